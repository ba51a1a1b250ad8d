"""The controller over fake gangs: what it makes of every end, and that no record is lost or counted twice.

The same over a real Ray, with real training, is in test_recovery.py.
"""

# ruff: noqa: F811 (fixtures are imported by name)

from __future__ import annotations

import itertools
import os
import socket
from typing import Any

import pandas as pd
import pytest
from fake_gangs import Bench, FakeCluster, FateAt, all_goes_well, bench, fake_validation, plan, undisturbed  # noqa: F401
from sweep_runs import SWEEP, Watcher, plan_of

from models import run_dir
from models.run_dir import checkpoint_path
from orchestrator.controller import Controller, SweepStopped, is_dead, loop
from orchestrator.gang import GangState
from orchestrator.plan import Plan
from orchestrator.store import Lease, Store
from orchestrator.sweep import UserError

Curves = dict[str, list[tuple[Any, ...]]]


def attempt_1(fate: str, arm: str, step: int) -> FateAt:
    """``fate`` at one step of the first attempt of one arm."""

    def at(spec: Any, config: Any, now: int) -> Any:
        is_arm = (config.gate is not None) == (arm == "g1")
        return fate if is_arm and now == step and spec.number == 1 else None

    return at


def always(fate: str, arm: str, step: int) -> FateAt:
    def at(spec: Any, config: Any, now: int) -> Any:
        return fate if (config.gate is not None) == (arm == "g1") and now == step else None

    return at


# -- a run without trouble --------------------------------------------------------------------------------------


def test_every_trial_runs_once_and_its_records_are_all_in_the_store(bench: Bench, plan: Plan):
    watcher = bench.run(plan)
    assert bench.states(plan) == {"baseline/1": "COMPLETE", "g1/1": "COMPLETE"}
    for row in bench.trials(plan).values():
        assert row.num_attempts == 1
        curve = bench.store.curve(row.fingerprint)
        assert [step.step for step in curve.steps] == list(range(1, 21))
        assert [validation.step for validation in curve.validations] == [10, 20]
        layers = [(probe.step, probe.layer) for probe in bench.store.layers(row.fingerprint)]
        assert layers == [(step, layer) for step in (5, 10, 15, 20) for layer in (1, 2)]
    assert len(watcher.started()) == 2
    assert bench.store.lease_holder(bench.store.sweep("tiny").id) is None


@pytest.mark.parametrize("order_seed", [0, 1, 2])
def test_trials_start_in_the_order_of_the_plan(bench: Bench, tmp_path, order_seed: int):
    wide = plan_of(tmp_path, ["seeds=[1,2,3]", "axes.train.lr=[1e-3,2e-3]", f"order_seed={order_seed}"])
    watcher = bench.run(wide, capacity=3)
    planned = [f"{one.arm} lr={one.axes['train.lr']:g} seed={one.seed}" for one in wide.trials]
    assert len(planned) == 12
    assert watcher.started() == planned


def test_as_many_gangs_as_the_cluster_holds_and_no_more_than_there_are_trials(bench: Bench, tmp_path):
    wide = plan_of(tmp_path, ["seeds=[1,2,3]"])
    for capacity, expected in ((4, 4), (50, 6)):
        cluster = FakeCluster(capacity)
        other = plan_of(tmp_path, ["seeds=[1,2,3]", f"train.lr={capacity}e-4"])
        with bench.controller(other, cluster) as controller:
            controller.run()
        assert len(cluster.gangs) == expected
        assert all(gang.state is GangState.DEAD for gang in cluster.gangs)
    del wide


def test_provenance_says_which_code_ran_on_what(bench: Bench, plan: Plan):
    bench.run(plan)
    row = bench.trials(plan)["g1/1"]
    (attempt,) = bench.store.attempts(row.fingerprint)
    found = attempt.provenance
    assert set(found["packages"]) >= {"torch", "megatron-core", "ray", "optuna"}
    assert found["packages"]["torch"]
    assert len(found["source_hash"]) == 16
    assert found["corpus_sha256"] == row.config.data.corpus_sha256 != ""
    assert found["driver_host"] == socket.gethostname()
    assert {"commit", "dirty"} <= set(found)
    assert attempt.hosts == ("fake-host",)
    frame = bench.store.frame("attempts", "tiny")
    # Outside a checkout nothing is known of either, which is no guess that the tree is clean.
    assert [None if value is pd.NA else value for value in frame["git_dirty"]] == [found["dirty"]] * 2
    assert [value or None for value in frame["git_commit"]] == [found["commit"]] * 2
    assert (found["commit"] is None) == (found["dirty"] is None)
    directory = run_dir.trial_dir(bench.home, row.fingerprint)
    assert run_dir.read_trial_config(directory) == row.config


