"""The thread that keeps the mirrors up to date while a sweep runs, and never troubles it.

A mirror that fails is tried again after a growing pause. The store gets one event when an outage begins and one when
it ends.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass

from models.redaction import redacted
from orchestrator.store import Store, StoreOutage
from orchestrator.tracking.memory import Memory
from orchestrator.tracking.mirror import OutOfTime, mirror

_LOG = logging.getLogger(__name__)

LONGEST_PAUSE_SECONDS = 120.0


@dataclass
class _Target:
    """One mirror and its outage, if it has one."""

    name: str
    update: Callable[[], object]
    num_failures: int = 0
    not_before: float = 0.0
    done_at: float | None = None
    """When it was last up to date, by the mirror's clock."""


class Mirror:
    """Mirrors one sweep to MLflow, and to whatever ``also`` names (name -> function that brings it up to date)."""

    def __init__(
        self,
        store: Store,
        sweep_id: int,
        tracking_uri: str,
        artifact_location: str | None = None,
        *,
        also: Mapping[str, Callable[[], object]] | None = None,
        interval_seconds: float = 5.0,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._store, self._sweep_id = store, sweep_id
        self._interval_seconds, self._clock = interval_seconds, clock
        self._began = clock()
        memory = Memory()
        self._wake = threading.Event()
        self._closing = threading.Event()
        self._deadline = float("inf")

        def mlflow() -> object:
            return mirror(
                store, sweep_id, tracking_uri, artifact_location, memory=memory, out_of_time=self._out_of_time
            )

        self._targets = [_Target("MLflow", mlflow), *(_Target(name, update) for name, update in (also or {}).items())]
        self._thread = threading.Thread(target=self._loop, name="mirror", daemon=True)

    def start(self) -> None:
        self._thread.start()

    def lags(self) -> dict[str, float]:
        """By mirror, the seconds since it was last up to date; since the start, when it never was."""
        return {
            one.name: self._clock() - (self._began if one.done_at is None else one.done_at) for one in self._targets
        }

    def nudge(self) -> None:
        """There is news worth showing at once, as the end of a trial. During an outage the pause still holds."""
        self._wake.set()

    def close(self, timeout_seconds: float) -> bool:
        """Send what is left, for at most about this long; whether everything was sent. What is not, is sent by the
        next run: the thread is a daemon, and a server that hangs can't hold the program."""
        self._deadline = self._clock() + timeout_seconds
        self._closing.set()
        self._wake.set()
        if self._thread.ident is not None:
            self._thread.join(timeout_seconds)
        return not self._thread.is_alive() and all(target.num_failures == 0 for target in self._targets)

    def _loop(self) -> None:
        while not self._closing.is_set():
            begun = self._clock()
            self.step()
            # From one beginning to the next: a long pass shall not lag by its own length and a pause on top.
            left = self._interval_seconds - (self._clock() - begun)
            self._wake.wait(max(left, self._interval_seconds / 10))
            self._wake.clear()
        for target in self._targets:
            target.not_before = 0.0
        self.step()

    def step(self) -> None:
        """Bring every mirror up to date whose pause is over."""
        for target in self._targets:
            if self._clock() < target.not_before:
                continue
            try:
                target.update()
            except StoreOutage as outage:  # not the mirror's: the controller tells of it
                _LOG.info("%s waits: %s", target.name, outage)
                target.num_failures = max(1, target.num_failures) if self._closing.is_set() else target.num_failures
            except OutOfTime:
                target.num_failures = max(1, target.num_failures)
            except Exception as error:
                self._failed(target, error)
            else:
                self._succeeded(target)

    def _failed(self, target: _Target, error: Exception) -> None:
        target.num_failures += 1
        pause = min(self._interval_seconds * 2.0**target.num_failures, LONGEST_PAUSE_SECONDS)
        target.not_before = self._clock() + pause
        if target.num_failures == 1:
            self._tell("tracking_down", f"{target.name} is not reached; the sweep runs on: {error}")

    def _succeeded(self, target: _Target) -> None:
        if target.num_failures:
            self._tell("tracking_back", f"{target.name} is reached again, and up to date")
        target.num_failures, target.not_before, target.done_at = 0, 0.0, self._clock()

    def _tell(self, kind: str, message: str) -> None:
        message = redacted(message)
        _LOG.info(message)
        try:
            self._store.add_event(self._sweep_id, kind, message)
        except Exception as error:
            _LOG.warning("the event %s was not stored: %s", kind, redacted(str(error)))

    def _out_of_time(self) -> bool:
        return self._closing.is_set() and self._clock() > self._deadline
