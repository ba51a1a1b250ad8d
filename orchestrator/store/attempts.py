"""The life of an attempt: started, recorded, ended. What becomes of one whose controller died: ``orphans``.

Only here does a trial's state move, and always in the transaction that checked the lease.
"""

from __future__ import annotations

import math
import secrets
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from typing import Any

from sqlalchemy import Connection, bindparam, func, insert, select, update

from models.config import Layout
from models.run_dir import DiagnosticRecord, Record, StepRecord, Summary, ValidationRecord
from orchestrator.store import ended, schema, shared_steps
from orchestrator.store import lease as leases
from orchestrator.store.layers import layer_rows
from orchestrator.store.reader import attempt_row
from orchestrator.store.rows import AttemptRow, FinishedIsFinal, Lease, TrialTaken
from orchestrator.store.submission import add_event, insert_missing, storable

_TRIAL, _ATTEMPT = schema.trial, schema.attempt
# Built once: these are a controller's time, and SQLAlchemy takes longer to build one than SQLite to run it.
_CLAIM = (
    update(_TRIAL)
    .where(_TRIAL.c.fingerprint == bindparam("of"), _TRIAL.c.state == schema.WAITING)
    .values(state=schema.RUNNING, cause=None, reason=None, end_step=None, updated_at=bindparam("now"))
)
_LAST_NUMBER = select(func.max(_ATTEMPT.c.number)).where(_ATTEMPT.c.fingerprint == bindparam("of"))
_OPEN = insert(_ATTEMPT).returning(*_ATTEMPT.c)
_STANDING = (
    select(_TRIAL.c.state, _ATTEMPT.c.ended_at, _ATTEMPT.c.sweep_id)
    .join(_ATTEMPT, _ATTEMPT.c.fingerprint == _TRIAL.c.fingerprint)
    .where(_ATTEMPT.c.id == bindparam("of"))
    .with_for_update(of=_TRIAL)
)
_CLOSE = update(_ATTEMPT).where(_ATTEMPT.c.id == bindparam("of"))
_MOVE = update(_TRIAL).where(_TRIAL.c.fingerprint == bindparam("of"))


def start(
    connection: Connection,
    lease: Lease,
    fingerprint: str,
    layout: Layout,
    provenance: Mapping[str, Any],
    resume_step: int,
    resumed_from: int | None,
    branched_from: str | None = None,
    cpus: float | None = None,
    gpus: float | None = None,
    hosts: Sequence[str] = (),
    num_earlier: int | None = None,
) -> AttemptRow:
    """Claim a WAITING trial and open its next attempt."""
    leases.check(connection, lease)
    now = datetime.now(UTC)
    claimed = connection.execute(_CLAIM, {"of": fingerprint, "now": now})
    if claimed.rowcount != 1:
        state = connection.scalar(select(schema.trial.c.state).where(schema.trial.c.fingerprint == fingerprint))
        raise TrialTaken(f"trial {fingerprint} is {state or 'unknown'}; only a WAITING trial can be started")
    last = connection.scalar(_LAST_NUMBER, {"of": fingerprint})
    if num_earlier is not None and (last or 0) != num_earlier:
        raise TrialTaken(f"trial {fingerprint} has had {last or 0} attempts, {num_earlier} when it was read")
    values = {
        "fingerprint": fingerprint,
        "number": (last or 0) + 1,
        "token": secrets.token_hex(4),
        "sweep_id": lease.sweep_id,
        "layout": layout.model_dump(mode="json"),
        "provenance": dict(provenance),
        "resume_step": resume_step,
        "resumed_from_attempt": resumed_from,
        "branched_from": branched_from,
        "cpus": cpus,
        "gpus": gpus,
        "hosts": list(hosts) or None,
        "started_at": now,
    }
    row = attempt_row(connection.execute(_OPEN, values).mappings().one())
    if branched_from is not None:
        shared_steps.take_over(connection, row)
    return row


def open_attempt(connection: Connection, lease: Lease, fingerprint: str) -> AttemptRow | None:
    """The trial's attempt that has not ended, if this sweep's controller started it."""
    attempt = schema.attempt
    mine = (attempt.c.fingerprint == fingerprint, attempt.c.sweep_id == lease.sweep_id, attempt.c.ended_at.is_(None))
    row = connection.execute(select(attempt).where(*mine)).mappings().one_or_none()
    return None if row is None else attempt_row(row)


def has_ended(connection: Connection, attempt: AttemptRow, cause: str, reason: str) -> bool:
    """Whether the attempt has ended in just this way."""
    table = schema.attempt
    ended = (table.c.id == attempt.id, table.c.ended_at.is_not(None), table.c.cause == cause, table.c.reason == reason)
    return connection.execute(select(table.c.id).where(*ended)).one_or_none() is not None


def record(connection: Connection, lease: Lease, batch: Sequence[tuple[AttemptRow, Sequence[Record]]]) -> None:
    """Keep attempts' records; those already there stay. An ended attempt still takes them (recovery reads late)."""
    leases.check(connection, lease)
    everything = [(attempt.id, item) for attempt, records in batch for item in records]
    steps = [_finite(item, of) for of, item in everything if isinstance(item, StepRecord)]
    validations = [_finite(item, of) for of, item in everything if isinstance(item, ValidationRecord)]
    insert_missing(connection, schema.step_metric, steps)
    if validations:
        insert_missing(connection, schema.validation, validations)
        ended.renew(connection, (attempt.fingerprint for attempt, _ in batch))
    probed = [(of, item) for of, item in everything if isinstance(item, DiagnosticRecord)]
    layers = [{"attempt_id": of, **row} for of, item in probed for row in layer_rows(item)]
    insert_missing(connection, schema.layer_diagnostic, layers)


