"""Decisions of rank pruning, and the trials that they end."""

from __future__ import annotations

import json
from collections.abc import Sequence
from datetime import UTC, datetime
from typing import Any

from sqlalchemy import Connection, func, insert, select, update

from orchestrator.store import lease as leases
from orchestrator.store import schema
from orchestrator.store.rows import Lease, RankDecision
from orchestrator.store.submission import add_event

RANK = "rank"


def add_decision(connection: Connection, lease: Lease, decision: RankDecision, words: str) -> None:
    """Kept before anything is stopped for it, the marks of the audit included."""
    leases.check(connection, lease)
    values = {
        "sweep_id": lease.sweep_id,
        "at": datetime.now(UTC),
        "arm": decision.arm,
        "axes": dict(decision.axes),
        "fraction": decision.fraction,
        "seeds": list(decision.seeds),
        "losses_nats": [[lr, loss] for lr, loss in decision.losses_nats.items()],
        "dropped": list(decision.dropped),
        "audited": list(decision.audited),
        "formula": decision.formula,
    }
    connection.execute(insert(schema.rank_decision).values(**values))
    add_event(connection, lease.sweep_id, "pruned_by_rank", words)


def decisions(connection: Connection, sweep_id: int) -> list[RankDecision]:
    """Oldest first."""
    table = schema.rank_decision
    found = connection.execute(select(table).where(table.c.sweep_id == sweep_id).order_by(table.c.id)).mappings()
    return [
        RankDecision(
            arm=row["arm"],
            axes=row["axes"],
            fraction=row["fraction"],
            seeds=tuple(row["seeds"]),
            losses_nats={float(lr): loss for lr, loss in row["losses_nats"]},
            dropped=tuple(map(float, row["dropped"])),
            audited=tuple(map(float, row["audited"])),
            formula=row["formula"],
        )
        for row in found
    ]


def prune(connection: Connection, lease: Lease, fingerprints: Sequence[str], reason: str) -> list[str]:
    """WAITING trials become PRUNED where their last attempt stopped, or at step 0; returns which those were."""
    leases.check(connection, lease)
    trial, attempt = schema.trial, schema.attempt
    last = select(func.coalesce(func.max(attempt.c.end_step), 0)).where(attempt.c.fingerprint == trial.c.fingerprint)
    done = []
    for fingerprint in sorted(set(fingerprints)):
        moved = connection.execute(
            update(trial)
            .where(trial.c.fingerprint == fingerprint, trial.c.state == schema.WAITING)
            .values(
                state=schema.PRUNED,
                cause=RANK,
                reason=reason,
                end_step=last.scalar_subquery(),
                updated_at=datetime.now(UTC),
            )
        ).rowcount
        done += [fingerprint] if moved else []
    return done


def reopen_pruned(connection: Connection, sweep_id: int, settings: dict[str, Any]) -> None:
    """Trials that another sweep stopped for its own reasons wait again, and so do a sweep's own once it prunes no more.

    They go on from their last checkpoint. What this sweep's decisions stopped stays stopped.
    """
    link, trial = schema.sweep_trial, schema.trial
    rows = connection.execute(
        select(link.c.fingerprint, link.c.arm, link.c.axes, trial.c.lr)
        .join(trial, trial.c.fingerprint == link.c.fingerprint)
        .where(link.c.sweep_id == sweep_id, link.c.current, trial.c.state == schema.PRUNED)
    ).all()
    if not rows:
        return
    ours = decisions(connection, sweep_id) if (settings.get("prune") or {}).get("rank") else []
    for fingerprint, arm, axes, lr in rows:
        if any(_covers(one, arm, axes, lr) for one in ours):
            continue
        values = {"state": schema.WAITING, "cause": None, "reason": None, "end_step": None}
        connection.execute(
            update(trial).where(trial.c.fingerprint == fingerprint).values(updated_at=datetime.now(UTC), **values)
        )
        add_event(connection, sweep_id, "reopened", "had been pruned by rank among other trials", fingerprint)


def _covers(decision: RankDecision, arm: str, axes: dict[str, Any], lr: float) -> bool:
    same = all(_text(axes.get(name)) == _text(value) for name, value in decision.axes.items())
    return decision.arm == arm and same and lr in decision.dropped


def _text(value: object) -> str:
    return json.dumps(value, sort_keys=True, default=str)
