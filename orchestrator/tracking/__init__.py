"""MLflow, as a mirror of the store: one way, off the critical path, rebuildable. The only package that knows MLflow.

Results never come from here. MLflow itself is imported when there is something to send, not before.
"""

from orchestrator.tracking.background import Mirror
from orchestrator.tracking.curves import OutOfTime, Sent
from orchestrator.tracking.mirror import TrackingError, mirror
from orchestrator.tracking.server import is_server, ui_command, ui_environment

__all__ = [
    "Mirror",
    "OutOfTime",
    "Sent",
    "TrackingError",
    "is_server",
    "mirror",
    "ui_command",
    "ui_environment",
]
