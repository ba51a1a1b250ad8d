"""Which checkpoints of an attempt stay: the last few that are whole, and those that another attempt builds on."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

from models import run_dir
from models.checkpoint.manifest import looks_whole


def prune(attempt_dir: Path, keep: int) -> None:
    """Remove what is older than the ``keep`` newest whole checkpoints of the attempt.

    A torn one does not count as one of them. One that another attempt was told to resume from stays: this attempt may
    be one that a controller gave up and that goes on writing. Nothing is removed while fewer than ``keep`` are whole.
    """
    checkpoints = list(run_dir.complete_checkpoints(attempt_dir))
    whole = [step for step, path in checkpoints if looks_whole(path)]
    if len(whole) < keep:
        return
    needed = run_dir.resumed_checkpoints(attempt_dir.parents[1])
    for step, path in checkpoints:
        if step < whole[keep - 1] and path not in needed:
            remove(path)


def remove(path: Path) -> None:
    """Take the name first: one that is half removed must not look like a checkpoint."""
    aside = path.with_name(f".{path.name}.removed")
    os.replace(path, aside)
    shutil.rmtree(aside, ignore_errors=True)
