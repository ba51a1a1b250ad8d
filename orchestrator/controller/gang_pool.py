"""The gangs of a sweep and the room that they take: started, dismissed when unsound, kept off hosts that often fail.

A host is known by Ray's id of its node: one that was restarted has a new id, and a clean slate. What others hold of a
node is what is neither free nor ours; we start nothing there, and no gang waits in Ray's own queue, where a large one
would starve.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Collection, Iterable, Sequence
from typing import Any

from orchestrator.controller.clock import Clock
from orchestrator.controller.pace import Pace
from orchestrator.controller.running import RunningAttempt
from orchestrator.controller.snapshot import View
from orchestrator.failures import EXCLUDED_AT
from orchestrator.gang import (
    UNITS,
    Amount,
    Cluster,
    Gang,
    GangShape,
    GangState,
    LeaseFile,
    NodeRoom,
    Room,
    minus,
    number_of_gangs,
    plus,
    refuse_too_large,
    times,
)
from orchestrator.store import HOST_EXCLUDED, Store
from orchestrator.sweep import WARM_BELOW_SECONDS, ResourcesConfig, UserError

GANG_STARTS_ALLOWED_TO_FAIL = 3
PLACED_SECONDS = 30.0
"""How long a gang may wait for the room that was free a moment ago: somebody else took it."""


class GangPool:
    """Raises UserError when the cluster cannot hold a gang of one of the shapes, or none can be started."""

    def __init__(
        self,
        cluster: Cluster,
        shapes: Iterable[GangShape],
        resources: ResourcesConfig,
        store: Store,
        sweep_id: int,
        view: View,
        clock: Clock,
    ) -> None:
        self.resources = resources
        self.cluster, self.store, self.sweep_id, self.view, self.clock = cluster, store, sweep_id, view, clock
        self.shapes = list(dict.fromkeys(shapes))
        self.gangs: list[Gang] = []
        self.lease_file: LeaseFile | None = None
        """Where gangs that outlive this controller look for it."""
        self.pace = Pace()
        self.failed_starts = 0
        self.faults: Counter[str] = Counter()
        events = [event for event in store.events(sweep_id) if event.kind == HOST_EXCLUDED]
        self.excluded = {found[1] for event in events if (found := re.search(r"\(node ([^)]+)\)", event.message))}
        self._held: dict[int, dict[str, Amount]] = {}
        """By the gang's id(): what it takes of each node."""
        self._begun: dict[int, float] = {}
        self._spent: list[Gang] = []
        self._gpu_units = 0
        """Of all gangs."""
        self._could_hold: dict[GangShape, bool] = {}
        """By what ``read_nodes`` found."""
        self.room = Room({})
        self.read_nodes()
        for shape in self.shapes:
            refuse_too_large(shape, self.nodes.values())
        if not all(number_of_gangs(shape, self._sizes()) for shape in self.shapes):
            self.excluded = set()  # a sweep that goes on badly beats one that stands still
            self.read_nodes()

    # -- the cluster ----------------------------------------------------------------------------------------

    def read_nodes(self) -> None:
        """What the nodes hold now, less what others hold of them."""
        self.nodes: dict[str, NodeRoom] = {node.id: node for node in self.cluster.rooms()}
        ours = self._ours()
        free = {}
        for node in self.nodes.values():
            if node.id not in self.excluded:
                mine = ours.get(node.id, (0, 0))
                theirs = minus(minus(node.total, node.available), mine)
                free[node.id] = minus(minus(node.total, mine), (max(0, theirs[0]), max(0, theirs[1])))
        self.room = Room(free)
        self._could_hold = {}

    def _ours(self) -> dict[str, Amount]:
        ours: dict[str, Amount] = {}
        for held in self._held.values():
            for node, amount in held.items():
                ours[node] = plus(ours.get(node, (0, 0)), amount)
        return ours

    def _sizes(self, without: Collection[str] = ()) -> list[Amount]:
        gone = {*self.excluded, *without}
        return [node.total for node in self.nodes.values() if node.id not in gone]

    def could_hold(self, shape: GangShape) -> bool:
        if shape not in self._could_hold:
            self._could_hold[shape] = number_of_gangs(shape, self._sizes()) > 0
        return self._could_hold[shape]

    # -- the gangs ------------------------------------------------------------------------------------------

    @property
    def num_starting(self) -> int:
        return sum(gang.state is GangState.STARTING for gang in self.gangs)

    def idle(self) -> list[Gang]:
        """Those that can take a trial."""
        return [gang for gang in self.gangs if gang.state is GangState.IDLE and gang not in self._spent]

    def held(self, gang: Gang) -> dict[str, Amount]:
        return self._held.get(id(gang), {})

    def in_use(self) -> tuple[int, float]:
        """Gangs and their GPUs."""
        return len(self.gangs), self._gpu_units / UNITS

    def follow_starts(self) -> None:
        """Raises UserError when none can be started."""
        self._replace_spent()
        now = self.clock.monotonic()
        for gang in [gang for gang in self.gangs if gang.state is GangState.STARTING]:
            error = gang.poll_start()
            if error is not None:
                self.lose(gang, f"a gang did not start: {error}")
                self.failed_starts += 1
                if self.failed_starts >= GANG_STARTS_ALLOWED_TO_FAIL:
                    raise UserError(f"no gang could be started, {self.failed_starts} in a row; the last: {error}")
            elif gang.state is GangState.IDLE:
                self.failed_starts = 0
                self.pace.saw_start(now - self._begun[id(gang)])
            elif now - self._begun[id(gang)] > PLACED_SECONDS and not gang.is_placed():
                self.lose(gang, "a gang withdrawn: the room that it was to have was taken by others")
                self.read_nodes()

    def start(self, shape: GangShape, nodes: Sequence[str]) -> Gang:
        """On these nodes, one for each bundle."""
        lease = self.lease_file.lease if self.lease_file else None
        gang = self.cluster.start_gang(shape, max(1, int(shape.cpus_per_rank)), nodes, lease)
        self._hold(gang, nodes)
        return gang

    def adopt(self, gang: Gang) -> None:
        """One that another controller started."""
        first_ranks = gang.members[:: gang.shape.ranks_per_bundle]
        self._hold(gang, [_place(member)[1] for member in first_ranks])

    def _hold(self, gang: Gang, nodes: Sequence[str]) -> None:
        self.gangs.append(gang)
        self._gpu_units += _gpu_units(gang)
        self._begun[id(gang)] = self.clock.monotonic()
        bundle = gang.shape.bundle_units
        held = {node: times(bundle, number) for node, number in Counter(nodes).items()}
        self._held[id(gang)] = held
        for node, amount in held.items():
            self.room.change(node, minus((0, 0), amount))

    def keep_lease(self) -> None:
        """Show the gangs that this controller lives: by its file, and by Ray when that can't be written."""
        if self.lease_file and not self.lease_file.keep([gang.gang_id for gang in self.gangs]):
            for gang in self.gangs:
                gang.renew()

    def retire(self, gang: Gang, reason: str) -> None:
        """Dismiss one that nothing is wrong with."""
        self.view.tell(reason)
        self._drop(gang)

    def lose(self, gang: Gang, reason: str) -> None:
        if gang not in self.gangs:
            return  # it was gone already, or before its attempt was adopted
        self.store.add_event(self.sweep_id, "gang_lost", reason)
        self.retire(gang, reason)

    def _drop(self, gang: Gang) -> None:
        gang.dismiss()
        self._release(gang)

    def _release(self, gang: Gang) -> None:
        self.gangs.remove(gang)
        self._gpu_units -= _gpu_units(gang)
        del self._begun[id(gang)]
        for node, amount in self._held.pop(id(gang)).items():
            self.room.change(node, amount)

    def took(self, attempt: RunningAttempt) -> None:
        """An attempt did what it was asked for: how long it took, and whether the gang's processes take another one."""
        if attempt.gang not in self.gangs:
            return  # it was gone before its attempt was adopted
        gang, seconds = attempt.gang, self.clock.monotonic() - attempt.begun_at
        self.pace.saw_end(attempt, seconds)
        resources = self.resources.of(attempt.trial.arm, attempt.trial.axes)
        is_long = resources.warm == "auto" and seconds >= WARM_BELOW_SECONDS
        if gang.num_attempts >= resources.warm_trials or is_long or resources.warm == "off":
            self._spent.append(gang)

    def _replace_spent(self) -> None:
        """Once their last checkpoint stands."""
        for gang in [one for one in self._spent if one.state is not GangState.IDLE or not one.is_landing]:
            self._spent.remove(gang)
            if gang in self.gangs:
                self._drop(gang)

    def heed_caps(self, max_trials: float, max_gpus: float) -> None:
        """Idle gangs beyond the caps are dismissed; what works ends first."""
        for gang in [one for one in self.idle() if not one.is_landing]:
            number, gpus = self.in_use()
            if number > max_trials:
                self.lose(gang, f"gang dismissed: the caps allow {max_trials:g}")
            elif gpus > max_gpus + 1 / UNITS and gang.shape.num_gpus:
                self.lose(gang, f"gang dismissed: the caps allow {max_gpus:g} GPUs")

    # -- hosts ----------------------------------------------------------------------------------------------

    def blame(self, gang: Gang, rank: int, faults: int, cause: str) -> None:
        """Count faults against the host of a rank; too many, and its gangs are dismissed once idle and none is begun.

        A host without which a shape has no place is never excluded: a sweep that goes on badly beats one that stands
        still.
        """
        if not faults or rank >= len(gang.members):
            return
        host, node = _place(gang.members[rank])
        self.faults[node] += faults
        if self.faults[node] < EXCLUDED_AT or node in self.excluded:
            return
        if not all(number_of_gangs(shape, self._sizes({node})) for shape in self.shapes):
            self.view.tell(f"host {host} failed {self.faults[node]} times ({cause}); it is the last one, so it stays")
            return
        self.excluded.add(node)
        self.read_nodes()
        reason = f"{host} (node {node}): {cause}; this sweep uses it no more"
        self.view.tell(f"excluded  host {reason}")
        self.store.add_event(self.sweep_id, HOST_EXCLUDED, reason)
        for other in self.idle():
            if any(_place(member)[1] == node for member in other.members) and not other.is_landing:
                self.lose(other, f"gang dismissed: it is on the excluded host {host}")

    def forget(self, gang: Gang) -> None:
        """Another controller has adopted it."""
        if gang in self.gangs:
            self._release(gang)

    def dismiss_all(self) -> None:
        for gang in self.gangs:
            gang.dismiss()
        if self.lease_file:
            self.lease_file.remove()


def _gpu_units(gang: Gang) -> int:
    return round(gang.shape.num_gpus * UNITS)


def _place(member: dict[str, Any]) -> tuple[str, str]:
    return member["host"], member.get("node_id", member["host"])
