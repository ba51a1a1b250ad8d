"""``gatesweep doctor``: what this machine and cluster can do. A line a check, each with its mend.

Read ``finding`` (what a line is), ``machine`` (one host), ``services`` (store, tracking, ports), ``nodes`` (every host
of a Ray cluster, and what lies between them).
"""

from orchestrator.doctor.finding import Finding, Level, worst
from orchestrator.doctor.machine import examine
from orchestrator.doctor.nodes import examine_nodes
from orchestrator.doctor.services import check_copies, check_ports, check_store, check_tracking

__all__ = [
    "Finding",
    "Level",
    "check_copies",
    "check_ports",
    "check_store",
    "check_tracking",
    "examine",
    "examine_nodes",
    "worst",
]
