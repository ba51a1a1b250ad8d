"""How long trials take: measured where trials of the gang's shape have run, from FLOPs where they have not."""

from __future__ import annotations

from orchestrator.controller.running import RunningAttempt
from orchestrator.gang import GangShape
from orchestrator.store import TrialRow

START_SECONDS = 10.0
"""Of a gang, before one has been started."""


class Pace:
    """FLOPs a second of whole attempts, start and validations included, by shape; and how long gangs take to start."""

    def __init__(self) -> None:
        self._done: dict[GangShape, tuple[float, float]] = {}
        self._starts = (0, 0.0)

    @property
    def start_seconds(self) -> float:
        number, seconds = self._starts
        return seconds / number if number else START_SECONDS

    def saw_start(self, seconds: float) -> None:
        number, before = self._starts
        self._starts = number + 1, before + seconds

    def saw_end(self, attempt: RunningAttempt, took_seconds: float) -> None:
        """An attempt that did what it was asked for."""
        config = attempt.trial.config
        share = (attempt.step - attempt.spec.resume_step) / config.train.num_steps
        flops, seconds = self._done.get(attempt.gang.shape, (0.0, 0.0))
        work = flops + share * attempt.trial.training_flops, seconds + took_seconds
        self._done[attempt.gang.shape] = work

    def seconds(self, trial: TrialRow, shape: GangShape) -> float | None:
        """Of a whole trial; None before any has ended. An unseen shape is as fast, by rank, as the others together."""
        flops, seconds = self._done.get(shape, (0.0, 0.0))
        if flops <= 0 or seconds <= 0:
            flops = sum(done for done, _ in self._done.values()) * shape.layout.world_size
            seconds = sum(took * of.layout.world_size for of, (_, took) in self._done.items())
        return trial.training_flops * seconds / flops if flops > 0 and seconds > 0 else None

    def remaining(self, attempt: RunningAttempt, now: float) -> float:
        """Seconds until an attempt ends: by its own steps, else by others', else as long again as it has run."""
        if (own := attempt.step_seconds()) is not None:
            return max(0.0, attempt.steps_left * own - (now - attempt.observed_at))
        elapsed = now - attempt.begun_at
        expected = self.seconds(attempt.trial, attempt.gang.shape)
        if expected is None:
            return elapsed
        left = 1 - attempt.spec.resume_step / attempt.trial.config.train.num_steps
        return max(0.0, expected * left - elapsed)
