"""What runs now, read from the store alone and cheaply: for whoever watches from another machine."""

from __future__ import annotations

from sqlalchemy import Connection, and_, func, select

from orchestrator.store import schema
from orchestrator.store.rows import RunningRow


def running(connection: Connection, sweep_id: int) -> list[RunningRow]:
    """The open attempts that the sweep's controller started, in execution order, each with its newest step."""
    attempt, link, trial, step = schema.attempt, schema.sweep_trial, schema.trial, schema.step_metric
    made = step.alias("made")
    newest = select(func.max(made.c.step)).where(made.c.attempt_id == attempt.c.id).correlate(attempt).scalar_subquery()
    query = (
        select(
            link.c.arm, link.c.axes, link.c.seed, attempt.c.fingerprint, attempt.c.number, attempt.c.hosts,
            attempt.c.started_at, attempt.c.resume_step, trial.c.num_steps,
            step.c.step, step.c.loss_nats, step.c.tokens_per_second,
        )
        .select_from(attempt)
        .join(link, and_(link.c.fingerprint == attempt.c.fingerprint, link.c.sweep_id == attempt.c.sweep_id))
        .join(trial, trial.c.fingerprint == attempt.c.fingerprint)
        .outerjoin(step, and_(step.c.attempt_id == attempt.c.id, step.c.step == newest))
        .where(attempt.c.sweep_id == sweep_id, attempt.c.ended_at.is_(None), link.c.current)
        .order_by(link.c.position)
    )  # fmt: skip
    return [
        RunningRow(
            arm=row.arm,
            axes=row.axes,
            seed=row.seed,
            fingerprint=row.fingerprint,
            attempt=row.number,
            hosts=tuple(row.hosts or ()),
            started_at=row.started_at,
            resume_step=row.resume_step,
            step=row.resume_step if row.step is None else row.step,
            num_steps=row.num_steps,
            loss_nats=row.loss_nats,
            tokens_per_second=row.tokens_per_second,
        )
        for row in connection.execute(query)
    ]
