"""An index for what changed lately: a controller asks for it every two seconds, of up to 10^5 trials."""

from __future__ import annotations

from alembic import op

revision = "0009"
down_revision = "0008"
branch_labels = None
depends_on = None

VIEWS_DIGEST = "45d01dccce168c83"  # orchestrator.store.views.digest(), as of this revision


def upgrade() -> None:
    op.create_index("ix_trial_updated_at", "trial", ["updated_at"])
