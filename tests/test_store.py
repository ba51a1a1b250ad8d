"""The store's contract, held by both back ends: submission, leases, attempts, mirrors, processes."""

# ruff: noqa: F811 (fixtures are imported by name)

from __future__ import annotations

import dataclasses
import math
import multiprocessing
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from datetime import UTC, datetime, timedelta

import pytest
from store_runs import STEPS, Run, a_plan, postgres_server, run, steps, store, store_url, validation  # noqa: F401

from models.config import Layout
from models.run_dir import Summary
from orchestrator.store import (
    FinishedIsFinal,
    LeaseHeld,
    LeaseLost,
    Store,
    StoreError,
    TrialTaken,
)
from orchestrator.sweep import UserError, VerdictConfig

# Submission


def test_a_plan_is_kept_as_it_was_submitted(store: Store) -> None:
    plan = a_plan()
    added = store.add(plan)
    sweep = store.sweep("quick")
    assert (added.num_new, added.num_known, added.sweep_id) == (4, 0, sweep.id)
    assert (sweep.question, sweep.baseline, sweep.arms) == ("Is it better?", "baseline", ("baseline", "gated"))
    assert sweep.verdict == {**plan.sweep.verdict.model_dump(mode="json"), "baseline": "baseline"}
    assert (sweep.verdict["margin"], sweep.overrides) == (0.01, ("train.tokens=1e4",))
    declared = {contrast.arm: [one.key for one in contrast.declared] for contrast in plan.contrasts}
    assert sweep.settings == {**plan.sweep.model_dump(mode="json"), "declared": declared}
    assert declared
    assert abs(sweep.created_at - datetime.now(UTC)) < timedelta(minutes=5)
    kept = store.trials(sweep.id)
    assert [trial.config for trial in kept] == [trial.config for trial in plan.trials]
    assert [trial.axes for trial in kept] == [trial.axes for trial in plan.trials]
    assert {trial.state for trial in kept} == {"WAITING"}
    assert (kept[0].num_parameters, kept[0].training_flops, kept[0].num_attempts) == (1234, 5678, 0)


def test_submitting_twice_changes_nothing(run: Run) -> None:
    run.complete(run.fingerprint, 2.5)
    before = (run.store.sweeps(), run.store.trials(run.sweep_id), run.store.events())
    again = run.store.add(a_plan())
    assert (again.num_new, again.num_known) == (0, 4)
    assert (run.store.sweeps(), run.store.trials(run.sweep_id), run.store.events()) == before


def test_a_changed_plan_adds_what_is_missing_and_hides_what_it_dropped(run: Run) -> None:
    run.complete(run.fingerprint, 2.5)
    changed = run.store.add(a_plan(lrs=(4e-3, 1e-2), arms=("baseline", "other")))
    assert (changed.num_new, changed.num_known) == (2, 2)
    shown = run.store.frame("results", "quick")
    assert sorted(set(shown["train.lr"])) == [4e-3, 1e-2]
    assert run.store.sweep("quick").arms == ("baseline", "other")
    back = run.store.add(a_plan())
    assert back.num_new == 0
    assert run.trial().state == "COMPLETE"


def test_changed_verdict_settings_leave_an_event(run: Run) -> None:
    run.store.add(a_plan(lrs=(1e-3,)))
    assert run.store.events(run.sweep_id) == []
    run.store.add(a_plan(verdict=VerdictConfig(margin=0.5)))
    (event,) = run.store.events(run.sweep_id)
    assert event.kind == "verdict settings changed"
    assert "0.01" in event.message
    assert "0.5" in event.message


def test_verdict_settings_are_those_of_the_first_submission(run: Run) -> None:
    run.store.add(a_plan(verdict=VerdictConfig(margin=0.5, looks=9)))
    sweep = run.store.sweep("quick")
    assert (sweep.verdict["margin"], sweep.verdict["looks"]) == (0.01, 1)
    assert sweep.settings["verdict"]["margin"] == 0.5


def test_a_change_of_seeds_is_a_look_once_a_verdict_could_be_read(run: Run) -> None:
    def submit(*seeds: int) -> list[dict[str, list[int]]]:
        sweep = run.plan.sweep.model_copy(update={"seeds": seeds})
        run.store.add(dataclasses.replace(run.plan, sweep=sweep))
        return run.store.sweep("quick").verdict.get("looks_taken", [])

    assert submit(1, 2) == []
    assert submit(1) == []  # nothing was complete
    run.complete(run.fingerprint, 2.5)
    assert submit(1, 2) == []  # the baseline alone is no verdict
    assert submit(1) == []
    run.complete(next(one.fingerprint for one in run.plan.trials if one.arm == "gated"), 2.4)
    look = {"seeds": [1], "extra_baseline_seeds": []}
    assert submit(1, 2) == [look]
    assert submit(1, 2) == [look]
    assert submit(1) == [look]  # 1, 2 were never all there
    assert submit(1, 2) == [look]


