"""A running attempt as the controller follows it, and how it is told."""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property

from models.run_dir import AttemptSpec, Record, StepRecord, ValidationRecord
from orchestrator.controller.snapshot import Running
from orchestrator.failures import NONFINITE, Consequence, Wish
from orchestrator.gang import Gang, Landing
from orchestrator.search import Stop
from orchestrator.store import AttemptRow, TrialRow
from orchestrator.sweep import RetryConfig


def trial_name(trial: TrialRow) -> str:
    """``g1-headwise lr=0.004 seed=1``."""
    values = {name.rpartition(".")[2]: value for name, value in trial.axes.items()}
    axes = [f"{name}={value:g}" if isinstance(value, float) else f"{name}={value}" for name, value in values.items()]
    return " ".join([trial.arm, *axes, f"seed={trial.seed}"])


@dataclass(eq=False)
class RunningAttempt:
    """The gang at work, how far its records were read, and why it was told to stop, if it was."""

    trial: TrialRow
    row: AttemptRow
    spec: AttemptSpec
    gang: Gang
    begun_at: float
    """Like all moments here, in the clock's time."""
    offset: int = 0
    followed_at: float = 0.0
    observed_at: float = 0.0
    """When its last step was read."""
    wish: Wish | None = None
    landing: Landing | None = None
    """Once all is measured, and the gang may be at the next trial: what the end still waits for."""
    validation: ValidationRecord | None = None
    """The last one on the slice that this attempt has written."""
    last: StepRecord | None = None
    _progress: tuple[int, int] = (0, 0)
    _heard_at: float | None = None
    _recent_seconds: deque[float] = field(default_factory=lambda: deque(maxlen=20))
    _step_seconds: float | None = None

    @cached_property
    def name(self) -> str:
        return trial_name(self.trial)

    @property
    def step(self) -> int:
        return self.last.step if self.last else self.spec.resume_step

    @property
    def steps_left(self) -> int:
        return self.trial.config.train.num_steps - self.step

    def observe(self, record: Record, now: float) -> None:
        if isinstance(record, ValidationRecord) and record.split == "slice":
            self.validation = record
        if not isinstance(record, StepRecord):
            return
        self.last, self.observed_at = record, now
        self._recent_seconds.append(self.trial.config.train.batch_tokens / record.tokens_per_second)
        self._step_seconds = sum(self._recent_seconds) / len(self._recent_seconds)

    def note(self, progress: tuple[int, int], now: float) -> None:
        """Bytes of metrics and micro-batches that the attempt has behind it."""
        if progress != self._progress:
            self._progress, self._heard_at = progress, now

    def silent_seconds(self, now: float) -> float:
        """Since the attempt was last heard of; 0 before its first micro-batch: preparing data may take long."""
        return 0.0 if self._heard_at is None else now - self._heard_at

    def ask_to_stop(self, wish: Wish) -> None:
        """To checkpoint after its step and end; who asked first stays the reason."""
        if self.wish is None:
            self.wish = wish
            self.gang.stop(self.row.token)

    def patience_seconds(self, retry: RetryConfig) -> float:
        return max(retry.hang_seconds, retry.hang_steps * (self.step_seconds() or 0.0))

    def step_seconds(self) -> float | None:
        """Mean over the last steps; None before the first."""
        return self._step_seconds

    def line(self) -> Running:
        pace = self.step_seconds()
        return Running(
            name=self.name,
            attempt=self.row.number,
            step=self.step,
            num_steps=self.trial.config.train.num_steps,
            loss_nats=self.last.loss_nats if self.last else None,
            tokens_per_second=None if pace is None else self.trial.config.train.batch_tokens / pace,
            eta_seconds=None if pace is None else self.steps_left * pace,
        )

    def ended_line(self, result: Consequence, loss_nats: float | None) -> str:
        if result.state == "COMPLETE":
            measured = f"validation loss {loss_nats:.4f} nats" if loss_nats is not None else "no finite validation loss"
            return f"complete  {self.name}: {measured}"
        paused = self.wish is not None and result.cause == self.wish.kind
        words = {
            "DIVERGED": "diverged ",
            "PRUNED": "pruned   ",
            "FAILED": "FAILED   ",
            "CANCELED": "canceled ",
            "WAITING": "paused   " if paused else "retrying ",
        }
        return f"{words[result.state]} {self.name}: {result.reason}"


def eta_seconds(running: Sequence[RunningAttempt], steps_waiting: int) -> float | None:
    """Steps left at the pace of the running trials, shared by the gangs at work. Divergence makes it shorter."""
    known = [pace for attempt in running if (pace := attempt.step_seconds()) is not None]
    if not known:
        return None
    left = steps_waiting + sum(attempt.steps_left for attempt in running)
    return left * (sum(known) / len(known)) / len(running)


def up_to(stop: Stop, records: list[Record]) -> list[Record]:
    """Records up to the one that fired the rule. A validation of the same step may come a read later: it never counts,
    so that the curve does not hang on how the records were cut into reads."""
    for number, record in enumerate(records, start=1):
        if record.step == stop.step and (stop.rule != NONFINITE or record.nonfinite):
            return records[:number]
    return records
