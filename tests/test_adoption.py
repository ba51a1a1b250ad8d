"""A controller that dies anywhere, over fake gangs that outlive it: the next one adopts them, and no number changes.

The same over a real Ray is in test_detached.py.
"""

# ruff: noqa: F811 (fixtures are imported by name)

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from fake_gangs import Bench, FakeCluster, FakeGang, FateAt, bench, bench_in, plan, undisturbed  # noqa: F401
from sweep_runs import SWEEP, Watcher, plan_of

from models import run_dir
from models.run_dir import Summary, write_json
from orchestrator.controller import ClusterLost
from orchestrator.gang import GangState, LeaseFile
from orchestrator.gang.lease_file import FOLDER, GangLease, LeaseWatch
from orchestrator.plan import Plan
from orchestrator.store import CANCEL_WANTED, LeaseLost, Store

Curves = dict[str, list[tuple[Any, ...]]]


class Killed(BaseException):
    """Stands for SIGKILL: nothing of the controller runs after it."""


def lasting(capacity: int = 2, **settings: Any) -> FakeCluster:
    return FakeCluster(capacity, outlives_driver=True, **settings)


def expire_leases(store: Store) -> None:
    with store._engine.begin() as connection:
        connection.exec_driver_sql("UPDATE lease SET expires_at = 0")


def run_until_killed(bench: Bench, plan: Plan, cluster: FakeCluster, num_steps: int) -> Any:
    """The controller, killed while trials run."""
    watcher = Watcher()
    controller = bench.controller(plan, cluster, watcher)

    def on_tick(snapshot: Any) -> None:
        if any(running.step >= num_steps for running in snapshot.running):
            raise Killed

    watcher.on_tick = on_tick
    controller.__enter__()
    with pytest.raises(Killed):
        controller.run()
    expire_leases(bench.store)
    return controller


def run_on(bench: Bench, plan: Plan, cluster: FakeCluster) -> Watcher:
    watcher = Watcher()
    with bench.controller(plan, cluster, watcher) as controller:
        controller.run()
    return watcher


def attempts_of(bench: Bench, plan: Plan) -> dict[str, list[str | None]]:
    return {
        name: [one.cause for one in bench.store.attempts(row.fingerprint)] for name, row in bench.trials(plan).items()
    }


# -- the life after a controller ----------------------------------------------------------------------------------


@pytest.mark.parametrize("num_polls", [0, 2, 50])
def test_gangs_of_a_killed_controller_are_adopted_and_no_step_is_trained_twice(
    bench: Bench, plan: Plan, undisturbed: Curves, num_polls: int
):
    """Also those that were done before anyone looked again."""
    cluster = lasting()
    run_until_killed(bench, plan, cluster, 7)
    for gang in cluster.gangs:
        gang.train_on(num_polls)
    watcher = run_on(bench, plan, cluster)
    assert attempts_of(bench, plan) == {"baseline/1": ["complete"], "g1/1": ["complete"]}
    assert sum(line.startswith("adopted") for line in watcher.lines) == 2
    assert watcher.started() == []
    assert len(cluster.gangs) == 2
    assert all(gang.state is GangState.DEAD for gang in cluster.gangs)
    assert bench.curves(plan) == undisturbed
    assert list((bench.home / FOLDER).iterdir()) == []
    kinds = [event.kind for event in bench.store.events(bench.store.sweep("tiny").id)]
    assert kinds.count("adopted") == 2


def test_a_gang_whose_grace_is_over_has_checkpointed_and_its_trial_goes_on_from_there(
    bench: Bench, plan: Plan, undisturbed: Curves
):
    cluster = lasting()
    run_until_killed(bench, plan, cluster, 7)
    for gang in cluster.gangs:
        gang.train_on(1)
        gang.give_up()
    run_on(bench, plan, cluster)
    for row in bench.trials(plan).values():
        first, second = bench.store.attempts(row.fingerprint)
        assert (row.state, first.cause, second.resumed_from) == ("COMPLETE", "controller_lost", 1)
        assert "no controller was heard of for 600 s; checkpointed at step" in (first.reason or "")
        assert second.resume_step == first.end_step > 7
    assert bench.curves(plan) == undisturbed


