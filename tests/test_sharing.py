"""Several sweeps on one cluster: shares by priority and by turns, and two controllers that keep to them, over fakes."""

# ruff: noqa: F811 (fixtures are imported by name)

from __future__ import annotations

from pathlib import Path

import pytest
from fake_gangs import Bench, FakeCluster, bench  # noqa: F401
from store_runs import Run, a_plan, postgres_server, store, store_url  # noqa: F401
from sweep_runs import SWEEP, Watcher, plan_of

from orchestrator.controller import Controller
from orchestrator.controller.sharing import allowance
from orchestrator.gang import GangState
from orchestrator.store import CAP_SET, Demand, Store
from orchestrator.sweep import UserError, check_cap

TOTAL = (16, 8)
NONE = (0, 0)


def demand(
    sweep_id: int,
    priority: int = 0,
    held: tuple[int, int] = NONE,
    wanted: tuple[int, int] = NONE,
    gang: tuple[int, int] = (1, 1),
) -> Demand:
    return Demand(sweep_id, f"sweep{sweep_id}", "here", priority, held, wanted, gang)


# -- shares -----------------------------------------------------------------------------------------------------


def test_a_higher_one_gets_all_that_it_holds_and_wants_and_a_lower_one_what_is_left():
    high = demand(1, 5, held=(2, 2), wanted=(3, 3))
    low = demand(2, 0, held=(4, 4), wanted=(9, 9))
    assert allowance(high, [low], TOTAL) == (5, 5)
    assert allowance(low, [high], TOTAL) == (3, 3)


def test_what_a_higher_one_does_not_want_is_left():
    assert allowance(demand(2, 0, wanted=(8, 8)), [demand(1, 5)], TOTAL) == (8, 8)
    on_cpus = demand(2, 0, wanted=(20, 0), gang=(1, 0))
    assert allowance(on_cpus, [demand(1, 5, wanted=(8, 8))], TOTAL) == (8, 0), "GPUs that are wanted bind no CPU sweep"


def test_three_levels_are_served_from_the_top():
    sweeps = [demand(1, 2, wanted=(4, 4)), demand(2, 1, wanted=(3, 3)), demand(3, 0, wanted=(9, 9))]
    given = [allowance(one, [other for other in sweeps if other is not one], TOTAL) for one in sweeps]
    assert given == [(4, 4), (3, 3), (1, 1)]


def test_equals_share_by_halves_and_one_that_wants_little_leaves_the_rest():
    one, other = demand(1, wanted=(9, 9)), demand(2, held=(8, 8), wanted=(1, 1))
    assert allowance(one, [other], TOTAL) == allowance(other, [one], TOTAL) == (4, 4)
    modest = demand(2, held=(1, 1), wanted=(1, 1))
    assert allowance(one, [modest], TOTAL) == (6, 6)
    assert allowance(modest, [one], TOTAL) == (2, 2)


def test_gangs_are_given_whole_and_never_more_than_there_is():
    one, other = demand(1, wanted=(6, 6), gang=(3, 3)), demand(2, wanted=(8, 8))
    given = allowance(one, [other], TOTAL), allowance(other, [one], TOTAL)
    assert given[0] in ((3, 3), (6, 6))
    assert sum(gpus for _, gpus in given) <= 8


def test_where_only_one_gang_fits_equals_take_turns():
    whole = {"wanted": (8, 8), "gang": (8, 8)}
    first, second = demand(1, **whole), demand(2, **whole)  # type: ignore[arg-type]
    assert (allowance(first, [second], TOTAL), allowance(second, [first], TOTAL)) == ((8, 8), NONE)
    holding = demand(1, held=(8, 8), wanted=(8, 8), gang=(8, 8))
    assert (allowance(holding, [second], TOTAL), allowance(second, [holding], TOTAL)) == (NONE, (8, 8))


# -- in the store -----------------------------------------------------------------------------------------------


def test_demands_are_those_of_leases_in_force_and_go_with_them(store: Store):
    run = Run(store)
    assert store.demands() == []
    mine = demand(run.sweep_id, 3, held=(1, 0), wanted=(2, 0))
    store.publish_demand(run.lease, mine)
    assert store.demands() == [mine]
    store.renew_lease(run.lease, 60)
    assert store.demands() == [mine]
    store.renew_lease(run.lease, -1)
    assert store.demands() == [], "its lease has run out"
    again = store.acquire_lease(run.sweep_id, "host-b:2", 60)
    assert store.demands() == [], "the next holder speaks for itself"
    store.publish_demand(again, mine)
    store.release_lease(again)
    assert store.demands() == []


