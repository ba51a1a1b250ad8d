"""The order in which trials of several shapes start: over simulated gangs, in virtual time, with the real store."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from fake_gangs import Bench, bench_in
from simulated_gangs import SimulatedCluster, VirtualClock, drawn, list_schedule, sweep_text
from sweep_runs import NoMirror, Watcher, plan_of

from models.config import TrialConfig
from orchestrator.controller import Controller
from orchestrator.gang import UNITS, GangShape
from orchestrator.plan import Plan
from orchestrator.store import CAP_SET

Begun = list[tuple[float, str, str]]
"""When, arm and fingerprint of the trials as they were started."""


@pytest.fixture(autouse=True)
def few_turns(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of the loop between two events."""
    monkeypatch.setattr("orchestrator.controller.loop.POLL_SECONDS", 10.0)
    monkeypatch.setattr("orchestrator.controller.loop.REFRESH_SECONDS", 60.0)
    monkeypatch.setattr("orchestrator.controller.loop.LEASE_SECONDS", 10_000.0)


@pytest.fixture
def bench(tmp_path: Path) -> Iterator[Bench]:
    with bench_in(tmp_path / "home") as opened:
        yield opened


def simulate(
    bench: Bench, plan: Plan, cluster: SimulatedCluster, on_tick: Callable[[Controller], None] = lambda _: None
) -> Begun:
    """Runs a sweep to its end; what was started, in order."""
    sweep_id = bench.store.add(plan).sweep_id
    begun: Begun = []
    watcher = Watcher()
    given = (plan.sweep, sweep_id, bench.store, cluster, NoMirror(), bench.home, watcher, (), cluster.clock)
    with Controller(*given) as controller:  # type: ignore[arg-type]
        launch = controller._launch

        def remember(gang: Any, trial: Any) -> None:
            begun.append((cluster.clock.monotonic(), trial.arm, trial.fingerprint))
            launch(gang, trial)

        controller._launch = remember  # type: ignore[method-assign]
        watcher.on_tick = lambda _: on_tick(controller)
        controller.run()
    assert {row.state for row in bench.trials(plan).values()} == {"COMPLETE"}
    return begun


def waits(begun: Begun, plan: Plan, arm: str) -> list[int]:
    """By trial of an arm: how many trials that come after it in the plan were started before it."""
    position = {trial.fingerprint: trial.position for trial in plan.trials}
    started = [position[fingerprint] for _, _, fingerprint in begun]
    places = [number for number, (_, name, _) in enumerate(begun) if name == arm]
    return [sum(before > started[place] for before in started[:place]) for place in places]


def test_a_mixed_sweep_fills_the_cluster_nearly_as_the_offline_list_schedule_does(bench: Bench, tmp_path: Path):
    plan = plan_of(tmp_path, text=sweep_text(75))
    clock, seconds = VirtualClock(), drawn(60.0)
    cluster = SimulatedCluster(30, 2, seconds, clock, start_seconds=2.0)
    begun = simulate(bench, plan, cluster)
    assert len(begun) == len({fingerprint for _, _, fingerprint in begun}) == 300
    listed = list_schedule([(GangShape.of(one.resources), seconds(one.config)) for one in plan.trials], cluster.sizes)
    assert clock.now <= listed / 0.97


def test_small_trials_do_not_starve_a_large_one(bench: Bench, tmp_path: Path):
    """One trial wants the whole cluster, behind a few and before many small ones of very different lengths."""
    plan = plan_of(tmp_path, text=sweep_text(8, {"whole": "{data: 4}"}))
    wholes = [trial for trial in plan.trials if trial.arm == "whole"]
    seconds = drawn(60.0)
    cluster = SimulatedCluster(2, 2, seconds, VirtualClock())
    begun = simulate(bench, plan, cluster)
    assert len(wholes) == 8
    # Each waits for what runs, during which the three other slots may each begin a few; never for the queue.
    assert max(waits(begun, plan, "whole")) <= 8


