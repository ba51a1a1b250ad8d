"""Attempts whose controller died: the next one adopts them, gang and all, or frees their trials to be tried again.

An open attempt belongs to its sweep, and a sweep to whoever holds its lease. So within a sweep adoption writes nothing
but an event; an attempt of a trial that several sweeps share moves to the sweep whose controller follows it now.
"""

from __future__ import annotations

from collections.abc import Sequence
from datetime import UTC, datetime

from sqlalchemy import Connection, select, update

from orchestrator.store import lease as leases
from orchestrator.store import schema
from orchestrator.store.attempts import close
from orchestrator.store.reader import attempt_row
from orchestrator.store.rows import CONTROLLER_LOST, AttemptRow, Lease, TrialTaken
from orchestrator.store.submission import add_event

ADOPTED = "adopted"


def find(connection: Connection, lease: Lease) -> list[AttemptRow]:
    """Open attempts of this sweep's trials that were begun by its own controllers, or by another sweep's whose lease
    has run out. The caller knows which of them it runs itself."""
    leases.check(connection, lease)
    link, trial, attempt = schema.sweep_trial, schema.trial, schema.attempt
    query = (
        select(attempt)
        .join(trial, trial.c.fingerprint == attempt.c.fingerprint)
        .join(link, link.c.fingerprint == trial.c.fingerprint)
        .where(link.c.sweep_id == lease.sweep_id, trial.c.state == schema.RUNNING, attempt.c.ended_at.is_(None))
        .order_by(link.c.position)
    )
    rows = [attempt_row(row) for row in connection.execute(query).mappings()]
    return [row for row in rows if _is_left(connection, lease, row)]


def _is_left(connection: Connection, lease: Lease, row: AttemptRow) -> bool:
    return row.sweep_id == lease.sweep_id or leases.holder(connection, row.sweep_id) is None


def adopt(connection: Connection, lease: Lease, row: AttemptRow, message: str) -> AttemptRow:
    """The attempt goes on under this lease. TrialTaken when another controller was faster, or it has ended."""
    leases.check(connection, lease)
    _claim(connection, lease, row)
    attempt = schema.attempt
    connection.execute(update(attempt).where(attempt.c.id == row.id).values(sweep_id=lease.sweep_id))
    add_event(connection, lease.sweep_id, ADOPTED, message, row.fingerprint, row.number)
    return attempt_row(connection.execute(select(attempt).where(attempt.c.id == row.id)).mappings().one())


def free(connection: Connection, lease: Lease, rows: Sequence[AttemptRow]) -> list[str]:
    """The attempts are over and their trials wait again; those that another controller took meanwhile are left alone.

    Returns the fingerprints of the trials that were freed.
    """
    leases.check(connection, lease)
    now = datetime.now(UTC)
    reason = "the controller went away while the attempt ran"
    freed = []
    for row in rows:
        try:
            _claim(connection, lease, row)
        except TrialTaken:
            continue
        held = _held_until_lost(connection, row, now)
        close(connection, row.id, ended_at=now, held_seconds=held, cause=CONTROLLER_LOST, reason=reason)
        connection.execute(
            update(schema.trial)
            .where(schema.trial.c.fingerprint == row.fingerprint)
            .values(state=schema.WAITING, cause=CONTROLLER_LOST, reason=reason, updated_at=now)
        )
        add_event(connection, lease.sweep_id, CONTROLLER_LOST, reason, row.fingerprint, row.number)
        freed.append(row.fingerprint)
    return freed


def _held_until_lost(connection: Connection, row: AttemptRow, now: datetime) -> float:
    """The last sign of life of its controller is the lease: hours or days may have passed since."""
    lost_at = leases.last_left_at(connection, row.sweep_id)
    until = now if lost_at is None else min(now, datetime.fromtimestamp(lost_at, UTC))
    return max(0.0, (until - row.started_at).total_seconds())


def _claim(connection: Connection, lease: Lease, row: AttemptRow) -> None:
    """Hold the attempt until the transaction ends. TrialTaken unless it is open, and as it was when it was read."""
    attempt = schema.attempt
    if row.sweep_id != lease.sweep_id and not leases.is_vacant(connection, row.sweep_id):
        raise TrialTaken(f"attempt {row.number} of trial {row.fingerprint}: its sweep has a controller again")
    found = connection.execute(
        select(attempt.c.sweep_id, attempt.c.ended_at).where(attempt.c.id == row.id).with_for_update()
    ).one()
    if found.ended_at is not None or found.sweep_id != row.sweep_id:
        raise TrialTaken(f"attempt {row.number} of trial {row.fingerprint} has ended, or another sweep has adopted it")
