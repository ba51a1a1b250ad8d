"""What a branch shares with its trunk: the trunk's records up to where it left become its own, so its curve is whole.

They are copied into its attempt, in the transaction that opens it, and only as far as the trial's own history does not
show them. Shares of the schedule are counted anew. Of validations only those are taken that the trial would have made
at that step from its beginning, so it may have fewer, and none that it would not have. Probes stay the trunk's.
"""

from __future__ import annotations

from sqlalchemy import Connection, Table, bindparam, select, text

from models.config import TrialConfig
from orchestrator.store import schema
from orchestrator.store.rows import AttemptRow

_COPY = """
INSERT INTO {table} (attempt_id, fraction, {columns})
SELECT :attempt, CAST(m.step AS DOUBLE PRECISION) / CAST(:num_steps AS DOUBLE PRECISION), {values}
FROM {visible} m
WHERE m.fingerprint = :trunk AND m.step <= :until {among}
  AND NOT EXISTS (SELECT 1 FROM {visible} o WHERE o.fingerprint = :own AND o.step = m.step)
"""
_STEPS = """(SELECT p.fingerprint, s.* FROM attempt_span p
             JOIN step_metric s ON s.attempt_id = p.attempt_id AND s.step <= p.last_step)"""
_COUNT = f"SELECT COUNT(*) FROM {_STEPS} m WHERE m.fingerprint = :of AND m.step <= :until"


def num_steps(connection: Connection, fingerprint: str, until: int) -> int:
    """How many steps up to ``until`` the trial's curve has."""
    number: int = connection.execute(text(_COUNT), {"of": fingerprint, "until": until}).scalar_one()
    return number


def take_over(connection: Connection, attempt: AttemptRow) -> None:
    """Copy what ``attempt``, which has just been opened, shares with the trial that it branched from."""
    stored = select(schema.trial.c.config).where(schema.trial.c.fingerprint == attempt.fingerprint)
    config = TrialConfig.model_validate(connection.scalars(stored).one())
    given = {
        "attempt": attempt.id,
        "num_steps": config.train.num_steps,
        "trunk": attempt.branched_from,
        "own": attempt.fingerprint,
        "until": attempt.resume_step,
    }
    connection.execute(text(_copy(schema.step_metric, _STEPS)), given)
    measured = [step for step in config.validation_steps() if step <= attempt.resume_step]
    if measured:
        statement = text(_copy(schema.validation, "curve_validation", "AND m.step IN :measured"))
        statement = statement.bindparams(bindparam("measured", expanding=True))
        connection.execute(statement, {**given, "measured": measured})


def _copy(table: Table, visible: str, among: str = "") -> str:
    """``visible``: the rows that count, with their fingerprint."""
    names = [column.name for column in table.columns if column.name not in ("attempt_id", "fraction")]
    values = ", ".join(f"m.{name}" for name in names)
    return _COPY.format(table=table.name, columns=", ".join(names), values=values, visible=visible, among=among)
