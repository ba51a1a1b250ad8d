"""What a sweep holds of its cluster and still wants: by this several sweeps share one."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0007"
down_revision = "0006"
branch_labels = None
depends_on = None

VIEWS_DIGEST = "45d01dccce168c83"  # orchestrator.store.views.digest(), as of this revision


def upgrade() -> None:
    op.add_column("lease", sa.Column("demand", sa.JSON()))
