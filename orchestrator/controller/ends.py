"""The end of an attempt: its consequence into the store, the search and the view, and what becomes of its gang."""

from __future__ import annotations

from dataclasses import replace

from models import run_dir
from models.retention import prune_trial
from orchestrator.controller.running import RunningAttempt
from orchestrator.controller.snapshot import about
from orchestrator.controller.sweep_run import SweepRun
from orchestrator.failures import (
    DISK_FULL,
    DISK_READ_ONLY,
    GPU_OUT_OF_MEMORY,
    HANG,
    PREEMPTED,
    Consequence,
    Ending,
    consequence,
)
from orchestrator.gang import GangEnd
from orchestrator.plan import after_out_of_memory
from orchestrator.store import CONTROLLER_LOST, FinishedIsFinal


def end_attempt(run: SweepRun, attempt: RunningAttempt, end: GangEnd) -> None:
    """The one place where an attempt's end becomes a state."""
    log_tail = run_dir.log_tail(attempt.spec.attempt_dir, end.rank) if end.summary is None else None
    result = _consequence(run, attempt, end, log_tail or "")
    run.running.remove(attempt)
    try:
        run.store.end_attempt(
            run.lease,
            attempt.row,
            state=result.state,
            cause=result.cause,
            reason=result.reason,
            end_step=result.end_step,
            summary=end.summary,
            log_tail=log_tail,
            held_seconds=end.held_seconds,
        )
    except FinishedIsFinal as taken:
        _let_go(run, attempt, taken)
        return
    if result.cause in (DISK_FULL, DISK_READ_ONLY):
        run.disk.was_full()
    run.trials.note(attempt.trial, result.state, run.clock.monotonic() + result.delay_seconds)
    _tell(run, attempt, result)
    run.announcer.trial_ended(attempt, result, run.trials.rows, run.clock.monotonic())
    _judge_gang(run, attempt, end, result)
    if result.state == "COMPLETE" and attempt.row.number > 1:
        prune_trial(run_dir.trial_dir(run.home, attempt.trial.fingerprint), run.sweep.checkpoint.keep)
    if result.state == "COMPLETE" and run.copier is not None:
        run.copier.add([attempt.trial.fingerprint])
    run.mirror.nudge()


def _is_at_another(run: SweepRun, attempt: RunningAttempt) -> bool:
    return any(other.gang is attempt.gang for other in run.running)


def _let_go(run: SweepRun, attempt: RunningAttempt, taken: FinishedIsFinal) -> None:
    """This controller slept past its lease, and another sweep that shares the trial has taken it over."""
    rows = run.store.attempts(attempt.trial.fingerprint)
    if any(row.token == attempt.row.token and row.sweep_id != run.sweep_id for row in rows):
        run.pool.forget(attempt.gang)  # with its gang
    elif not _is_at_another(run, attempt):
        run.pool.lose(attempt.gang, f"{attempt.name} is no longer ours: {taken}")


def _consequence(run: SweepRun, attempt: RunningAttempt, end: GangEnd, log_tail: str) -> Consequence:
    """A first attempt, as most are, needs no look at those before it."""
    reopened_after, number = attempt.trial.reopened_after, attempt.row.number
    attempts = run.store.attempts(attempt.trial.fingerprint) if number > reopened_after + 1 else []
    earlier = [one for one in attempts if reopened_after < one.number < number]
    ending = Ending(end.summary, end.error, end.rank_died, attempt.wish, end.exit_code, log_tail)
    result = consequence(ending, earlier, run.sweep.retry)
    if result.cause != GPU_OUT_OF_MEMORY:
        return result
    trial, tried = attempt.trial, run.micro_batches[attempt.trial.fingerprint]
    advice = after_out_of_memory(trial.config, run.sweep.resources.of(trial.arm, trial.axes), tried, end.error or "")
    return replace(result, reason=f"{result.reason}; {advice}")


def _tell(run: SweepRun, attempt: RunningAttempt, result: Consequence) -> None:
    loss = _final_loss(run, attempt) if result.state == "COMPLETE" else None
    if result.state not in ("WAITING", "CANCELED"):
        told = (result.state, loss, result.cause, result.reason, result.end_step)
        run.search.tell(attempt.trial.fingerprint, *told)
    with about(attempt.trial.fingerprint, attempt.row.number):
        run.view.tell(attempt.ended_line(result, loss))


def _final_loss(run: SweepRun, attempt: RunningAttempt) -> float | None:
    """The last validation on the slice; an earlier attempt's, where this one had nothing left to do."""
    if attempt.validation is not None:
        return attempt.validation.loss_nats
    measured = [row for row in run.store.curve(attempt.trial.fingerprint).validations if row.split == "slice"]
    return measured[-1].loss_nats if measured else None


def _judge_gang(run: SweepRun, attempt: RunningAttempt, end: GangEnd, result: Consequence) -> None:
    """Whatever went wrong, the other ranks may hang in a collective and the process may be poisoned. Not when a last
    checkpoint could not be written: then they wait for the next trial, or are at it."""
    if attempt.landing is not None and not end.rank_died and result.cause != HANG:
        return
    if end.summary is None:
        run.pool.blame(attempt.gang, end.rank, result.host_faults, result.cause)
        run.pool.lose(attempt.gang, f"gang dismissed, after attempt {attempt.row.number} of {attempt.name}")
    elif result.cause == CONTROLLER_LOST:
        run.pool.lose(attempt.gang, f"gang dismissed: {result.reason}")
    elif result.cause == PREEMPTED:
        run.pool.lose(attempt.gang, f"gang dismissed: its host is being taken away ({result.reason})")
    else:
        run.pool.took(attempt)
