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
from orchestrator.failures.causes import (
    DISK_FULL,
    DISK_READ_ONLY,
    HANG,
    NONFINITE,
    PREEMPTED,
    Cause,
    Evidence,
    counted_as,
    diagnose,
)
from orchestrator.store import CONTROLLER_LOST, AttemptRow
from orchestrator.sweep import RetryConfig

LONGEST_BACKOFF_SECONDS = 300.0


@dataclass(frozen=True)
class Wish:
    """Why the controller told an attempt to stop, if it did."""

    kind: Literal["divergence", "interrupted", "budget", "hang", "canceled", "rank", "rung"]
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
    exit_code: int | None = None
    """Of the process of the rank that died, if Ray told."""
    log: str = ""
    """The tail of the failed rank's log."""


@dataclass(frozen=True)
class Consequence:
    """The trial's next state; WAITING means that it will be tried again."""

    state: Literal["WAITING", "COMPLETE", "PRUNED", "DIVERGED", "FAILED", "CANCELED"]
    cause: str
    reason: str
    end_step: int | None = None
    host_faults: int = 0
    """What it weighs against the host of the failed rank."""
    delay_seconds: float = 0.0
    """How long the trial waits before its next attempt."""


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
    if wish is not None and wish.kind == "rank":
        # A rate that ranks too low is stopped, however its gang came to an end.
        return Consequence("PRUNED", wish.rule, wish.reason, wish.step if summary is None else summary.step)
    if wish is not None and wish.kind == "canceled":
        return Consequence("CANCELED", "canceled", wish.reason)
    if wish is not None and wish.kind != HANG:
        return Consequence("WAITING", wish.kind, wish.reason)
    if summary is not None and summary.outcome == "stopped" and summary.error:
        return Consequence("WAITING", CONTROLLER_LOST, f"{summary.error}; checkpointed at step {summary.step}")
    if summary is not None and summary.outcome == "stopped":
        return Consequence("WAITING", PREEMPTED, f"SIGTERM came; checkpointed at step {summary.step}")
    return _charged(ending, earlier, retry)


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


def _charged(ending: Ending, earlier: Sequence[AttemptRow], retry: RetryConfig) -> Consequence:
    """An attempt that failed: its cause is told, and its budget charged."""
    cause, reason = _cause_of(ending, retry)
    if cause.counts_as == "never_again":
        return Consequence("FAILED", cause.name, f"{reason}; never retried", host_faults=cause.host_faults)
    if cause.counts_as == "nothing":
        pauses = {DISK_FULL: "the sweep pauses until there is room"}
        pauses[DISK_READ_ONLY] = "the sweep pauses until it can be written again"
        said = pauses.get(cause.name, "retried, uncounted")
        return Consequence("WAITING", cause.name, f"{reason}; {said}", host_faults=cause.host_faults)
    budget = getattr(retry, cause.counts_as)
    spent = sum(counted_as(attempt.cause, retry.rules) == cause.counts_as for attempt in earlier)
    if spent >= budget:
        retries = {0: "no retry allowed", 1: "the only retry is used"}.get(budget, f"all {budget} retries used")
        return Consequence("FAILED", cause.name, f"{reason}; {retries}", host_faults=cause.host_faults)
    delay = min(retry.backoff_seconds * 2.0**spent, LONGEST_BACKOFF_SECONDS)
    words = f"{reason}; retry {spent + 1} of {budget}"
    return Consequence("WAITING", cause.name, words, host_faults=cause.host_faults, delay_seconds=delay)


def _cause_of(ending: Ending, retry: RetryConfig) -> tuple[Cause, str]:
    if ending.wish is not None and ending.wish.kind == HANG:
        return Cause(HANG, "infrastructure"), ending.wish.reason
    without = "a rank's process ended" if ending.rank_died else "the attempt ended without a summary"
    evidence = Evidence(ending.error or "", ending.log, ending.exit_code, ending.rank_died)
    return diagnose(evidence, retry.rules), ending.error or without
