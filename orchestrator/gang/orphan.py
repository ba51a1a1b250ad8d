"""How a gang ends itself once no controller wants it: in a rank's process, by a thread that reads the lease file.

A gang that trains is not cut short: rank 0 has the attempt stop, which checkpoints, and only then ends the gang, with
its placement group. The other ranks leave that to rank 0, but not for ever: it may be gone, and they wait in vain.
"""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable

import ray
from ray.util.placement_group import remove_placement_group

from orchestrator.gang.lease_file import GangLease, LeaseWatch

LEAST_PATIENCE_SECONDS = 120.0
"""With a checkpoint that is being written, or with rank 0, where the grace time is shorter than this."""
REMOVAL_SECONDS = 10.0
"""How long Ray may take to end the gang; cut off from Ray, a process just ends."""


def group_name(gang: str) -> str:
    return f"gang-{gang}"


def rank_name(gang: str, rank: int) -> str:
    return f"gang-{gang}-rank-{rank}"


class Guard:
    """Looks at the lease file now and then, and ends the process when its time has come."""

    def __init__(self, rank: int, gang: str, lease: GangLease, is_busy: Callable[[], bool]) -> None:
        self.rank, self.watch = rank, LeaseWatch(gang, lease)
        self._is_busy = is_busy
        self._over_since: float | None = None
        threading.Thread(target=self._run, name="lease", daemon=True).start()

    def _run(self) -> None:
        while not self._has_to_end():
            time.sleep(self.watch.lease.period_seconds)
            self.watch.look()
        _end_gang(self.watch.gang)

    def _has_to_end(self) -> bool:
        if not self.watch.is_over:
            self._over_since = None
            return False
        now = time.monotonic()
        self._over_since = now if self._over_since is None else self._over_since
        patience = max(self.watch.lease.grace_seconds, LEAST_PATIENCE_SECONDS)
        return (self.rank == 0 and not self._is_busy()) or now - self._over_since > patience


def _end_gang(gang: str) -> None:
    """Removing the placement group kills every rank in it, this one too."""
    remover = threading.Thread(target=_remove, args=(gang,), daemon=True)
    remover.start()
    remover.join(REMOVAL_SECONDS)
    time.sleep(1.0)
    os._exit(0)


def _remove(gang: str) -> None:
    remove_placement_group(ray.util.get_placement_group(group_name(gang)))
