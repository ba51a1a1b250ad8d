"""``--json-logs``: what the controller tells, as JSON lines in GATESWEEP_HOME/logs/SWEEP.jsonl.

Ranks write their own, beside their text.
"""

from __future__ import annotations

import contextlib
import time
from pathlib import Path
from types import TracebackType
from typing import Self

from models.json_log import json_line
from orchestrator.controller import Snapshot, View, told_about
from orchestrator.sweep import UserError

LOGGER = "orchestrator.controller"


class JsonLogged:
    """A view whose lines are also appended to a file, each flushed."""

    def __init__(self, view: View, home: Path, sweep: str) -> None:
        self._view, self._sweep = view, sweep
        self.path = home / "logs" / f"{sweep}.jsonl"

    def __enter__(self) -> Self:
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            self._stream = self.path.open("a", encoding="utf-8")
        except OSError as error:
            raise UserError(f"--json-logs: {self.path} can't be written: {error.strerror}") from error
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stream.close()

    def tick(self, snapshot: Snapshot) -> None:
        self._view.tick(snapshot)

    def tell(self, line: str) -> None:
        self._view.tell(line)
        labels = {"sweep": self._sweep, **told_about()}
        with contextlib.suppress(OSError):  # a full disk pauses the sweep by other means, and must not end it by this
            self._stream.write(json_line(line, labels, logger=LOGGER, seconds=time.time()))
            self._stream.flush()
