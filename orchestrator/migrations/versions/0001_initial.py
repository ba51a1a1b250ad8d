"""The first schema. A revision is never edited once released: a change is a new one."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0001"
down_revision = None
branch_labels = None
depends_on = None

VIEWS_DIGEST = "b623443af5a3f998"  # orchestrator.store.views.digest(), as of this revision

ROW_ID = sa.BigInteger().with_variant(sa.Integer(), "sqlite")


def upgrade() -> None:
    op.create_table(
        "sweep",
        sa.Column("id", ROW_ID, nullable=False),
        sa.Column("name", sa.String(length=200), nullable=False),
        sa.Column("question", sa.Text(), nullable=False),
        sa.Column("baseline", sa.String(length=200), nullable=False),
        sa.Column("verdict", sa.JSON(), nullable=False),
        sa.Column("settings", sa.JSON(), nullable=False),
        sa.Column("text", sa.Text(), nullable=False),
        sa.Column("overrides", sa.JSON(), nullable=False),
        sa.Column("created_at", sa.DateTime(timezone=True), nullable=False),
        sa.Column("updated_at", sa.DateTime(timezone=True), nullable=False),
        sa.Column("mlflow_run_id", sa.String(length=64)),
        sa.PrimaryKeyConstraint("id", name="pk_sweep"),
        sa.UniqueConstraint("name", name="uq_sweep_name"),
    )
    op.create_table(
        "trial",
        sa.Column("fingerprint", sa.String(length=64), nullable=False),
        sa.Column("config", sa.JSON(), nullable=False),
        sa.Column("lr", sa.Float(precision=53), nullable=False),
        sa.Column("seed", sa.BigInteger(), nullable=False),
        sa.Column("num_steps", sa.BigInteger(), nullable=False),
        sa.Column("num_parameters", sa.BigInteger(), nullable=False),
        sa.Column("training_flops", sa.Float(precision=53), nullable=False),
        sa.Column("state", sa.String(length=10), nullable=False),
        sa.Column("cause", sa.String(length=100)),
        sa.Column("reason", sa.Text()),
        sa.Column("end_step", sa.BigInteger()),
        sa.Column("reopened_after", sa.Integer(), nullable=False),
        sa.Column("created_at", sa.DateTime(timezone=True), nullable=False),
        sa.Column("updated_at", sa.DateTime(timezone=True), nullable=False),
        sa.CheckConstraint(
            "state IN ('WAITING', 'RUNNING', 'COMPLETE', 'PRUNED', 'DIVERGED', 'FAILED', 'CANCELED')",
            name=op.f("ck_trial_state"),
        ),
        sa.PrimaryKeyConstraint("fingerprint", name="pk_trial"),
    )
    op.create_table(
        "arm",
        sa.Column("sweep_id", ROW_ID, nullable=False),
        sa.Column("name", sa.String(length=200), nullable=False),
        sa.Column("position", sa.Integer(), nullable=False),
        sa.Column("settings", sa.JSON(), nullable=False),
        sa.Column("current", sa.Boolean(), nullable=False),
        sa.ForeignKeyConstraint(["sweep_id"], ["sweep.id"], name="fk_arm_sweep_id"),
        sa.PrimaryKeyConstraint("sweep_id", "name", name="pk_arm"),
    )
    op.create_table(
        "attempt",
        sa.Column("id", ROW_ID, nullable=False),
        sa.Column("fingerprint", sa.String(length=64), nullable=False),
        sa.Column("number", sa.Integer(), nullable=False),
        sa.Column("token", sa.String(length=32), nullable=False),
        sa.Column("sweep_id", ROW_ID, nullable=False),
        sa.Column("layout", sa.JSON(), nullable=False),
        sa.Column("hosts", sa.JSON(none_as_null=True)),
        sa.Column("provenance", sa.JSON(), nullable=False),
        sa.Column("resume_step", sa.BigInteger(), nullable=False),
        sa.Column("resumed_from_attempt", sa.Integer()),
        sa.Column("started_at", sa.DateTime(timezone=True), nullable=False),
        sa.Column("ended_at", sa.DateTime(timezone=True)),
        sa.Column("cause", sa.String(length=100)),
        sa.Column("reason", sa.Text()),
        sa.Column("end_step", sa.BigInteger()),
        sa.Column("seconds", sa.Float(precision=53)),
        sa.Column("tokens_per_second", sa.Float(precision=53)),
        sa.Column("peak_memory_bytes", sa.BigInteger()),
        sa.Column("log_tail", sa.Text()),
        sa.ForeignKeyConstraint(["fingerprint"], ["trial.fingerprint"], name="fk_attempt_fingerprint"),
        sa.ForeignKeyConstraint(["sweep_id"], ["sweep.id"], name="fk_attempt_sweep_id"),
        sa.PrimaryKeyConstraint("id", name="pk_attempt"),
        sa.UniqueConstraint("fingerprint", "number", name="uq_attempt_fingerprint"),
    )
    op.create_index("ix_attempt_sweep_id", "attempt", ["sweep_id"], unique=False)
    op.create_table(
        "event",
        sa.Column("id", ROW_ID, nullable=False),
        sa.Column("sweep_id", ROW_ID),
        sa.Column("fingerprint", sa.String(length=64)),
        sa.Column("attempt_number", sa.Integer()),
        sa.Column("at", sa.DateTime(timezone=True), nullable=False),
        sa.Column("kind", sa.String(length=100), nullable=False),
        sa.Column("message", sa.Text(), nullable=False),
        sa.ForeignKeyConstraint(["fingerprint"], ["trial.fingerprint"], name="fk_event_fingerprint"),
        sa.ForeignKeyConstraint(["sweep_id"], ["sweep.id"], name="fk_event_sweep_id"),
        sa.PrimaryKeyConstraint("id", name="pk_event"),
    )
    op.create_index("ix_event_fingerprint", "event", ["fingerprint"], unique=False)
    op.create_index("ix_event_sweep_id", "event", ["sweep_id"], unique=False)
    op.create_table(
        "lease",
        sa.Column("sweep_id", ROW_ID, autoincrement=False, nullable=False),
        sa.Column("holder", sa.String(length=200), nullable=False),
        sa.Column("token", sa.BigInteger(), nullable=False),
        sa.Column("expires_at", sa.Float(precision=53), nullable=False),
        sa.ForeignKeyConstraint(["sweep_id"], ["sweep.id"], name="fk_lease_sweep_id"),
        sa.PrimaryKeyConstraint("sweep_id", name="pk_lease"),
    )
    op.create_table(
        "step_metric",
        sa.Column("attempt_id", ROW_ID, nullable=False),
        sa.Column("step", sa.BigInteger(), nullable=False),
        sa.Column("tokens", sa.BigInteger(), nullable=False),
        sa.Column("fraction", sa.Float(precision=53), nullable=False),
        sa.Column("lr", sa.Float(precision=53)),
        sa.Column("loss_nats", sa.Float(precision=53)),
        sa.Column("gradient_norm", sa.Float(precision=53)),
        sa.Column("tokens_per_second", sa.Float(precision=53)),
        sa.Column("nonfinite", sa.Boolean(), nullable=False),
        sa.ForeignKeyConstraint(["attempt_id"], ["attempt.id"], name="fk_step_metric_attempt_id"),
        sa.PrimaryKeyConstraint("attempt_id", "step", name="pk_step_metric"),
        sqlite_with_rowid=False,
    )
    op.create_table(
        "sweep_trial",
        sa.Column("sweep_id", ROW_ID, nullable=False),
        sa.Column("fingerprint", sa.String(length=64), nullable=False),
        sa.Column("arm", sa.String(length=200), nullable=False),
        sa.Column("axes", sa.JSON(), nullable=False),
        sa.Column("seed", sa.BigInteger(), nullable=False),
        sa.Column("layout", sa.JSON(), nullable=False),
        sa.Column("position", sa.Integer(), nullable=False),
        sa.Column("current", sa.Boolean(), nullable=False),
        sa.Column("mlflow_run_id", sa.String(length=64)),
        sa.Column("mirror_cursor", sa.JSON(none_as_null=True)),
        sa.ForeignKeyConstraint(["fingerprint"], ["trial.fingerprint"], name="fk_sweep_trial_fingerprint"),
        sa.ForeignKeyConstraint(["sweep_id", "arm"], ["arm.sweep_id", "arm.name"], name="fk_sweep_trial_arm"),
        sa.ForeignKeyConstraint(["sweep_id"], ["sweep.id"], name="fk_sweep_trial_sweep_id"),
        sa.PrimaryKeyConstraint("sweep_id", "fingerprint", name="pk_sweep_trial"),
    )
    op.create_index("ix_sweep_trial_fingerprint", "sweep_trial", ["fingerprint"], unique=False)
    op.create_table(
        "validation",
        sa.Column("attempt_id", ROW_ID, nullable=False),
        sa.Column("step", sa.BigInteger(), nullable=False),
        sa.Column("split", sa.String(length=20), nullable=False),
        sa.Column("tokens", sa.BigInteger(), nullable=False),
        sa.Column("fraction", sa.Float(precision=53), nullable=False),
        sa.Column("loss_nats", sa.Float(precision=53)),
        sa.Column("bits_per_byte", sa.Float(precision=53)),
        sa.Column("num_tokens", sa.BigInteger(), nullable=False),
        sa.Column("num_bytes", sa.BigInteger(), nullable=False),
        sa.Column("nonfinite", sa.Boolean(), nullable=False),
        sa.ForeignKeyConstraint(["attempt_id"], ["attempt.id"], name="fk_validation_attempt_id"),
        sa.PrimaryKeyConstraint("attempt_id", "step", "split", name="pk_validation"),
        sqlite_with_rowid=False,
    )
