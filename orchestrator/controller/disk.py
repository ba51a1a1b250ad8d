"""A full or read-only disk pauses a sweep: nothing starts until it can be written; then it goes on by itself."""

from __future__ import annotations

import shutil
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

ROOM_BYTES = 512 * 2**20
SHORTEST_PAUSE_SECONDS = 10.0
"""A quota may be used up while the file system has room: then only trying again tells."""


class DiskWatch:
    """Whether the file system of the sweep's home is known to be full."""

    def __init__(self, home: Path) -> None:
        self.home = home
        self._full_since: float | None = None
        self._told = False

    def was_full(self) -> None:
        """An attempt has just met a full disk."""
        self._full_since = time.monotonic()

    def is_full(self, tell: Callable[[str], None]) -> bool:
        """True while the sweep has to wait for room; says so once, and once when it is over."""
        if self._full_since is None:
            return False
        free = shutil.disk_usage(self.home).free
        fault = self._write_fault()
        if free >= ROOM_BYTES and fault is None and time.monotonic() - self._full_since >= SHORTEST_PAUSE_SECONDS:
            tell(f"goes on   {free / 2**30:.1f} GiB are free again at {self.home}")
            self._full_since, self._told = None, False
            return False
        if not self._told:
            said = fault or f"{free / 2**20:.0f} MiB free"
            tell(f"PAUSED    the disk at {self.home} can't be written: {said}; make room, the sweep waits")
            self._told = True
        return True

    def _write_fault(self) -> str | None:
        """Only trying tells that a file system was mounted read-only."""
        try:
            with tempfile.TemporaryFile(dir=self.home) as probe:
                probe.write(b"gatesweep")
        except OSError as error:
            return error.strerror
        return None
