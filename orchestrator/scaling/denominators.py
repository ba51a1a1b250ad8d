"""When two arms are at equal tokens, FLOPs, parameters or seconds, and what is read of them where they are not. Pure.

The surprise: while the learning rate falls, a loss halfway is not that of a run half as long. So only trials that end
with equal amounts are compared; a curve read on its way describes, and bears no verdict.
"""

from __future__ import annotations

from collections.abc import Sequence
from statistics import fmean
from typing import Literal

DENOMINATORS_VERSION = "denominators-1"

Denominator = Literal["tokens", "flops", "parameters", "wall-clock"]

TOLERANCE = 0.01
"""Two amounts within 1 % are equal. Where a loss one nat above its floor falls with the 0.3rd power of compute, a
steep law, 1 % of compute is 0.003 nats."""


def are_equal(amount: float, other: float, tolerance: float = TOLERANCE) -> bool:
    return abs(amount / other - 1.0) <= tolerance


def shares_of_schedule(amount: float, other: float) -> tuple[float, float]:
    """At which share of each schedule both have had as much as the smaller one has in all."""
    smaller = min(amount, other)
    return smaller / amount, smaller / other


def read_at(curves: Sequence[Sequence[tuple[float, float | None]]], fraction: float) -> float | None:
    """Mean loss of several trials at a share of their schedules, each curve (share, loss) read between its points.

    None where a curve begins later, or was not finite there.
    """
    losses = [_read(curve, fraction) for curve in curves]
    known = [loss for loss in losses if loss is not None]
    return fmean(known) if known and len(known) == len(losses) else None


def _read(curve: Sequence[tuple[float, float | None]], fraction: float) -> float | None:
    below = [one for one in curve if one[0] <= fraction]
    above = [one for one in curve if one[0] >= fraction]
    if not below or not above or below[-1][1] is None or above[0][1] is None:
        return None
    (first, loss), (second, other) = below[-1], above[0]
    assert loss is not None
    assert other is not None
    return loss if second == first else loss + (other - loss) * (fraction - first) / (second - first)