# -- two controllers --------------------------------------------------------------------------------------------


class Pair:
    """Two sweeps of three seeds each on one cluster of four ranks; each turn is one round of both loops."""

    def __init__(self, bench: Bench, folder: Path, monkeypatch: pytest.MonkeyPatch, *priorities: int) -> None:
        monkeypatch.setattr("orchestrator.controller.loop.REFRESH_SECONDS", -1.0)
        self.bench, self.cluster = bench, FakeCluster(4)
        self.watchers = [Watcher(), Watcher()]
        seeds = ("[1,2,3,4]", "[11,12,13,14]")
        self.plans = [
            plan_of(folder, [f"name={name}", f"seeds={seeds[number]}", f"priority={priorities[number]}"], SWEEP)
            for number, name in enumerate(("one", "two"))
        ]

    def open(self, number: int) -> Controller:
        return self.bench.controller(self.plans[number], self.cluster, self.watchers[number]).__enter__()

    def turn(self, *controllers: Controller) -> tuple[int, ...]:
        """How many attempts each runs afterwards."""
        for controller in controllers:
            controller._keep_lease()
            controller._refresh(now=True)
            controller._work()
        alive = [gang for gang in self.cluster.gangs if gang.state is not GangState.DEAD]
        assert len(alive) <= 4
        return tuple(len(controller.running) for controller in controllers)

    def states(self, number: int) -> set[str]:
        return set(self.bench.states(self.plans[number]).values())


def test_a_lower_sweep_gives_way_as_its_trials_end_and_goes_on_when_the_higher_wants_no_more(
    bench: Bench, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    pair = Pair(bench, tmp_path, monkeypatch, 0, 5)
    low = pair.open(0)
    for _ in range(3):
        assert pair.turn(low)[0] <= 4
    assert len(low.running) == 4
    begun = {attempt.row.fingerprint for attempt in low.running}
    high = pair.open(1)
    counts = [pair.turn(low, high)]
    while pair.states(1) != {"COMPLETE"}:
        counts.append(pair.turn(low, high))
        assert len(counts) < 200
        if counts[-1][1] + len([one for one in high.trials.rows if one.state == "WAITING"]) > 4:
            assert {attempt.row.fingerprint for attempt in low.running} <= begun, "nothing new while the higher waits"
    assert (0, 4) in counts, "all of the cluster came to the higher one"
    high.__exit__(None, None, None)
    for _ in range(60):
        pair.turn(low)
    assert pair.states(0) == {"COMPLETE"}
    assert all(len(bench.store.attempts(one.fingerprint)) == 1 for one in bench.trials(pair.plans[0]).values())
    told = [line for line in pair.watchers[0].lines if line.startswith(("yielding", "goes on"))]
    assert told[0] == "yielding  to two (priority 5): nothing starts on what it holds and wants; what runs goes on"
    assert len(told) == 2
    low.__exit__(None, None, None)


def test_equals_come_to_halves_whoever_was_first(bench: Bench, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    pair = Pair(bench, tmp_path, monkeypatch, 1, 1)
    first = pair.open(0)
    for _ in range(3):
        pair.turn(first)
    second = pair.open(1)
    counts = []
    while pair.states(0) != {"COMPLETE"} or pair.states(1) != {"COMPLETE"}:
        counts.append(pair.turn(first, second))
        assert len(counts) < 200
    assert (2, 2) in counts
    for controller in (first, second):
        controller.__exit__(None, None, None)


def test_a_priority_that_is_set_counts_at_once_and_a_dead_controller_wants_nothing(
    bench: Bench, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    pair = Pair(bench, tmp_path, monkeypatch, 0, 0)
    one, two = pair.open(0), pair.open(1)
    pair.turn(one, two)
    bench.store.add_event(two.sweep_id, CAP_SET, check_cap("priority=7"))
    pair.turn(one, two)
    assert {demand.name: demand.priority for demand in bench.store.demands()} == {"one": 0, "two": 7}
    while len(two.running) < 4:
        pair.turn(one, two)
    bench.store.renew_lease(two.lease, -1)  # it is gone without a word, and its gangs with it
    for gang in list(two.pool.gangs):
        gang.dismiss()
    while len(one.running) < 4:
        pair.turn(one)
    for controller in (one, two):
        controller.pool.dismiss_all()


@pytest.mark.parametrize("text", ["priority=high", "priority=none", "priority=1.5", "priority=2000"])
def test_a_priority_that_is_none_is_refused(text: str):
    with pytest.raises(UserError, match=f"set {text}: .*allowed: a whole number from -1000 to 1000"):
        check_cap(text)
