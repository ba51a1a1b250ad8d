"""What probes see inside a trial's model, a row a layer."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0002"
down_revision = "0001"
branch_labels = None
depends_on = None

VIEWS_DIGEST = "45d01dccce168c83"  # orchestrator.store.views.digest(), as of this revision

ROW_ID = sa.BigInteger().with_variant(sa.Integer(), "sqlite")


def upgrade() -> None:
    op.create_table(
        "layer_diagnostic",
        sa.Column("attempt_id", ROW_ID, nullable=False),
        sa.Column("step", sa.BigInteger(), nullable=False),
        sa.Column("layer", sa.Integer(), nullable=False),
        sa.Column("tokens", sa.BigInteger(), nullable=False),
        sa.Column("fraction", sa.Float(precision=53), nullable=False),
        sa.Column("first_token_attention", sa.Float(precision=53)),
        sa.Column("max_activation", sa.Float(precision=53)),
        sa.Column("attention_output_rms", sa.Float(precision=53)),
        sa.Column("ffn_output_rms", sa.Float(precision=53)),
        sa.Column("residual_rms", sa.Float(precision=53)),
        sa.Column("gradient_norm", sa.Float(precision=53)),
        sa.Column("update_ratio", sa.Float(precision=53)),
        sa.Column("gate_score", sa.Float(precision=53)),
        sa.Column("heads", sa.JSON(), nullable=False),
        sa.Column("gates", sa.JSON(), nullable=False),
        sa.Column("nonfinite", sa.Boolean(), nullable=False),
        sa.ForeignKeyConstraint(["attempt_id"], ["attempt.id"], name="fk_layer_diagnostic_attempt_id"),
        sa.PrimaryKeyConstraint("attempt_id", "step", "layer", name="pk_layer_diagnostic"),
        sqlite_with_rowid=False,
    )
