"""Gangs: the Ray actors, one a rank, that run attempts; the only Ray.

A gang outlives its attempt: torch, Megatron and the process group stay up, and the next trial of the same shape
starts at once. All calls here but ``Cluster.wait`` return without waiting; the controller polls. Read ``ranks`` (in a
rank's process), ``ending`` (what errors mean), ``shapes`` (what a gang asks for, and where it fits; no Ray), ``gangs``,
``cluster``. On a cluster that outlives its driver gangs do so, too: ``lease_file`` (how long), ``orphan`` (how they end
themselves), ``detached`` (how the next driver finds them).
"""

from orchestrator.gang.cluster import Cluster, Node
from orchestrator.gang.detached import Wanted
from orchestrator.gang.ending import is_broken_collective
from orchestrator.gang.gangs import Gang, GangEnd, GangState, Landing
from orchestrator.gang.lease_file import GangLease, LeaseFile
from orchestrator.gang.ranks import source_hash
from orchestrator.gang.shapes import (
    UNITS,
    Amount,
    Fits,
    GangShape,
    NodeRoom,
    Room,
    minus,
    number_of_gangs,
    plus,
    refuse_too_large,
    times,
    units,
)

__all__ = [
    "UNITS",
    "Amount",
    "Cluster",
    "Fits",
    "Gang",
    "GangEnd",
    "GangLease",
    "GangShape",
    "GangState",
    "Landing",
    "LeaseFile",
    "Node",
    "NodeRoom",
    "Room",
    "Wanted",
    "is_broken_collective",
    "minus",
    "number_of_gangs",
    "plus",
    "refuse_too_large",
    "source_hash",
    "times",
    "units",
]
