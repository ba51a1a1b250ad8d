"""The running attempts, a look further: their new records past the search and into the store, and who hangs."""

from __future__ import annotations

from collections.abc import Sequence

from models import run_dir
from models.run_dir import Record
from orchestrator.controller.running import RunningAttempt, up_to
from orchestrator.controller.sweep_run import SweepRun
from orchestrator.failures import HANG, Wish
from orchestrator.gang import GangEnd


def follow(run: SweepRun, attempts: Sequence[RunningAttempt]) -> list[tuple[RunningAttempt, GangEnd]]:
    """Those that have ended, and how; all their records are in the store by then.

    The records of all attempts are one transaction: with a hundred gangs at work, one each would be the controller's
    whole time.
    """
    ends: list[tuple[RunningAttempt, GangEnd]] = []
    news: list[tuple[RunningAttempt, list[Record]]] = []
    for attempt in attempts:
        end = _look(run, attempt, news)
        if end is not None:
            ends.append((attempt, end))
    run.store.record_all(run.lease, [(attempt.row, records) for attempt, records in news])
    now = run.clock.monotonic()
    for attempt, records in news:
        for record in records:
            attempt.observe(record, now)
    return ends


def _look(run: SweepRun, attempt: RunningAttempt, news: list[tuple[RunningAttempt, list[Record]]]) -> GangEnd | None:
    """Its end, once it has one; what it has written since the last look goes into ``news``."""
    now = attempt.followed_at = run.clock.monotonic()
    if attempt.landing is not None:
        return attempt.landing.poll() or _hung(run, attempt)
    end = attempt.gang.poll_end()
    progress = attempt.gang.progress()
    if progress is not None:
        attempt.note(progress, now)
    if end is not None or (progress is not None and progress[0] > attempt.offset):
        news.append((attempt, _read(run, attempt)))
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


def _read(run: SweepRun, attempt: RunningAttempt) -> list[Record]:
    """New records, past the search. Nothing after a divergence rule fired is kept."""
    records, attempt.offset = run_dir.read_records(attempt.spec.attempt_dir, attempt.offset)
    if attempt.wish is not None and attempt.wish.kind == "divergence":
        return []
    stop = run.search.decide(attempt.trial.fingerprint, records)
    if stop is not None:
        records = up_to(stop, records)
        attempt.wish = Wish("divergence", stop.rule, stop.reason, stop.step)
        attempt.gang.stop(attempt.row.token)
    return records
