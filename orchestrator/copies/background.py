"""The thread that copies checkpoints of trials that have ended, and never troubles the sweep.

A place that is down is tried again after a growing pause, and told of once when that begins and once when it ends.
What is not copied in the end is copied by the next run.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Iterable
from pathlib import Path

from models import run_dir, trust
from models.redaction import redacted
from orchestrator.copies.checkpoints import copy_checkpoint
from orchestrator.copies.place import CopyError, Place

_LOG = logging.getLogger(__name__)

FIRST_PAUSE_SECONDS, LONGEST_PAUSE_SECONDS = 5.0, 120.0

COPIES_DOWN, COPIES_BACK, COPY_REFUSED = "copies_down", "copies_back", "copy_refused"


class Copier:
    """Copies last checkpoints of trials of one home to one place. ``tell``: (kind, message) of what went wrong."""

    def __init__(
        self,
        home: Path,
        place: Place,
        tell: Callable[[str, str], None],
        *,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.place = place
        self.num_copied = 0
        self._home, self._tell_event, self._clock = home, tell, clock
        self._wanted: dict[str, None] = {}
        """Fingerprints, in their order."""
        self._news = threading.Condition()
        self._is_closing = False
        self._num_failures, self._not_before = 0, 0.0
        self._thread = threading.Thread(target=self._loop, name="copies", daemon=True)

    def start(self) -> None:
        self._thread.start()

    def add(self, fingerprints: Iterable[str]) -> None:
        """Trials that have ended with a checkpoint, or may have. Returns at once."""
        with self._news:
            self._wanted |= dict.fromkeys(fingerprints)
            self._news.notify()

    @property
    def num_left(self) -> int:
        return len(self._wanted)

    def close(self, timeout_seconds: float) -> int:
        """Copy what is left, for at most about this long and only while the place takes it; how many are not copied.
        The thread is a daemon: a place that hangs can't hold the program."""
        with self._news:
            self._is_closing = True
            self._not_before = 0.0
            self._news.notify()
        if self._thread.ident is not None:
            self._thread.join(timeout_seconds)
        return self.num_left

    def _loop(self) -> None:
        while True:
            with self._news:
                while not self._is_closing and (not self._wanted or self._clock() < self._not_before):
                    self._news.wait(max(0.0, self._not_before - self._clock()) if self._wanted else None)
                is_last = self._is_closing
            self.step()
            if is_last and (self._num_failures or not self._wanted):
                return

    def step(self) -> None:
        """Copy what is wanted, until the place fails."""
        for fingerprint in list(self._wanted):
            try:
                self.num_copied += copy_checkpoint(run_dir.trial_dir(self._home, fingerprint), self.place)
            except (trust.Untrusted, trust.Altered) as refusal:
                self._tell(COPY_REFUSED, f"the checkpoint of {fingerprint} is not copied: {refusal}")
            except Exception as error:
                self._failed(error)
                return
            with self._news:
                self._wanted.pop(fingerprint, None)
            self._succeeded()

    def _failed(self, error: Exception) -> None:
        self._num_failures += 1
        pause = min(FIRST_PAUSE_SECONDS * 2.0 ** (self._num_failures - 1), LONGEST_PAUSE_SECONDS)
        self._not_before = self._clock() + pause
        if self._num_failures == 1:
            said = str(error) if isinstance(error, CopyError) else f"{type(error).__name__}: {error}"
            self._tell(COPIES_DOWN, f"checkpoints are not copied; the sweep runs on: {said}")

    def _succeeded(self) -> None:
        if self._num_failures:
            self._tell(COPIES_BACK, f"checkpoints are copied to {self.place} again")
        self._num_failures, self._not_before = 0, 0.0

    def _tell(self, kind: str, message: str) -> None:
        message = redacted(message)
        _LOG.info(message)
        try:
            self._tell_event(kind, message)
        except Exception as error:
            _LOG.warning("the event %s was not stored: %s", kind, redacted(str(error)))
