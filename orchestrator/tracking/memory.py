"""What a mirror remembers from one pass to the next, so that a pass costs what is new and not what there is.

A sweep may have 10^5 trials, and a pass follows the end of each: read and compared anew every time, they would take
the controller's process for themselves. All of it can be lost; a pass without it asks the store and MLflow again.
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from typing import Any

from orchestrator.store import Store, TrialRow

Cursor = dict[str, Any]

CLOCK_SKEW = timedelta(seconds=10)
READ_ANEW_SECONDS = 300.0
ACTIVE_SECONDS = 60.0
"""How long a run that was found in MLflow counts as there: to ask for one loads all its metrics."""


class Memory:
    """Of the mirror of one sweep at one place."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self.cursors: dict[str, Cursor] = {}
        self.run_ids: dict[str, str | None] = {}
        """By fingerprint."""
        self._rows: dict[str, TrialRow] = {}
        self._since = datetime.min.replace(tzinfo=UTC)
        self._read_at = -float("inf")
        self._active: dict[str, float] = {}
        self._settled: dict[str, tuple[TrialRow, datetime]] = {}

    def read(self, store: Store, sweep_id: int) -> list[TrialRow]:
        """The sweep's trials, by position."""
        asked, now = datetime.now(UTC), self._clock()
        is_old = now - self._read_at > READ_ANEW_SECONDS
        changes = [] if is_old else store.trial_changes(sweep_id, self._since)
        if is_old or any(change["fingerprint"] not in self._rows for change in changes):
            self._rows = {row.fingerprint: row for row in store.trials(sweep_id)}
            self.run_ids = {row.fingerprint: row.mlflow_run_id for row in self._rows.values()}
            self._read_at, changes = now, []
        for change in changes:
            old = self._rows[change["fingerprint"]]
            if any(getattr(old, name) != value for name, value in change.items()):
                self._rows[old.fingerprint] = dataclasses.replace(old, **change)
        self._since = asked - CLOCK_SKEW
        return list(self._rows.values())

    def settle(self, row: TrialRow, submitted_at: datetime) -> None:
        """Nothing is left to send of a trial that has ended, until it or its sweep changes."""
        self._settled[row.fingerprint] = row, submitted_at

    def is_settled(self, row: TrialRow, submitted_at: datetime) -> bool:
        known = self._settled.get(row.fingerprint)
        return known is not None and known[0] is row and known[1] == submitted_at

    def forget(self) -> None:
        """MLflow has lost the runs, or refuses what it is sent: everything is looked at again."""
        self._active, self._settled = {}, {}

    def was_active(self, run_id: str) -> bool:
        return self._clock() - self._active.get(run_id, -float("inf")) < ACTIVE_SECONDS

    def saw_active(self, run_id: str) -> None:
        self._active[run_id] = self._clock()
