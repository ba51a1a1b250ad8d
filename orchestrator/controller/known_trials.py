"""The trials of a sweep as its controller knows them: what changed is read now and then, for others change them, too.

There may be a hundred thousand: whatever is asked at every turn of the loop is kept up to date as trials change, and
nothing here walks over all of them but the first reading.
"""

from __future__ import annotations

import bisect
import dataclasses
import heapq
from collections import Counter
from collections.abc import Callable, Collection, Mapping
from datetime import UTC, datetime, timedelta
from typing import Any

from orchestrator.controller.clock import Clock
from orchestrator.gang import GangShape
from orchestrator.store import Store, TrialRow

CLOCK_SKEW = timedelta(seconds=10)
"""By how much the clocks of those who write into the store may differ."""
FULL_READ_SECONDS = 300.0
"""A look at all of them finds what a clock that was further off has hidden, and what is no longer the sweep's."""
_EVER = datetime.min.replace(tzinfo=UTC)

Place = tuple[int, str]
"""Position and fingerprint."""


class KnownTrials:
    """Rows by fingerprint, in the order of execution; of those that wait, a queue for each shape of gang."""

    def __init__(self, store: Store, sweep_id: int, clock: Clock, shape_of: Callable[[TrialRow], GangShape]) -> None:
        self._store, self._sweep_id, self._clock, self._shape_of = store, sweep_id, clock, shape_of
        self._shapes: dict[str, GangShape] = {}
        self._alike: dict[GangShape, GangShape] = {}
        """One object for each shape: they are compared at every turn."""
        self._rows: dict[str, TrialRow] = {}
        self._since = _EVER
        self._all_read_at = -float("inf")
        self._later: list[tuple[float, str]] = []
        """When those that failed lately may be tried again, a heap."""
        self._not_before: dict[str, float] = {}
        self._held: frozenset[str] = frozenset()
        self.read_at = -float("inf")
        self.generation = 0
        """Raised whenever trials may have joined or left."""
        self.counts: Counter[str] = Counter()
        self.steps_waiting = 0
        self.queues: dict[GangShape, list[Place]] = {}

    @property
    def rows(self) -> Collection[TrialRow]:
        return self._rows.values()

    @property
    def by_fingerprint(self) -> Mapping[str, TrialRow]:
        return self._rows

    def __getitem__(self, fingerprint: str) -> TrialRow:
        return self._rows[fingerprint]

    def shape(self, trial: TrialRow) -> GangShape:
        known = self._shapes.get(trial.fingerprint)
        if known is None:
            shape = self._shape_of(trial)
            known = self._shapes[trial.fingerprint] = self._alike.setdefault(shape, shape)
        return known

    def read(self, everything: bool = False) -> None:
        """What changed since the last reading; ``everything``: also what was added or is no longer the sweep's."""
        now, asked = self._clock.monotonic(), datetime.now(UTC)
        changes: list[dict[str, Any]] = []
        looks_at_all = now - self._all_read_at > FULL_READ_SECONDS
        if self._rows and not everything:
            changes = self._store.trial_changes(self._sweep_id, _EVER if looks_at_all else self._since)
            known = all(self._is_known(change) for change in changes)
            everything = not known or (looks_at_all and len(changes) != len(self._rows))
        if everything or not self._rows:
            rows = self._store.trials(self._sweep_id)
            self.generation += 1
            self._forget()
            for row in rows:
                self._put(row)
        for change in changes if not everything else ():
            old = self._rows[change["fingerprint"]]
            if any(getattr(old, name) != value for name, value in change.items()):
                self._put(dataclasses.replace(old, **change))
        if everything or looks_at_all:
            self._all_read_at = now
        self._since, self.read_at = asked - CLOCK_SKEW, now

    def _is_known(self, change: dict[str, Any]) -> bool:
        """Otherwise the sweep was submitted anew."""
        old = self._rows.get(change["fingerprint"])
        return old is not None and (old.arm, old.position) == (change["arm"], change["position"])

    def note(self, trial: TrialRow, state: str, not_before: float = 0.0, num_attempts: int | None = None) -> None:
        """What this controller has just written. ``not_before``: when it may be tried again, in the clock's time."""
        self._not_before.pop(trial.fingerprint, None)
        if not_before > self._clock.monotonic():
            self._not_before[trial.fingerprint] = not_before
            heapq.heappush(self._later, (not_before, trial.fingerprint))
        known = self._rows.get(trial.fingerprint, trial)
        number = known.num_attempts if num_attempts is None else num_attempts
        self._put(dataclasses.replace(known, state=state, num_attempts=number))

    def wake(self) -> None:
        """Those whose time has come join the queues."""
        now = self._clock.monotonic()
        while self._later and self._later[0][0] <= now:
            _, fingerprint = heapq.heappop(self._later)
            if self._not_before.get(fingerprint, now) <= now:
                self._not_before.pop(fingerprint, None)
                self._enqueue(self._rows[fingerprint])

    def hold(self, fingerprints: frozenset[str]) -> None:
        """These, and no others, stay out of the queues though they wait, whatever is read of them meanwhile."""
        before, self._held = self._held, fingerprints
        for fingerprint in before ^ fingerprints:
            row = self._rows.get(fingerprint)
            if row is not None and row.state == "WAITING":
                self._dequeue(row)
                if fingerprint not in self._not_before:
                    self._enqueue(row)

    def waiting(self) -> list[TrialRow]:
        """Those that may be started now, in order; it walks over all of them."""
        return [self._rows[fingerprint] for _, fingerprint in sorted(one for of in self.queues.values() for one in of)]

    @property
    def are_unfinished(self) -> bool:
        return bool(self.counts["WAITING"] + self.counts["RUNNING"])

    def _forget(self) -> None:
        self._rows, self.counts, self.queues, self.steps_waiting = {}, Counter(), {}, 0

    def _put(self, row: TrialRow) -> None:
        old = self._rows.get(row.fingerprint)
        if old is not None:
            self.counts[old.state] -= 1
            if old.state == "WAITING":
                self.steps_waiting -= old.config.train.num_steps
                self._dequeue(old)
        self._rows[row.fingerprint] = row
        self.counts[row.state] += 1
        if row.state == "WAITING":
            self.steps_waiting += row.config.train.num_steps
            if row.fingerprint not in self._not_before:
                self._enqueue(row)

    def _enqueue(self, row: TrialRow) -> None:
        if row.fingerprint in self._held:
            return
        queue, place = self.queues.setdefault(self.shape(row), []), (row.position, row.fingerprint)
        at = bisect.bisect_left(queue, place)
        if row.state == "WAITING" and queue[at : at + 1] != [place]:
            queue.insert(at, place)

    def _dequeue(self, row: TrialRow) -> None:
        queue, place = self.queues.get(self.shape(row), []), (row.position, row.fingerprint)
        at = bisect.bisect_left(queue, place)
        if queue[at : at + 1] == [place]:
            del queue[at]