@pytest.mark.parametrize(("overrides", "final"), [([], True), (["checkpoint.final=false"], False)])
def test_the_end_of_a_trial_is_kept_unless_the_sweep_says_otherwise(bench: Bench, tmp_path, overrides, final: bool):
    wanted = plan_of(tmp_path, overrides)
    bench.run(wanted)
    specs = sorted(bench.home.glob("trials/*/attempts/*"))
    assert len(specs) == 2
    assert [run_dir.read_attempt_spec(path).final_checkpoint for path in specs] == [final] * 2


# -- retries ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("step", "resumed"), [(3, 0), (7, 5), (10, 5), (11, 10), (20, 15)])
def test_a_dead_rank_costs_an_attempt_and_no_number(
    bench: Bench, plan: Plan, undisturbed: Curves, step: int, resumed: int
):
    bench.run(plan, attempt_1("die", "g1", step))
    row = bench.trials(plan)["g1/1"]
    assert (row.state, row.num_attempts) == ("COMPLETE", 2)
    first, second = bench.store.attempts(row.fingerprint)
    assert (first.cause, first.sweep_id) == ("rank_died", second.sweep_id)
    assert second.resume_step == resumed
    assert second.resumed_from == (1 if resumed else None)
    assert bench.curves(plan) == undisturbed


def test_the_retry_budget_ends_in_failed_with_cause_and_last_words(bench: Bench, tmp_path):
    short = plan_of(tmp_path, ["retry.infrastructure=2"])
    watcher = bench.run(short, always("die", "g1", 8))
    row = bench.trials(short)["g1/1"]
    assert (row.state, row.cause, row.num_attempts) == ("FAILED", "rank_died", 3)
    assert row.reason == "process 1 of a rank died: SIGKILL; all 2 retries used"
    assert bench.states(short)["baseline/1"] == "COMPLETE"
    attempts = bench.store.attempts(row.fingerprint)
    assert [attempt.log_tail for attempt in attempts] == ["begin\nthe last words"] * 3
    assert [attempt.resume_step for attempt in attempts] == [0, 5, 5]
    assert any(line.startswith("FAILED") and "g1 seed=1" in line for line in watcher.lines)


def test_an_error_in_training_fails_at_once_and_only_its_own_trial(bench: Bench, plan: Plan):
    bench.run(plan, always("raise", "g1", 8))
    row = bench.trials(plan)["g1/1"]
    assert (row.state, row.cause, row.num_attempts) == ("FAILED", "error", 1)
    assert row.reason == "ValueError: the corpus is gone; no retry allowed"
    assert bench.store.attempts(row.fingerprint)[0].log_tail == "begin\nthe last words"
    assert bench.states(plan)["baseline/1"] == "COMPLETE"


def test_a_failed_gang_is_dismissed_and_another_one_takes_its_place(bench: Bench, plan: Plan):
    cluster = FakeCluster(1, attempt_1("die", "g1", 8))
    with bench.controller(plan, cluster) as controller:
        controller.run()
    assert len(cluster.gangs) == 2
    kinds = [event.kind for event in bench.store.events(bench.store.sweep("tiny").id)]
    assert kinds.count("gang_lost") == 1


def test_a_rerun_has_fresh_budgets_and_goes_on_from_the_checkpoint(bench: Bench, tmp_path, undisturbed: Curves):
    short = plan_of(tmp_path, ["retry.infrastructure=1"])
    bench.run(short, always("die", "g1", 8))
    row = bench.trials(short)["g1/1"]
    assert (row.state, row.num_attempts) == ("FAILED", 2)
    assert bench.run(short).lines == []  # FAILED is final until it is reopened

    assert bench.store.reopen(bench.store.sweep("tiny").id, [row.fingerprint]) == 1
    # Dies once more at the third attempt: its budget of one retry is whole again.
    bench.run(short, lambda spec, _config, step: "die" if spec.number == 3 and step == 12 else None)
    row = bench.trials(short)["g1/1"]
    assert (row.state, row.num_attempts) == ("COMPLETE", 4)
    assert [attempt.resume_step for attempt in bench.store.attempts(row.fingerprint)] == [0, 5, 5, 10]
    assert bench.curves(short) == undisturbed


