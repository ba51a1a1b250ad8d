"""Which seeds a verdict has at each of its declared looks, where seeds go to the pairs that are undecided.

All of it follows from what the sweep declares, before anything runs. There is one row of seeds: those that ``confirm``
names, the baseline's extra ones, then the whole numbers above all that are named. An arm walks along it,
``seeds_per_look`` a look; the baseline, which every difference leans on, is ahead by its share.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass

from orchestrator.sweep.settings import Sweep


@dataclass(frozen=True)
class LookSeeds:
    """By look, from the first: all seeds that have run then, in the order in which they join."""

    arms: tuple[tuple[int, ...], ...]
    """Of an arm that is still undecided."""
    baseline: tuple[tuple[int, ...], ...]

    @property
    def number(self) -> int:
        return len(self.arms)

    def of(self, look: int, is_baseline: bool) -> tuple[int, ...]:
        """``look`` counts from 1."""
        return (self.baseline if is_baseline else self.arms)[look - 1]

    def new(self, look: int, is_baseline: bool) -> tuple[int, ...]:
        """Those that join for a look."""
        before = self.of(look - 1, is_baseline) if look > 1 else ()
        return self.of(look, is_baseline)[len(before) :]


def look_seeds(
    select: Sequence[int], confirm: Sequence[int], extra: Sequence[int], looks: int, seeds_per_look: int
) -> LookSeeds:
    """``extra``: of the baseline at the first look, beside ``confirm``; its share is kept at every look, rounded."""
    sizes = [len(confirm) + look * seeds_per_look for look in range(looks)]
    share = (len(confirm) + len(extra)) / len(confirm)
    of_baseline = [round(share * size) for size in sizes]
    named = (*confirm, *extra)
    row = (*named, *itertools.islice(itertools.count(max(*named, *select) + 1), of_baseline[-1] - len(named)))
    return LookSeeds(tuple(row[:size] for size in sizes), tuple(row[:size] for size in of_baseline))


def seeds_of_looks(sweep: Sweep) -> LookSeeds | None:
    """None of a sweep that gives every arm the same seeds."""
    rules = sweep.verdict
    if rules.allocate is None:
        return None
    return look_seeds(
        sweep.seeds, sweep.confirm_seeds, sweep.extra_baseline_seeds, rules.looks, rules.allocate.seeds_per_look
    )
