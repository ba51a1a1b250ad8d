"""What a gang asks of the cluster, and where the room for it is. Pure: counts of resources by node, no Ray.

Ranks that differ in tensor alone talk at every layer, so they are on one node: they share a bundle, which Ray never
cuts. ``placement`` says how the bundles of a gang, one a tensor group, lie to one another.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property

from models.config import Layout
from orchestrator.sweep import Placement, ResourcesConfig, UserError

UNITS = 10_000
"""In one CPU or GPU: Ray's own resolution. Whole numbers, so that nothing drifts."""

Amount = tuple[int, int]
"""CPUs and GPUs in units."""


@dataclass(frozen=True)
class GangShape:
    """A bundle of CPUs and GPUs for each tensor group of a layout, and how the bundles are placed."""

    layout: Layout
    cpus_per_rank: float
    gpus_per_rank: float
    placement: Placement = "pack"

    @classmethod
    def of(cls, resources: ResourcesConfig) -> GangShape:
        return cls(resources.layout, resources.cpus, resources.gpus, resources.placement)

    @property
    def device(self) -> str:
        return "cuda" if self.gpus_per_rank else "cpu"

    @property
    def ranks_per_bundle(self) -> int:
        return self.layout.tensor

    @cached_property
    def num_bundles(self) -> int:
        return self.layout.world_size // self.layout.tensor

    @property
    def bundle(self) -> dict[str, float]:
        ranks = self.ranks_per_bundle
        resources = {"CPU": self.cpus_per_rank * ranks, "GPU": self.gpus_per_rank * ranks}
        return {name: amount for name, amount in resources.items() if amount}

    @cached_property
    def bundle_units(self) -> Amount:
        return units(self.bundle)

    @property
    def num_gpus(self) -> float:
        return self.gpus_per_rank * self.layout.world_size

    @cached_property
    def _hash(self) -> int:
        return hash((self.layout, self.cpus_per_rank, self.gpus_per_rank, self.placement))

    def __hash__(self) -> int:
        return self._hash

    def __eq__(self, other: object) -> bool:
        """Asked for each gang and trial again and again, and most are the very same."""
        if self is other or not isinstance(other, GangShape):
            return self is other
        if self._hash != other._hash:
            return False
        amounts = (other.cpus_per_rank, other.gpus_per_rank, other.placement)
        return self.layout == other.layout and (self.cpus_per_rank, self.gpus_per_rank, self.placement) == amounts

    def __str__(self) -> str:
        rank = {"CPU": self.cpus_per_rank, "GPU": self.gpus_per_rank}
        amounts = " + ".join(f"{amount:g} {name}" for name, amount in rank.items() if amount)
        said = f"{self.layout.world_size} rank(s) x {amounts}"
        if self.ranks_per_bundle > 1:
            said += f", {self.ranks_per_bundle} on a node at a time"
        return said if self.placement == "pack" else f"{said}, placement {self.placement}"


@dataclass(frozen=True)
class NodeRoom:
    """A living node, in units."""

    id: str
    total: Amount
    available: Amount
    """What nobody holds, ourselves included."""


def units(resources: Mapping[str, float]) -> Amount:
    cpus, gpus = (round(resources.get(name, 0.0) * UNITS) for name in ("CPU", "GPU"))
    return cpus, gpus


def times(amount: Amount, number: int) -> Amount:
    return amount[0] * number, amount[1] * number


def plus(one: Amount, other: Amount) -> Amount:
    return one[0] + other[0], one[1] + other[1]


def minus(one: Amount, other: Amount) -> Amount:
    return one[0] - other[0], one[1] - other[1]


