"""The base tables. Singular names: the plural ones (``results``, ``curves``, ``attempts``) are the documented views.

A trial is global, keyed by its fingerprint: two sweeps that ask for the same trial share it. JSON columns stay
``json`` on Postgres, not ``jsonb``, which would forget the order of arms and axes.
"""

from __future__ import annotations

from datetime import UTC, datetime
from typing import Any

from sqlalchemy import (
    JSON,
    BigInteger,
    Boolean,
    CheckConstraint,
    Column,
    DateTime,
    Dialect,
    Float,
    ForeignKey,
    ForeignKeyConstraint,
    Index,
    Integer,
    MetaData,
    String,
    Table,
    Text,
    UniqueConstraint,
)
from sqlalchemy.types import TypeDecorator

from models.redaction import redacted, redacted_content

VERSION_TABLE = "gatesweep_version"
"""Not ``alembic_version``: Optuna and MLflow use that name, and may share the database."""

REVISIONS = ("0001", "0002", "0003", "0004", "0005", "0006", "0007", "0008", "0009", "0010", "0011")
"""Every schema version this code knows, oldest first. A database at another one was made by newer code."""

WAITING, RUNNING, COMPLETE, PRUNED, DIVERGED, FAILED, CANCELED = STATES = (
    "WAITING",
    "RUNNING",
    "COMPLETE",
    "PRUNED",
    "DIVERGED",
    "FAILED",
    "CANCELED",
)
FINISHED = (COMPLETE, PRUNED, DIVERGED)
"""Final for ever. FAILED and CANCELED can be reopened. PRUNED is final for the sweep that stopped the trial: one that
does not prune, and shares it, has it finished when it is submitted."""


class UtcDateTime(TypeDecorator[datetime]):
    """Aware UTC timestamps on both back ends; SQLite itself keeps no time zone."""

    impl = DateTime(timezone=True)
    cache_ok = True

    def process_bind_param(self, value: datetime | None, dialect: Dialect) -> datetime | None:
        if value is None:
            return None
        utc = value.astimezone(UTC)
        return utc.replace(tzinfo=None) if dialect.name == "sqlite" else utc

    def process_result_value(self, value: datetime | None, dialect: Dialect) -> datetime | None:
        if value is None:
            return None
        return value.replace(tzinfo=UTC) if value.tzinfo is None else value.astimezone(UTC)


class Redacted(TypeDecorator[str]):
    """Text that may come from anywhere, as an error or a log: no credential gets into it, whoever writes."""

    impl = Text
    cache_ok = True

    def process_bind_param(self, value: str | None, dialect: Dialect) -> str | None:
        return None if value is None else redacted(value)


class RedactedJson(TypeDecorator[Any]):
    """The same of every text in a JSON column."""

    impl = JSON
    cache_ok = True

    def process_bind_param(self, value: Any, dialect: Dialect) -> Any:
        return redacted_content(value)


metadata = MetaData(
    naming_convention={
        "pk": "pk_%(table_name)s",
        "fk": "fk_%(table_name)s_%(column_0_name)s",
        "uq": "uq_%(table_name)s_%(column_0_name)s",
        "ix": "ix_%(table_name)s_%(column_0_name)s",
        "ck": "ck_%(table_name)s_%(constraint_name)s",
    }
)

RowId = BigInteger().with_variant(Integer, "sqlite")
"""SQLite numbers rows by itself only in an INTEGER key."""

sweep = Table(
    "sweep",
    metadata,
    Column("id", RowId, primary_key=True),
    Column("name", String(200), nullable=False, unique=True),
    Column("question", Redacted, nullable=False),
    Column("baseline", String(200), nullable=False),
    Column("verdict", JSON, nullable=False),
    Column("settings", RedactedJson, nullable=False),
    Column("text", Redacted, nullable=False),
    Column("overrides", RedactedJson, nullable=False),
    Column("created_at", UtcDateTime, nullable=False),
    Column("updated_at", UtcDateTime, nullable=False),
    Column("mlflow_run_id", String(64)),
    Column("mirror_cursor", JSON(none_as_null=True)),
)

arm = Table(
    "arm",
    metadata,
    Column("sweep_id", RowId, ForeignKey("sweep.id"), primary_key=True),
    Column("name", String(200), primary_key=True),
    Column("position", Integer, nullable=False),
    Column("settings", RedactedJson, nullable=False),
    Column("current", Boolean, nullable=False),
)