def test_the_tail_is_the_mean_of_the_last_validations_of_complete_trials(run: Run) -> None:
    attempt = run.start()
    measured = [validation(10, 3.0), validation(19, 2.4), validation(20, 2.2), validation(20, 2.3, "full")]
    run.store.record(run.lease, attempt, measured)
    assert run.store.tails(run.sweep_id, 0.1) == []
    run.end(attempt, "COMPLETE")
    rows = {row.split: row for row in run.store.tails(run.sweep_id, 0.1)}
    assert (rows["slice"].num_points, rows["slice"].loss_nats) == (2, pytest.approx(2.3))
    assert rows["slice"].bits_per_byte == pytest.approx(2.3 / math.log(2))
    assert (rows["full"].num_points, rows["full"].loss_nats) == (1, 2.3)
    assert {row.num_points for row in run.store.tails(run.sweep_id, 0.05)} == {1}
    assert max(row.num_points for row in run.store.tails(run.sweep_id, 1.0)) == 3


def test_a_sweep_of_unknown_name_gets_the_nearest_one(run: Run) -> None:
    with pytest.raises(UserError, match=r"no sweep 'quack'.*did you mean 'quick'"):
        run.store.sweep("quack")


def test_two_sweeps_share_an_identical_trial(run: Run) -> None:
    run.complete(run.fingerprint, 2.5)
    other = run.store.add(a_plan(name="second", lrs=(1e-3,)))
    assert (other.num_new, other.num_known) == (0, 2)
    assert run.store.trials(other.sweep_id)[0].state == "COMPLETE"
    shown = run.store.frame("results")
    rows = shown[shown.fingerprint == run.fingerprint]
    assert list(rows.sweep) == ["quick", "second"]
    assert list(rows.validation_loss_nats) == [2.5, 2.5]
    assert list(rows.trained_in) == ["quick", "quick"]


# Lease


def test_a_lease_in_force_keeps_others_out(run: Run) -> None:
    with pytest.raises(LeaseHeld, match="host-a:1") as caught:
        run.store.acquire_lease(run.sweep_id, "host-b:2", 60)
    assert 0 < caught.value.seconds_left <= 60
    assert run.store.lease_holder(run.sweep_id) is not None
    run.store.release_lease(run.lease)
    assert run.store.lease_holder(run.sweep_id) is None
    assert run.store.acquire_lease(run.sweep_id, "host-b:2", 60).token > run.lease.token


def test_renewing_a_lease_prolongs_it(run: Run) -> None:
    run.store.renew_lease(run.lease, 5000)
    held = run.store.lease_holder(run.sweep_id)
    assert held is not None
    assert 4000 < held[1] <= 5000


def test_an_expired_lease_is_taken_over_and_its_old_holder_fenced(run: Run) -> None:
    attempt = run.start()
    waiting = run.plan.trials[1].fingerprint
    run.store.renew_lease(run.lease, -1)
    run.store.record(run.lease, attempt, steps(1, 1))  # expired, but nobody took it: still the only writer
    new = run.store.acquire_lease(run.sweep_id, "host-b:2", 60)
    writes = [
        lambda: run.store.record(run.lease, attempt, steps(2, 2)),
        lambda: run.end(attempt, "COMPLETE"),
        lambda: run.start(fingerprint=waiting),
        lambda: run.store.renew_lease(run.lease, 60),
        lambda: run.store.release_lease(run.lease),
        lambda: run.store.orphans(run.lease),
        lambda: run.store.adopt(run.lease, attempt, "adopted"),
        lambda: run.store.free(run.lease, [attempt]),
    ]
    for write in writes:
        with pytest.raises(LeaseLost, match="was lost"):
            write()
    assert [row.step for row in run.store.curve(run.fingerprint).steps] == [1]
    assert run.store.orphans(new) == [attempt]
    assert run.store.free(new, [attempt]) == [run.fingerprint]
    assert run.trial().state == "WAITING"
    (closed,) = run.store.attempts(run.fingerprint)
    assert (closed.cause, closed.ended_at is not None, closed.seconds) == ("controller_lost", True, None)


