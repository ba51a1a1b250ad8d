"""The loop that joins plan, store, gangs and search; the one place where an attempt's end becomes a state.

Read ``loop``, then ``snapshot`` (what it shows while it runs), ``resume`` and ``provenance``.
"""

from orchestrator.controller.loop import Controller, SweepStopped, is_dead
from orchestrator.controller.snapshot import Running, Snapshot, View

__all__ = ["Controller", "Running", "Snapshot", "SweepStopped", "View", "is_dead"]