lease = Table(
    "lease",
    metadata,
    Column("sweep_id", RowId, ForeignKey("sweep.id"), primary_key=True, autoincrement=False),
    Column("holder", String(200), nullable=False),
    Column("token", BigInteger, nullable=False),
    Column("expires_at", Float(53), nullable=False),  # epoch seconds by the database's clock, as those below
    Column("renewed_at", Float(53)),  # NULL while nobody holds it
    Column("left_at", Float(53)),  # when the last holder's time was over
    Column("demand", JSON(none_as_null=True)),  # of the present holder, on its Ray cluster
    Column("held_seconds", Float(53), nullable=False, server_default="0"),  # up to the last renewal, over all holders
)

trial = Table(
    "trial",
    metadata,
    Column("fingerprint", String(64), primary_key=True),
    Column("config", JSON, nullable=False),
    Column("lr", Float(53), nullable=False),
    Column("seed", BigInteger, nullable=False),
    Column("num_steps", BigInteger, nullable=False),
    Column("batch_tokens", BigInteger, nullable=False, server_default="0"),
    Column("precision", String(10), nullable=False, server_default=""),
    Column("num_parameters", BigInteger, nullable=False),
    Column("training_flops", Float(53), nullable=False),  # passes 2^63 from about 9e18 on
    Column("state", String(10), nullable=False),
    Column("cause", String(100)),
    Column("reason", Redacted),
    Column("end_step", BigInteger),
    Column("reopened_after", Integer, nullable=False),
    Column("created_at", UtcDateTime, nullable=False),
    Column("updated_at", UtcDateTime, nullable=False),
    CheckConstraint("state IN ('" + "', '".join(STATES) + "')", name="state"),
    Index("ix_trial_fingerprint_state", "fingerprint", "state"),  # states are counted without a look at configs
    Index("ix_trial_state", "state"),
)

sweep_trial = Table(
    "sweep_trial",
    metadata,
    Column("sweep_id", RowId, ForeignKey("sweep.id"), primary_key=True),
    Column("fingerprint", String(64), ForeignKey("trial.fingerprint"), primary_key=True),
    Column("arm", String(200), nullable=False),
    Column("axes", JSON, nullable=False),
    Column("seed", BigInteger, nullable=False),
    Column("layout", JSON, nullable=False),
    Column("position", Integer, nullable=False),
    Column("current", Boolean, nullable=False),
    Column("mlflow_run_id", String(64)),
    Column("mirror_cursor", JSON(none_as_null=True)),
    ForeignKeyConstraint(["sweep_id", "arm"], ["arm.sweep_id", "arm.name"], name="fk_sweep_trial_arm"),
    Index("ix_sweep_trial_fingerprint", "fingerprint", "sweep_id", "current"),
    sqlite_with_rowid=False,
)

attempt = Table(
    "attempt",
    metadata,
    Column("id", RowId, primary_key=True),
    Column("fingerprint", String(64), ForeignKey("trial.fingerprint"), nullable=False),
    Column("number", Integer, nullable=False),
    Column("token", String(32), nullable=False),
    Column("sweep_id", RowId, ForeignKey("sweep.id"), nullable=False),
    Column("layout", JSON, nullable=False),
    Column("hosts", JSON(none_as_null=True)),
    Column("provenance", RedactedJson, nullable=False),
    Column("resume_step", BigInteger, nullable=False),
    Column("resumed_from_attempt", Integer),
    Column("branched_from", String(64)),  # the trial whose checkpoint it began at, if that is another one
    Column("cpus", Float(53)),
    Column("gpus", Float(53)),
    Column("held_seconds", Float(53)),
    Column("started_at", UtcDateTime, nullable=False),
    Column("ended_at", UtcDateTime),
    Column("cause", String(100)),
    Column("reason", Redacted),
    Column("end_step", BigInteger),
    Column("seconds", Float(53)),
    Column("tokens_per_second", Float(53)),
    Column("peak_memory_bytes", BigInteger),
    Column("log_tail", Redacted),
    UniqueConstraint("fingerprint", "number"),
    Index("ix_attempt_spent", "sweep_id", "ended_at", "held_seconds", "cpus", "gpus"),  # what a budget asks for
)

step_metric = Table(
    "step_metric",
    metadata,
    Column("attempt_id", RowId, ForeignKey("attempt.id"), primary_key=True),
    Column("step", BigInteger, primary_key=True),
    Column("tokens", BigInteger, nullable=False),
    Column("fraction", Float(53), nullable=False),
    Column("lr", Float(53)),
    Column("loss_nats", Float(53)),
    Column("gradient_norm", Float(53)),
    Column("tokens_per_second", Float(53)),
    Column("nonfinite", Boolean, nullable=False),
    sqlite_with_rowid=False,
)

