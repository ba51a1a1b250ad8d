"""Loss spikes, counted on a trial's training curve. Pure: no store, no I/O.

A spike is an optimizer step whose training loss (its batch's, nats a token) lies more than 0.3 above the median of the
100 steps before it, after the first 2.5 % of the schedule. The threshold is the one that was used on the paper's
released curves, which also begin late (step 10,000 of some 420,000); the window is ours. It looks back only, so that
a curve that falls fast shows none: a centred window would count the beginning of every short trial.

Each step counts: a bump of five steps is five, as points of a curve are. A lasting jump counts until the median has
followed, half a window. With small batches the loss of a batch scatters by more than 0.3, and that counts too.
"""

from __future__ import annotations

import math
from bisect import bisect_left, insort
from collections import deque
from collections.abc import Iterable

FORMULA_VERSION = "spikes-1"
"""Raised whenever a change alters an answer."""

THRESHOLD_NATS = 0.3
WINDOW_STEPS = 100
MIN_WINDOW_STEPS = 10
"""A median of fewer losses says nothing: no spike is seen so early in a curve."""
WARMUP_FRACTION = 0.025


def loss_spikes(curve: Iterable[tuple[int, float | None]], num_steps: int) -> tuple[int, ...]:
    """The steps at which a curve of (step from 1, loss in nats) has spikes; ``num_steps`` is its whole schedule.

    A loss that is missing or not finite is no spike and enters no median.
    """
    found: list[int] = []
    recent: deque[float] = deque()
    ordered: list[float] = []
    for step, loss in curve:
        if loss is None or not math.isfinite(loss):
            continue
        enough = len(ordered) >= MIN_WINDOW_STEPS and step > WARMUP_FRACTION * num_steps
        if enough and loss - _median(ordered) > THRESHOLD_NATS:
            found.append(step)
        recent.append(loss)
        insort(ordered, loss)
        if len(recent) > WINDOW_STEPS:
            del ordered[bisect_left(ordered, recent.popleft())]
    return tuple(found)


def _median(ordered: list[float]) -> float:
    middle = len(ordered) // 2
    return ordered[middle] if len(ordered) % 2 else (ordered[middle - 1] + ordered[middle]) / 2
