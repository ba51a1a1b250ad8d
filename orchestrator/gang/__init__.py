"""Gangs: the Ray actors, one a rank, that run attempts; the only Ray.

A gang outlives its attempt: torch, Megatron and the process group stay up, and the next trial of the same shape
starts at once. All calls here return without waiting; the controller polls. Read ``ranks`` (in a rank's process),
``ending`` (what errors mean), ``gangs``, ``cluster``. On a cluster that outlives its driver gangs do so, too:
``lease_file`` (how long), ``orphan`` (how they end themselves), ``detached`` (how the next driver finds them).
"""

from orchestrator.gang.cluster import Cluster, Node
from orchestrator.gang.detached import Wanted
from orchestrator.gang.gangs import Gang, GangEnd, GangShape, GangState, Landing
from orchestrator.gang.lease_file import GangLease, LeaseFile
from orchestrator.gang.ranks import source_hash

__all__ = [
    "Cluster",
    "Gang",
    "GangEnd",
    "GangLease",
    "GangShape",
    "GangState",
    "Landing",
    "LeaseFile",
    "Node",
    "Wanted",
    "source_hash",
]
