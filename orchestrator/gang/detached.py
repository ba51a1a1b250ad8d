"""Gangs that a dead driver left on a cluster which outlives it: found by name, and ended by name."""

from __future__ import annotations

import contextlib
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Any

import ray
from ray.util.placement_group import remove_placement_group

from orchestrator.gang.ending import words
from orchestrator.gang.gangs import Gang
from orchestrator.gang.orphan import group_name, rank_name
from orchestrator.gang.shapes import GangShape

ANSWER_SECONDS = 10.0
"""How long the ranks of all gangs together are given to say who they are."""


@dataclass(frozen=True)
class Wanted:
    """A gang as the store knows it, and the attempt that it should be running."""

    gang_id: str
    shape: GangShape
    token: str


def find(wanted: Sequence[Wanted], driver_hash: str) -> list[Gang | str]:
    """For each, the gang, or why it can't be adopted."""
    handles = [_ranks_of(one) for one in wanted]
    asked = {
        id(rank): rank.identity.options(concurrency_group="control").remote()
        for ranks in handles
        if not isinstance(ranks, str)
        for rank in ranks
    }
    if asked:
        ray.wait(list(asked.values()), num_returns=len(asked), timeout=ANSWER_SECONDS)
    return [
        ranks if isinstance(ranks, str) else _judge(one, ranks, [asked[id(rank)] for rank in ranks], driver_hash)
        for one, ranks in zip(wanted, handles, strict=True)
    ]


def _ranks_of(one: Wanted) -> list[Any] | str:
    try:
        return [ray.get_actor(rank_name(one.gang_id, rank)) for rank in range(one.shape.layout.world_size)]
    except ValueError:
        return "its gang is gone"


def _judge(one: Wanted, ranks: Sequence[Any], asked: Sequence[Any], driver_hash: str) -> Gang | str:
    done, _ = ray.wait(list(asked), num_returns=len(asked), timeout=0)
    if len(done) < len(asked):
        return f"{len(asked) - len(done)} of {len(asked)} rank(s) of its gang did not answer"
    try:
        members = ray.get(list(asked))
    except ray.exceptions.RayError as error:
        return f"its gang is gone: {words(error)}"
    if any(member["token"] != one.token for member in members):
        return "its gang is at another one, or at none"
    if any(member["source_hash"] != driver_hash for member in members):
        return "its gang runs other code than this controller"
    group = ray.util.get_placement_group(group_name(one.gang_id))
    return Gang.adopted(one.shape, one.gang_id, group, ranks, members, one.token)


def end(gang_ids: Collection[str]) -> None:
    """Kill the ranks of these gangs, as far as there are any, and give their resources back."""
    for gang_id in sorted(gang_ids):
        with contextlib.suppress(ValueError):  # there is none of that name
            remove_placement_group(ray.util.get_placement_group(group_name(gang_id)))