def test_gangs_that_never_start_end_the_run_with_the_last_reason(bench: Bench, plan: Plan):
    cluster = FakeCluster(1, start_error="RuntimeError: rank 0 runs other code than the driver")
    with (
        pytest.raises(UserError, match=r"no gang could be started, 3 in a row; the last: .* runs other code"),
        bench.controller(plan, cluster) as controller,
    ):
        controller.run()
    assert set(bench.states(plan).values()) == {"WAITING"}
    assert bench.store.lease_holder(bench.store.sweep("tiny").id) is None


# -- divergence -------------------------------------------------------------------------------------------------


def test_a_rule_that_fires_makes_a_result_with_step_and_reason(bench: Bench, plan: Plan):
    def rising(_spec: Any, config: Any, step: int) -> Any:
        return "rise" if config.gate is None and step >= 6 else None

    bench.run(plan, rising)
    row = bench.trials(plan)["baseline/1"]
    assert (row.state, row.cause, row.end_step, row.num_attempts) == ("DIVERGED", "loss_above_start", 10, 1)
    assert "at steps 6 to 10" in row.reason
    curve = bench.store.curve(row.fingerprint)
    assert [step.step for step in curve.steps] == list(range(1, 11))
    # Step 10 is also measured on the validation slice. Whether that is read with the step is chance: it never counts.
    assert curve.validations == ()


@pytest.mark.parametrize("steps_a_poll", [1, 2, 3, 4, 7, 20])
def test_where_a_trial_diverged_does_not_hang_on_when_it_was_read(
    bench: Bench, plan: Plan, monkeypatch: pytest.MonkeyPatch, steps_a_poll: int
):
    monkeypatch.setattr("fake_gangs.STEPS_A_POLL", steps_a_poll)

    def rising_then_broken(_spec: Any, config: Any, step: int) -> Any:
        if config.gate is not None or step < 6:
            return None
        return "rise" if step < 13 else "not finite"

    bench.run(plan, rising_then_broken)
    row = bench.trials(plan)["baseline/1"]
    assert (row.state, row.cause, row.end_step, row.num_attempts) == ("DIVERGED", "loss_above_start", 10, 1)
    curve = bench.store.curve(row.fingerprint)
    assert ([step.step for step in curve.steps], curve.validations) == (list(range(1, 11)), ())


def test_not_finite_once_is_resumed_and_leaves_no_trace(bench: Bench, plan: Plan, undisturbed: Curves):
    bench.run(plan, attempt_1("not finite", "g1", 12))
    row = bench.trials(plan)["g1/1"]
    assert (row.state, row.num_attempts) == ("COMPLETE", 2)
    assert bench.store.attempts(row.fingerprint)[1].resume_step == 10
    assert bench.curves(plan) == undisturbed


def test_not_finite_twice_at_a_step_is_divergence(bench: Bench, plan: Plan):
    bench.run(plan, always("not finite", "g1", 12))
    row = bench.trials(plan)["g1/1"]
    assert (row.state, row.cause, row.end_step, row.num_attempts) == ("DIVERGED", "nonfinite", 12, 2)
    assert "not finite again at the same step" in row.reason
    curve = bench.store.curve(row.fingerprint)
    assert [step.step for step in curve.steps] == list(range(1, 13))
    assert curve.steps[-1].nonfinite


@pytest.mark.parametrize("steps_a_poll", [1, 3, 20])
def test_a_validation_that_is_not_finite_is_measured_again_and_not_stepped_over(
    bench: Bench, plan: Plan, undisturbed: Curves, monkeypatch: pytest.MonkeyPatch, steps_a_poll: int
):
    """The trainer goes on after it and checkpoints past it when it is told to stop."""
    monkeypatch.setattr("fake_gangs.STEPS_A_POLL", steps_a_poll)
    bench.run(plan, attempt_1("validation not finite", "g1", 10))
    row = bench.trials(plan)["g1/1"]
    assert (row.state, row.num_attempts) == ("COMPLETE", 2)
    assert bench.store.attempts(row.fingerprint)[1].resume_step == 5
    assert bench.curves(plan) == undisturbed


