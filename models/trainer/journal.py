"""What a rank writes while it trains: records and summary (rank 0), and a log of its own (every rank)."""

from __future__ import annotations

import logging
import time
from pathlib import Path
from types import TracebackType
from typing import Self

from models import run_dir
from models.json_log import JsonFormatter, Labels, json_line
from models.redaction import RedactingFormatter, redacted
from models.run_dir import Record, Summary


class Journal:
    """Appends to the attempt's files. A context: the log handlers are taken off at its end.

    With ``labels`` the log is also written as JSON lines, which have these labels.
    """

    def __init__(self, attempt_dir: Path, rank: int, labels: Labels | None = None) -> None:
        self.attempt_dir, self.rank, self.is_writer = attempt_dir, rank, rank == 0
        attempt_dir.mkdir(parents=True, exist_ok=True)
        self._labels = labels
        self._handlers = [logging.FileHandler(run_dir.log_path(attempt_dir, rank))]
        self._handlers[0].setFormatter(RedactingFormatter("%(asctime)s %(levelname)s %(name)s: %(message)s"))
        if labels is not None:
            self._handlers.append(logging.FileHandler(run_dir.json_log_path(attempt_dir, rank), encoding="utf-8"))
            self._handlers[1].setFormatter(JsonFormatter(labels))
        self._log = logging.getLogger("models")

    def __enter__(self) -> Self:
        for handler in self._handlers:
            self._log.addHandler(handler)
        self._log.setLevel(logging.INFO)
        self._metrics = run_dir.metrics_path(self.attempt_dir).open("a") if self.is_writer else None
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for handler in self._handlers:
            self._log.removeHandler(handler)
            handler.close()
        if self._metrics is not None:
            self._metrics.close()

    def write(self, record: Record) -> None:
        """One line, flushed: the controller sees it at once, and a killed process loses at most a torn line."""
        if self._metrics is None:
            return
        self._metrics.write(run_dir.record_line(record))
        self._metrics.flush()

    def append(self, text: str) -> None:
        """To the rank's log, also after the journal was closed: by then the logger writes into another attempt's."""
        with run_dir.log_path(self.attempt_dir, self.rank).open("a") as stream:
            stream.write(redacted(text))
        if self._labels is not None:
            line = json_line(text, self._labels, level="ERROR", logger=__name__, seconds=time.time())
            with run_dir.json_log_path(self.attempt_dir, self.rank).open("a", encoding="utf-8") as stream:
                stream.write(line)

    def write_summary(self, summary: Summary) -> None:
        """Also after the journal was closed."""
        if self.is_writer:
            error = None if summary.error is None else redacted(summary.error)
            run_dir.write_json(self.attempt_dir / "summary.json", summary.model_copy(update={"error": error}))
