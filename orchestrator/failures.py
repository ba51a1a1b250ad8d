"""What ended an attempt, and what follows: a final state, or another attempt. Pure; the controller carries it out.

A rank that is gone is the machine's fault and has its own retry budget; an exception in the training is the user's.
Divergence is a result and never retried, but for a first non-finite number, which is resumed once: at the same step
again it was the model and not the machine.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from models.run_dir import Summary
from orchestrator.store import AttemptRow
from orchestrator.sweep import RetryConfig

NONFINITE = "nonfinite"
RANK_DIED = "rank_died"
ERROR = "error"


@dataclass(frozen=True)
class Wish:
    """Why the controller told an attempt to stop, if it did."""

    kind: Literal["divergence", "interrupted", "budget"]
    rule: str
    reason: str
    step: int | None = None
    """The step at which a divergence rule fired."""


@dataclass(frozen=True)
class Ending:
    """All that is known of an attempt's end."""

    summary: Summary | None
    error: str | None
    rank_died: bool
    wish: Wish | None


@dataclass(frozen=True)
class Consequence:
    """The trial's next state; WAITING means that it will be tried again."""

    state: Literal["WAITING", "COMPLETE", "DIVERGED", "FAILED"]
    cause: str
    reason: str
    end_step: int | None = None


def consequence(ending: Ending, earlier: Sequence[AttemptRow], retry: RetryConfig) -> Consequence:
    """What follows from an attempt's end. ``earlier`` are the trial's attempts that count against its budgets."""
    summary, wish = ending.summary, ending.wish
    if wish is not None and wish.kind == "divergence" and wish.rule != NONFINITE:
        # Decided by the records alone, so it holds however the attempt went on after them, not finite included.
        return Consequence("DIVERGED", wish.rule, wish.reason, wish.step)
    nonfinite_step = _nonfinite_step(ending)
    if nonfinite_step is not None:
        return _after_nonfinite(nonfinite_step, _nonfinite_reason(ending), earlier)
    if summary is not None and summary.outcome == "complete":
        return Consequence("COMPLETE", "complete", f"all {summary.step} steps", summary.step)
    if wish is not None:
        return Consequence("WAITING", wish.kind, wish.reason)
    if ending.rank_died:
        return _retried(RANK_DIED, ending.error or "a rank's process ended", earlier, retry.infrastructure)
    return _retried(ERROR, ending.error or "the attempt ended without a summary", earlier, retry.error)


def _nonfinite_step(ending: Ending) -> int | None:
    if ending.wish is not None and ending.wish.rule == NONFINITE:
        return ending.wish.step
    if ending.summary is not None and ending.summary.outcome == "nonfinite":
        return ending.summary.step
    return None


def _nonfinite_reason(ending: Ending) -> str:
    if ending.summary is not None and ending.summary.error:
        return ending.summary.error
    return ending.wish.reason if ending.wish is not None else "a loss is not finite"


def _after_nonfinite(step: int, reason: str, earlier: Sequence[AttemptRow]) -> Consequence:
    before = [attempt.end_step for attempt in earlier if attempt.cause == NONFINITE]
    if not before:
        return Consequence(
            "WAITING", NONFINITE, f"{reason}; resumed once to tell a machine fault from divergence", step
        )
    again = "the same step" if before[-1] == step else f"step {step} after step {before[-1]}"
    return Consequence("DIVERGED", NONFINITE, f"{reason}; not finite again at {again}", step)


def _retried(cause: str, reason: str, earlier: Sequence[AttemptRow], budget: int) -> Consequence:
    spent = sum(attempt.cause == cause for attempt in earlier)
    if spent < budget:
        return Consequence("WAITING", cause, f"{reason}; retry {spent + 1} of {budget}")
    retries = {0: "no retry allowed", 1: "the only retry is used"}.get(budget, f"all {budget} retries used")
    return Consequence("FAILED", cause, f"{reason}; {retries}")
