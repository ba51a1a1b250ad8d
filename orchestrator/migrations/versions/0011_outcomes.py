"""Of every COMPLETE trial one narrow row with what tables need of its attempts and validations.

``store.migrate`` fills it once the views are there. SQLite's links lie in the order of their key from now on, so that
a sweep's are neighbours.
"""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0011"
down_revision = "0010"
branch_labels = None
depends_on = None

VIEWS_DIGEST = "73a2b5ef5f17d359"  # orchestrator.store.views.digest(), as of this revision

ROW_ID = sa.BigInteger().with_variant(sa.Integer(), "sqlite")


def upgrade() -> None:
    op.create_table(
        "outcome",
        sa.Column("fingerprint", sa.String(length=64), nullable=False),
        sa.Column("tail", sa.Float(precision=53), nullable=False, autoincrement=False),
        sa.Column("num_attempts", sa.Integer(), nullable=False),
        sa.Column("backends", sa.Text(), nullable=False),
        sa.Column("layouts", sa.Text(), nullable=False),
        sa.Column("tokens_per_second", sa.Float(precision=53)),
        sa.Column("sweep_id", ROW_ID, nullable=False),
        sa.Column("branched", sa.Text()),
        sa.Column("slice_points", sa.Integer()),
        sa.Column("slice_loss_nats", sa.Float(precision=53)),
        sa.Column("slice_bits_per_byte", sa.Float(precision=53)),
        sa.Column("full_points", sa.Integer()),
        sa.Column("full_loss_nats", sa.Float(precision=53)),
        sa.Column("full_bits_per_byte", sa.Float(precision=53)),
        sa.ForeignKeyConstraint(["fingerprint"], ["trial.fingerprint"], name="fk_outcome_fingerprint"),
        sa.ForeignKeyConstraint(["sweep_id"], ["sweep.id"], name="fk_outcome_sweep_id"),
        sa.PrimaryKeyConstraint("fingerprint", "tail", name="pk_outcome"),
        sqlite_with_rowid=False,
    )
    if op.get_bind().dialect.name == "sqlite":
        clustered = {"sqlite_with_rowid": False}
        with op.batch_alter_table("sweep_trial", recreate="always", table_kwargs=clustered):
            pass
