"""Trials that began at another one's checkpoint: which one, in attempts and results."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0010"
down_revision = "0009"
branch_labels = None
depends_on = None

VIEWS_DIGEST = "73a2b5ef5f17d359"  # orchestrator.store.views.digest(), as of this revision


def upgrade() -> None:
    op.add_column("attempt", sa.Column("branched_from", sa.String(length=64)))
