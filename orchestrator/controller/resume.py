"""What the next attempt of a trial builds on: the checkpoint that the controller names, and the records up to it."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from models.run_dir import StepRecord, complete_checkpoints, read_records
from orchestrator.failures import CORRUPT_CHECKPOINT, NONFINITE
from orchestrator.store import AttemptRow, Lease, Store


@dataclass(frozen=True)
class ResumePoint:
    step: int
    checkpoint: Path | None = None
    attempt: int | None = None
    """The attempt that wrote the checkpoint; None: from the start, or of another trial."""
    trunk: str | None = None
    """The fingerprint of that other trial."""


def attempt_dir(trial_dir: Path, attempt: AttemptRow) -> Path:
    return trial_dir / "attempts" / f"{attempt.number:03d}-{attempt.token}"


def resume_point(trial_dir: Path, attempts: Sequence[AttemptRow]) -> ResumePoint:
    """The furthest whole checkpoint of any earlier attempt; of equal ones the newest attempt's.

    Only one whose steps the readers of the curve still count: what an attempt wrote after its successor had branched
    off is nobody's history. And of an attempt that met a non-finite number, only one from before it, so that it is
    met again or not. One that an attempt could not load is passed over for the one before.
    """
    best, visible = ResumePoint(step=0), math.inf
    broken = {(one.resumed_from, one.resume_step) for one in attempts if one.cause == CORRUPT_CHECKPOINT}
    for attempt in reversed(attempts):
        limit = visible
        if attempt.cause == NONFINITE and attempt.end_step is not None:
            limit = min(limit, attempt.end_step - 1)
        for step, path in complete_checkpoints(attempt_dir(trial_dir, attempt)):
            if best.step < step <= limit and (attempt.number, step) not in broken:
                best = ResumePoint(step=step, checkpoint=path, attempt=attempt.number)
                break
        visible = min(visible, attempt.resume_step)
    return best


def recover_records(store: Store, lease: Lease, trial_dir: Path, earlier: Sequence[AttemptRow], step: int) -> None:
    """What attempts wrote and no controller read, since it was killed: the next attempt builds on it."""
    for attempt in earlier:
        records, _ = read_records(attempt_dir(trial_dir, attempt))
        store.record(lease, attempt, [record for record in records if record.step <= step])


def curve_until(store: Store, fingerprint: str, step: int) -> list[StepRecord]:
    """What earlier attempts showed, as far as the next one builds on it."""
    if step == 0:
        return []
    return [
        StepRecord(
            step=row.step,
            tokens=row.tokens,
            fraction=row.fraction,
            lr=row.lr or 0.0,
            loss_nats=row.loss_nats,
            gradient_norm=row.gradient_norm,
            tokens_per_second=row.tokens_per_second or 0.0,
            nonfinite=row.nonfinite,
        )
        for row in store.curve(fingerprint).steps
        if row.step <= step
    ]
