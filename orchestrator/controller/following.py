"""A running attempt, a look further: its new records into the store and past the search, and whether it hangs."""

from __future__ import annotations

from models import run_dir
from models.run_dir import StepRecord
from orchestrator.controller.running import RunningAttempt, up_to
from orchestrator.controller.sweep_run import SweepRun
from orchestrator.failures import HANG, Wish
from orchestrator.gang import GangEnd


def follow(run: SweepRun, attempt: RunningAttempt) -> GangEnd | None:
    """Its end, once it has one; all its records are in the store by then."""
    now = attempt.followed_at = run.clock.monotonic()
    if attempt.landing is not None:
        return attempt.landing.poll() or _hung(run, attempt)
    end = attempt.gang.poll_end()
    progress = attempt.gang.progress()
    if progress is not None:
        attempt.note(progress, now)
    if end is not None or (progress is not None and progress[0] > attempt.offset):
        _read(run, attempt)
    if end is not None and end.landing is not None:
        attempt.landing, end = end.landing, None
        attempt.gang.free()
        run.pool.took(attempt)
    return end or _hung(run, attempt)


def _hung(run: SweepRun, attempt: RunningAttempt) -> GangEnd | None:
    """The end that is made of an attempt which does nothing any more. Where it stands is written down before."""
    silent, limit = attempt.silent_seconds(run.clock.monotonic()), attempt.patience_seconds(run.sweep.retry)
    if silent <= limit:
        return None
    attempt.gang.dump_stacks()
    reason = f"hung: nothing done for {silent:.0f} s after step {attempt.step}; stacks-rank*.txt say where"
    if attempt.wish is None:
        attempt.wish = Wish("hang", HANG, reason)
    return GangEnd(summary=None, error=reason)


def _read(run: SweepRun, attempt: RunningAttempt) -> None:
    """New records: into the store, then past the search. Nothing after a divergence rule fired is kept."""
    records, attempt.offset = run_dir.read_records(attempt.spec.attempt_dir, attempt.offset)
    if attempt.wish is not None and attempt.wish.kind == "divergence":
        return
    stop = run.search.decide(attempt.trial.fingerprint, records)
    if stop is not None:
        records = up_to(stop, records)
        attempt.wish = Wish("divergence", stop.rule, stop.reason, stop.step)
        attempt.gang.stop(attempt.row.token)
    run.store.record(run.lease, attempt.row, records)
    for record in records:
        if isinstance(record, StepRecord):
            attempt.observe(record, run.clock.monotonic())
