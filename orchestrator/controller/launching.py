"""What a gang is asked to do: the attempt's spec, from the sweep, the trial and the point it resumes at."""

from __future__ import annotations

from pathlib import Path

from models import run_dir
from models.run_dir import AttemptSpec
from orchestrator.controller.resume import ResumePoint
from orchestrator.gang import GangShape
from orchestrator.store import AttemptRow, TrialRow
from orchestrator.sweep import Sweep

CHECKPOINTS_A_TRIAL = 10


def attempt_spec(
    sweep: Sweep,
    shape: GangShape,
    home: Path,
    trial: TrialRow,
    row: AttemptRow,
    resume: ResumePoint,
    micro_batch_sequences: int,
) -> AttemptSpec:
    """Without ``checkpoint.every_steps`` ten checkpoints over the schedule."""
    return AttemptSpec(
        fingerprint=trial.fingerprint,
        number=row.number,
        token=row.token,
        trial_dir=str(run_dir.trial_dir(home, trial.fingerprint)),
        data_dir=str(home / "data"),
        layout=shape.layout,
        micro_batch_sequences=micro_batch_sequences,
        device=shape.device,
        backend=sweep.resources.backend,
        resume_checkpoint=None if resume.checkpoint is None else str(resume.checkpoint),
        resume_step=resume.step,
        checkpoint_every_steps=sweep.checkpoint.every_steps or -(-trial.config.train.num_steps // CHECKPOINTS_A_TRIAL),
        keep_checkpoints=sweep.checkpoint.keep,
        final_checkpoint=sweep.checkpoint.final,
        threads_per_rank=max(1, int(shape.cpus_per_rank)),
        diagnostics=sweep.diagnostics,
    )
