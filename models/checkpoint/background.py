"""The thread of a rank that writes while it trains on."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor, wait
from typing import Any


class Writer:
    """Does one piece of writing at a time, in order. It outlives a trial: the next one starts while it writes."""

    def __init__(self) -> None:
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="checkpoint")
        self._last: Future[Any] | None = None

    def submit(self, work: Callable[[], Any]) -> Future[Any]:
        self._last = self._thread.submit(work)
        return self._last

    def wait(self, seconds: float | None = None) -> bool:
        """Until all that was submitted is done, well or not; False when it was not after ``seconds``."""
        return self._last is None or not wait([self._last], timeout=seconds).not_done

    def close(self) -> None:
        """Finish, and take nothing any more."""
        self._thread.shutdown(wait=True)
