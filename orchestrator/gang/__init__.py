"""Gangs: the Ray actors, one a rank, that run attempts; the only Ray.

A gang outlives its attempt: torch, Megatron and the process group stay up, and the next trial of the same shape
starts at once. All calls here return without waiting; the controller polls. Read ``ranks`` (in a rank's process),
``ending`` (what errors mean), ``gangs``, ``cluster``.
"""

from orchestrator.gang.cluster import Cluster, Node
from orchestrator.gang.gangs import Gang, GangEnd, GangShape, GangState, Landing
from orchestrator.gang.ranks import source_hash

__all__ = ["Cluster", "Gang", "GangEnd", "GangShape", "GangState", "Landing", "Node", "source_hash"]
