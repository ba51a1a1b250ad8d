"""Which waiting trial starts where: in the order of the plan, with room kept for those that have to wait.

Trials are taken in order. One starts on an idle gang of its shape, else on a new gang where there is room. Where there
is neither, the first trial of its shape gets a *reservation*: the gang of its shape that ends next, or, if that is
longer than making room and starting a gang, the nodes where room comes first, and the time when it does, reckoned from
what runs there (``pace``). Trials behind it go on, and start before it only where that costs it nothing: elsewhere, in
what it leaves of its nodes, or if they are expected to end before its time (EASY back-filling, with a reservation for
each shape instead of one: Mu'alem and Feitelson, doi 10.1109/71.932708). The order is disturbed by no more than that.

The bound: a reservation's nodes stay the same, and past its time nothing starts on them that would take its room. So
a trial waits at most until all has ended that ran on its nodes by then, however wrong the estimates were; trials before
it in the order are finitely many. Caps count like a node: their room is reserved, too.
"""

from __future__ import annotations

import heapq
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field

from orchestrator.controller.clock import Clock
from orchestrator.controller.gang_pool import GangPool
from orchestrator.controller.known_trials import KnownTrials, Place
from orchestrator.controller.running import RunningAttempt
from orchestrator.gang import UNITS, Amount, Fits, Gang, GangShape, GangState, Room, minus, plus, times
from orchestrator.store import TrialRow

CAPS = "caps"
"""Stands for a node that holds as many trials and GPUs as the caps allow. No node of Ray's has such a name."""
NO_CAP = 10**9

Held = Mapping[str, Amount]


@dataclass
class Reservation:
    """What a waiting trial waits for: a gang of its shape to end, or nodes."""

    place: Place
    until: float
    """When it is expected, in the clock's time."""
    gang: Gang | None = None
    nodes: list[str] = field(default_factory=list)
    spare: dict[str, Amount] = field(default_factory=dict)
    """By node, what others may hold past that time."""

    users: list[Gang] = field(default_factory=list)
    """Who does already."""

    def allows(self, held: Held, ends: float) -> bool:
        return ends <= self.until or all(_within(held[node], self.spare[node]) for node in held if node in self.spare)

    def charge(self, gang: Gang, held: Held, ends: float) -> None:
        if ends > self.until and gang not in self.users:
            self.users.append(gang)
            for node in held:
                if node in self.spare:
                    self.spare[node] = minus(self.spare[node], held[node])