def test_a_gang_that_was_done_and_went_away_leaves_a_complete_trial(bench: Bench, plan: Plan, undisturbed: Curves):
    """On a local Ray, too: there it dies with its controller."""
    for cluster in (lasting(), FakeCluster(2)):
        folder = bench.home / f"outlives-{cluster.outlives_driver}"
        with bench_in(folder) as other:
            run_until_killed(other, plan, cluster, 7)
            for gang in cluster.gangs:
                gang.train_on(50)
                gang.dismiss()
            watcher = run_on(other, plan, cluster)
            assert attempts_of(other, plan) == {"baseline/1": ["complete"], "g1/1": ["complete"]}
            assert watcher.started() == []
            assert other.curves(plan) == undisturbed


def test_a_gang_that_died_meanwhile_costs_the_steps_since_its_checkpoint_and_no_budget(
    bench: Bench, tmp_path: Any, undisturbed: Curves
):
    strict = plan_of(tmp_path, ["retry={infrastructure: 0, error: 0}"])
    cluster = lasting()
    run_until_killed(bench, strict, cluster, 7)
    cluster.gangs[0].dismiss()
    watcher = run_on(bench, strict, cluster)
    assert sorted(attempts_of(bench, strict).values()) == [["complete"], ["controller_lost", "complete"]]
    assert any("its controller is gone, its gang is gone" in line for line in watcher.lines)
    assert bench.curves(strict) == undisturbed


def test_an_error_that_nobody_saw_is_charged_as_if_it_had_been_seen(bench: Bench, plan: Plan):
    cluster = lasting(fate=lambda spec, config, step: "raise" if step == 12 else None)
    run_until_killed(bench, plan, cluster, 7)
    for gang in cluster.gangs:
        gang.train_on(50)
    run_on(bench, plan, cluster)
    assert attempts_of(bench, plan) == {"baseline/1": ["error"], "g1/1": ["error"]}
    assert set(bench.states(plan).values()) == {"FAILED"}


def test_a_survivor_whose_peer_died_while_nobody_looked_is_no_error_of_the_trial(
    bench: Bench, tmp_path: Any, undisturbed: Curves
):
    """Its account is all that is left, and tells of the connection, not of the rank that is gone."""
    strict = plan_of(tmp_path, ["retry={infrastructure: 1, error: 0, backoff_seconds: 0}"])
    cluster = lasting()
    run_until_killed(bench, strict, cluster, 7)
    gang = cluster.gangs[0]
    said = "RuntimeError: [/pytorch/gloo/transport/tcp/pair.cc:537] Read error [127.0.0.1]:11687: Connection reset"
    ended = Summary(outcome="error", step=gang.step, resume_step=0, seconds=1.0, tokens_per_second=None, error=said)
    write_json(gang.spec.attempt_dir / "summary.json", ended)
    gang.dismiss()
    run_on(bench, strict, cluster)
    assert sorted(attempts_of(bench, strict).values()) == [["complete"], ["rank_died", "complete"]]
    assert bench.curves(strict) == undisturbed


def test_what_the_dead_controller_was_asked_to_cancel_is_canceled(bench: Bench, plan: Plan):
    cluster = lasting()
    controller = run_until_killed(bench, plan, cluster, 7)
    row = bench.trials(plan)["g1/1"]
    bench.store.add_event(controller.sweep_id, CANCEL_WANTED, "the user wants it canceled", row.fingerprint)
    run_on(bench, plan, cluster)
    assert bench.states(plan) == {"baseline/1": "COMPLETE", "g1/1": "CANCELED"}
    assert attempts_of(bench, plan)["g1/1"] == ["canceled"]


