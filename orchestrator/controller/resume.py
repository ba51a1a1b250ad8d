"""Which checkpoint the next attempt of a trial starts from. The controller names it; nobody searches for it later."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from models.run_dir import complete_checkpoints
from orchestrator.store import AttemptRow


@dataclass(frozen=True)
class ResumePoint:
    step: int
    checkpoint: Path | None = None
    attempt: int | None = None
    """The attempt that wrote the checkpoint; None: from the start."""


def resume_point(trial_dir: Path, attempts: Sequence[AttemptRow]) -> ResumePoint:
    """The furthest whole checkpoint of any earlier attempt; of equal ones the newest attempt's."""
    best = ResumePoint(step=0)
    for attempt in attempts:
        folder = trial_dir / "attempts" / f"{attempt.number:03d}-{attempt.token}"
        newest = next(complete_checkpoints(folder), None)
        if newest is not None and newest[0] >= best.step:
            best = ResumePoint(step=newest[0], checkpoint=newest[1], attempt=attempt.number)
    return best
