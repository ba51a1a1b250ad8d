"""Which learning rate is an arm's best, and at which it breaks. Pure: no store, no I/O.

The surprise: a learning rate at which any seed diverged, failed or is missing has no mean, so it cannot be the
best one. Its finished seeds are the lucky ones, and an average over them would flatter the arm.

The best of the grid is one of the rates that were tried, which can be confirmed; ``optimum`` looks between them.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from operator import attrgetter
from statistics import fmean, stdev
from typing import Literal, NamedTuple

from orchestrator.scaling.proportion import clopper_pearson

FORMULA_VERSION = "best-of-grid-1"
"""Best of the grid by mean final loss over seeds; raised whenever a change alters an answer."""

Edge = Literal["lowest", "highest"]

_TRIAL, _SEED, _STATE = attrgetter("lr", "seed"), attrgetter("seed"), attrgetter("state")


class CellResult(NamedTuple):
    """One trial as the choice of a learning rate sees it. ``loss_nats`` is its final validation loss, if any."""

    arm: str
    lr: float
    seed: int
    state: str
    loss_nats: float | None = None


@dataclass(frozen=True)
class LearningRatePoint:
    """One learning rate of an arm: its seeds, what became of them, and their mean if they are all complete."""

    lr: float
    num_seeds: int
    """Seeds that belong to this cell, the missing ones included."""
    num_complete: int
    num_diverged: int
    num_open: int
    """Seeds that are waiting or running."""
    num_pruned: int
    """Seeds stopped for the rate's rank."""
    losses_nats: tuple[float, ...]
    """Final losses of the complete seeds, by ascending seed."""
    mean_loss_nats: float | None
    sd_loss_nats: float | None
    """Sample standard deviation (n - 1); None below two seeds or without a mean."""


@dataclass(frozen=True)
class BestLearningRate:
    """An arm's best learning rate: the whole grid as it came out, the best point, and what bounds it."""

    arm: str
    points: tuple[LearningRatePoint, ...]
    """By ascending learning rate."""
    best: LearningRatePoint | None
    """None when no learning rate has all its seeds complete."""
    edge: Edge | None
    """Alarm: nothing lower, or nothing higher, gave a result, so the optimum may lie outside the grid."""
    smallest_diverged: LearningRatePoint | None

    @property
    def diverged_interval(self) -> tuple[float, float] | None:
        """95 % interval of Clopper and Pearson (Biometrika 26, 1934) for the chance that a seed diverges at
        ``smallest_diverged``, of the seeds that ended there."""
        point = self.smallest_diverged
        return None if point is None else clopper_pearson(point.num_diverged, point.num_complete + point.num_diverged)

    @property
    def num_finite(self) -> int:
        """Learning rates with a mean: the number of candidates the best was chosen from."""
        return sum(point.mean_loss_nats is not None for point in self.points)


def best_learning_rate(arm: str, results: Sequence[CellResult], seeds: Sequence[int] | None = None) -> BestLearningRate:
    """Best of the grid: the lowest mean final loss over seeds.

    ``seeds`` are those every cell must have; by default all that occur among ``results``. Of equal means the lower
    learning rate wins, as it is the farther from divergence. Raises ValueError for a trial given twice.
    """
    _refuse_duplicates(arm, results)
    expected = set(seeds) if seeds is not None else {result.seed for result in results}
    at_rate: dict[float, list[CellResult]] = {}
    for result in results:
        at_rate.setdefault(result.lr, []).append(result)
    points = tuple(_point(rate, at_rate[rate], expected) for rate in sorted(at_rate))
    ranked = [(point.mean_loss_nats, point.lr, point) for point in points if point.mean_loss_nats is not None]
    best = min(ranked, key=lambda entry: entry[:2])[2] if ranked else None
    return BestLearningRate(
        arm=arm,
        points=points,
        best=best,
        edge=None if best is None else _edge(points, best),
        smallest_diverged=next((point for point in points if point.num_diverged), None),
    )


def _refuse_duplicates(arm: str, results: Sequence[CellResult]) -> None:
    foreign = {result.arm for result in results} - {arm}
    if foreign:
        raise ValueError(f"results of arm {arm!r} expected, got also {', '.join(sorted(foreign))}")
    if len(set(map(_TRIAL, results))) == len(results):
        return
    for (lr, seed), count in Counter(map(_TRIAL, results)).items():
        if count > 1:
            raise ValueError(f"arm {arm!r}: learning rate {lr:g}, seed {seed} was given {count} times, not once")


def _point(lr: float, cell: Sequence[CellResult], expected: set[int]) -> LearningRatePoint:
    losses = tuple(
        [
            loss
            for _, _, _, state, loss in sorted(cell, key=_SEED)
            if state == "COMPLETE" and loss is not None and math.isfinite(loss)
        ]
    )
    num_seeds, states = len(expected.union(map(_SEED, cell))), Counter(map(_STATE, cell))
    whole = bool(losses) and len(losses) == num_seeds
    return LearningRatePoint(
        lr=lr,
        num_seeds=num_seeds,
        num_complete=states["COMPLETE"],
        num_diverged=states["DIVERGED"],
        num_open=states["WAITING"] + states["RUNNING"],
        num_pruned=states["PRUNED"],
        losses_nats=losses,
        mean_loss_nats=fmean(losses) if whole else None,
        sd_loss_nats=stdev(losses) if whole and len(losses) > 1 else None,
    )


def _edge(points: tuple[LearningRatePoint, ...], best: LearningRatePoint) -> Edge | None:
    """A single rate is no grid and has no edge. A diverged rate above is a bound that was found, not an edge; one
    still open may yet be one. One that was pruned was worse, which bounds, too. Rates that only failed or are missing
    bound nothing.
    """
    if len(points) == 1:
        return None
    telling = [p for p in points if p.mean_loss_nats is not None or p.num_diverged or p.num_open or p.num_pruned]
    if best is telling[0]:
        return "lowest"
    return "highest" if best is telling[-1] else None
