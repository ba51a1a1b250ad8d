"""A grid of learning rates that grows where an arm's best is at its edge; for all arms, so that grids stay equal."""

from __future__ import annotations

from collections.abc import Sequence

from orchestrator.scaling.grid import BestLearningRate
from orchestrator.sweep import ExtendedRates, rounded_rate


def extension(rates: ExtendedRates, arms: Sequence[BestLearningRate]) -> float | None:
    """The next rate: beyond the edge at which more arms have their best (of as many, the lower one), as far from it as
    the rate before is. None when no arm is at an edge, or as many were added as the sweep allows.

    ``arms`` are all that are compared, each with the whole grid so far and every trial of it ended.
    """
    grid = sorted({point.lr for arm in arms for point in arm.points})
    edges = [arm.edge for arm in arms if arm.edge is not None]
    if not edges or len(grid) - len(rates.values) >= rates.extend or len(grid) < 2:
        return None
    if edges.count("lowest") >= edges.count("highest"):
        return rounded_rate(grid[0] * grid[0] / grid[1])
    return rounded_rate(grid[-1] * grid[-1] / grid[-2])
