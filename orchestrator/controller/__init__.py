"""The loop that joins plan, store, gangs and search; the one place where an attempt's end becomes a state.

Read ``loop``, then ``running`` (an attempt that is followed), ``snapshot`` (what is shown), ``resume``, ``provenance``.
"""

from orchestrator.controller.lease_holder import is_dead
from orchestrator.controller.loop import Controller, SweepStopped
from orchestrator.controller.selection import choose_rates
from orchestrator.controller.snapshot import Running, Snapshot, View

__all__ = ["Controller", "Running", "Snapshot", "SweepStopped", "View", "choose_rates", "is_dead"]
