"""The learning rate as a pure function of the step."""

from __future__ import annotations

import math

from models.config import TrainConfig


def learning_rate(train: TrainConfig, step: int) -> float:
    """Rate of the update that makes optimizer step ``step`` (1-based).

    Linear warm-up to ``lr`` over ``warmup_steps``; then ``cosine`` to ``lr * min_lr_fraction`` at the
    last step, ``wsd`` (stable, then linear over the last ``decay_fraction``), or ``constant``.
    """
    num_steps, warmup_steps = train.num_steps, train.warmup_steps
    if step <= warmup_steps:
        return train.lr * step / warmup_steps
    lowest = train.lr * train.min_lr_fraction
    if train.schedule == "cosine":
        done = (step - warmup_steps) / (num_steps - warmup_steps)
        return lowest + (train.lr - lowest) * 0.5 * (1.0 + math.cos(math.pi * done))
    if train.schedule == "wsd":
        left = num_steps - step
        if left < train.decay_steps:
            return lowest + (train.lr - lowest) * left / train.decay_steps
    return train.lr
