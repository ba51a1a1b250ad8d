"""Indices for stores of 10^5 trials, and of each trial's config the two values that every table needs.

Counting states reads two small indices now and no row of ``trial``, which carries its config.
"""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0003"
down_revision = "0002"
branch_labels = None
depends_on = None

VIEWS_DIGEST = "45d01dccce168c83"  # orchestrator.store.views.digest(), as of this revision


def upgrade() -> None:
    op.add_column("trial", sa.Column("batch_tokens", sa.BigInteger(), nullable=False, server_default="0"))
    op.add_column("trial", sa.Column("precision", sa.String(length=10), nullable=False, server_default=""))
    op.execute(
        "UPDATE trial SET precision = config ->> 'precision',"
        " batch_tokens = CAST(config -> 'train' ->> 'batch_tokens' AS BIGINT)"
    )
    op.create_index("ix_trial_fingerprint_state", "trial", ["fingerprint", "state"])
    op.create_index("ix_trial_state", "trial", ["state"])
    op.drop_index("ix_sweep_trial_fingerprint", "sweep_trial")
    op.create_index("ix_sweep_trial_fingerprint", "sweep_trial", ["fingerprint", "sweep_id", "current"])
    op.drop_index("ix_event_sweep_id", "event")
    op.create_index("ix_event_sweep_id", "event", ["sweep_id", "id"])
    op.create_index("ix_event_kind", "event", ["kind", "sweep_id"])
