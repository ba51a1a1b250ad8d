"""What was stopped by rank: which learning rates, at which rung, on which losses, and which of them are finished all
the same."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0005"
down_revision = "0004"
branch_labels = None
depends_on = None

VIEWS_DIGEST = "45d01dccce168c83"  # orchestrator.store.views.digest(), as of this revision

ROW_ID = sa.BigInteger().with_variant(sa.Integer(), "sqlite")


def upgrade() -> None:
    op.create_table(
        "rank_decision",
        sa.Column("id", ROW_ID, nullable=False),
        sa.Column("sweep_id", ROW_ID, nullable=False),
        sa.Column("at", sa.DateTime(timezone=True), nullable=False),
        sa.Column("arm", sa.String(length=200), nullable=False),
        sa.Column("axes", sa.JSON(), nullable=False),
        sa.Column("fraction", sa.Float(precision=53), nullable=False),
        sa.Column("seeds", sa.JSON(), nullable=False),
        sa.Column("losses_nats", sa.JSON(), nullable=False),
        sa.Column("dropped", sa.JSON(), nullable=False),
        sa.Column("audited", sa.JSON(), nullable=False),
        sa.Column("formula", sa.String(length=40), nullable=False),
        sa.ForeignKeyConstraint(["sweep_id"], ["sweep.id"], name="fk_rank_decision_sweep_id"),
        sa.PrimaryKeyConstraint("id", name="pk_rank_decision"),
    )
    op.create_index("ix_rank_decision_sweep_id", "rank_decision", ["sweep_id"])
