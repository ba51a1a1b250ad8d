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
from orchestrator.tracking.mlflow_runs import MlflowRuns

Cursor = dict[str, Any]

CLOCK_SKEW = timedelta(seconds=10)
READ_ANEW_SECONDS = 300.0


class Memory:
    """Of the mirror of one sweep at one place."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self.runs: MlflowRuns | None = None
        """The sweep's runs in MLflow, once they were opened."""
        self.cursors: dict[str, Cursor] = {}
        self.unwritten: dict[str, Cursor] = {}
        """Of the cursors, those that the store has not got yet."""
        self.run_ids: dict[str, str | None] = {}
        """By fingerprint."""
        self.never_begun: set[str] = set()
        """Trials that had not begun when they were first read: no run of an earlier process is theirs."""
        self._rows: dict[str, TrialRow] = {}
        self._since = datetime.min.replace(tzinfo=UTC)
        self._read_at = -float("inf")
        self._active: set[str] = set()
        self._settled: dict[str, tuple[TrialRow, datetime]] = {}
        self._served: dict[str, tuple[TrialRow, float]] = {}

    def read(self, store: Store, sweep_id: int) -> list[TrialRow]:
        """The sweep's trials, by position."""
        asked, now = datetime.now(UTC), self._clock()
        is_old = now - self._read_at > READ_ANEW_SECONDS
        changes = [] if is_old else store.trial_changes(sweep_id, self._since)
        if is_old or any(change["fingerprint"] not in self._rows for change in changes):
            self._read_anew(store, sweep_id)
            self._read_at, changes = now, []
        for change in changes:
            old = self._rows[change["fingerprint"]]
            if any(getattr(old, name) != value for name, value in change.items()):
                self._rows[old.fingerprint] = dataclasses.replace(old, **change)
        self._since = asked - CLOCK_SKEW
        return list(self._rows.values())

    def _read_anew(self, store: Store, sweep_id: int) -> None:
        rows = {row.fingerprint: row for row in store.trials(sweep_id)}
        self.never_begun |= {key for key, row in rows.items() if key not in self._rows and not has_begun(row)}
        self._rows = rows
        self.run_ids = {row.fingerprint: row.mlflow_run_id for row in rows.values()}

    def serve(self, row: TrialRow) -> None:
        """What there was of it was sent."""
        self._served[row.fingerprint] = row, self._clock()

    def may_rest(self, row: TrialRow, seconds: float) -> bool:
        """Whether it was served less than this ago, and its state is what it was."""
        known = self._served.get(row.fingerprint)
        return known is not None and known[0] is row and self._clock() - known[1] < seconds

    def settle(self, row: TrialRow, submitted_at: datetime) -> None:
        """Nothing is left to send of a trial that has ended, until it or its sweep changes."""
        self._settled[row.fingerprint] = row, submitted_at

    def is_settled(self, row: TrialRow, submitted_at: datetime) -> bool:
        known = self._settled.get(row.fingerprint)
        return known is not None and known[0] is row and known[1] == submitted_at

    def forget(self) -> None:
        """MLflow has lost the runs, or refuses what it is sent: everything is looked at again."""
        self.runs, self._active, self._settled, self._served = None, set(), {}, {}
        self.never_begun = set()

    def was_active(self, run_id: str) -> bool:
        """Whether the run was there once. MLflow refuses points of one that is not any more, and to ask for one loads
        all its metrics."""
        return run_id in self._active

    def saw_active(self, run_id: str) -> None:
        self._active.add(run_id)


def has_begun(row: TrialRow) -> bool:
    """Only then it has a run in MLflow."""
    return row.state != "WAITING" or row.num_attempts > 0