validation = Table(
    "validation",
    metadata,
    Column("attempt_id", RowId, ForeignKey("attempt.id"), primary_key=True),
    Column("step", BigInteger, primary_key=True),
    Column("split", String(20), primary_key=True),
    Column("tokens", BigInteger, nullable=False),
    Column("fraction", Float(53), nullable=False),
    Column("loss_nats", Float(53)),
    Column("bits_per_byte", Float(53)),
    Column("num_tokens", BigInteger, nullable=False),
    Column("num_bytes", BigInteger, nullable=False),
    Column("nonfinite", Boolean, nullable=False),
    sqlite_with_rowid=False,
)

outcome = Table(
    "outcome",
    metadata,
    Column("fingerprint", String(64), ForeignKey("trial.fingerprint"), primary_key=True),
    Column("tail", Float(53), primary_key=True, autoincrement=False),
    Column("num_attempts", Integer, nullable=False),
    Column("backends", Redacted, nullable=False),  # JSON as it is read, as the next one
    Column("layouts", Redacted, nullable=False),
    Column("tokens_per_second", Float(53)),
    Column("sweep_id", RowId, ForeignKey("sweep.id"), nullable=False),
    Column("branched", Redacted),  # JSON, too
    Column("slice_points", Integer),
    Column("slice_loss_nats", Float(53)),
    Column("slice_bits_per_byte", Float(53)),
    Column("full_points", Integer),
    Column("full_loss_nats", Float(53)),
    Column("full_bits_per_byte", Float(53)),
    sqlite_with_rowid=False,
)

layer_diagnostic = Table(
    "layer_diagnostic",
    metadata,
    Column("attempt_id", RowId, ForeignKey("attempt.id"), primary_key=True),
    Column("step", BigInteger, primary_key=True),
    Column("layer", Integer, primary_key=True),  # from 1, as Megatron counts
    Column("tokens", BigInteger, nullable=False),
    Column("fraction", Float(53), nullable=False),
    Column("first_token_attention", Float(53)),
    Column("max_activation", Float(53)),
    Column("attention_output_rms", Float(53)),
    Column("ffn_output_rms", Float(53)),
    Column("residual_rms", Float(53)),
    Column("gradient_norm", Float(53)),
    Column("update_ratio", Float(53)),
    Column("gate_score", Float(53)),
    Column("heads", JSON, nullable=False),
    Column("gates", JSON, nullable=False),
    Column("nonfinite", Boolean, nullable=False),
    sqlite_with_rowid=False,
)

rank_decision = Table(
    "rank_decision",
    metadata,
    Column("id", RowId, primary_key=True),
    Column("sweep_id", RowId, ForeignKey("sweep.id"), nullable=False),
    Column("at", UtcDateTime, nullable=False),
    Column("arm", String(200), nullable=False),
    Column("axes", JSON, nullable=False),
    Column("fraction", Float(53), nullable=False),
    Column("seeds", JSON, nullable=False),
    Column("losses_nats", JSON, nullable=False),  # pairs of learning rate and mean loss
    Column("dropped", JSON, nullable=False),
    Column("audited", JSON, nullable=False),
    Column("formula", String(40), nullable=False),
    Index("ix_rank_decision_sweep_id", "sweep_id"),
)

imported_curve = Table(
    "imported_curve",
    metadata,
    Column("id", RowId, primary_key=True),
    Column("sweep_id", RowId, ForeignKey("sweep.id"), nullable=False),
    Column("name", String(200), nullable=False),
    Column("number", Integer, nullable=False),  # within its name, in the order of the file
    Column("seed", BigInteger),
    Column("source", Redacted, nullable=False),
    Column("format", String(20), nullable=False),
    Column("sha256", String(64), nullable=False),  # of the file
    Column("imported_at", UtcDateTime, nullable=False),
    UniqueConstraint("sweep_id", "name", "number"),
)

imported_point = Table(
    "imported_point",
    metadata,
    Column("curve_id", RowId, ForeignKey("imported_curve.id"), primary_key=True, autoincrement=False),
    Column("split", String(20), primary_key=True),
    Column("step", BigInteger, primary_key=True, autoincrement=False),
    Column("tokens", BigInteger),
    Column("loss_nats", Float(53)),
    sqlite_with_rowid=False,
)

event = Table(
    "event",
    metadata,
    Column("id", RowId, primary_key=True),
    Column("sweep_id", RowId, ForeignKey("sweep.id")),
    Column("fingerprint", String(64), ForeignKey("trial.fingerprint")),
    Column("attempt_number", Integer),
    Column("at", UtcDateTime, nullable=False),
    Column("kind", String(100), nullable=False),
    Column("message", Redacted, nullable=False),
    Index("ix_event_sweep_id", "sweep_id", "id"),
    Index("ix_event_kind", "kind", "sweep_id"),
    Index("ix_event_fingerprint", "fingerprint"),
)
