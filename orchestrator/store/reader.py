"""Reading rows back as typed snapshots."""

from __future__ import annotations

import difflib
from datetime import datetime
from typing import Any

from sqlalchemy import JSON, Boolean, Connection, RowMapping, func, select, text

from models.config import Layout, TrialConfig
from orchestrator.store import schema
from orchestrator.store.rows import (
    AttemptRow,
    Curve,
    EventRow,
    LayerRow,
    StepRow,
    SweepRow,
    TailRow,
    TrialRow,
    ValidationRow,
)
from orchestrator.sweep import UserError


def sweeps(connection: Connection) -> list[SweepRow]:
    """Every sweep, in the order of their first submission."""
    rows = connection.execute(select(schema.sweep).order_by(schema.sweep.c.id)).mappings().all()
    return [_sweep_row(connection, row) for row in rows]


def sweep(connection: Connection, name: str) -> SweepRow:
    row = connection.execute(select(schema.sweep).where(schema.sweep.c.name == name)).mappings().one_or_none()
    if row is None:
        raise UserError(_unknown_sweep(connection, name))
    return _sweep_row(connection, row)


def _unknown_sweep(connection: Connection, name: str) -> str:
    names = list(connection.scalars(select(schema.sweep.c.name).order_by(schema.sweep.c.name)))
    if not names:
        return f"no sweep {name!r} in the store: it holds none yet"
    nearest = difflib.get_close_matches(name, names, n=1)
    hint = f" (did you mean {nearest[0]!r}?)" if nearest else ""
    return f"no sweep {name!r} in the store{hint}; it holds: {', '.join(names)}"


def _sweep_row(connection: Connection, row: RowMapping) -> SweepRow:
    arm = schema.arm
    arms = connection.scalars(
        select(arm.c.name).where(arm.c.sweep_id == row["id"], arm.c.current).order_by(arm.c.position)
    )
    values = dict(row)
    values["overrides"] = tuple(values["overrides"])
    return SweepRow(arms=tuple(arms), **values)


def trials(connection: Connection, sweep_id: int) -> list[TrialRow]:
    """The current trials of a sweep, in execution order."""
    link, trial, attempt = schema.sweep_trial, schema.trial, schema.attempt
    num_attempts = select(func.count()).where(attempt.c.fingerprint == trial.c.fingerprint).scalar_subquery()
    shared = (
        trial.c.config, trial.c.state, trial.c.cause, trial.c.reason, trial.c.end_step, trial.c.reopened_after,
        trial.c.num_parameters, trial.c.training_flops,
    )  # fmt: skip
    own = (
        link.c.fingerprint, link.c.arm, link.c.axes, link.c.seed, link.c.layout, link.c.position,
        link.c.mlflow_run_id,
    )  # fmt: skip
    query = (
        select(*own, *shared, num_attempts.label("num_attempts"))
        .join(trial, trial.c.fingerprint == link.c.fingerprint)
        .where(link.c.sweep_id == sweep_id, link.c.current)
        .order_by(link.c.position)
    )
    return [_trial_row(row) for row in connection.execute(query).mappings()]


def trial_changes(connection: Connection, sweep_id: int, since: datetime) -> list[dict[str, Any]]:
    """What can change of the sweep's current trials that were written since."""
    link, trial, attempt = schema.sweep_trial, schema.trial, schema.attempt
    num_attempts = select(func.count()).where(attempt.c.fingerprint == trial.c.fingerprint).scalar_subquery()
    changing = (
        trial.c.fingerprint,
        link.c.arm,
        link.c.position,
        trial.c.state,
        trial.c.cause,
        trial.c.reason,
        trial.c.end_step,
    )
    query = (
        select(*changing, trial.c.reopened_after, num_attempts.label("num_attempts"))
        .join(link, trial.c.fingerprint == link.c.fingerprint)
        .where(link.c.sweep_id == sweep_id, link.c.current, trial.c.updated_at >= since)
    )
    return [dict(row) for row in connection.execute(query).mappings()]


def _trial_row(row: RowMapping) -> TrialRow:
    values = dict(row)
    values["config"] = TrialConfig.model_validate(values["config"])
    values["layout"] = Layout.model_validate(values["layout"])
    values["training_flops"] = int(values["training_flops"])
    return TrialRow(**values)


def attempts(connection: Connection, fingerprint: str) -> list[AttemptRow]:
    """A trial's attempts, oldest first."""
    attempt = schema.attempt
    query = select(attempt).where(attempt.c.fingerprint == fingerprint).order_by(attempt.c.number)
    return [attempt_row(row) for row in connection.execute(query).mappings()]


