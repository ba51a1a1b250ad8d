"""When a training run has diverged, judged from its records alone; no Optuna here.

The same curve gives the same stop, however it was cut into batches.
"""

from __future__ import annotations

import bisect
import math
from collections import deque
from dataclasses import dataclass

from models.run_dir import Record, StepRecord, ValidationRecord
from orchestrator.sweep import DivergenceConfig


@dataclass(frozen=True)
class Stop:
    """A decision to stop a trial: after which optimizer step, by which rule, and why in words."""

    step: int
    rule: str
    reason: str


class _Streak:
    """A threshold that counts only when it is passed at ``patience`` steps in a row: spikes that recover do not."""

    def __init__(self, patience: int) -> None:
        self.patience = patience
        self.first_step = 0
        self.length = 0

    def passed(self, above: bool, step: int) -> bool:
        if not above:
            self.length = 0
        else:
            self.first_step = step if self.length == 0 else self.first_step
            self.length += 1
        return self.length >= self.patience


class _RunningMedian:
    """The median of the last ``size`` values; None until there are so many."""

    def __init__(self, size: int) -> None:
        self._size = size
        self._window: deque[float] = deque()
        self._sorted: list[float] = []

    def add(self, value: float) -> float | None:
        if len(self._window) == self._size:
            del self._sorted[bisect.bisect_left(self._sorted, self._window.popleft())]
        self._window.append(value)
        bisect.insort(self._sorted, value)
        if len(self._window) < self._size:
            return None
        middle = self._size // 2
        return self._sorted[middle] if self._size % 2 else (self._sorted[middle - 1] + self._sorted[middle]) / 2


class DivergenceRule:
    """Looks at every record of one trial, in order, and keeps the first reason to stop it.

    The *start* is the loss of the first step seen. The *best* is the lowest running median over ``patience_steps``
    losses, so that one lucky batch is not the best. The first ``warmup_steps`` steps are judged by nothing but
    finiteness.
    """

    def __init__(self, config: DivergenceConfig) -> None:
        self._config = config
        self._start: float | None = None
        self._best = math.inf
        self._median = _RunningMedian(config.patience_steps)
        self._streaks = {
            rule: _Streak(config.patience_steps) for rule in ("loss_above_start", "loss_above_best", "gradient_norm")
        }
        self._last_step = -1
        self.stop: Stop | None = None

    def observe(self, record: Record) -> None:
        if self.stop is not None:
            return
        if isinstance(record, ValidationRecord):
            if _nonfinite(record, record.loss_nats):
                self._end(record.step, "nonfinite", f"the validation loss at step {record.step} is not finite")
        elif isinstance(record, StepRecord) and record.step > self._last_step:
            self._last_step = record.step
            self._observe_step(record)

    def _observe_step(self, record: StepRecord) -> None:
        loss, norm, step = record.loss_nats, record.gradient_norm, record.step
        if _nonfinite(record, loss, norm):
            bad = [name for name, number in (("training loss", loss), ("gradient norm", norm)) if not _finite(number)]
            verb = "are" if len(bad) > 1 else "is"
            self._end(step, "nonfinite", f"the {' and the '.join(bad or ['record'])} at step {step} {verb} not finite")
            return
        judged = step > self._config.warmup_steps
        if loss is not None:
            self._observe_loss(step, loss, judged)
        if norm is not None and judged and (limit := self._config.gradient_norm_above) is not None:
            self._judge("gradient_norm", step, "gradient norm", norm, limit, "the configured limit", "")

    def _observe_loss(self, step: int, loss: float, judged: bool) -> None:
        self._start = loss if self._start is None else self._start
        median = self._median.add(loss)
        self._best = self._best if median is None else min(self._best, median)
        if not judged:
            return
        patience, above_start, above_best = (
            self._config.patience_steps,
            self._config.loss_above_start,
            self._config.loss_above_best,
        )
        if above_start is not None:
            meaning = f"its start {self._start:.4g} + {above_start:g}"
            self._judge("loss_above_start", step, "training loss", loss, self._start + above_start, meaning, " nats")
        if above_best is not None:
            meaning = f"its best {self._best:.4g}, a median over {patience} steps, + {above_best:g}"
            self._judge("loss_above_best", step, "training loss", loss, self._best + above_best, meaning, " nats")

    def _judge(self, rule: str, step: int, name: str, value: float, limit: float, meaning: str, unit: str) -> None:
        streak = self._streaks[rule]
        if streak.passed(value > limit, step):
            steps = f"step {step}" if streak.first_step == step else f"steps {streak.first_step} to {step}"
            reason = f"the {name} was above {limit:.4g}{unit} ({meaning}) at {steps}, and is {value:.4g}{unit}"
            self._end(step, rule, reason)

    def _end(self, step: int, rule: str, reason: str) -> None:
        self.stop = self.stop or Stop(step=step, rule=rule, reason=reason)


def _finite(number: float | None) -> bool:
    return number is not None and math.isfinite(number)


def _nonfinite(record: Record, *numbers: float | None) -> bool:
    """The run dir writes a non-finite number as null and flags the record; null without the flag was not measured."""
    return record.nonfinite or any(number is not None and not math.isfinite(number) for number in numbers)