class Schedule:
    """Decides; starts and retires gangs; the trials that can begin are the caller's to launch."""

    def __init__(
        self,
        pool: GangPool,
        trials: KnownTrials,
        running: list[RunningAttempt],
        clock: Clock,
        tell: Callable[[str], None],
    ) -> None:
        self._pool, self._trials, self._running, self._clock, self._tell = pool, trials, running, clock, tell
        self.reservations: dict[GangShape, Reservation] = {}
        self._told: set[tuple[GangShape, str]] = set()
        self._caps: Amount = (NO_CAP * UNITS, NO_CAP * UNITS)
        self._queues: Mapping[GangShape, Sequence[Place]] = {}
        self._idle: list[Gang] = []
        self._begun: dict[int, float] = {}
        """By the gang's id(): when the trial is expected to end that this turn gave it."""

    def turn(
        self, waiting: Mapping[GangShape, Sequence[Place]], caps: tuple[float, float]
    ) -> list[tuple[Gang, TrialRow]]:
        """Gangs and the trials that they are to take now. ``waiting``: in order, by shape; ``caps``: trials and GPUs at
        once."""
        self._caps = tuple(int(min(cap, NO_CAP) * UNITS + 0.5) for cap in caps)  # type: ignore[assignment]
        # A gang is idle before the end of its trial is booked, and that end may be the gang's, too.
        at_work = {id(attempt.gang) for attempt in self._running if attempt.landing is None}
        self._idle, self._begun = [gang for gang in self._pool.idle() if id(gang) not in at_work], {}
        promised = Counter(gang.shape for gang in self._pool.gangs if gang.state is GangState.STARTING)
        self._queues = queues = {shape: queue for shape, queue in waiting.items() if queue}
        self.reservations = {shape: one for shape, one in self.reservations.items() if shape in queues}
        shapes, launches = list(queues), []
        heads = [(queues[shape][0], number, 0) for number, shape in enumerate(shapes)]
        heapq.heapify(heads)
        while heads:
            place, number, at = heapq.heappop(heads)
            shape, trial = shapes[number], self._trials[place[1]]
            gang = self._take_idle(place, trial, shape)
            if gang is not None:
                launches.append((gang, trial))
            elif promised[shape] > 0:
                promised[shape] -= 1
            elif not self._start(place, trial, shape):
                continue
            self._drop_reservation(place, shape)
            if at + 1 < len(queues[shape]):
                heapq.heappush(heads, (queues[shape][at + 1], number, at + 1))
        return launches

    # -- one trial ------------------------------------------------------------------------------------------

    def _take_idle(self, place: Place, trial: TrialRow, shape: GangShape) -> Gang | None:
        ends = self._expected_end(trial, shape)
        for gang in self._idle:
            if gang.shape == shape and self._may_hold(place, self._held(gang), ends, gang):
                self._idle.remove(gang)
                self._charge(place, gang, ends)
                return gang
        return None

    def _start(self, place: Place, trial: TrialRow, shape: GangShape) -> bool:
        """Start a gang for the trial, or reserve what it waits for."""
        if not self._ever_fits(shape):
            return False
        ends = self._expected_end(trial, shape) + self._pool.pace.start_seconds
        nodes = self._free_place(place, shape, ends)
        if nodes is None:
            surplus = [gang for gang in self._idle if gang.shape not in self._queues and not gang.is_landing]
            nodes = self._place_with(surplus, place, shape, ends) if surplus else None
        if nodes is None:
            nodes = self._reserved_place(place, shape)
        if nodes is None:
            return False
        self._charge(place, self._pool.start(shape, nodes), ends)
        return True

    def _ever_fits(self, shape: GangShape) -> bool:
        one = self._caps_of(shape)
        if not _within(one, self._caps):
            if any(self._caps):
                self._tell_once(shape, f"waiting   a gang of {shape}: the caps do not allow even one")
            return False
        if not self._pool.could_hold(shape):
            self._tell_once(shape, f"waiting   a gang of {shape}: the nodes that hold one are gone")
            return False
        self._told.discard((shape, "waits"))
        return True

    def _tell_once(self, shape: GangShape, line: str) -> None:
        if (shape, "waits") not in self._told:
            self._told.add((shape, "waits"))
            self._tell(line)

    def _expected_end(self, trial: TrialRow, shape: GangShape) -> float:
        seconds = self._pool.pace.seconds(trial, shape)
        return float("inf") if seconds is None else self._clock.monotonic() + seconds

    # -- room -----------------------------------------------------------------------------------------------

    def _caps_of(self, shape: GangShape) -> Amount:
        return UNITS, int(shape.num_gpus * UNITS + 0.5)

    def _caps_left(self) -> Amount:
        number, gpus = self._pool.in_use()
        return self._caps[0] - number * UNITS, self._caps[1] - int(gpus * UNITS + 0.5)

    def _held(self, gang: Gang) -> dict[str, Amount]:
        return {**self._pool.held(gang), CAPS: self._caps_of(gang.shape)}

    def _would_hold(self, shape: GangShape, nodes: Iterable[str]) -> dict[str, Amount]:
        held = {node: times(shape.bundle_units, number) for node, number in Counter(nodes).items()}
        return {**held, CAPS: self._caps_of(shape)}

    def _before(self, place: Place, shape: GangShape | None = None) -> list[Reservation]:
        """Reservations of nodes that a trial has to heed: of trials before it."""
        return [one for of, one in self.reservations.items() if one.gang is None and one.place < place and of != shape]

    def _may_hold(self, place: Place, held: Held, ends: float, gang: Gang | None = None) -> bool:
        return all(gang in one.users or one.allows(held, ends) for one in self._before(place))

    def _charge(self, place: Place, gang: Gang, ends: float) -> None:
        self._begun[id(gang)] = ends
        for one in self._before(place):
            one.charge(gang, self._held(gang), ends)

    def _free_place(self, place: Place, shape: GangShape, ends: float, room: Room | None = None) -> list[str] | None:
        if room is None and not _within(self._caps_of(shape), self._caps_left()):
            return None
        room = room or self._pool.room
        reserved = [one for one in self._before(place, shape) if ends > one.until]
        tight = {
            node for one in reserved for node, spare in one.spare.items() if not _within(shape.bundle_units, spare)
        }
        for avoid in (tight, {node for one in reserved for node in one.spare}):
            nodes = room.place(shape, avoid)
            if nodes is not None and self._may_hold(place, self._would_hold(shape, nodes), ends):
                return nodes
        return None

    def _place_with(self, gangs: list[Gang], place: Place, shape: GangShape, ends: float) -> list[str] | None:
        """A place in the free room and that of idle gangs, which are retired as far as it takes."""
        room, caps = Room(self._pool.room.free), self._caps_left()
        used: list[Gang] = []
        for gang in gangs:
            for node, amount in self._pool.held(gang).items():
                room.change(node, amount)
            caps = plus(caps, self._caps_of(gang.shape))
            used.append(gang)
            if _within(self._caps_of(shape), caps):
                nodes = self._free_place(place, shape, ends, room)
                if nodes is not None:
                    self._retire(used, nodes, shape)
                    return nodes
        return None

    def _retire(self, gangs: list[Gang], nodes: list[str], shape: GangShape) -> None:
        """As few of the gangs as make room on these nodes, the last one that was needed first."""
        wanted = Counter(nodes)
        for gang in reversed(gangs):
            free = self._pool.room.free
            has_room = all(_within(times(shape.bundle_units, number), free[node]) for node, number in wanted.items())
            if has_room and _within(self._caps_of(shape), self._caps_left()):
                return
            self._idle.remove(gang)
            self._pool.retire(gang, f"gang dismissed: its room is wanted for {shape}")

    # -- reservations ---------------------------------------------------------------------------------------

    def _reserved_place(self, place: Place, shape: GangShape) -> list[str] | None:
        """The reserved nodes, once they have room; what is idle there is retired."""
        one = self.reservations.get(shape)
        if one is None or one.place != place or not self._still_holds(one):
            self._drop_reservation(place, shape)
            one = self._reserve(place, shape)
            if one is None:
                return None
            self.reservations[shape] = one
        if one.gang is not None:
            return None
        idle = [gang for gang in self._idle if not gang.is_landing]
        there = [gang for gang in idle if not self._pool.held(gang).keys().isdisjoint(one.nodes)]
        there += [gang for gang in idle if gang not in there]  # for the caps alone
        free = {node: self._pool.room.free[node] for node in one.nodes}
        caps = self._caps_left()
        used: list[Gang] = []
        for gang in (None, *there):
            if gang is not None:
                for node, amount in self._pool.held(gang).items():
                    if node in free:
                        free[node] = plus(free[node], amount)
                caps = plus(caps, self._caps_of(gang.shape))
                used.append(gang)
            nodes = Room(free).place(shape)
            if nodes is not None and _within(self._caps_of(shape), caps):
                self._retire(used, nodes, shape)
                return nodes
        return None

    def _still_holds(self, one: Reservation) -> bool:
        if one.gang is not None:
            return one.gang.state is GangState.BUSY and self._clock.monotonic() <= one.until
        return all(node in self._pool.room.free for node in one.nodes)

    def _drop_reservation(self, place: Place, shape: GangShape) -> None:
        one = self.reservations.get(shape)
        if one is not None and one.place >= place:
            del self.reservations[shape]

    def _reserve(self, place: Place, shape: GangShape) -> Reservation | None:
        """By the expected ends of all that holds room; None while reservations of others leave no room to come."""
        now, start = self._clock.monotonic(), self._pool.pace.start_seconds
        soonest = self._soonest(shape, now)
        if soonest is not None and soonest[0] <= now + start:  # no room comes sooner
            return Reservation(place, soonest[0] + start, gang=soonest[1])
        ends = self._ends(now)
        of_shape = min(
            (
                (end, number)
                for number, (end, gang) in enumerate(ends)
                if gang.shape == shape and gang not in self._idle
            ),
            default=None,
        )
        taken = {node for one in self._before(place, shape) for node in one.spare}
        free = {node: amount for node, amount in self._pool.room.free.items() if node not in taken}
        fits, caps = Fits(shape), self._caps_left()
        for node, amount in free.items():
            fits.put(node, amount)
        ready = float("inf")
        for end, gang in sorted(ends, key=lambda one: one[0]):
            for node, amount in self._pool.held(gang).items():
                if node in free:
                    free[node] = plus(free[node], amount)
                    fits.put(node, free[node])
            caps = plus(caps, self._caps_of(gang.shape))
            if fits.holds_one() and _within(self._caps_of(shape), caps):
                ready = end
                break
        if of_shape is not None and of_shape[0] <= ready + start:
            return Reservation(place, of_shape[0] + start, gang=ends[of_shape[1]][1])
        nodes = Room(free).place(shape) if ready < float("inf") else None
        if nodes is None:
            return None
        held = self._would_hold(shape, nodes)
        spare = {node: minus(caps if node == CAPS else free[node], amount) for node, amount in held.items()}
        return Reservation(place, ready, nodes=list(dict.fromkeys(nodes)), spare=spare)

    def _soonest(self, shape: GangShape, now: float) -> tuple[float, Gang] | None:
        """The gang of a shape at work that is expected to be idle first, without a look at all others."""
        pace = self._pool.pace
        of_shape = (
            (now + pace.remaining(attempt, now), number)
            for number, attempt in enumerate(self._running)
            if attempt.gang.shape == shape and attempt.landing is None
        )
        end, number = min(of_shape, default=(0.0, -1))
        return None if number < 0 else (end, self._running[number].gang)

    def _ends(self, now: float) -> list[tuple[float, Gang]]:
        """When each gang is expected to be idle."""
        pace = self._pool.pace
        busy = [
            (now + pace.remaining(attempt, now), attempt.gang) for attempt in self._running if attempt.landing is None
        ]
        known = {id(gang) for _, gang in busy}
        late = now + pace.start_seconds
        rest = [gang for gang in self._pool.gangs if id(gang) not in known]
        idle = {id(gang) for gang in self._idle}
        return busy + [(now if id(gang) in idle else self._begun.get(id(gang), late), gang) for gang in rest]


def _within(one: Amount, other: Amount) -> bool:
    return one[0] <= other[0] and one[1] <= other[1]
