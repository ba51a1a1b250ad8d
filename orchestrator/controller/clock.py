"""The controller's sense of time, as one object: a simulation gives it another."""

from __future__ import annotations

import time


class Clock:
    """This process's monotonic time."""

    def monotonic(self) -> float:
        """Seconds since some fixed moment."""
        return time.monotonic()

    def sleep(self, seconds: float) -> None:
        time.sleep(seconds)
