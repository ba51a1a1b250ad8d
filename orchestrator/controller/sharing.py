"""Several sweeps on one cluster: what each may hold, by priority, and by turns among equals. What works goes on.

Every controller says in the store what it holds and what its waiting trials could still take. Who shares the store and
the Ray cluster then reckons the same: sweeps of a higher priority get all that they hold and want; what is left goes
gang by gang, each time to the equal that has been given least. A sweep beyond its share starts nothing and gives back
idle gangs; those at work end their trials first. The sums are over the whole cluster, not by node: what a higher one
wants is kept free although it may lie in pieces too small for it, so that they grow together.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from orchestrator.controller.gang_pool import GangPool
from orchestrator.controller.known_trials import KnownTrials
from orchestrator.controller.orders import Orders
from orchestrator.gang import UNITS, Amount, GangShape, minus, plus, times
from orchestrator.store import Demand, Lease, Store

NO_CAP = float("inf")


class Sharing:
    """One sweep's part in it. ``cluster_id`` names the Ray cluster: sweeps on another one are none of its business."""

    def __init__(
        self, store: Store, name: str, cluster_id: str, pool: GangPool, trials: KnownTrials, orders: Orders
    ) -> None:
        self._store, self._name, self._cluster_id = store, name, cluster_id
        self._pool, self._trials, self._orders = pool, trials, orders
        self._published: Demand | None = None
        self._allowed: Amount | None = None
        self._is_yielding = False

    def refresh(self, lease: Lease, starts_more: bool, tell: Callable[[str], None]) -> None:
        """Say what we want, hear what others do. ``starts_more``: False while the sweep stops or waits for its disk."""
        mine = self._demand(lease.sweep_id, starts_more)
        if mine != self._published:
            self._store.publish_demand(lease, mine)
            self._published = mine
        others = [
            one for one in self._store.demands() if one.sweep_id != lease.sweep_id and one.cluster == self._cluster_id
        ]
        total = (0, 0)
        for node in self._pool.nodes.values():
            total = plus(total, node.total)
        self._allowed = allowance(mine, others, total) if others else None
        self._tell(mine, others, tell)

    def caps(self, caps: tuple[float, float]) -> tuple[float, float]:
        """Trials and GPUs at once: the user's caps, within our share."""
        if self._allowed is None:
            return caps
        cpus, gpus = self._allowed
        smallest = min((amount_of(shape)[0] for shape in self._pool.shapes), default=0)
        trials = cpus // smallest if smallest else NO_CAP
        return min(caps[0], trials), min(caps[1], gpus / UNITS)

    def _demand(self, sweep_id: int, starts_more: bool) -> Demand:
        queues = {shape: len(queue) for shape, queue in self._trials.queues.items() if queue} if starts_more else {}
        gangs = self._needed_gangs(queues)
        held = (0, 0)
        for shape in gangs:
            held = plus(held, amount_of(shape))
        max_trials, max_gpus = self._orders.caps()
        num_left, gpus_left = max_trials - len(gangs), max_gpus * UNITS - held[1]
        wanted = (0, 0)
        for shape, number in queues.items():
            amount = amount_of(shape)
            most = int(max(0, min(number, num_left, gpus_left / amount[1] if amount[1] else NO_CAP)))
            wanted = plus(wanted, times(amount, most))
            num_left, gpus_left = num_left - most, gpus_left - amount[1] * most
        shapes = [*queues] or [gang.shape for gang in self._pool.gangs] or self._pool.shapes
        largest = max((amount_of(shape) for shape in shapes), key=lambda amount: (amount[1], amount[0]), default=(0, 0))
        return Demand(sweep_id, self._name, self._cluster_id, self._orders.priority, held, wanted, largest)

    def _needed_gangs(self, queues: dict[GangShape, int]) -> list[GangShape]:
        """The shapes of our gangs but of idle ones that no trial waits for. Trials that such a gang takes next are
        taken out of ``queues``."""
        idle = [gang for gang in self._pool.idle() if not gang.is_landing]
        are_idle = {id(gang) for gang in idle}
        needed = [gang.shape for gang in self._pool.gangs if id(gang) not in are_idle]
        for gang in idle:
            if queues.get(gang.shape, 0):
                queues[gang.shape] -= 1
                needed.append(gang.shape)
        return needed

    def _tell(self, mine: Demand, others: Sequence[Demand], tell: Callable[[str], None]) -> None:
        """Once when we begin to give way, and once when that is over."""
        above = [one for one in others if one.priority > mine.priority and any(plus(one.held, one.wanted))]
        needed = plus(mine.held, mine.gang) if any(mine.wanted) else mine.held
        is_yielding = bool(above) and self._allowed is not None and not _fits(needed, self._allowed)
        if is_yielding and not self._is_yielding:
            names = ", ".join(f"{one.name} (priority {one.priority})" for one in above)
            tell(f"yielding  to {names}: nothing starts on what it holds and wants; what runs goes on")
        elif self._is_yielding and not is_yielding:
            tell("goes on   no sweep of a higher priority wants what this one waits for")
        self._is_yielding = is_yielding


def amount_of(shape: GangShape) -> Amount:
    return times(shape.bundle_units, shape.num_bundles)


def allowance(mine: Demand, others: Sequence[Demand], total: Amount) -> Amount:
    """CPUs and GPUs, in units, that this sweep may hold on a cluster of ``total``."""
    left = total
    for one in others:
        if one.priority > mine.priority:
            left = minus(left, plus(one.held, one.wanted))
    equals = [mine, *(one for one in others if one.priority == mine.priority)]
    given = {one.sweep_id: (0, 0) for one in equals}
    open_ones = {one.sweep_id: one for one in equals if any(one.gang)}

    def turn(one: Demand) -> tuple[float, float, int]:
        """Least given first; among these who holds less, so that equals take turns where a part is left over."""
        return _share(given[one.sweep_id], total), _share(one.held, total), one.sweep_id

    while open_ones:
        one = min(open_ones.values(), key=turn)
        more = plus(given[one.sweep_id], one.gang)
        asked = plus(one.held, one.wanted)
        is_served = all(has >= wants for has, wants in zip(given[one.sweep_id], asked, strict=True))
        if is_served or not _fits(one.gang, left):
            del open_ones[one.sweep_id]
            continue
        given[one.sweep_id], left = more, minus(left, one.gang)
    return given[mine.sweep_id]


def _share(amount: Amount, total: Amount) -> float:
    """The dominant one: of what it has the largest part of (Ghodsi et al. 2011, Dominant Resource Fairness)."""
    return max((has / of for has, of in zip(amount, total, strict=True) if of), default=0.0)


def _fits(amount: Amount, room: Amount) -> bool:
    return all(wants <= has for wants, has in zip(amount, room, strict=True))