def test_a_divergence_rule_judges_a_resumed_trial_on_its_whole_curve(bench: Bench, plan: Plan):
    """The streak begins at step 9, before the checkpoint from which the second attempt goes on."""

    def rising(spec: Any, config: Any, step: int) -> Any:
        if config.gate is not None:
            return None
        if spec.number == 1 and step == 12:
            return "die"
        return "rise" if step >= 9 else None

    bench.run(plan, rising)
    row = bench.trials(plan)["baseline/1"]
    assert (row.state, row.end_step, row.num_attempts) == ("DIVERGED", 13, 2)
    assert [step.step for step in bench.store.curve(row.fingerprint).steps] == list(range(1, 14))


# -- stopping ---------------------------------------------------------------------------------------------------


def stop_after_records(controller: Controller, watcher: Watcher, num_steps: int) -> None:
    def on_tick(snapshot: Any) -> None:
        if snapshot.stopping is None and any(running.step >= num_steps for running in snapshot.running):
            controller.request_stop("SIGINT")

    watcher.on_tick = on_tick


def test_a_stop_checkpoints_what_runs_and_the_next_run_goes_on_from_there(
    bench: Bench, plan: Plan, undisturbed: Curves
):
    watcher = Watcher()
    with bench.controller(plan, FakeCluster(2), watcher) as controller:
        stop_after_records(controller, watcher, 4)
        with pytest.raises(SweepStopped, match="SIGINT"):
            controller.run()
    rows = bench.trials(plan)
    assert {row.state for row in rows.values()} == {"WAITING"}
    assert {row.cause for row in rows.values()} == {"interrupted"}
    assert bench.store.lease_holder(bench.store.sweep("tiny").id) is None

    again = bench.run(plan)
    assert bench.states(plan) == {"baseline/1": "COMPLETE", "g1/1": "COMPLETE"}
    for row in bench.trials(plan).values():
        second = bench.store.attempts(row.fingerprint)[1]
        assert second.resume_step == 7  # the checkpoint of the stop, not the last one of every five steps
    assert all("attempt 2 from step" in line for line in again.lines if line.startswith("started"))
    assert bench.curves(plan) == undisturbed


@pytest.mark.parametrize("moment", ["_to_follow", "_work", "_launch", "_follow", "_check_budget"])
def test_a_stop_may_come_at_any_moment_of_the_loop(
    bench: Bench, tmp_path, monkeypatch: pytest.MonkeyPatch, moment: str
):
    """As a signal does, whose handler runs between any two lines: before and after each part of the loop."""
    plan = plan_of(tmp_path, ["train.tokens=51200"])
    for when, call in itertools.product(("before", "after"), (1, 2)):
        with bench.controller(plan, FakeCluster(2)) as controller:
            monkeypatch.setattr(controller, moment, _interrupting(controller, moment, when, call))
            with pytest.raises(SweepStopped, match="SIGINT"):
                controller.run()
        rows = bench.trials(plan).values()
        assert {row.state for row in rows} == {"WAITING"}
        assert {row.cause for row in rows} <= {"interrupted", None}
    bench.run(plan)
    for row in bench.trials(plan).values():
        assert row.state == "COMPLETE"
        assert [step.step for step in bench.store.curve(row.fingerprint).steps] == list(range(1, 201))


def _interrupting(controller: Controller, moment: str, when: str, call: int) -> Any:
    """A method of the controller with a signal before or after one of its calls."""
    original, calls = getattr(controller, moment), itertools.count(1)

    def interrupted(*args: Any) -> Any:
        is_now = next(calls) == call
        if is_now and when == "before":
            controller.request_stop("SIGINT")
        answer = original(*args)
        if is_now and when == "after":
            controller.request_stop("SIGINT")
        return answer

    return interrupted


