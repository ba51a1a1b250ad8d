"""What attempts and controllers have used up: CPUs, GPUs and time. Known attempts are charged as the sweep stands."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0004"
down_revision = "0003"
branch_labels = None
depends_on = None

VIEWS_DIGEST = "45d01dccce168c83"  # orchestrator.store.views.digest(), as of this revision

_RANKS = " * ".join(
    f"CAST(COALESCE(layout ->> '{name}', '1') AS FLOAT)" for name in ("tensor", "context", "data", "pipeline")
)
_A_RANK = """
COALESCE((SELECT CAST(s.settings -> 'resources' ->> '{name}' AS FLOAT) FROM sweep s WHERE s.id = sweep_id), {default})
"""


def upgrade() -> None:
    for name in ("cpus", "gpus", "held_seconds"):
        op.add_column("attempt", sa.Column(name, sa.Float(precision=53)))
    cpus, gpus = _A_RANK.format(name="cpus", default=1), _A_RANK.format(name="gpus", default=0)
    op.execute(f"UPDATE attempt SET held_seconds = seconds, cpus = {_RANKS} * {cpus}, gpus = {_RANKS} * {gpus}")
    op.drop_index("ix_attempt_sweep_id", "attempt")
    op.create_index("ix_attempt_spent", "attempt", ["sweep_id", "ended_at", "held_seconds", "cpus", "gpus"])
    op.add_column("lease", sa.Column("renewed_at", sa.Float(precision=53)))
    op.add_column("lease", sa.Column("left_at", sa.Float(precision=53)))
    op.add_column("lease", sa.Column("held_seconds", sa.Float(precision=53), nullable=False, server_default="0"))
