"""What a sweep announces: an event in the store (which MLflow gets as tags), and a notice to the webhook if it is asked
for."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping
from typing import Any

from orchestrator.controller.running import RunningAttempt, trial_name
from orchestrator.controller.snapshot import View
from orchestrator.controller.wave import WaveWatch
from orchestrator.failures import Consequence
from orchestrator.notices import Webhook, notice_body
from orchestrator.store import Store, TrialRow
from orchestrator.sweep import NoticeKind, Sweep


class Announcer:
    """Of one sweep. Nothing here waits for a receiver."""

    def __init__(self, sweep: Sweep, sweep_id: int, store: Store, view: View, webhook: Webhook | None) -> None:
        self._sweep, self._sweep_id, self._store, self._view, self._webhook = sweep, sweep_id, store, view, webhook
        self._wave = WaveWatch(sweep.notices.wave, sweep.baseline)

    def trial_ended(self, attempt: RunningAttempt, result: Consequence, trials: Iterable[TrialRow], now: float) -> None:
        trial = attempt.trial
        if result.state == "FAILED":
            facts = {
                "trial": trial_name(trial),
                "fingerprint": trial.fingerprint,
                "arm": trial.arm,
                "axes": trial.axes,
                "seed": trial.seed,
                "attempt": attempt.row.number,
                "cause": result.cause,
                "reason": result.reason,
            }
            message = f"{trial_name(trial)} failed: {result.cause}: {result.reason}"
            self._announce("trial_failed", message, facts, trial.fingerprint, attempt.row.number)
        wave = self._wave.ended(trial, result.state, trials, now)
        if wave is not None:
            self._view.tell(f"WAVE      {wave.message}")
            self._announce("divergence_wave", wave.message, wave.facts)

    def budget(self, message: str, facts: Mapping[str, Any]) -> None:
        self._view.tell(f"budget    {message}")
        self._announce("budget", message, facts)

    def sweep_done(self, trials: Iterable[TrialRow]) -> None:
        counts = Counter(trial.state for trial in trials)
        number = counts.total()
        states = ", ".join(f"{count} {state.lower()}" for state, count in sorted(counts.items()))
        facts = {"trials": number, "states": dict(sorted(counts.items()))}
        self._announce("sweep_done", f"all {number} trials have ended: {states}", facts)

    def _announce(
        self,
        kind: NoticeKind,
        message: str,
        facts: Mapping[str, Any],
        fingerprint: str | None = None,
        attempt: int | None = None,
    ) -> None:
        self._store.add_event(self._sweep_id, kind, message, fingerprint, attempt)
        if self._webhook is not None and kind in self._sweep.notices.on:
            self._webhook.send(notice_body(kind, self._sweep.name, message, facts))