def test_trials_of_one_shape_start_in_the_order_of_the_plan(bench: Bench, tmp_path: Path):
    plan = plan_of(tmp_path, text=sweep_text(6))
    begun = simulate(bench, plan, SimulatedCluster(8, 2, drawn(60.0), VirtualClock()))
    for arm in ("single", "pair", "four", "eight"):
        planned = [trial.fingerprint for trial in plan.trials if trial.arm == arm]
        assert [fingerprint for _, name, fingerprint in begun if name == arm] == planned


def test_caps_hold_over_all_shapes_together_and_starve_none(bench: Bench, tmp_path: Path):
    text = sweep_text(4).replace("cpus: 1, by", "cpus: 1, max_trials: 3, by")
    plan = plan_of(tmp_path, text=text)
    most: list[int] = []

    def look(controller: Controller) -> None:
        most.append(len(controller.pool.gangs))
        if len(most) == 20:
            bench.store.add_event(controller.sweep_id, CAP_SET, "max_trials=5")

    begun = simulate(bench, plan, SimulatedCluster(20, 2, drawn(60.0), VirtualClock()), look)
    assert max(most[:20]) == 3
    assert max(most) == 5
    assert max(waits(begun, plan, "eight")) <= 12


def test_nothing_is_started_where_others_hold_the_room(bench: Bench, tmp_path: Path):
    plan = plan_of(tmp_path, text=sweep_text(5, {}))
    clock = VirtualClock()

    class Shared(SimulatedCluster):
        """Somebody else has all but one CPU for the first 500 s."""

        def rooms(self) -> list[Any]:
            found = super().rooms()
            theirs = 3 if clock.now < 500 else 0
            return [type(n)(n.id, n.total, (n.available[0] - theirs * UNITS, 0)) for n in found]

    cluster = Shared(1, 4, lambda _: 300.0, clock)
    begun = simulate(bench, plan, cluster)
    at = [round(when) for when, _, _ in begun]
    assert at[:2] == [0, 300]
    assert all(500 <= when < 600 for when in at[2:])


def test_warm_gangs_are_kept_after_short_trials_and_replaced_after_so_many_or_long_ones(bench: Bench, tmp_path: Path):
    def gangs(number: int, seconds: float, resources: str) -> int:
        text = sweep_text(6, {}).replace("cpus: 1, by: []", f"cpus: 1, {resources}")
        plan = plan_of(tmp_path / str(number), text=text.replace("simulated", f"simulated-{number}"))
        started: list[Any] = []

        class Counting(SimulatedCluster):
            def start_gang(self, *given: Any) -> Any:
                started.append(super().start_gang(*given))
                return started[-1]

        with bench_in(tmp_path / f"home-{number}") as own:
            simulate(own, plan, Counting(1, 1, lambda _: seconds, VirtualClock()))
        return len(started)

    assert gangs(0, 60.0, "by: []") == 1
    assert gangs(1, 60.0, "warm_trials: 2") == 3
    assert gangs(2, 60.0, "warm: 'off'") == 6
    assert gangs(3, 900.0, "by: []") == 6
    assert gangs(4, 900.0, "warm: 'on'") == 1


def test_a_trial_that_is_expected_to_end_in_time_fills_the_gap(bench: Bench, tmp_path: Path):
    """Short ones run on the nodes that a large one waits for; the large one starts no later than without them."""
    lengths = {"single": 10.0, "long": 200.0, "whole": 50.0}
    text = sweep_text(6, {"long": "{distributed_optimizer: true}", "whole": "{data: 4}"})

    def seconds(config: TrialConfig) -> float:
        arm = {0.02: "single", 0.01: "long", 0.011: "whole"}[round(config.model.init_std, 3)]
        return lengths[arm]

    plan = plan_of(tmp_path, text=text)
    begun = simulate(bench, plan, SimulatedCluster(2, 2, seconds, VirtualClock()))
    listed = list_schedule(
        [(GangShape.of(one.resources), seconds(one.config)) for one in plan.trials],
        {"a": (2 * UNITS, 0), "b": (2 * UNITS, 0)},
    )
    assert max(waits(begun, plan, "whole")) <= 15
    assert begun[-1][0] <= listed * 1.1
