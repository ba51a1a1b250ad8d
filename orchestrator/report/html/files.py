"""The report as files. Each is written aside, flushed and renamed; the page comes last, and needs no other."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING

from orchestrator.report.html.material import gathered
from orchestrator.report.html.page import rendered
from orchestrator.sweep import UserError

if TYPE_CHECKING:
    from orchestrator.store import Store

REPORT_FILE = "report.html"


def write_report(store: Store, sweep_name: str, directory: Path) -> list[Path]:
    """Write the report of a stored sweep into ``directory``, which is made; the files, the page first.

    UserError when there is no such sweep, or the folder can't be written to.
    """
    material = gathered(store, sweep_name)
    page = rendered(material).encode()
    pictures = {f"{picture.name}.png": picture.png for picture in material.pictures}
    try:
        directory.mkdir(parents=True, exist_ok=True)
        for name, content in {**pictures, REPORT_FILE: page}.items():
            _write(directory / name, content)
    except OSError as error:
        raise UserError(f"report: {error.filename or directory}: {error.strerror}") from error
    return [directory / name for name in (REPORT_FILE, *pictures)]


def _write(path: Path, content: bytes) -> None:
    aside = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        with aside.open("wb") as stream:
            stream.write(content)
            stream.flush()
            os.fsync(stream.fileno())
        aside.replace(path)
    finally:
        aside.unlink(missing_ok=True)
