"""How a sweep is stopped before its end: asked from outside, out of budget, and what waits for its checkpoints."""

from __future__ import annotations

from orchestrator.controller.sweep_run import SweepRun
from orchestrator.failures import Wish

STOP_GRACE_SECONDS = 60.0
"""How long attempts that were told to stop may take to checkpoint."""


class Stopping:
    """Whether the sweep is being stopped, and since when."""

    def __init__(self) -> None:
        self._requests: list[str] = []
        self.wish: Wish | None = None
        self._deadline = float("inf")

    def __bool__(self) -> bool:
        return self.wish is not None

    @property
    def reason(self) -> str | None:
        return None if self.wish is None else self.wish.reason

    @property
    def is_hurried(self) -> bool:
        """Asked to stop a second time."""
        return len(self._requests) + (self.wish is not None) > 1

    def request(self, reason: str) -> None:
        """Safe to call from a signal handler, between any two lines of the loop: it only leaves a note."""
        self._requests.append(reason)

    def heed_requests(self, run: SweepRun) -> None:
        while self._requests:
            reason = self._requests.pop(0)
            if self.wish is None:
                self.stop_all(run, Wish("interrupted", "interrupted", reason))
            else:
                self._deadline = 0.0

    def stop_all(self, run: SweepRun, wish: Wish) -> None:
        self.wish = wish
        self._deadline = run.clock.monotonic() + STOP_GRACE_SECONDS
        work = "running trials checkpoint and will be resumed" if run.running else "nothing runs yet"
        run.view.tell(f"stopping: {wish.reason}; {work}")
        for attempt in run.running:
            attempt.ask_to_stop(wish)

    def is_overdue(self, run: SweepRun) -> bool:
        """The grace is over: what still runs is to be killed, and resumes from its last checkpoint."""
        return run.clock.monotonic() > self._deadline
