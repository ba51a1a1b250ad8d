"""A view: losses by tokens, FLOPs, parameters and seconds. No table changes."""

from __future__ import annotations

revision = "0009"
down_revision = "0008"
branch_labels = None
depends_on = None

VIEWS_DIGEST = "beb974cb6ce94e35"  # orchestrator.store.views.digest(), as of this revision


def upgrade() -> None:
    """Views are made anew after every migration."""