def test_a_stop_that_comes_when_all_is_done_stops_nothing(bench: Bench, plan: Plan, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("fake_gangs.STEPS_A_POLL", 19)
    watcher = Watcher()
    with bench.controller(plan, FakeCluster(2), watcher) as controller:
        # Both are told to stop before their last step, and are complete after it.
        stop_after_records(controller, watcher, 19)
        controller.run()
    assert set(bench.states(plan).values()) == {"COMPLETE"}


class _Deaf(FakeCluster):
    """Gangs that do not hear that they are to stop, and do not end."""

    def start_gang(self, *given: Any) -> Any:
        gang = super().start_gang(*given)
        gang.stop = lambda token: None  # type: ignore[method-assign]
        original = gang.poll_end
        gang.poll_end = lambda: original() if gang.step < 8 else None  # type: ignore[method-assign]
        return gang


def test_a_second_request_does_not_wait_for_checkpoints(bench: Bench, plan: Plan, undisturbed: Curves):
    watcher = Watcher()
    cluster = _Deaf(2)
    with bench.controller(plan, cluster, watcher) as controller:
        watcher.on_tick = lambda snapshot: (
            controller.request_stop("SIGINT")
            if snapshot.running and all(one.step >= 8 for one in snapshot.running)
            else None
        )
        with pytest.raises(SweepStopped, match="SIGINT"):
            controller.run()
    assert all(gang.state is GangState.DEAD for gang in cluster.gangs)
    assert {row.cause for row in bench.trials(plan).values()} == {"interrupted"}
    bench.run(plan)
    assert bench.curves(plan) == undisturbed


# -- one controller a sweep, and what a dead one leaves ---------------------------------------------------------


def test_a_second_controller_is_refused_by_the_name_of_the_first(bench: Bench, plan: Plan):
    with bench.controller(plan, FakeCluster(2)):
        holder = f"{socket.gethostname()}:{os.getpid()}"
        with (
            pytest.raises(UserError, match=f"sweep tiny: the sweep is run by {holder}; its lease ends in"),
            bench.controller(plan, FakeCluster(2)),
        ):
            pass


def test_a_holder_is_dead_only_when_its_process_on_this_host_is_gone():
    host = socket.gethostname()
    assert not is_dead(f"{host}:{os.getpid()}")
    assert not is_dead(f"{host}:1")
    assert not is_dead("another-host:99999999")
    assert is_dead(f"{host}:99999999")


def test_the_lease_of_a_dead_controller_is_waited_for_and_no_other(bench: Bench, plan: Plan):
    sweep_id = bench.store.add(plan).sweep_id
    bench.store.acquire_lease(sweep_id, f"{socket.gethostname()}:99999999", 0.3)
    watcher = bench.run(plan)
    assert "is dead; waiting for its lease to run out" in watcher.lines[0]
    assert set(bench.states(plan).values()) == {"COMPLETE"}


class Killed(BaseException):
    """Stands for SIGKILL: nothing of the controller runs after it."""


def run_until_killed(bench: Bench, plan: Plan, num_steps: int, monkeypatch: pytest.MonkeyPatch) -> FakeCluster:
    """A controller that dies while trials run. Its gangs are not dismissed: they may train on for a while."""
    watcher, cluster = Watcher(), FakeCluster(2)
    controller = bench.controller(plan, cluster, watcher)

    def on_tick(snapshot: Any) -> None:
        if any(running.step >= num_steps for running in snapshot.running):
            raise Killed

    watcher.on_tick = on_tick
    controller.__enter__()
    with pytest.raises(Killed):
        controller.run()
    expire_lease(bench.store, controller.lease)
    return cluster


def expire_lease(store: Store, lease: Lease) -> None:
    store.renew_lease(lease, -1.0)


def test_what_a_killed_controller_left_is_taken_over_and_nothing_is_lost(
    bench: Bench, plan: Plan, undisturbed: Curves, monkeypatch: pytest.MonkeyPatch
):
    run_until_killed(bench, plan, 7, monkeypatch)
    assert bench.states(plan) == {"baseline/1": "RUNNING", "g1/1": "RUNNING"}
    watcher = bench.run(plan)
    assert sum("its controller is gone" in line for line in watcher.lines) == 2
    for row in bench.trials(plan).values():
        assert (row.state, row.num_attempts) == ("COMPLETE", 2)
        assert bench.store.attempts(row.fingerprint)[0].cause == "controller_lost"
    assert bench.curves(plan) == undisturbed


def test_records_that_a_gang_wrote_after_its_controller_died_are_not_missing(
    bench: Bench, plan: Plan, undisturbed: Curves, monkeypatch: pytest.MonkeyPatch
):
    """It checkpoints at steps that no controller has read; the next attempt builds on them."""
    cluster = run_until_killed(bench, plan, 4, monkeypatch)
    for gang in cluster.gangs:
        while gang.step < 12:
            gang.poll_end()
    bench.run(plan)
    for row in bench.trials(plan).values():
        assert [one.resume_step for one in bench.store.attempts(row.fingerprint)] == [0, 10]
    assert bench.curves(plan) == undisturbed


def test_a_late_writer_cannot_make_a_later_attempt_skip_steps(
    bench: Bench, plan: Plan, undisturbed: Curves, monkeypatch: pytest.MonkeyPatch
):
    """The orphan of attempt 1 checkpoints on after attempt 2 has branched off; attempt 3 must not build on that."""
    orphans = run_until_killed(bench, plan, 7, monkeypatch).gangs
    fate: FateAt = lambda spec, _config, step: "die" if spec.number == 2 and step == 8 else None  # noqa: E731
    original = Controller._launch

    def launch(self: Controller, gang: Any, trial: Any) -> None:
        if bench.store.attempts(trial.fingerprint)[-1].number == 2:
            for orphan in orphans:
                while orphan.state is GangState.BUSY and orphan.step < 16:
                    orphan.poll_end()
        original(self, gang, trial)

    monkeypatch.setattr(Controller, "_launch", launch)
    bench.run(plan, fate)
    for row in bench.trials(plan).values():
        assert (row.state, row.num_attempts) == ("COMPLETE", 3)
        assert [one.resume_step for one in bench.store.attempts(row.fingerprint)] == [0, 5, 5]
    assert bench.curves(plan) == undisturbed


def test_a_controller_that_was_taken_over_writes_no_more(bench: Bench, plan: Plan):
    watcher = Watcher()
    controller = bench.controller(plan, FakeCluster(2), watcher)
    taken = []

    def on_tick(snapshot: Any) -> None:
        if not taken and any(running.step >= 5 for running in snapshot.running):
            expire_lease(bench.store, controller.lease)
            taken.append(bench.store.acquire_lease(controller.sweep_id, "another-host:7", 60))

    watcher.on_tick = on_tick
    with pytest.raises(Exception, match="was lost: the token is now"), controller:
        controller.run()
    assert bench.store.lease_holder(controller.sweep_id) is not None  # the other one's, untouched
    assert set(bench.states(plan).values()) == {"RUNNING"}


# -- shared trials ----------------------------------------------------------------------------------------------

SISTER = SWEEP.replace("name: tiny", "name: sister").replace("  g1:", "  gated:")


def test_a_second_sweep_reuses_the_trials_of_the_first(bench: Bench, plan: Plan, tmp_path):
    bench.run(plan)
    sister = plan_of(tmp_path, ["seeds=[1,2]"], SISTER)
    watcher = bench.run(sister)
    assert sorted(watcher.started()) == ["baseline seed=2", "gated seed=2"]
    assert set(bench.states(sister).values()) == {"COMPLETE"}
    assert bench.trials(sister)["gated/1"].fingerprint == bench.trials(plan)["g1/1"].fingerprint
    frame = bench.store.frame("results", "sister")
    assert frame.set_index(["arm", "seed"])["trained_in"].to_dict() == {
        ("baseline", 1): "tiny", ("gated", 1): "tiny", ("baseline", 2): "sister", ("gated", 2): "sister",
    }  # fmt: skip


def test_a_sweep_that_is_extended_runs_only_what_is_missing(bench: Bench, plan: Plan, tmp_path):
    bench.run(plan)
    watcher = bench.run(plan_of(tmp_path, ["seeds=[1,2]"]))
    assert sorted(watcher.started()) == ["baseline seed=2", "g1 seed=2"]
    assert set(bench.states(plan).values()) == {"COMPLETE"}
    assert bench.run(plan_of(tmp_path, ["seeds=[1,2]"])).started() == []


def test_a_trial_that_another_sweep_runs_is_waited_for_and_counts_for_both(bench: Bench, plan: Plan, tmp_path):
    """Two controllers at once: the sister's loop is driven from inside the first one's."""
    sister = plan_of(tmp_path, (), SISTER)
    outer, watcher = bench.controller(plan, FakeCluster(2)), Watcher()
    with outer, bench.controller(sister, FakeCluster(2), watcher) as inner:
        while len(outer.running) < 2:
            step_loop(outer)
        watcher.on_tick = lambda _: step_loop(outer)
        inner.run()
    assert watcher.started() == []
    assert set(bench.states(sister).values()) == {"COMPLETE"}
    assert all(row.num_attempts == 1 for row in bench.trials(sister).values())


def step_loop(controller: Controller) -> None:
    """One turn of the loop."""
    controller._refresh(now=True)
    controller._work()


def test_a_shared_trial_is_adopted_when_the_sweep_that_ran_it_dies(
    bench: Bench, plan: Plan, tmp_path, undisturbed: Curves, monkeypatch: pytest.MonkeyPatch
):
    """It dies while the other one already waits for its trials: nobody else would ever end them."""
    monkeypatch.setattr(loop, "LEASE_SECONDS", 20.0)
    sister = plan_of(tmp_path, (), SISTER)
    dying, watcher = bench.controller(plan, FakeCluster(2)), Watcher()
    dying.__enter__()
    while len(dying.running) < 2:
        step_loop(dying)
    step_loop(dying)
    with bench.controller(sister, FakeCluster(2), watcher) as heir:
        expire_lease(bench.store, dying.lease)
        watcher.on_tick = lambda _: setattr(heir, "lease_renewed", heir.lease_renewed - 60)
        heir.run()
    assert set(bench.states(sister).values()) == {"COMPLETE"}
    assert len(watcher.started()) == 2
    assert bench.curves(sister) == undisturbed
    # The dying one wakes up: its attempts are over, and it can neither end them nor break.
    for attempt in dying.running:
        attempt.gang.dismiss()
    dying._follow(list(dying.running))
    assert dying.running == []
    assert set(bench.states(plan).values()) == {"COMPLETE"}
    assert bench.curves(sister) == undisturbed


# -- what it shows ----------------------------------------------------------------------------------------------


def test_the_snapshot_counts_every_trial_and_shows_each_running_one(bench: Bench, tmp_path):
    wide = plan_of(tmp_path, ["seeds=[1,2]"])
    watcher = bench.run(wide)
    assert all(sum(snapshot.states.values()) == 4 for snapshot in watcher.snapshots)
    busy = [snapshot for snapshot in watcher.snapshots if len(snapshot.running) == 2]
    assert busy
    assert all(snapshot.states["RUNNING"] == 2 for snapshot in busy)
    line = next(one for snapshot in busy for one in snapshot.running if one.step)
    assert (line.num_steps, line.attempt) == (20, 1)
    assert line.tokens_per_second == pytest.approx(1000.0)
    assert line.eta_seconds == pytest.approx((20 - line.step) * 256 / 1000)
    assert [set(snapshot.states) for snapshot in watcher.snapshots][-1] == {"COMPLETE"}
    assert watcher.snapshots[0].eta_seconds is None


def test_lines_tell_starts_ends_retries_and_pauses(bench: Bench, plan: Plan):
    watcher = bench.run(plan, attempt_1("die", "g1", 8), capacity=1)
    text = "\n".join(watcher.lines)
    assert "started   g1 seed=1\n" in text
    assert "retrying  g1 seed=1: process 1 of a rank died: SIGKILL; retry 1 of 5" in text
    assert "started   g1 seed=1, attempt 2 from step 5" in text
    final = fake_validation(bench.trials(plan)["g1/1"].config, 20).loss_nats
    assert f"complete  g1 seed=1: validation loss {final:.4f} nats" in text


def test_a_checkpoint_folder_without_its_name_is_no_checkpoint(bench: Bench, plan: Plan, undisturbed: Curves):
    """A killed save leaves a hidden folder behind."""

    def torn(spec: Any, config: Any, step: int) -> Any:
        if spec.number == 1 and step == 8 and config.gate is not None:
            whole = checkpoint_path(spec.attempt_dir, 8)
            whole.with_name(f".{whole.name}").mkdir(parents=True)
            return "die"
        return None

    bench.run(plan, torn)
    row = bench.trials(plan)["g1/1"]
    assert bench.store.attempts(row.fingerprint)[1].resume_step == 5
    assert bench.curves(plan) == undisturbed
