"""What the gates of a ladder decided, and the trials that joined the sweep for it.

Kept in the sweep's ``verdict`` under ``gated``, oldest first. What let an arm through holds for ever; of what did not,
the newest holds, and only for the seeds that it saw: with more of them the gate is read anew.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any

from sqlalchemy import Connection, select, update

from orchestrator.store import schema
from orchestrator.store.submission import add_event, join_trials, verdict_seeds
from orchestrator.sweep import arm_key

if TYPE_CHECKING:
    from orchestrator.plan import PlannedTrial

GATED = "gate"
"""The kind of the events."""


@dataclass(frozen=True)
class GatePassage:
    """An arm before a rung: whether it goes on to it, and why."""

    arm: str
    rung: int
    """The one that it would go on to, from 1."""
    axes: Mapping[str, Any]
    below: int
    """The rung whose verdict was read."""
    axes_below: Mapping[str, Any]
    is_through: bool
    reason: str
    """The verdict with its interval, in words."""
    decision: str
    delta_nats: float | None
    low_nats: float | None
    high_nats: float | None
    read: tuple[str, ...]
    """Fingerprints of the trials behind the verdict."""
    formula: str
    seeds: Mapping[str, Any]
    """Those of the verdict."""
    at: datetime
    by_user: bool = False
    """Let through against the gate."""

    @property
    def key(self) -> str:
        return arm_key(self.arm, self.axes)


def passages(verdict: Mapping[str, Any]) -> list[GatePassage]:
    """Out of a sweep's ``verdict``, oldest first."""
    return [
        GatePassage(**{**one, "read": tuple(one["read"]), "at": datetime.fromisoformat(one["at"])})
        for one in verdict.get("gated", ())
    ]


def standing_passages(verdict: Mapping[str, Any], settings: Mapping[str, Any]) -> dict[str, GatePassage]:
    """Those that hold now, by arm and rung (``GatePassage.key``)."""
    seeds, found = verdict_seeds(settings), dict[str, GatePassage]()
    for one in passages(verdict):
        earlier = found.get(one.key)
        if earlier is None or not earlier.is_through:
            found[one.key] = one
    return {key: one for key, one in found.items() if one.is_through or dict(one.seeds) == seeds}


def let_through(connection: Connection, sweep_name: str) -> set[str]:
    """Keys of what no gate holds back any more; none of a sweep that is not known yet."""
    verdict = connection.scalar(select(schema.sweep.c.verdict).where(schema.sweep.c.name == sweep_name))
    return {one.key for one in passages(verdict or {}) if one.is_through}


def promote(
    connection: Connection, sweep_id: int, decided: Sequence[GatePassage], trials: Sequence[PlannedTrial]
) -> bool:
    """Note what a rung decided and add the trials of those that go on, in one transaction; False, and nothing is done,
    when any of it was decided before."""
    row = connection.execute(select(schema.sweep).where(schema.sweep.c.id == sweep_id).with_for_update()).one()
    standing = standing_passages(row.verdict, row.settings)
    if any(one.key in standing for one in decided):
        return False
    join_trials(connection, sweep_id, trials)
    _note(connection, sweep_id, row.verdict, decided)
    return True


def promote_anyway(connection: Connection, sweep_id: int, keys: Sequence[str]) -> list[GatePassage]:
    """What a gate has held back goes on all the same; returns what does. A controller adds the trials."""
    row = connection.execute(select(schema.sweep).where(schema.sweep.c.id == sweep_id).with_for_update()).one()
    held = [one for one in standing_passages(row.verdict, row.settings).values() if not one.is_through]
    wanted = [
        replace(one, is_through=True, by_user=True, at=_now(), reason=f"by the user, against the gate: {one.reason}")
        for one in held
        if one.key in keys
    ]
    if wanted:
        _note(connection, sweep_id, row.verdict, wanted)
    return wanted


def _note(connection: Connection, sweep_id: int, verdict: Mapping[str, Any], decided: Sequence[GatePassage]) -> None:
    new = [{**asdict(one), "at": one.at.isoformat(timespec="seconds")} for one in decided]
    changed = {**verdict, "gated": [*verdict.get("gated", ()), *new]}
    connection.execute(update(schema.sweep).where(schema.sweep.c.id == sweep_id).values(verdict=changed))
    for one in decided:
        does = "goes on to" if one.is_through else "does not go on to"
        add_event(connection, sweep_id, GATED, f"{one.arm} {does} rung {one.rung}: {one.reason}")


def _now() -> datetime:
    return datetime.now(UTC)