def test_recovery_may_record_what_a_lost_attempt_had_written(run: Run) -> None:
    attempt = run.start()
    run.store.free(run.lease, [attempt])
    run.store.record(run.lease, attempt, steps(1, 5))
    assert len(run.store.curve(run.fingerprint).steps) == 5


def test_a_trial_that_another_sweep_runs_is_not_taken(run: Run) -> None:
    other_id = run.store.add(a_plan(name="second")).sweep_id
    other = run.store.acquire_lease(other_id, "host-b:2", 60)
    attempt = run.start()
    with pytest.raises(TrialTaken, match="is RUNNING; only a WAITING trial"):
        run.store.start_attempt(other, run.fingerprint, layout=Layout(), provenance={})
    assert run.store.orphans(other) == []
    with pytest.raises(TrialTaken, match="its sweep has a controller again"):
        run.store.adopt(other, attempt, "adopted")
    assert run.store.free(other, [attempt]) == []
    run.store.renew_lease(run.lease, -1)
    assert run.store.orphans(other) == [attempt]
    assert run.store.free(other, [attempt]) == [run.fingerprint]
    assert run.trial().state == "WAITING"
    assert run.store.free(other, [attempt]) == []


def test_an_adopted_attempt_goes_on_and_ends_under_the_new_lease(run: Run) -> None:
    attempt = run.start()
    run.store.record(run.lease, attempt, steps(1, 3))
    run.store.renew_lease(run.lease, -1)
    heir = run.store.acquire_lease(run.sweep_id, "host-b:2", 60)
    adopted = run.store.adopt(heir, attempt, "gang abcd goes on")
    assert adopted == attempt
    run.store.record(heir, adopted, steps(1, 5))
    run.store.end_attempt(heir, adopted, state="COMPLETE", cause="complete", reason="all 5 steps")
    assert [row.step for row in run.store.curve(run.fingerprint).steps] == [1, 2, 3, 4, 5]
    assert (run.trial().state, run.trial().num_attempts) == ("COMPLETE", 1)
    told = [(event.kind, event.message, event.attempt) for event in run.store.events(run.sweep_id)]
    assert ("adopted", "gang abcd goes on", 1) in told
    assert run.store.orphans(heir) == []
    with pytest.raises(TrialTaken, match="has ended"):
        run.store.adopt(heir, attempt, "again")


def test_a_shared_attempt_moves_to_the_sweep_that_adopts_it_and_is_no_orphan_of_the_first(run: Run) -> None:
    other_id = run.store.add(a_plan(name="second")).sweep_id
    other = run.store.acquire_lease(other_id, "host-b:2", 60)
    attempt = run.start()
    run.store.renew_lease(run.lease, -1)
    adopted = run.store.adopt(other, attempt, "gang abcd goes on")
    assert (adopted.sweep_id, adopted.number) == (other_id, 1)
    heir = run.store.acquire_lease(run.sweep_id, "host-c:3", 60)
    assert run.store.orphans(heir) == []
    with pytest.raises(TrialTaken, match="another sweep has adopted it"):
        run.store.adopt(heir, attempt, "too late")
    assert run.store.free(heir, [attempt]) == []
    run.store.end_attempt(other, adopted, state="COMPLETE", cause="complete", reason="all")
    assert run.trial().state == "COMPLETE"


# Attempts


def test_an_attempt_knows_where_it_ran(run: Run) -> None:
    attempt = run.start(hosts=["n1", "n2"])
    summary = Summary(
        outcome="complete", step=STEPS, resume_step=0, seconds=7.5, tokens_per_second=900.0, peak_memory_bytes=10**10
    )
    run.end(attempt, "COMPLETE", summary=summary, log_tail="bye")
    (row,) = run.store.attempts(run.fingerprint)
    assert (row.number, len(row.token), row.layout, row.hosts) == (1, 8, Layout(data=2), ("n1", "n2"))
    assert row.provenance["packages"] == {"torch": "2.13.0"}
    assert (row.seconds, row.tokens_per_second, row.peak_memory_bytes, row.log_tail) == (7.5, 900.0, 10**10, "bye")
    assert (row.end_step, run.trial().end_step) == (STEPS, STEPS)
    (shown,) = run.store.frame("attempts", "quick").to_dict("records")
    assert (shown["git_commit"], shown["git_dirty"], shown["hosts"]) == ("abc123", True, ["n1", "n2"])
    assert shown["started_at"] == row.started_at
    assert shown["train.lr"] == 1e-3


