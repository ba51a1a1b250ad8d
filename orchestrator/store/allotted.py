"""Confirming trials that a look gave to the arms that it left undecided.

Kept in the sweep's ``verdict`` under ``allocated``, oldest first.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any

from sqlalchemy import Connection, select, update

from orchestrator.store import schema
from orchestrator.store.rows import Allotment
from orchestrator.store.submission import add_event, join_trials

if TYPE_CHECKING:
    from orchestrator.plan import PlannedTrial

ALLOCATED = "seeds_allocated"


def allot(
    connection: Connection,
    sweep_id: int,
    axes: Mapping[str, Any],
    look: int,
    trials: Sequence[PlannedTrial],
    reasons: Mapping[str, str],
    formula: str,
) -> bool:
    """Note what a look decided and add the trials that it gave, in one transaction; False when it was noted before."""
    query = select(schema.sweep.c.verdict).where(schema.sweep.c.id == sweep_id).with_for_update()
    verdict = connection.scalars(query).one()
    if find_allotment(verdict, axes, look) is not None:
        return False
    join_trials(connection, sweep_id, trials)
    now = {
        "axes": dict(axes),
        "look": look,
        "at": datetime.now(UTC).isoformat(timespec="seconds"),
        "trials": [trial.fingerprint for trial in trials],
        "reasons": dict(reasons),
        "formula": formula,
    }
    verdict = {**verdict, "allocated": [*verdict.get("allocated", ()), now]}
    connection.execute(update(schema.sweep).where(schema.sweep.c.id == sweep_id).values(verdict=verdict))
    for arm, reason in reasons.items():
        add_event(connection, sweep_id, ALLOCATED, f"{arm}: {reason}")
    return True


def find_allotment(verdict: Mapping[str, Any], axes: Mapping[str, Any], look: int) -> Allotment | None:
    return next((one for one in allotments(verdict) if one.look == look and dict(one.axes) == dict(axes)), None)


def allotments(verdict: Mapping[str, Any]) -> list[Allotment]:
    """Out of a sweep's ``verdict``, oldest first."""
    return [
        Allotment(
            axes=one["axes"],
            look=one["look"],
            at=datetime.fromisoformat(one["at"]),
            trials=tuple(one["trials"]),
            reasons=one["reasons"],
            formula=one["formula"],
        )
        for one in verdict.get("allocated", ())
    ]
