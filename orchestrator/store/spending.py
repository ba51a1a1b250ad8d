"""What a sweep has used up, over all its runs and controllers, and what it may.

Charged is the time from an attempt's start until its end was seen, with all CPUs and GPUs of its gang: what an
attempt held, not what it made of it. A trial that another sweep runs is charged to that one.
"""

from __future__ import annotations

from datetime import UTC, datetime

from sqlalchemy import Connection, and_, func, select

from orchestrator.store import lease as leases
from orchestrator.store import schema
from orchestrator.store.reader import events
from orchestrator.store.rows import BUDGET_EXTENDED, BudgetLine, Spent
from orchestrator.sweep import limits


def spent(connection: Connection, sweep_id: int) -> Spent:
    """One pass over an index that holds all it needs: attempts are as many as trials, and more."""
    attempt = schema.attempt
    of_sweep = select(
        func.coalesce(func.sum(attempt.c.held_seconds * attempt.c.gpus), 0.0),
        func.coalesce(func.sum(attempt.c.held_seconds * attempt.c.cpus), 0.0),
    ).where(attempt.c.sweep_id == sweep_id)
    gpu_seconds, cpu_seconds = connection.execute(of_sweep).one()
    still_open = select(attempt.c.started_at, attempt.c.gpus, attempt.c.cpus).where(
        attempt.c.sweep_id == sweep_id, attempt.c.ended_at.is_(None)
    )
    now = datetime.now(UTC)
    for started_at, gpus, cpus in connection.execute(still_open):
        seconds = max(0.0, (now - started_at).total_seconds())
        gpu_seconds += seconds * (gpus or 0.0)
        cpu_seconds += seconds * (cpus or 0.0)
    return Spent(gpu_seconds / 3600, cpu_seconds / 3600, leases.held_seconds(connection, sweep_id) / 3600)


def budget(connection: Connection, sweep_id: int) -> list[BudgetLine]:
    """A line for each budget that the last submission declared."""
    settings = connection.scalars(select(schema.sweep.c.settings).where(schema.sweep.c.id == sweep_id)).one()
    declared = {name: hours for name, hours in settings.get("budget", {}).items() if hours is not None}
    if not declared:
        return []
    added = [event.message for event in events(connection, sweep_id, 0, BUDGET_EXTENDED, None)]
    used = spent(connection, sweep_id)
    return [BudgetLine(name, limit, getattr(used, name)) for name, limit in limits(declared, added).items()]


def pace(connection: Connection, sweep_id: int) -> tuple[float, float, float, int]:
    """What complete trials took, with all their attempts, as far as that was noted: FLOPs, GPU-hours, CPU-hours and
    how many trials that are."""
    attempt, link, trial = schema.attempt, schema.sweep_trial, schema.trial
    of_trial = (
        select(
            attempt.c.fingerprint,
            func.sum(attempt.c.held_seconds * attempt.c.gpus).label("gpu_seconds"),
            func.sum(attempt.c.held_seconds * attempt.c.cpus).label("cpu_seconds"),
            func.min(attempt.c.resume_step).label("first_step"),  # above 0 of a branch: what is before is its trunk's
        )
        .join(link, and_(link.c.fingerprint == attempt.c.fingerprint, link.c.sweep_id == sweep_id, link.c.current))
        .where(attempt.c.held_seconds.is_not(None), attempt.c.cpus.is_not(None))
        .group_by(attempt.c.fingerprint)
        .subquery()
    )
    done = trial.c.training_flops * (1.0 - of_trial.c.first_step * 1.0 / trial.c.num_steps)
    of_sweep = (
        select(
            func.coalesce(func.sum(done), 0.0),
            func.coalesce(func.sum(of_trial.c.gpu_seconds), 0.0) / 3600,
            func.coalesce(func.sum(of_trial.c.cpu_seconds), 0.0) / 3600,
            func.count(),
        )
        .join(of_trial, of_trial.c.fingerprint == trial.c.fingerprint)
        .where(trial.c.state == schema.COMPLETE)
    )
    flops, gpu_hours, cpu_hours, num_trials = connection.execute(of_sweep).one()
    return flops, gpu_hours, cpu_hours, num_trials


def ended_by_cause(connection: Connection, sweep_id: int) -> dict[str, int]:
    """Of the attempts that this sweep's controllers started, how many each cause ended; ``complete`` where none did."""
    attempt = schema.attempt
    counted = select(attempt.c.cause, func.count()).group_by(attempt.c.cause)
    counted = counted.where(attempt.c.sweep_id == sweep_id, attempt.c.ended_at.is_not(None))
    return {cause or "complete": number for cause, number in connection.execute(counted)}