def test_an_attempt_knows_its_back_end_when_it_has_ended(run: Run) -> None:
    ended = Summary(outcome="complete", step=1, resume_step=0, seconds=1.0, tokens_per_second=None)
    first = run.start()
    assert run.outcome().backends == ()
    run.end(first, "WAITING", cause="killed")  # left no summary
    assert run.outcome().backends == ()
    for backend in ("transformer_engine", "local"):
        run.end(run.start(), "WAITING", summary=ended.model_copy(update={"backend": backend}))
    assert run.outcome().backends == ("local", "transformer_engine")
    assert [row.provenance.get("backend") for row in run.store.attempts(run.fingerprint)] == [
        None, "transformer_engine", "local",
    ]  # fmt: skip


def test_a_retry_is_the_next_attempt(run: Run) -> None:
    first = run.start()
    run.end(first, "WAITING", cause="killed")
    assert (run.trial().state, run.trial().cause, run.trial().end_step) == ("WAITING", "killed", None)
    second = run.start(resume_step=10, resumed_from=1)
    assert (second.number, second.resume_step, second.resumed_from) == (2, 10, 1)
    assert second.token != first.token
    assert (run.trial().state, run.trial().cause) == ("RUNNING", None)
    assert [row.cause for row in run.store.attempts(run.fingerprint)] == ["killed", None]
    assert run.store.attempts(run.fingerprint)[0].seconds is not None


def test_only_one_controller_claims_a_trial(run: Run) -> None:
    run.start()
    with pytest.raises(TrialTaken, match="is RUNNING"):
        run.start()
    with pytest.raises(TrialTaken, match="is unknown"):
        run.start(fingerprint="feedfeedfeedfeed")


@pytest.mark.parametrize("state", ["COMPLETE", "PRUNED", "DIVERGED"])
def test_finished_is_final(run: Run, state: str) -> None:
    attempt = run.start()
    run.end(attempt, state, end_step=7)
    for other in ("WAITING", "COMPLETE", "FAILED"):
        with pytest.raises(FinishedIsFinal, match=f"the trial is {state}"):
            run.end(attempt, other)
    with pytest.raises(TrialTaken, match=f"is {state}"):
        run.start()
    assert run.store.reopen(run.sweep_id, [run.fingerprint]) == 0
    assert run.store.cancel(run.sweep_id, [run.fingerprint]) == 0
    assert run.store.orphans(run.lease) == []
    assert run.store.free(run.lease, [attempt]) == []
    assert (run.trial().state, run.trial().end_step) == (state, 7)


def test_an_earlier_attempt_cannot_end_the_trial_of_a_later_one(run: Run) -> None:
    first = run.start()
    run.end(first, "WAITING", cause="killed")
    run.start()
    with pytest.raises(FinishedIsFinal, match=r"attempt 1 .* has ended"):
        run.end(first, "COMPLETE")
    assert run.trial().state == "RUNNING"


def test_an_attempt_ends_only_in_a_state_that_is(run: Run) -> None:
    with pytest.raises(ValueError, match="can't end in state DONE; allowed: WAITING, COMPLETE"):
        run.end(run.start(), "DONE")


def test_failed_and_canceled_trials_can_be_reopened(run: Run) -> None:
    failed, canceled, waiting = (trial.fingerprint for trial in run.plan.trials[:3])
    run.end(run.start(fingerprint=failed), "FAILED", cause="error", end_step=3)
    assert run.store.cancel(run.sweep_id, [canceled, failed, "feed"]) == 1
    assert run.trial(canceled).state == "CANCELED"
    assert run.store.reopen(run.sweep_id, [failed, canceled, waiting]) == 2
    again = run.trial(failed)
    assert (again.state, again.cause, again.end_step, again.reopened_after) == ("WAITING", None, None, 1)
    assert run.trial(canceled).state == "WAITING"
    assert run.start(fingerprint=failed).number == 2


def test_a_sweep_cannot_reopen_a_trial_that_is_not_its_own(run: Run) -> None:
    run.end(run.start(), "FAILED", cause="error")
    other = run.store.add(a_plan(name="second", lrs=(0.5,))).sweep_id
    assert run.store.reopen(other, [run.fingerprint]) == 0
    assert run.trial().state == "FAILED"


# Mirrors and events