def test_a_divergence_is_found_at_the_same_step_by_the_next_controller(bench: Bench, plan: Plan):
    fate: FateAt = lambda _spec, config, step: "rise" if config.gate is not None and step >= 6 else None  # noqa: E731
    calm, cluster = bench_in(bench.home / "calm"), lasting(fate=fate)
    with calm as undisturbed_bench:
        run_on(undisturbed_bench, plan, lasting(fate=fate))
        expected = undisturbed_bench.trials(plan)["g1/1"]
        curves = undisturbed_bench.curves(plan)
    run_until_killed(bench, plan, cluster, 7)
    for gang in cluster.gangs:
        gang.train_on(50)
    run_on(bench, plan, cluster)
    found = bench.trials(plan)["g1/1"]
    assert expected.state == "DIVERGED"
    assert (found.state, found.cause, found.reason, found.end_step) == (
        expected.state, expected.cause, expected.reason, expected.end_step,
    )  # fmt: skip
    assert bench.curves(plan) == curves


def test_idle_gangs_of_a_dead_controller_are_ended_by_the_next(bench: Bench, plan: Plan):
    cluster = lasting()
    controller = run_until_killed(bench, plan, cluster, 7)
    idle = cluster.start_gang(controller.pool.shapes[0], 1)
    idle.poll_start()
    controller.pool.adopt(idle)
    controller.pool.keep_lease()
    run_on(bench, plan, cluster)
    assert idle.state is GangState.DEAD
    assert idle.spec is None


def test_a_gang_of_another_shape_is_followed_to_its_end_and_then_dismissed(bench: Bench, plan: Plan, tmp_path: Any):
    cluster = lasting()
    run_until_killed(bench, plan, cluster, 7)
    wider = plan_of(tmp_path, ["resources.cpus=2", "seeds=[1,2]"])
    run_on(bench, wider, cluster)
    assert set(bench.states(wider).values()) == {"COMPLETE"}
    assert all(gang.state is GangState.DEAD for gang in cluster.gangs)
    own, *others = [gang.shape.cpus_per_rank for gang in cluster.gangs][1:]
    assert own == 1
    assert set(others) == {2}  # one or two: trials this short may wait for a gang rather than for the start of one


# -- killed anywhere ----------------------------------------------------------------------------------------------


