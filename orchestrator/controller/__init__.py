"""The loop that joins plan, store, gangs and search; the one place where an attempt's end becomes a state.

Read ``loop``, which is a page, then its steps: ``launching``, ``following``, ``ends``, ``stopping``. They share a
``sweep_run``, of which ``known_trials``, ``gang_pool`` and ``running`` (an attempt that is followed) are the parts.
"""

from orchestrator.controller.allocation import confirm
from orchestrator.controller.cluster_watch import ClusterLost
from orchestrator.controller.growing import grow_rates
from orchestrator.controller.lease_holder import is_dead
from orchestrator.controller.loop import BudgetUsedUp, Controller, SweepStopped
from orchestrator.controller.promotion import bring_up_to_date
from orchestrator.controller.reproduction import Reproduction, reproduce
from orchestrator.controller.selection import choose_rates
from orchestrator.controller.snapshot import Running, Snapshot, View, told_about

__all__ = [
    "BudgetUsedUp",
    "ClusterLost",
    "Controller",
    "Reproduction",
    "Running",
    "Snapshot",
    "SweepStopped",
    "View",
    "bring_up_to_date",
    "choose_rates",
    "confirm",
    "grow_rates",
    "is_dead",
    "reproduce",
    "told_about",
]
