"""The gangs of a sweep: started as they are wanted, dismissed when unsound, and kept off hosts that failed too often.

A host is known by Ray's id of its node: one that was restarted has a new id, and a clean slate.
"""

from __future__ import annotations

import re
from collections import Counter
from typing import Any

from orchestrator.controller.snapshot import View
from orchestrator.failures import EXCLUDED_AT
from orchestrator.gang import Cluster, Gang, GangShape, GangState, LeaseFile
from orchestrator.store import HOST_EXCLUDED, Store
from orchestrator.sweep import UserError

GANG_STARTS_ALLOWED_TO_FAIL = 3


class GangPool:
    """All gangs are of one shape. Raises UserError when the cluster cannot hold one, or none can be started."""

    def __init__(self, cluster: Cluster, shape: GangShape, store: Store, sweep_id: int, view: View) -> None:
        self.cluster, self.shape, self.store, self.sweep_id, self.view = cluster, shape, store, sweep_id, view
        self.gangs: list[Gang] = []
        self.lease_file: LeaseFile | None = None
        """Where gangs that outlive this controller look for it."""
        self.failed_starts = 0
        self.faults: Counter[str] = Counter()
        events = [event for event in store.events(sweep_id) if event.kind == HOST_EXCLUDED]
        self.excluded = {found[1] for event in events if (found := re.search(r"\(node ([^)]+)\)", event.message))}
        self.capacity = cluster.capacity(shape)
        if self.excluded:
            self.capacity = self._capacity_without(self.excluded) or self.capacity

    @property
    def num_starting(self) -> int:
        return sum(gang.state is GangState.STARTING for gang in self.gangs)

    def idle(self) -> list[Gang]:
        return [gang for gang in self.gangs if gang.state is GangState.IDLE]

    def start(self, wanted: int, allowed: int | None = None) -> None:
        """Follow the gangs that are starting, and start more until there are ``wanted``, as far as the cluster goes.

        ``allowed``: no more than so many; idle ones beyond that are dismissed.
        """
        most = self.capacity if allowed is None else min(allowed, self.capacity)
        for gang in [gang for gang in self.gangs if gang.state is GangState.STARTING]:
            error = gang.poll_start()
            if error is not None:
                self.lose(gang, f"a gang did not start: {error}")
                self.failed_starts += 1
                if self.failed_starts >= GANG_STARTS_ALLOWED_TO_FAIL:
                    raise UserError(f"no gang could be started, {self.failed_starts} in a row; the last: {error}")
            elif gang.state is GangState.IDLE:
                self.failed_starts = 0
        for gang in [gang for gang in self.idle() if gang.shape != self.shape and not gang.is_landing]:
            self.lose(gang, f"gang dismissed: it was adopted, and the sweep asks for {self.shape} now")
        for gang in [gang for gang in self.idle() if not gang.is_landing][: max(0, len(self.gangs) - most)]:
            self.lose(gang, f"gang dismissed: the caps allow {most}")
        while len(self.gangs) < min(wanted, most):
            num_threads = max(1, int(self.shape.cpus_per_rank))
            lease = self.lease_file.lease if self.lease_file else None
            self.gangs.append(self.cluster.start_gang(self.shape, num_threads, frozenset(self.excluded), lease))

    def keep_lease(self) -> None:
        """Show the gangs that this controller lives: by its file, and by Ray when that can't be written."""
        if self.lease_file and not self.lease_file.keep([gang.gang_id for gang in self.gangs]):
            for gang in self.gangs:
                gang.renew()

    def lose(self, gang: Gang, reason: str) -> None:
        if gang not in self.gangs:
            return  # it was gone already, or before its attempt was adopted
        self.view.tell(reason)
        self.store.add_event(self.sweep_id, "gang_lost", reason)
        gang.dismiss()
        self.gangs.remove(gang)

    def blame(self, gang: Gang, rank: int, faults: int, cause: str) -> None:
        """Count faults against the host of a rank; too many, and its gangs are dismissed once idle and none is begun.

        The last host that can hold a gang is never excluded: a sweep that goes on badly beats one that stands still.
        """
        if not faults or rank >= len(gang.members):
            return
        host, node = _place(gang.members[rank])
        self.faults[node] += faults
        if self.faults[node] < EXCLUDED_AT or node in self.excluded:
            return
        left = self._capacity_without(self.excluded | {node})
        if not left:
            self.view.tell(f"host {host} failed {self.faults[node]} times ({cause}); it is the last one, so it stays")
            return
        self.excluded.add(node)
        self.capacity = left
        reason = f"{host} (node {node}): {cause}; this sweep uses it no more"
        self.view.tell(f"excluded  host {reason}")
        self.store.add_event(self.sweep_id, HOST_EXCLUDED, reason)
        for other in self.idle():
            if any(_place(member)[1] == node for member in other.members):
                self.lose(other, f"gang dismissed: it is on the excluded host {host}")

    def forget(self, gang: Gang) -> None:
        """Another controller has adopted it."""
        self.gangs = [one for one in self.gangs if one is not gang]

    def _capacity_without(self, nodes: set[str]) -> int:
        try:
            return self.cluster.capacity(self.shape, frozenset(nodes))
        except UserError:
            return 0

    def dismiss_all(self) -> None:
        for gang in self.gangs:
            gang.dismiss()
        if self.lease_file:
            self.lease_file.remove()


def _place(member: dict[str, Any]) -> tuple[str, str]:
    return member["host"], member.get("node_id", member["host"])