def how_many(free: Amount, bundle: Amount) -> int:
    """Bundles that fit."""
    fits = [have // need for have, need in zip(free, bundle, strict=True) if need]
    return max(0, min(fits))


@dataclass
class Fits:
    """How many bundles of one shape the nodes hold, kept up to date as nodes change."""

    shape: GangShape
    by_node: dict[str, int] = field(default_factory=dict)
    total: int = 0
    nodes: int = 0
    largest: int = 0

    def put(self, node: str, free: Amount) -> None:
        now, before = how_many(free, self.shape.bundle_units), self.by_node.get(node, 0)
        self.by_node[node] = now
        self.total += now - before
        self.nodes += (now > 0) - (before > 0)
        self.largest = max(self.largest, now)

    def holds_one(self) -> bool:
        """Whether a gang fits, if nothing was taken away since the counting began."""
        wanted = self.shape.num_bundles
        if self.shape.placement == "strict_pack":
            return self.largest >= wanted
        return (self.nodes if self.shape.placement == "strict_spread" else self.total) >= wanted


def number_of_gangs(shape: GangShape, nodes: Collection[Amount]) -> int:
    """Gangs of one shape that empty nodes of these sizes hold together."""
    fits, wanted = [how_many(total, shape.bundle_units) for total in nodes], shape.num_bundles
    if shape.placement == "strict_pack":
        return sum(fit // wanted for fit in fits)
    if shape.placement == "strict_spread":
        number = sum(fits) // wanted
        while number and sum(min(fit, number) for fit in fits) < number * wanted:
            number -= 1
        return number
    return sum(fits) // wanted


def refuse_too_large(shape: GangShape, nodes: Collection[NodeRoom]) -> None:
    """UserError when the nodes cannot hold one gang, whoever uses them now."""
    fits = [how_many(node.total, shape.bundle_units) for node in nodes]
    if number_of_gangs(shape, [node.total for node in nodes]):
        return
    largest = max((node.total for node in nodes), default=(0, 0))
    bundle = " + ".join(f"{amount:g} {name}" for name, amount in shape.bundle.items())
    raise UserError(
        f"resources: a gang asks for {shape}, and the cluster holds {sum(fits) * shape.ranks_per_bundle} such rank(s) "
        f"on {sum(fit > 0 for fit in fits)} of {len(fits)} node(s): the {shape.ranks_per_bundle} tensor rank(s) of a "
        f"group are on one node, which takes {bundle}, and the largest has {largest[0] / UNITS:g} CPU + "
        f"{largest[1] / UNITS:g} GPU"
    )


class Room:
    """What is free, by node. Nodes that are alike are looked at together: a cluster has few kinds of them."""

    def __init__(self, free: Mapping[str, Amount]) -> None:
        self.free = dict(free)
        self._alike: dict[Amount, dict[str, None]] = {}
        for node, amount in self.free.items():
            self._alike.setdefault(amount, {})[node] = None

    def change(self, node: str, by: Amount) -> None:
        """More room on a node, or less; nothing for a node that is gone."""
        old = self.free.get(node)
        if old is None:
            return
        same = self._alike[old]
        del same[node]
        if not same:
            del self._alike[old]
        self.free[node] = new = plus(old, by)
        self._alike.setdefault(new, {})[node] = None

    def place(self, shape: GangShape, avoid: Collection[str] = ()) -> list[str] | None:
        """A node for each bundle, None when there is no room; takes nothing.

        Of nodes that would do, the fullest: large gangs need whole ones.
        """
        wanted = shape.num_bundles
        tightest = self._fitting(shape.bundle_units, avoid)
        if shape.placement in ("pack", "strict_pack"):
            for fit, node in tightest:
                if fit >= wanted:
                    return [node] * wanted
            if shape.placement == "strict_pack":
                return None
            return _filled(list(self._fitting(shape.bundle_units, avoid))[::-1], wanted)
        return _dealt(list(tightest), wanted, once=shape.placement == "strict_spread")

    def _fitting(self, bundle: Amount, avoid: Collection[str]) -> Iterator[tuple[int, str]]:
        """(bundles, node), the fewest bundles and GPUs first."""
        kinds = [(how_many(amount, bundle), amount[1], amount[0], nodes) for amount, nodes in self._alike.items()]
        for fit, _, _, nodes in sorted((kind for kind in kinds if kind[0]), key=lambda kind: kind[:3]):
            for node in nodes:
                if node not in avoid:
                    yield fit, node


def _filled(largest: Sequence[tuple[int, str]], wanted: int) -> list[str] | None:
    """As few nodes as go."""
    placed: list[str] = []
    for fit, node in largest:
        placed += [node] * min(fit, wanted - len(placed))
        if len(placed) == wanted:
            return placed
    return None


def _dealt(fitting: Sequence[tuple[int, str]], wanted: int, *, once: bool) -> list[str] | None:
    """One bundle a node, and only when all have one, unless ``once``, a further one."""
    placed: list[str] = []
    for dealt in range(1, 2 if once else wanted + 1):
        placed += [node for fit, node in fitting if fit >= dealt][: wanted - len(placed)]
        if len(placed) == wanted:
            return placed
    return None
