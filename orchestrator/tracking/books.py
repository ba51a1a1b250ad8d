"""What store and MLflow know of each other: which run is whose, and how far each was sent.

A cursor a trial is kept in the store and moves after MLflow has taken the points. A run that was created but not noted
is found again by its tags; runs that MLflow has lost are made anew. So a mirror may be killed anywhere and run again.
"""

from __future__ import annotations

import time
from dataclasses import replace
from typing import TYPE_CHECKING

from orchestrator.store import Store, SweepRow, TrialRow
from orchestrator.tracking import run_content
from orchestrator.tracking.memory import Cursor, Memory
from orchestrator.tracking.mlflow_runs import MlflowRuns
from orchestrator.tracking.server import open_client, sqlite_path

if TYPE_CHECKING:
    from mlflow import MlflowClient

WRITE_SECONDS = 1.0
"""Cursors are written together, this often: each by itself would wait for the controller's writes, and they for it. A
process that dies before sends some points twice, and MLflow drops them."""


class Books:
    """Of one sweep at one place, for one pass."""

    def __init__(
        self, store: Store, sweep_id: int, tracking_uri: str, artifact_location: str | None, memory: Memory
    ) -> None:
        self.store, self.memory = store, memory
        self.sweep: SweepRow = next(row for row in store.sweeps() if row.id == sweep_id)
        self.rows: list[TrialRow] = memory.read(store, sweep_id)
        self._uri, self._artifact_location = tracking_uri, artifact_location
        self._place = run_content.digest(tracking_uri)
        self._opened: MlflowRuns | None = None
        self._written_at = time.monotonic()
        path = sqlite_path(tracking_uri)
        if path is not None and not path.exists():
            self.forget()
            memory.never_begun = {row.fingerprint for row in self.rows}

    def runs(self) -> MlflowRuns:
        """The sweep's own run is opened at the first need and brought up to date before any of its trials.

        So it is never older than a trial's cursor, and a killed pass leaves nothing undone that the next one would
        not notice.
        """
        if self._opened is None:
            runs = self.memory.runs or self._open(open_client(self._uri))
            runs.sweep = self.sweep
            runs.tell(run_content.sweep_tags(self.sweep, self.rows), run_content.sweep_status(self.rows))
            self.memory.runs = self._opened = runs
        return self._opened

    def _open(self, client: MlflowClient) -> MlflowRuns:
        runs = MlflowRuns(client, self.sweep, self._artifact_location)
        if not runs.find(self.sweep.mlflow_run_id):
            if self.sweep.mlflow_run_id is not None:
                self.forget()
            runs.find_or_create()
            self.store.set_mlflow_run(self.sweep.id, None, runs.sweep_run_id)
        return runs

    def run_id(self, row: TrialRow) -> str | None:
        """As far as it is known here; whether MLflow still has it, only ``live_run`` asks."""
        return self.memory.run_ids[row.fingerprint]

    def live_run(self, row: TrialRow) -> str | None:
        """The trial's run, if it is the one that its cursor speaks of and MLflow has it."""
        runs = self.runs()  # first: it forgets all runs where the sweep's own is lost
        known = self.memory.run_ids[row.fingerprint]
        if known is None or self.memory.was_active(known):
            return known
        if not runs.is_active(known):
            return None
        self.memory.saw_active(known)
        return known

    def new_run(self, row: TrialRow, tags: dict[str, str], start_ms: int | None) -> tuple[str, bool]:
        """A run for the trial, to be filled from the beginning, and whether MLflow has these tags of it by now."""
        runs, run_id = self.runs(), None
        is_surely_new = row.fingerprint in self.memory.never_begun
        if not is_surely_new or self.store.mlflow_run(self.sweep.id, row.fingerprint) is not None:
            run_id = runs.find_child(row.fingerprint)
        is_found = run_id is not None
        run_id = run_id or runs.create_child(run_content.trial_name(row), tags, start_ms)
        self.memory.never_begun.discard(row.fingerprint)
        self.store.set_mlflow_run(self.sweep.id, row.fingerprint, run_id)
        self.memory.run_ids[row.fingerprint] = run_id
        self.memory.saw_active(run_id)
        return run_id, not is_found

    # Cursors

    def new_cursor(self) -> Cursor:
        return {"place": self._place}

    def cursor(self, row: TrialRow) -> Cursor:
        """The trial's cursor at this place; another tracking URI begins from nothing."""
        cursor = self._noted(row)
        return dict(cursor) if cursor.get("place") == self._place else self.new_cursor()

    def _noted(self, row: TrialRow) -> Cursor:
        cursors = self.memory.cursors
        if row.fingerprint not in cursors:
            cursors[row.fingerprint] = self.store.mirror_cursor(self.sweep.id, row.fingerprint) or {}
        return cursors[row.fingerprint]

    def note(self, row: TrialRow, cursor: Cursor) -> None:
        self.memory.cursors[row.fingerprint] = self.memory.unwritten[row.fingerprint] = dict(cursor)
        if time.monotonic() - self._written_at >= WRITE_SECONDS:
            self.write()

    def write(self) -> None:
        if self.memory.unwritten:
            self.store.set_mirror_cursors(self.sweep.id, self.memory.unwritten)
        self.memory.unwritten, self._written_at = {}, time.monotonic()

    def note_sweep(self, cursor: Cursor) -> None:
        """What is noted of the sweep itself."""
        self.store.set_mirror_cursor(self.sweep.id, None, cursor)
        self.sweep = replace(self.sweep, mirror_cursor=cursor)

    def forget(self) -> None:
        """All runs are made anew, or found by their tags and filled from the beginning."""
        memory = self.memory
        memory.forget()
        if self.sweep.mlflow_run_id is not None:
            self.store.set_mlflow_run(self.sweep.id, None, None)
            self.sweep = replace(self.sweep, mlflow_run_id=None)
        if self.sweep.mirror_cursor is not None:
            self.store.set_mirror_cursor(self.sweep.id, None, None)
            self.sweep = replace(self.sweep, mirror_cursor=None)
        for row in self.rows:
            if memory.run_ids[row.fingerprint] is not None or self._noted(row):
                self.store.set_mlflow_run(self.sweep.id, row.fingerprint, None)
                self.store.set_mirror_cursor(self.sweep.id, row.fingerprint, None)
            memory.cursors[row.fingerprint] = {}
            memory.run_ids[row.fingerprint] = None
        memory.unwritten = {}