def attempt_row(row: RowMapping) -> AttemptRow:
    values = dict(row)
    values["layout"] = Layout.model_validate(values["layout"])
    values["hosts"] = tuple(values["hosts"] or ())
    values["resumed_from"] = values.pop("resumed_from_attempt")
    return AttemptRow(**values)


_STEPS = """
SELECT p.number AS attempt, m.step, m.tokens, m.fraction, m.lr, m.loss_nats, m.gradient_norm, m.tokens_per_second,
       m.nonfinite
FROM attempt_span p JOIN step_metric m ON m.attempt_id = p.attempt_id AND m.step <= p.last_step
WHERE p.fingerprint = :fingerprint AND p.number >= :attempt AND (p.number > :attempt OR m.step > :step)
ORDER BY m.step, p.number
"""

_VALIDATIONS = """
SELECT attempt, step, split, tokens, fraction, loss_nats, bits_per_byte, num_tokens, num_bytes, nonfinite
FROM curve_validation WHERE fingerprint = :fingerprint ORDER BY step, attempt, split DESC
"""


def curve(connection: Connection, fingerprint: str, after: tuple[int, int] | None) -> Curve:
    """What the reader's rule keeps of a trial; ``after`` leaves out steps up to that (attempt, step)."""
    attempt, step = after or (0, -1)
    cursor = {"fingerprint": fingerprint, "attempt": attempt, "step": step}
    steps = connection.execute(text(_STEPS).columns(nonfinite=Boolean), cursor)
    validations = connection.execute(text(_VALIDATIONS).columns(nonfinite=Boolean), {"fingerprint": fingerprint})
    return Curve(
        steps=tuple(StepRow(*row) for row in steps), validations=tuple(ValidationRow(*row) for row in validations)
    )


_LAYERS = """
SELECT p.number AS attempt, d.step, d.layer, d.tokens, d.fraction, d.first_token_attention, d.max_activation,
       d.attention_output_rms, d.ffn_output_rms, d.residual_rms, d.gradient_norm, d.update_ratio, d.heads, d.gates
FROM attempt_span p JOIN layer_diagnostic d ON d.attempt_id = p.attempt_id AND d.step <= p.last_step
WHERE p.fingerprint = :fingerprint AND d.step > :after
ORDER BY d.step, p.number, d.layer
"""


def layers(connection: Connection, fingerprint: str, after: int) -> list[LayerRow]:
    """What the probes after step ``after`` saw, by step and layer, of what the reader's rule keeps of a trial."""
    question = text(_LAYERS).columns(heads=JSON, gates=JSON)
    found = connection.execute(question, {"fingerprint": fingerprint, "after": after}).mappings()
    return [LayerRow(**{**row, "heads": tuple(row["heads"])}) for row in found]


_TAILS = """
SELECT v.fingerprint, v.split, COUNT(*) AS num_points,
       CASE WHEN COUNT(v.loss_nats) = COUNT(*) THEN AVG(v.loss_nats) END AS loss_nats,
       CASE WHEN COUNT(v.bits_per_byte) = COUNT(*) THEN AVG(v.bits_per_byte) END AS bits_per_byte
FROM sweep_trial st
JOIN trial t ON t.fingerprint = st.fingerprint
JOIN curve_validation v ON v.fingerprint = st.fingerprint
WHERE st.sweep_id = :sweep_id AND st.current AND t.state = 'COMPLETE' AND v.fraction > :after
GROUP BY v.fingerprint, v.split
"""


def tails(connection: Connection, sweep_id: int, tail: float) -> list[TailRow]:
    """Of every complete trial of the sweep, a row a split: the validations in the last ``tail`` of the schedule."""
    rows = connection.execute(text(_TAILS), {"sweep_id": sweep_id, "after": 1.0 - tail})
    return [TailRow(*row) for row in rows]


def events(
    connection: Connection, sweep_id: int | None, after: int, kind: str | None, last: int | None
) -> list[EventRow]:
    """Events with an id above ``after``, oldest first; of one sweep or kind or of all, and the ``last`` of them."""
    event = schema.event
    query = select(
        event.c.id, event.c.at, event.c.kind, event.c.message, event.c.fingerprint, event.c.attempt_number
    ).where(event.c.id > after)
    if sweep_id is not None:
        query = query.where(event.c.sweep_id == sweep_id)
    if kind is not None:
        query = query.where(event.c.kind == kind)
    rows = connection.execute(query.order_by(event.c.id.desc()).limit(last)).all()
    return [EventRow(*row) for row in reversed(rows)]
