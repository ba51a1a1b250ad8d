"""The optimum between the rates of a grid: a parabola in log LR near the best one, with an interval by Fieller.

The surprise: the interval may be unbounded, and that is an answer. On a flat curve the place of a minimum is not known,
and a bootstrap over three seeds would hide it (it covers 74 % for a stated 95 %).

For the curve a + b x + c x^2 in x = log LR the slope at the true optimum is 0, so the values x at which b + 2 c x does
not differ from 0 are its confidence set (Fieller, J. R. Stat. Soc. B 16, 1954). The noise is that of the seeds, pooled
over the cells of all arms. That the curve is no parabola further away is not in it: hence only rates near the best.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from orchestrator.scaling.grid import BestLearningRate, LearningRatePoint

OPTIMUM_VERSION = "parabola-fieller-1"

MIN_RATES = 4
FARTHEST = math.log(1e6)
"""An end of an interval further from the rates that were fitted than this factor is none."""

WINDOW = 5
"""Rates that are fitted: the best of the grid, and its neighbours."""


@dataclass(frozen=True)
class Optimum:
    """Learning rates. ``low`` and ``high`` are None at an end that the data do not bound."""

    lr: float
    low: float | None
    high: float | None
    tolerance: tuple[float, float] | None
    """Where the fitted loss is within the margin of its minimum, as far as rates were fitted; None without a margin."""
    tolerance_open: tuple[bool, bool]
    """Whether the range goes on beyond the fitted rates."""
    num_rates: int
    loss_nats: float
    """Of the parabola at ``lr`` ..."""
    curvature: float
    """... and what it rises by, per squared unit of log LR."""
    fitted: tuple[float, float]
    """The lowest and the highest rate that it was fitted to."""

    def loss_at(self, lr: float) -> float:
        """The fitted loss in nats."""
        return self.loss_nats + self.curvature * (math.log(lr) - math.log(self.lr)) ** 2


def pooled_variance(arms: Sequence[BestLearningRate]) -> tuple[float, int]:
    """Variance of one seed, pooled over the whole cells of all arms, and its degrees of freedom (0: none known)."""
    cells = [p for arm in arms for p in arm.points if p.sd_loss_nats is not None]
    degrees = sum(len(p.losses_nats) - 1 for p in cells)
    squares = sum((len(p.losses_nats) - 1) * (p.sd_loss_nats or 0.0) ** 2 for p in cells)
    return (squares / degrees if degrees else 0.0), degrees


def fit_optimum(
    arm: BestLearningRate, variance: float, degrees: int, margin: float | None = None, alpha: float = 0.05
) -> Optimum | None:
    """None with fewer than four rates that have a mean, or where the fit has no minimum: best of grid stands alone.

    ``variance`` is that of one seed, with ``degrees`` of freedom; without any, the interval is unbounded.
    """
    import numpy as np

    window = _window(arm)
    if len(window) < MIN_RATES:
        return None
    x = np.log([point.lr for point in window])
    centre = float(x.mean())
    design = np.stack([np.ones(len(x)), x - centre, (x - centre) ** 2], axis=1)
    weights = np.array([len(point.losses_nats) for point in window], dtype=float)
    means = np.array([point.mean_loss_nats for point in window])
    inverse = np.linalg.inv(design.T @ (weights[:, None] * design))
    a, b, c = (float(value) for value in inverse @ (design.T @ (weights * means)))
    if c <= 0.0:
        return None
    best = -b / (2 * c)
    if abs(best) > FARTHEST:
        return None
    low, high = _fieller(b, c, variance * inverse, degrees, alpha)
    first, last = float(x[0]) - centre, float(x[-1]) - centre
    tolerance, is_open = None, (False, False)
    if margin is not None:
        reach = math.sqrt(margin / c)
        is_open = (best - reach < first, best + reach > last)
        if best + reach >= first and best - reach <= last:
            ends = max(best - reach, first), min(best + reach, last)
            tolerance = math.exp(ends[0] + centre), math.exp(ends[1] + centre)
    return Optimum(
        lr=math.exp(best + centre),
        low=None if low is None else math.exp(low + centre),
        high=None if high is None else math.exp(high + centre),
        tolerance=tolerance,
        tolerance_open=is_open,
        num_rates=len(window),
        loss_nats=a - b * b / (4 * c),
        curvature=c,
        fitted=(window[0].lr, window[-1].lr),
    )


def _window(arm: BestLearningRate) -> list[LearningRatePoint]:
    """The best rate of the grid and those around it, nearly as many on each side; rates without a mean are no part."""
    finite = [point for point in arm.points if point.mean_loss_nats is not None]
    if arm.best is None or len(finite) <= WINDOW:
        return finite
    first = min(max(finite.index(arm.best) - WINDOW // 2, 0), len(finite) - WINDOW)
    return finite[first : first + WINDOW]


def _fieller(b: float, c: float, covariance: object, degrees: int, alpha: float) -> tuple[float | None, float | None]:
    """The x at which |b + 2 c x| <= t * its standard error; (None, None) unless that is one bounded interval.

    Where the curvature itself does not differ from 0, the set has no upper or no lower end, or is everything.
    """
    import numpy as np
    from scipy.special import stdtrit

    if not degrees:
        return None, None
    v = np.asarray(covariance) * float(stdtrit(degrees, alpha / 2)) ** 2
    square = 4 * (c * c - float(v[2, 2]))
    if square <= 0.0:
        return None, None
    half = (2 * b * c - 2 * float(v[1, 2])) / square
    constant = (b * b - float(v[1, 1])) / square
    root = math.sqrt(max(half * half - constant, 0.0))
    low, high = -half - root, -half + root
    return (low if low > -FARTHEST else None), (high if high < FARTHEST else None)
