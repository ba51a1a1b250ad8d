"""A trial onto a gang: claimed in the store, the point it resumes at, and the spec of what the gang is asked to do."""

from __future__ import annotations

from pathlib import Path

from models import run_dir
from models.run_dir import AttemptSpec
from orchestrator.controller.adoption import gang_facts
from orchestrator.controller.branching import Branching
from orchestrator.controller.provenance import data_hashes, provenance
from orchestrator.controller.resume import ResumePoint, curve_until, recover_records, resume_point
from orchestrator.controller.running import RunningAttempt, trial_name
from orchestrator.controller.snapshot import about
from orchestrator.controller.sweep_run import SweepRun
from orchestrator.gang import Gang, GangEnd
from orchestrator.store import AttemptRow, TrialRow, TrialTaken


def launch(
    run: SweepRun, branching: Branching, gang: Gang, trial: TrialRow
) -> tuple[RunningAttempt, GangEnd | None] | None:
    """The attempt, and its end if it could not begin; None when another sweep that shares the trial runs it now."""
    claimed = None if trial.num_attempts else _claim(run, branching, gang, trial, [])
    if claimed is None:  # it was tried before, or by somebody else since the trials were read
        claimed = _claim(run, branching, gang, trial, run.store.attempts(trial.fingerprint))
    if claimed is None:
        return None
    row, resume = claimed
    spec = attempt_spec(run, gang, trial, row, resume, branching.steps_of(trial.fingerprint))
    directory = Path(spec.trial_dir)
    run.search.ask(trial.fingerprint, curve_until(run.store, trial.fingerprint, resume.step))
    attempt = RunningAttempt(trial, row, spec, gang, run.clock.monotonic())
    run.running.append(attempt)
    run.trials.note(trial, "RUNNING", num_attempts=row.number)
    again = f", attempt {row.number} from step {resume.step}" if row.number > 1 else ""
    again += f", branched from {resume.trunk} at step {resume.step}" if resume.trunk is not None else ""
    with about(trial.fingerprint, row.number):
        run.view.tell(f"started   {trial_name(trial)}{again}")
    try:
        run_dir.write_trial_config(directory, trial.config)
        run_dir.write_json(spec.attempt_dir / "attempt.json", spec)
    except OSError as error:
        return attempt, GangEnd(summary=None, error=f"{type(error).__name__}: {error}")
    gang.launch(spec)
    return attempt, None


def _claim(
    run: SweepRun, branching: Branching, gang: Gang, trial: TrialRow, earlier: list[AttemptRow]
) -> tuple[AttemptRow, ResumePoint] | None:
    """None when the trial is not waiting, or had other attempts than ``earlier``."""
    directory = run_dir.trial_dir(run.home, trial.fingerprint)
    own = resume_point(directory, earlier)
    recover_records(run.store, run.lease, directory, earlier, own.step)
    resume = branching.start(trial, earlier, own, gang.shape)
    try:
        row = run.store.start_attempt(
            run.lease,
            trial.fingerprint,
            layout=gang.shape.layout,
            provenance={**provenance(), **data_hashes(trial.config), **gang_facts(gang)},
            num_earlier=len(earlier),
            resume_step=resume.step,
            resumed_from=resume.attempt,
            branched_from=resume.trunk,
            cpus=gang.shape.cpus_per_rank * gang.shape.layout.world_size,
            gpus=gang.shape.gpus_per_rank * gang.shape.layout.world_size,
            hosts=[member["host"] for member in gang.members],
        )
    except TrialTaken:
        return None
    return row, resume


def attempt_spec(
    run: SweepRun, gang: Gang, trial: TrialRow, row: AttemptRow, resume: ResumePoint, branch_steps: tuple[int, ...]
) -> AttemptSpec:
    sweep, shape = run.sweep, gang.shape
    return AttemptSpec(
        fingerprint=trial.fingerprint,
        number=row.number,
        token=row.token,
        trial_dir=str(run_dir.trial_dir(run.home, trial.fingerprint)),
        data_dir=str(run.home / "data"),
        layout=shape.layout,
        micro_batch_sequences=run.micro_batches[trial.fingerprint],
        device=shape.device,
        backend=sweep.resources.backend,
        resume_checkpoint=None if resume.checkpoint is None else str(resume.checkpoint),
        resume_step=resume.step,
        checkpoint_every_steps=sweep.checkpoint.steps_between(trial.config.train.num_steps),
        keep_checkpoints=sweep.checkpoint.keep,
        final_checkpoint=sweep.checkpoint.final,
        branch_steps=branch_steps,
        threads_per_rank=max(1, int(shape.cpus_per_rank)),
        diagnostics=sweep.diagnostics,
        log_labels={"sweep": sweep.name} if run.json_logs else None,
    )
