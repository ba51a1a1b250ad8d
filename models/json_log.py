"""Logs as JSON lines for collectors, beside the text for people: a line says which sweep, trial, attempt and rank."""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping
from datetime import UTC, datetime

from models.redaction import redacted

Labels = Mapping[str, str | int]


def json_line(message: str, labels: Labels, *, level: str = "INFO", logger: str, seconds: float) -> str:
    """One line with its end. ``seconds`` since 1970; a credential in ``message`` is cut out."""
    when = datetime.fromtimestamp(seconds, UTC).isoformat(timespec="milliseconds")
    content = {"time": when, "level": level, "logger": logger, **labels, "message": redacted(message)}
    return json.dumps(content, ensure_ascii=False) + "\n"


class JsonFormatter(logging.Formatter):
    """Records with fixed labels; a traceback is part of the message."""

    def __init__(self, labels: Labels) -> None:
        super().__init__()
        self._labels = labels

    def format(self, record: logging.LogRecord) -> str:
        message = record.getMessage()
        if record.exc_info:
            message += f"\n{self.formatException(record.exc_info)}"
        line = json_line(message, self._labels, level=record.levelname, logger=record.name, seconds=record.created)
        return line.rstrip("\n")
