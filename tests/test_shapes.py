"""Where a gang fits: bundles on nodes, by placement; no Ray."""

from __future__ import annotations

import random

import pytest

from models.config import Layout
from orchestrator.gang import UNITS, Fits, GangShape, NodeRoom, Room, minus, number_of_gangs, refuse_too_large, times
from orchestrator.sweep import UserError


def cpus(*sizes: float) -> dict[str, tuple[int, int]]:
    return {f"n{number}": (int(size * UNITS), 0) for number, size in enumerate(sizes)}


def shape(placement: str, tensor: int = 1, data: int = 1, each: float = 1) -> GangShape:
    return GangShape(Layout(tensor=tensor, data=data), each, 0, placement)  # type: ignore[arg-type]


def test_tensor_ranks_share_a_bundle_which_no_two_nodes_can_split():
    pair = shape("spread", tensor=2)
    assert (pair.num_bundles, pair.bundle) == (1, {"CPU": 2})
    assert Room(cpus(1, 1, 1)).place(pair) is None
    assert Room(cpus(1, 2, 1)).place(pair) == ["n1"]
    assert GangShape(Layout(tensor=2, data=3), 0.5, 0.25).bundle == {"CPU": 1, "GPU": 0.5}


def test_placement_says_how_the_bundles_lie_to_one_another():
    four = {name: shape(name, data=4) for name in ("pack", "spread", "strict_pack", "strict_spread")}
    room = Room(cpus(3, 4, 2, 1))
    assert room.place(four["pack"]) == ["n1"] * 4
    assert room.place(four["strict_pack"]) == ["n1"] * 4
    assert sorted(room.place(four["spread"]) or []) == ["n0", "n1", "n2", "n3"]
    assert sorted(room.place(four["strict_spread"]) or []) == ["n0", "n1", "n2", "n3"]
    room = Room(cpus(3, 2, 0))
    assert room.place(four["pack"]) == ["n0"] * 3 + ["n1"]
    assert sorted(room.place(four["spread"]) or []) == ["n0", "n0", "n1", "n1"]
    assert room.place(four["strict_pack"]) is None
    assert room.place(four["strict_spread"]) is None


def test_small_gangs_leave_whole_nodes_to_large_ones():
    room = Room(cpus(4, 4, 4))
    for _ in range(3):
        (node,) = room.place(shape("pack")) or []
        room.change(node, (-UNITS, 0))
    assert sorted(room.free.values()) == [(UNITS, 0), (4 * UNITS, 0), (4 * UNITS, 0)]


def test_a_shape_that_no_node_can_hold_is_refused_with_the_reason():
    nodes = [NodeRoom("a", (4 * UNITS, UNITS), (0, 0)), NodeRoom("b", (2 * UNITS, 0), (0, 0))]
    refuse_too_large(shape("pack", tensor=4), nodes)  # full now, and large enough
    with pytest.raises(
        UserError, match=r"8 tensor rank\(s\) of a group are on one node, which takes 8 CPU, and the lar"
    ):
        refuse_too_large(shape("pack", tensor=8), nodes)
    with pytest.raises(
        UserError, match=r"asks for 3 rank\(s\) x 1 CPU, placement strict_spread, and the cluster holds 6"
    ):
        refuse_too_large(shape("strict_spread", data=3), nodes)
    refuse_too_large(shape("spread", data=3), nodes)


@pytest.mark.parametrize("placement", ["pack", "spread", "strict_pack", "strict_spread"])
def test_counting_and_placing_agree_on_drawn_clusters(placement: str):
    """As many gangs are placed one after the other on an empty cluster of equal nodes as the count says; and the count
    of fits that is kept up to date knows whether one more can be."""
    draw = random.Random(placement)
    for _ in range(60):
        gang = shape(placement, draw.choice([1, 2]), draw.choice([1, 2, 3, 4]), draw.choice([0.5, 1, 2]))
        size = draw.randint(1, 6)
        sizes = cpus(*[size] * draw.randint(1, 5))
        room, number = Room(sizes), 0
        while True:
            fits = Fits(gang)
            for node, free in room.free.items():
                fits.put(node, free)
            nodes = room.place(gang)
            assert fits.holds_one() == (nodes is not None)
            if nodes is None:
                break
            number += 1
            for node in nodes:
                room.change(node, minus((0, 0), gang.bundle_units))
        most = number_of_gangs(gang, list(sizes.values()))
        assert number <= most
        assert (number > 0) == (most > 0)
        if placement in ("pack", "strict_pack", "spread"):
            assert number == most
        assert all(free >= (0, 0) for free in room.free.values())


def test_amounts_do_not_drift():
    room = Room({"n0": (UNITS, 0)})
    tenth = GangShape(Layout(), 0.1, 0).bundle_units
    for _ in range(10):
        room.change("n0", minus((0, 0), tenth))
    assert room.free == {"n0": (0, 0)}
    assert times(tenth, 10) == (UNITS, 0)