def _finite(item: StepRecord | ValidationRecord, attempt_id: int) -> dict[str, Any]:
    values: dict[str, Any] = dict(item)
    del values["kind"]
    for key, value in list(values.items()):
        if isinstance(value, float) and not math.isfinite(value):
            values[key] = None
            values["nonfinite"] = True
    return {"attempt_id": attempt_id, **values}


def end(
    connection: Connection,
    lease: Lease,
    attempt: AttemptRow,
    state: str,
    cause: str,
    reason: str,
    end_step: int | None,
    summary: Summary | None,
    log_tail: str | None,
    held_seconds: float | None = None,
) -> None:
    """Close the attempt and move its trial to ``state``; a trial that is not RUNNING in this attempt is left alone."""
    leases.check(connection, lease)
    if state == schema.RUNNING or state not in schema.STATES:
        allowed = ", ".join(other for other in schema.STATES if other != schema.RUNNING)
        raise ValueError(f"an attempt can't end in state {state}; allowed: {allowed}")
    found = connection.execute(_STANDING, {"of": attempt.id}).one()
    if found.sweep_id != lease.sweep_id:
        raise FinishedIsFinal(
            f"attempt {attempt.number} of trial {attempt.fingerprint} was adopted by another sweep that shares it"
        )
    is_open, running = found.ended_at is None, found.state
    if running != schema.RUNNING or not is_open:
        raise FinishedIsFinal(
            f"attempt {attempt.number} of trial {attempt.fingerprint} can't end in {state}: "
            f"the trial is {running} and the attempt has {'not ' if is_open else ''}ended"
        )
    now = datetime.now(UTC)
    reason, log_tail = storable(reason), None if log_tail is None else storable(log_tail)
    step = summary.step if end_step is None and summary is not None else end_step
    held = (now - attempt.started_at).total_seconds() if held_seconds is None else held_seconds
    closing = _closing(attempt, summary, now) | {"held_seconds": held}
    close(connection, attempt.id, cause=cause, reason=reason, end_step=step, log_tail=log_tail, **closing)
    kept = None if state == schema.WAITING else step
    moved = {"state": state, "cause": cause, "reason": reason, "end_step": kept, "updated_at": now}
    connection.execute(_MOVE, {"of": attempt.fingerprint, **moved})
    if state == schema.COMPLETE:
        ended.keep(connection, attempt.fingerprint)


def _closing(attempt: AttemptRow, summary: Summary | None, now: datetime) -> dict[str, Any]:
    """Measurements of an ended attempt; a killed one left no summary, but held its hosts until now."""
    if summary is None:
        return {"ended_at": now, "seconds": (now - attempt.started_at).total_seconds()}
    speed = summary.tokens_per_second
    return {
        "ended_at": now,
        "provenance": {**attempt.provenance, "backend": summary.backend},
        "seconds": summary.seconds if math.isfinite(summary.seconds) else None,
        "tokens_per_second": speed if speed is not None and math.isfinite(speed) else None,
        "peak_memory_bytes": summary.peak_memory_bytes,
    }


def close(connection: Connection, attempt_id: int, **values: object) -> None:
    connection.execute(_CLOSE, {"of": attempt_id, **values})


def reopen(connection: Connection, sweep_id: int, fingerprints: Sequence[str]) -> int:
    """FAILED and CANCELED trials of the sweep wait again, with a fresh retry budget; others are left alone."""
    attempt, trial = schema.attempt, schema.trial
    last = select(func.coalesce(func.max(attempt.c.number), 0)).where(attempt.c.fingerprint == trial.c.fingerprint)
    changes = {"cause": None, "reason": None, "end_step": None, "reopened_after": last.scalar_subquery()}
    ended = (schema.FAILED, schema.CANCELED)
    return _move(connection, sweep_id, fingerprints, ended, schema.WAITING, "reopened", changes)


def cancel(connection: Connection, sweep_id: int, fingerprints: Sequence[str]) -> int:
    """WAITING trials of the sweep are CANCELED, for every sweep that shares them; others are left alone."""
    changes = {"cause": "canceled", "reason": "canceled by the user"}
    return _move(connection, sweep_id, fingerprints, (schema.WAITING,), schema.CANCELED, "canceled", changes)


def _move(
    connection: Connection,
    sweep_id: int,
    fingerprints: Sequence[str],
    states: tuple[str, ...],
    state: str,
    kind: str,
    changes: Mapping[str, Any],
) -> int:
    trial, link = schema.trial, schema.sweep_trial
    in_sweep = select(link.c.fingerprint).where(link.c.sweep_id == sweep_id)
    num_moved = 0
    for fingerprint in sorted(set(fingerprints)):
        moved = connection.execute(
            update(trial)
            .where(trial.c.fingerprint == fingerprint, trial.c.state.in_(states), trial.c.fingerprint.in_(in_sweep))
            .values(state=state, updated_at=datetime.now(UTC), **changes)
        ).rowcount
        if moved:
            add_event(connection, sweep_id, kind, f"{kind} by the user", fingerprint)
            num_moved += 1
    return num_moved
