"""What a rank writes while it trains: records and summary (rank 0), and a log of its own (every rank)."""

from __future__ import annotations

import logging
from pathlib import Path
from types import TracebackType
from typing import Self

from models import run_dir
from models.redaction import RedactingFormatter, redacted
from models.run_dir import Record, Summary


class Journal:
    """Appends to the attempt's files. A context: the log handler is taken off at its end."""

    def __init__(self, attempt_dir: Path, rank: int) -> None:
        self.attempt_dir, self.rank, self.is_writer = attempt_dir, rank, rank == 0
        attempt_dir.mkdir(parents=True, exist_ok=True)
        self._handler = logging.FileHandler(run_dir.log_path(attempt_dir, rank))
        self._handler.setFormatter(RedactingFormatter("%(asctime)s %(levelname)s %(name)s: %(message)s"))
        self._log = logging.getLogger("models")

    def __enter__(self) -> Self:
        self._log.addHandler(self._handler)
        self._log.setLevel(logging.INFO)
        self._metrics = run_dir.metrics_path(self.attempt_dir).open("a") if self.is_writer else None
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._log.removeHandler(self._handler)
        self._handler.close()
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

    def write_summary(self, summary: Summary) -> None:
        """Also after the journal was closed."""
        if self.is_writer:
            error = None if summary.error is None else redacted(summary.error)
            run_dir.write_json(self.attempt_dir / "summary.json", summary.model_copy(update={"error": error}))
