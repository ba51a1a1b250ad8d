"""The trials of a sweep as its controller knows them: read anew now and then, for others change them, too."""

from __future__ import annotations

import dataclasses

from orchestrator.controller.clock import Clock
from orchestrator.store import Store, TrialRow

UNFINISHED = ("WAITING", "RUNNING")


class KnownTrials:
    """In the order of execution. ``not_before``: when a trial that failed may be tried again, by fingerprint, in the
    clock's time."""

    def __init__(self, store: Store, sweep_id: int, clock: Clock) -> None:
        self._store, self._sweep_id, self._clock = store, sweep_id, clock
        self.rows: list[TrialRow] = []
        self.read_at = -float("inf")
        self.not_before: dict[str, float] = {}

    def read(self) -> None:
        self.rows = self._store.trials(self._sweep_id)
        self.read_at = self._clock.monotonic()

    def note(self, trial: TrialRow, state: str) -> None:
        """What this controller has just written, without reading all trials anew: there may be thousands."""
        self.rows = [
            dataclasses.replace(one, state=state) if one.fingerprint == trial.fingerprint else one for one in self.rows
        ]

    def waiting(self) -> list[TrialRow]:
        """Those that may be started now."""
        now = self._clock.monotonic()
        return [
            trial
            for trial in self.rows
            if trial.state == "WAITING" and self.not_before.get(trial.fingerprint, now) <= now
        ]

    @property
    def are_unfinished(self) -> bool:
        return any(trial.state in UNFINISHED for trial in self.rows)
