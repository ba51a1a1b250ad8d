"""Which checkpoints stay: the last few that are whole, and those that others build on. Loads no torch.

While an attempt runs, its rank 0 tidies its own folder alone; of a trial that is complete the controller tidies all.
"""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

from models import run_dir, trust


def looks_whole(path: Path) -> bool:
    """Whether every file of the manifest is there with its size: what can be told without reading gigabytes."""
    try:
        files = json.loads((path / trust.MANIFEST).read_text())["files"]
        return all((path / name).stat().st_size == entry["bytes"] for name, entry in files.items())
    except (OSError, ValueError, KeyError, TypeError):
        return False


def prune_attempt(attempt_dir: Path, keep: int) -> None:
    """Remove what is older than the ``keep`` newest whole checkpoints of the attempt.

    A torn one does not count as one of them. One that another attempt was told to resume from stays: this attempt may
    be one that a controller gave up and that goes on writing. So does one that is for other trials (``branch_steps``).
    Nothing is removed while fewer than ``keep`` are whole.
    """
    checkpoints = list(run_dir.complete_checkpoints(attempt_dir))
    whole = [step for step, path in checkpoints if looks_whole(path)]
    if len(whole) < keep:
        return
    trial_dir = attempt_dir.parents[1]
    needed = run_dir.resumed_checkpoints(trial_dir) | run_dir.branch_checkpoints(trial_dir)
    for step, path in checkpoints:
        if step < whole[keep - 1] and path not in needed:
            remove(path)


def prune_trial(trial_dir: Path, keep: int) -> None:
    """Of a trial that is complete: keep the ``keep`` furthest whole checkpoints of its history, over all attempts.

    No attempt will build on the others; those for other trials stay. Nothing is removed while fewer than ``keep`` are
    whole.
    """
    whole = [(step, path) for step, path in run_dir.visible_checkpoints(trial_dir) if looks_whole(path)]
    kept = {path for _, path in sorted(whole, key=lambda one: one[0], reverse=True)[:keep]}
    if len(kept) < keep:
        return
    kept |= run_dir.branch_checkpoints(trial_dir)
    for folder in (trial_dir / "attempts").glob("[0-9]*-*"):
        for _, path in run_dir.complete_checkpoints(folder):
            if path not in kept:
                remove(path)


def remove(path: Path) -> None:
    """Take the name first: one that is half removed must not look like a checkpoint."""
    aside = path.with_name(f".{path.name}.removed")
    os.replace(path, aside)
    shutil.rmtree(aside, ignore_errors=True)
