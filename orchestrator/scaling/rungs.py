"""The loss of a trial at a rung: at the same step in every learning rate of an arm.

A validation within 2 % of the schedule around the rung is it, on the slice. Where none falls, it is the mean training
loss over the last 5 % of the schedule before the rung: of one seed, all rates see the same batches there, so they are
compared on the same text, too.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from statistics import fmean

from models.config import TrialConfig
from orchestrator.store import Curve

NEAR_FRACTION = 0.02
WINDOW_FRACTION = 0.05


@dataclass(frozen=True)
class RungPoint:
    """Where a trial is measured. ``window`` is the number of training steps that are averaged; 0: a validation."""

    step: int
    window: int = 0


def rung_point(config: TrialConfig, fraction: float) -> RungPoint:
    num_steps = config.train.num_steps
    wanted = max(1, round(fraction * num_steps))
    near = [s for s in config.validation_steps() if s < num_steps and abs(s - wanted) <= NEAR_FRACTION * num_steps]
    if near:
        return RungPoint(min(near, key=lambda step: (abs(step - wanted), step)))
    return RungPoint(wanted, window=max(1, min(wanted, round(WINDOW_FRACTION * num_steps))))


def loss_at(point: RungPoint, curve: Curve) -> float | None:
    """In nats; None before the trial was there, inf when it was not finite."""
    if not point.window:
        here = [row.loss_nats for row in curve.validations if row.step == point.step and row.split == "slice"]
        return None if not here else math.inf if here[-1] is None else here[-1]
    if not curve.steps or curve.steps[-1].step < point.step:
        return None
    losses = [row.loss_nats for row in curve.steps if point.step - point.window < row.step <= point.step]
    known = [loss for loss in losses if loss is not None]
    return fmean(known) if known and len(known) == len(losses) else math.inf
