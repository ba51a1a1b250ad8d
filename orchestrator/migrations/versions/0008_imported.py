"""Curves from elsewhere: files of other programs, kept beside a sweep and never among its trials."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0008"
down_revision = "0007"
branch_labels = None
depends_on = None

VIEWS_DIGEST = "45d01dccce168c83"  # orchestrator.store.views.digest(), as of this revision

ROW_ID = sa.BigInteger().with_variant(sa.Integer(), "sqlite")


def upgrade() -> None:
    op.create_table(
        "imported_curve",
        sa.Column("id", ROW_ID, nullable=False),
        sa.Column("sweep_id", ROW_ID, nullable=False),
        sa.Column("name", sa.String(length=200), nullable=False),
        sa.Column("number", sa.Integer(), nullable=False),
        sa.Column("seed", sa.BigInteger()),
        sa.Column("source", sa.Text(), nullable=False),
        sa.Column("format", sa.String(length=20), nullable=False),
        sa.Column("sha256", sa.String(length=64), nullable=False),
        sa.Column("imported_at", sa.DateTime(timezone=True), nullable=False),
        sa.ForeignKeyConstraint(["sweep_id"], ["sweep.id"], name="fk_imported_curve_sweep_id"),
        sa.PrimaryKeyConstraint("id", name="pk_imported_curve"),
        sa.UniqueConstraint("sweep_id", "name", "number", name="uq_imported_curve_sweep_id"),
    )
    op.create_table(
        "imported_point",
        sa.Column("curve_id", ROW_ID, nullable=False, autoincrement=False),
        sa.Column("split", sa.String(length=20), nullable=False),
        sa.Column("step", sa.BigInteger(), nullable=False, autoincrement=False),
        sa.Column("tokens", sa.BigInteger()),
        sa.Column("loss_nats", sa.Float(precision=53)),
        sa.ForeignKeyConstraint(["curve_id"], ["imported_curve.id"], name="fk_imported_point_curve_id"),
        sa.PrimaryKeyConstraint("curve_id", "split", "step", name="pk_imported_point"),
        sqlite_with_rowid=False,
    )
