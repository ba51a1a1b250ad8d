"""What of a sweep itself, beside its trials, MLflow has been sent: its notices."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0006"
down_revision = "0005"
branch_labels = None
depends_on = None

VIEWS_DIGEST = "45d01dccce168c83"  # orchestrator.store.views.digest(), as of this revision


def upgrade() -> None:
    op.add_column("sweep", sa.Column("mirror_cursor", sa.JSON()))
