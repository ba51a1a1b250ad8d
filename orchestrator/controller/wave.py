"""A wave of divergence: trials that nobody expected to diverge, too many and too close together.

Expected is a trial at the highest of its arm's learning rates (that one is in many sweeps to find the edge), and one at
a rate at which the baseline has diverged, or above. All others count; so does every trial that ended otherwise.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from orchestrator.store import TrialRow
from orchestrator.sweep import WaveConfig

_ENDED = ("COMPLETE", "DIVERGED", "PRUNED")


@dataclass(frozen=True)
class Wave:
    message: str
    facts: dict[str, Any]


class WaveWatch:
    """Sees the ends that one controller saw. ``now`` is its clock's, in seconds."""

    def __init__(self, config: WaveConfig, baseline: str) -> None:
        self._config, self._baseline = config, baseline
        self._ends: deque[tuple[float, TrialRow, str]] = deque()
        self._baseline_diverged_at = float("inf")
        self._told_at = -float("inf")

    def ended(self, trial: TrialRow, state: str, trials: Iterable[TrialRow], now: float) -> Wave | None:
        """The wave that this end makes, once for the length of a window. ``trials``: all of the sweep."""
        if state not in _ENDED:
            return None
        rate = trial.config.train.lr
        if state == "DIVERGED" and trial.arm == self._baseline:
            self._baseline_diverged_at = min(self._baseline_diverged_at, rate)
        window = 60.0 * self._config.minutes
        self._ends.append((now, trial, state))
        while self._ends[0][0] < now - window:
            self._ends.popleft()
        if state != "DIVERGED" or now - self._told_at < window:
            return None
        if sum(how == "DIVERGED" for *_, how in self._ends) < self._config.trials:
            return None  # what follows looks at every trial
        highest = _highest_rates(trials)
        counted = [(one, how) for _, one, how in self._ends if how != "DIVERGED" or not self._expected(one, highest)]
        diverged = [one for one, how in counted if how == "DIVERGED"]
        if len(diverged) < self._config.trials or len(diverged) < self._config.share * len(counted):
            return None
        self._told_at = now
        arms = sorted({one.arm for one in diverged})
        counts = f"{len(diverged)} of {len(counted)} trials that ended within {self._config.minutes:g} minutes"
        message = f"{counts} diverged, at learning rates that should hold: {', '.join(arms)}"
        facts = {"diverged": len(diverged), "ended": len(counted), "minutes": self._config.minutes, "arms": arms}
        return Wave(message, facts)

    def _expected(self, trial: TrialRow, highest: dict[str, float]) -> bool:
        rate = trial.config.train.lr
        return rate >= self._baseline_diverged_at or rate >= highest.get(trial.arm, float("inf"))


def _highest_rates(trials: Iterable[TrialRow]) -> dict[str, float]:
    """By arm, of those that have several."""
    rates: dict[str, set[float]] = {}
    for trial in trials:
        rates.setdefault(trial.arm, set()).add(trial.config.train.lr)
    return {arm: max(of_arm) for arm, of_arm in rates.items() if len(of_arm) > 1}