class DeadlyWrites:
    """Counts the store's writes, and kills the controller before or after one of them."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.num_writes, self.kill_at, self.after = 0, -1, False
        original = Store._write

        def write(store: Store, function: Any, *args: Any, **kwargs: Any) -> Any:
            self.num_writes += 1
            if self.num_writes == self.kill_at and not self.after:
                raise Killed
            answer = original(store, function, *args, **kwargs)
            if self.num_writes == self.kill_at and self.after:
                raise Killed
            return answer

        monkeypatch.setattr(Store, "_write", write)

    def arm(self, kill_at: int, after: bool) -> None:
        self.num_writes, self.kill_at, self.after = 0, kill_at, after


def live_until_killed(bench: Bench, plan: Plan, cluster: FakeCluster) -> bool:
    """Whether the controller was killed."""
    try:
        controller = bench.controller(plan, cluster)
        controller.__enter__()
        controller.run()
        controller.__exit__(None, None, None)
    except Killed:
        return True
    return False


UNATTENDED: dict[str, Callable[[FakeGang], None]] = {
    "stands": lambda gang: None,
    "trains on": lambda gang: gang.train_on(2),
    "gives up": lambda gang: gang.give_up(),
    "dies": lambda gang: gang.dismiss(),
}


@pytest.mark.parametrize("after", [False, True])
def test_killed_at_any_write_no_trial_is_lost_or_doubled(
    bench: Bench, plan: Plan, undisturbed: Curves, monkeypatch: pytest.MonkeyPatch, after: bool
):
    """One life after the other in one home, each killed at a later write; what its gangs do meanwhile goes round."""
    monkeypatch.setattr("fake_gangs.STEPS_A_POLL", 8)
    deadly = DeadlyWrites(monkeypatch)
    kill_at, killed = 1, 0
    while True:
        home = bench.home / f"killed-{kill_at}"
        with bench_in(home) as one:
            one.store.add(plan)
            cluster = lasting()
            deadly.arm(kill_at + 1, after)  # the first write adds the plan again
            if not live_until_killed(one, plan, cluster):
                break
            deadly.arm(-1, after)
            killed += 1
            fate = list(UNATTENDED)[kill_at % len(UNATTENDED)]
            for gang in cluster.gangs:
                UNATTENDED[fate](gang)
            expire_leases(one.store)
            run_on(one, plan, cluster)
            assert one.states(plan) == {"baseline/1": "COMPLETE", "g1/1": "COMPLETE"}, (kill_at, fate)
            assert one.curves(plan) == undisturbed, (kill_at, fate)
            for row in one.trials(plan).values():
                causes = [attempt.cause for attempt in one.store.attempts(row.fingerprint)]
                assert causes.count("complete") == 1, (kill_at, fate)
                assert set(causes[:-1]) <= {"controller_lost"}, (kill_at, fate)
                folders = list((run_dir.trial_dir(one.home, row.fingerprint) / "attempts").iterdir())
                assert len(folders) <= len(causes), (kill_at, fate)
            assert all(gang.state is GangState.DEAD for gang in cluster.gangs), (kill_at, fate)
        kill_at += 1
    assert killed >= 12


def test_an_heir_killed_while_it_adopts_leaves_all_to_the_next(
    bench: Bench, plan: Plan, undisturbed: Curves, monkeypatch: pytest.MonkeyPatch
):
    deadly = DeadlyWrites(monkeypatch)
    cluster = lasting()
    run_until_killed(bench, plan, cluster, 7)
    for kill_at in range(1, 8):
        deadly.arm(kill_at, after=True)
        assert live_until_killed(bench, plan, cluster)
        expire_leases(bench.store)
    deadly.arm(-1, after=True)
    run_on(bench, plan, cluster)
    assert attempts_of(bench, plan) == {"baseline/1": ["complete"], "g1/1": ["complete"]}
    assert bench.curves(plan) == undisturbed


# -- the cluster goes away ----------------------------------------------------------------------------------------


def head_events(bench: Bench, sweep_id: int) -> list[str]:
    return [one.kind for one in bench.store.events(sweep_id) if one.kind in ("head_down", "head_back", "cluster_lost")]


@pytest.fixture
def hurried(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("LOOK_SECONDS", "PATIENCE_SECONDS", "CHECKPOINT_SECONDS"):
        monkeypatch.setattr(f"orchestrator.controller.cluster_watch.{name}", 0.0)


def vanishing(cluster: FakeCluster, are_dead: bool) -> Callable[[Any], None]:
    """To be called at every tick: the head goes away in the middle of a trial, and its gangs with it if they die."""

    def on_tick(snapshot: Any) -> None:
        if any(running.step >= 7 for running in snapshot.running):
            cluster.reachable = False
            for gang in cluster.gangs if are_dead else []:
                gang.dismiss()

    return on_tick


@pytest.mark.parametrize("are_dead", [False, True])
@pytest.mark.usefixtures("hurried")
def test_a_cluster_that_vanishes_ends_the_run_and_charges_no_trial(
    bench: Bench, tmp_path: Any, undisturbed: Curves, are_dead: bool
):
    """Its gangs are heard for a while yet, or died with it."""
    strict = plan_of(tmp_path, ["retry={infrastructure: 0, error: 0}"])
    cluster, watcher = lasting(), Watcher()

    watcher.on_tick = vanishing(cluster, are_dead)
    with pytest.raises(ClusterLost, match="no trial is lost"), bench.controller(strict, cluster, watcher) as controller:
        controller.run()
    assert set(bench.states(strict).values()) <= {"RUNNING", "WAITING"}
    assert bench.store.lease_holder(controller.sweep_id) is None
    assert head_events(bench, controller.sweep_id) == ["head_down", "cluster_lost"]
    run_on(bench, strict, lasting())
    cause = "controller_lost" if are_dead else "interrupted"
    assert list(attempts_of(bench, strict).values()) == [[cause, "complete"]] * 2
    assert bench.curves(strict) == undisturbed


def test_a_head_that_comes_back_in_time_costs_nothing(
    bench: Bench, plan: Plan, undisturbed: Curves, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr("orchestrator.controller.cluster_watch.LOOK_SECONDS", 0.0)
    cluster, watcher = lasting(), Watcher()
    answers = iter([True, True, False, False, False])
    monkeypatch.setattr(cluster, "is_reachable", lambda: next(answers, True))
    with bench.controller(plan, cluster, watcher) as controller:
        controller.run()
    assert [line[:8].strip() for line in watcher.lines if "Ray's head" in line] == ["PAUSED", "goes on"]
    assert head_events(bench, controller.sweep_id) == ["head_down", "head_back"]
    assert attempts_of(bench, plan) == {"baseline/1": ["complete"], "g1/1": ["complete"]}
    assert bench.curves(plan) == undisturbed


@pytest.mark.parametrize("are_dead", [False, True])
@pytest.mark.usefixtures("hurried")
def test_another_head_in_the_place_of_the_first_ends_the_run_and_charges_no_trial(
    bench: Bench, tmp_path: Any, undisturbed: Curves, are_dead: bool
):
    """It does not know the gangs, and may have ended them."""
    strict = plan_of(tmp_path, ["retry={infrastructure: 0, error: 0}"])
    cluster, watcher = lasting(), Watcher()

    def on_line(line: str) -> None:
        if line.startswith("PAUSED"):
            cluster.was_replaced = cluster.reachable = True

    watcher.on_tick, watcher.on_line = vanishing(cluster, are_dead), on_line
    with pytest.raises(ClusterLost, match="has forgotten"), bench.controller(strict, cluster, watcher) as controller:
        controller.run()
    assert bench.store.lease_holder(controller.sweep_id) is None
    assert head_events(bench, controller.sweep_id) == ["head_down", "cluster_lost"]
    run_on(bench, strict, lasting())
    cause = "controller_lost" if are_dead else "interrupted"
    assert list(attempts_of(bench, strict).values()) == [[cause, "complete"]] * 2
    assert bench.curves(strict) == undisturbed


# -- two controllers ----------------------------------------------------------------------------------------------


def test_a_controller_that_lost_its_lease_writes_no_more_and_leaves_its_gangs_to_the_other(
    bench: Bench, plan: Plan, undisturbed: Curves
):
    cluster, watcher = lasting(), Watcher()
    slept = bench.controller(plan, cluster, watcher)
    heirs: list[Any] = []

    def on_tick(snapshot: Any) -> None:
        if not heirs and any(running.step >= 5 for running in snapshot.running):
            expire_leases(bench.store)
            heirs.append(bench.controller(plan, cluster))
            heirs[0].__enter__()

    watcher.on_tick = on_tick
    with pytest.raises(LeaseLost, match="was lost: the token is now"), slept:
        slept.run()
    assert all(gang.state is not GangState.DEAD for gang in cluster.gangs)
    heirs[0].run()
    heirs[0].__exit__(None, None, None)
    assert attempts_of(bench, plan) == {"baseline/1": ["complete"], "g1/1": ["complete"]}
    assert bench.curves(plan) == undisturbed


SISTER = SWEEP.replace("name: tiny", "name: sister").replace("  g1:", "  gated:")


def test_a_sweep_that_shares_trials_adopts_them_and_the_one_that_slept_lets_them_go(
    bench: Bench, plan: Plan, tmp_path: Any, undisturbed: Curves
):
    sister, cluster = plan_of(tmp_path, (), SISTER), lasting()
    slept = bench.controller(plan, cluster)
    slept.__enter__()
    while not (slept.running and all(attempt.step for attempt in slept.running)):
        slept._refresh(now=True)
        slept._work()
    expire_leases(bench.store)
    watcher = Watcher()
    with bench.controller(sister, cluster, watcher) as heir:
        assert len(heir.running) == 2
        for gang in cluster.gangs:
            gang.train_on(50)
        slept._follow(list(slept.running))
        assert (slept.running, slept.pool.gangs) == ([], [])
        assert all(gang.state is not GangState.DEAD for gang in cluster.gangs)
        heir.run()
    assert watcher.started() == []
    assert attempts_of(bench, sister) == {"baseline/1": ["complete"], "gated/1": ["complete"]}
    assert bench.curves(sister) == undisturbed


# -- the lease file -----------------------------------------------------------------------------------------------


class Hands:
    """A clock that is moved by hand."""

    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def hands() -> Hands:
    return Hands()


@pytest.fixture
def lease_file(tmp_path: Any, hands: Hands) -> LeaseFile:
    return LeaseFile(tmp_path, "tiny", 3, 60.0, hands)


def test_a_gang_that_is_named_in_a_file_that_moves_is_wanted(lease_file: LeaseFile, hands: Hands):
    watch = LeaseWatch("abcd", lease_file.lease, hands)
    for _ in range(50):
        hands.now += 12.0
        assert lease_file.keep(["abcd", "ef01"])
        watch.look()
        assert not watch.is_over
    for _ in range(6):
        hands.now += 12.0
        watch.look()
    assert watch.is_over
    assert watch.reason() == "no controller was heard of for 60 s"


def test_the_file_is_written_when_gangs_change_or_it_is_time_and_not_at_every_turn(lease_file: LeaseFile, hands: Hands):
    beats = []
    for turn in range(100):
        hands.now += 1.0
        lease_file.keep(["abcd"] if turn < 50 else ["abcd", "ef01"])
        beats.append(json.loads(Path(lease_file.lease.path).read_text())["beat"])
    assert beats[-1] == 10
    assert beats[49:51] == [5, 6]


def test_a_gang_that_is_named_no_more_is_given_up_at_once_but_not_before_it_was_ever_named(
    lease_file: LeaseFile, hands: Hands
):
    watch = LeaseWatch("abcd", lease_file.lease, hands)
    lease_file.keep(["ef01"])
    watch.look()
    assert not watch.is_over
    lease_file.keep(["ef01", "abcd"])
    watch.look()
    lease_file.keep(["ef01"])
    watch.look()
    assert watch.is_over
    assert watch.reason() == "its controller has given this gang up"


@pytest.mark.parametrize("content", [None, "", "[1]", '{"beat": '])
def test_a_file_that_can_not_be_read_is_no_news_as_long_as_the_controller_calls(
    lease_file: LeaseFile, hands: Hands, content: str | None
):
    watch = LeaseWatch("abcd", lease_file.lease, hands)
    lease_file.keep(["abcd"])
    watch.look()
    lease_file.remove()
    if content is not None:
        Path(lease_file.lease.path).write_text(content)
    for _ in range(20):
        hands.now += 50.0
        watch.heard()
        watch.look()
        assert not watch.is_over
    hands.now += 61.0
    watch.look()
    assert watch.is_over


def test_a_folder_that_can_not_be_written_makes_the_controller_call_its_gangs(tmp_path: Any, hands: Hands):
    (tmp_path / FOLDER).write_text("in the way")
    assert not LeaseFile(tmp_path, "tiny", 3, 60.0, hands).keep(["abcd"])


def test_an_adopted_gang_looks_at_the_other_file(tmp_path: Any, lease_file: LeaseFile, hands: Hands):
    watch = LeaseWatch("abcd", lease_file.lease, hands)
    lease_file.keep(["abcd"])
    watch.look()
    heir = LeaseFile(tmp_path, "tiny", 4, 600.0, hands)
    assert heir.left_behind() == ["abcd"]
    watch.move(heir.lease)
    heir.keep(["abcd"])
    watch.look()
    lease_file.keep([])  # the old controller wakes up
    watch.look()
    hands.now += 599.0
    assert not watch.is_over
    assert lease_file.left_behind() == []
    heir.remove_earlier()
    assert [path.name for path in (tmp_path / FOLDER).iterdir()] == [heir.lease.path.rpartition("/")[2]]
    assert LeaseFile(tmp_path, "another sweep", 9, 60.0, hands).left_behind() == []


def test_a_lease_is_renewed_several_times_in_its_grace():
    assert GangLease("x", 600.0).period_seconds == 10.0
    assert GangLease("x", 5.0).period_seconds == 1.0