def test_the_map_to_mlflow_and_the_mirrors_cursor_are_kept(run: Run) -> None:
    run.store.set_mlflow_run(run.sweep_id, None, "parent")
    run.store.set_mlflow_run(run.sweep_id, run.fingerprint, "child")
    assert run.store.sweep("quick").mlflow_run_id == "parent"
    assert [trial.mlflow_run_id for trial in run.store.trials(run.sweep_id)] == ["child", None, None, None]
    assert run.store.mirror_cursor(run.sweep_id, run.fingerprint) is None
    run.store.set_mirror_cursor(run.sweep_id, run.fingerprint, {"steps": [1, 20]})
    assert run.store.mirror_cursor(run.sweep_id, run.fingerprint) == {"steps": [1, 20]}
    run.store.add(a_plan())
    assert run.store.mirror_cursor(run.sweep_id, run.fingerprint) == {"steps": [1, 20]}
    run.store.set_mirror_cursors(run.sweep_id, {trial.fingerprint: {"step": 3} for trial in run.plan.trials[:2]})
    found = [run.store.mirror_cursor(run.sweep_id, trial.fingerprint) for trial in run.plan.trials]
    assert found == [{"step": 3}, {"step": 3}, None, None]
    assert [run.store.mlflow_run(run.sweep_id, trial.fingerprint) for trial in run.plan.trials[:2]] == ["child", None]
    run.store.set_mirror_cursor(run.sweep_id, run.fingerprint, None)
    assert run.store.mirror_cursor(run.sweep_id, run.fingerprint) is None


def test_events_come_in_order_and_after_a_cursor(run: Run) -> None:
    run.store.add_event(run.sweep_id, "budget", "80 % spent")
    run.store.add_event(None, "store", "of no sweep")
    run.store.add_event(run.sweep_id, "trial", "failed", run.fingerprint, 2)
    first, second = run.store.events(run.sweep_id)
    assert (first.kind, second.fingerprint, second.attempt) == ("budget", run.fingerprint, 2)
    assert run.store.events(run.sweep_id, after=first.id) == [second]
    assert len(run.store.events()) == 3
    assert first.at.tzinfo is UTC


# Processes


def _write_in_a_process(url: str, name: str, lr: float) -> int:
    with Store(url) as store:
        run = Run(store, a_plan(name=name, lrs=(lr, 1e-3)))
        attempt = run.start()
        for step in range(1, 51):
            store.record(run.lease, attempt, steps(step, step))
        run.end(attempt, "COMPLETE")
        return len(store.curve(run.fingerprint).steps)


def test_two_processes_open_an_empty_store_and_write_at_once(store_url: str) -> None:
    with ProcessPoolExecutor(2, mp_context=multiprocessing.get_context("spawn")) as pool:
        jobs = [pool.submit(_write_in_a_process, store_url, f"s{i}", lr) for i, lr in enumerate((0.1, 0.2))]
        assert [job.result() for job in jobs] == [50, 50]
    with Store(store_url) as store:
        assert [sweep.name for sweep in sorted(store.sweeps(), key=lambda sweep: sweep.name)] == ["s0", "s1"]
        counts = store.query("SELECT COUNT(*) AS rows, COUNT(DISTINCT fingerprint) AS trials FROM curves")
        assert counts.to_dict("records") == [{"rows": 100, "trials": 2}]
        assert len({trial.fingerprint for sweep in store.sweeps() for trial in store.trials(sweep.id)}) == 6


def test_threads_read_while_another_one_writes(run: Run) -> None:
    attempt = run.start()

    def read(_turn: int) -> bool:
        seen = [row.step for row in run.store.curve(run.fingerprint).steps]
        return seen == list(range(1, len(seen) + 1)) and len(run.store.trials(run.sweep_id)) == 4

    with ThreadPoolExecutor(3) as pool:
        reads = [pool.submit(read, turn) for turn in range(40)]
        for step in range(1, 41):
            run.store.record(run.lease, attempt, steps(step, step))
        assert all(job.result() for job in reads)
    assert read(0)


def test_a_controllers_errors_are_of_one_kind() -> None:
    assert all(issubclass(error, StoreError) for error in (LeaseHeld, LeaseLost, TrialTaken, FinishedIsFinal))


def test_a_log_with_a_nul_is_kept(run: Run):
    run.end(run.start(), "FAILED", log_tail="before\0after")
    run.store.add_event(run.sweep_id, "odd", "a\0b")
    assert run.store.attempts(run.fingerprint)[0].log_tail == "before\ufffdafter"
    assert run.store.events(run.sweep_id)[0].message == "a\ufffdb"
