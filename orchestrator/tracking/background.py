"""The thread that keeps the mirrors up to date while a sweep runs, and never troubles it.

It looks for news once a second. Points go first: each running trial's every few seconds, and at once those of one that
has begun or ended. What can wait (tags, Optuna's copy, pictures) fills the time until the next look, each a piece at
least. A mirror that fails is tried again after a growing pause. The store gets one event when an outage begins and one
when it ends.
"""

from __future__ import annotations

import logging
import sys
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass

from models.redaction import redacted
from orchestrator.store import Store, StoreOutage
from orchestrator.tracking.curves import OutOfTime
from orchestrator.tracking.memory import Memory
from orchestrator.tracking.mirror import SweepMirror

_LOG = logging.getLogger(__name__)

LONGEST_PAUSE_SECONDS = 120.0
LOOKS_PER_INTERVAL = 5
SWITCH_SECONDS = 0.0005
"""How long this thread keeps Python's lock when the controller's wants it back, after each statement to the store: with
Python's own 5 ms a round trip to the database takes 1.3 ms instead of 0.1 while a picture is drawn."""

IsDue = Callable[[], bool]


@dataclass
class _Target:
    """One mirror and its outage, if it has one."""

    name: str
    update: Callable[[IsDue], object]
    rest_seconds: float
    """Not looked at for so long after it was up to date."""
    num_failures: int = 0
    not_before: float = 0.0
    done_at: float | None = None
    """When it was last up to date, by the mirror's clock."""


class Mirror:
    """Mirrors one sweep to MLflow, and to whatever ``also`` names: by name, a function that brings it up to date, or
    stops early, at least one piece further, once what it is given says that time is up."""

    def __init__(
        self,
        store: Store,
        sweep_id: int,
        tracking_uri: str,
        artifact_location: str | None = None,
        *,
        also: Mapping[str, Callable[[IsDue], object]] | None = None,
        interval_seconds: float = 5.0,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """``interval_seconds``: from one sending of a running trial's points to the next."""
        self._store, self._sweep_id = store, sweep_id
        self._interval_seconds, self._clock = interval_seconds, clock
        self._began = clock()
        self._wake = threading.Event()
        self._closing = threading.Event()
        self._deadline = float("inf")
        self._next_look = float("inf")
        one = SweepMirror(store, sweep_id, tracking_uri, artifact_location, Memory(clock), self._out_of_time)

        def curves(is_due: IsDue) -> object:
            return one.send_curves(is_due, rest_seconds=0.0 if self._closing.is_set() else interval_seconds)

        self._targets = [
            _Target("MLflow", curves, 0.0),
            *(_Target(name, update, interval_seconds) for name, update in (also or {}).items()),
            _Target("MLflow's artifact store", one.send_artifacts, interval_seconds),
        ]
        self._thread = threading.Thread(target=self._loop, name="mirror", daemon=True)

    def start(self) -> None:
        sys.setswitchinterval(min(SWITCH_SECONDS, sys.getswitchinterval()))
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
        pause = self._interval_seconds / LOOKS_PER_INTERVAL
        while not self._closing.is_set():
            # From one beginning to the next: a long pass shall not lag by its own length and a pause on top.
            self._next_look = self._clock() + pause
            self.step()
            self._wake.wait(max(self._next_look - self._clock(), pause / 10))
            self._wake.clear()
        for target in self._targets:
            target.not_before = 0.0
        self.step()

    def step(self) -> None:
        """Bring every mirror up to date whose pause is over, as far as there is time."""
        for target in self._targets:
            if self._clock() < target.not_before:
                continue
            was_cut = False

            def is_due() -> bool:
                nonlocal was_cut
                was_cut = self._is_due()
                return was_cut

            try:
                target.update(is_due)
            except StoreOutage as outage:  # not the mirror's: the controller tells of it
                _LOG.info("%s waits: %s", target.name, outage)
                target.num_failures = max(1, target.num_failures) if self._closing.is_set() else target.num_failures
            except OutOfTime:
                target.num_failures = max(1, target.num_failures)
            except Exception as error:
                self._failed(target, error)
            else:
                self._succeeded(target, was_cut)

    def _is_due(self) -> bool:
        return self._out_of_time() if self._closing.is_set() else self._clock() >= self._next_look

    def _failed(self, target: _Target, error: Exception) -> None:
        target.num_failures += 1
        pause = min(self._interval_seconds * 2.0**target.num_failures, LONGEST_PAUSE_SECONDS)
        target.not_before = self._clock() + pause
        if target.num_failures == 1:
            self._tell("tracking_down", f"{target.name} is not reached; the sweep runs on: {error}")

    def _succeeded(self, target: _Target, was_cut: bool) -> None:
        if target.num_failures:
            self._tell("tracking_back", f"{target.name} is reached again")
        target.num_failures, target.not_before = 0, 0.0
        if not was_cut:
            target.done_at = self._clock()
            target.not_before = self._clock() + target.rest_seconds
        elif self._closing.is_set():
            target.num_failures = 1

    def _tell(self, kind: str, message: str) -> None:
        message = redacted(message)
        _LOG.info(message)
        try:
            self._store.add_event(self._sweep_id, kind, message)
        except Exception as error:
            _LOG.warning("the event %s was not stored: %s", kind, redacted(str(error)))

    def _out_of_time(self) -> bool:
        return self._closing.is_set() and self._clock() > self._deadline
