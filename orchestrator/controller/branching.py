"""Decay branches while a sweep runs: who waits for its trunk, where a branch begins, what a trunk keeps for them.

A branch waits as long as its trunk is still going to write the checkpoint that it leaves from. If that comes to nothing
(the trunk has ended without, was trained by a sweep that did not ask for it, has gone on behind it; the files are gone
or torn; the trunk ran otherwise) the branch trains from its beginning: the same numbers for a higher price. Nothing of
this is state: it is told anew from the trials and from what lies in the run dirs.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from models import run_dir
from models.retention import looks_whole, remove
from orchestrator.controller.resume import ResumePoint, recover_records
from orchestrator.controller.running import trial_name
from orchestrator.controller.sweep_run import SweepRun
from orchestrator.failures import CORRUPT_CHECKPOINT
from orchestrator.gang import GangShape
from orchestrator.plan import Branch, decay_branches
from orchestrator.store import FINISHED, AttemptRow, TrialRow


class Branching:
    """Does nothing in a sweep without trunks, and beside pruning by rank."""

    def __init__(self, run: SweepRun) -> None:
        self._run = run
        self._generation = 0
        self._branches: dict[str, Branch] = {}
        self._told: set[str] = set()

    @property
    def branches(self) -> dict[str, Branch]:
        """By fingerprint, of the trials that there are now."""
        trials = self._run.trials
        if trials.generation != self._generation:
            self._generation = trials.generation
            # Rungs are read off a trial's validations, of which a branch has fewer.
            is_on = self._run.sweep.prune.rank is None
            tail = self._run.sweep.verdict.tail
            self._branches = decay_branches(trials.rows, self._run.micro_batches, tail) if is_on else {}
        return self._branches

    def work(self) -> None:
        """Hold back the branches whose checkpoint is still to come."""
        branches = self.branches
        rows = self._run.trials.by_fingerprint
        waiting = [(one, branch) for one, branch in branches.items() if rows[one].state == "WAITING"]
        self._run.trials.hold(frozenset(one for one, branch in waiting if self._is_to_come(branch)))

    def steps_of(self, trunk: str) -> tuple[int, ...]:
        """Where branches that have not ended for good may leave a trial."""
        rows = self._run.trials.by_fingerprint
        left = {
            branch.step
            for one, branch in self.branches.items()
            if branch.trunk == trunk and rows[one].state not in FINISHED
        }
        return tuple(sorted(left))

    def start(self, trial: TrialRow, earlier: Sequence[AttemptRow], own: ResumePoint, shape: GangShape) -> ResumePoint:
        """The checkpoint of the trunk if that is further than the trial's ``own``; the trunk's records up to there are
        in the store then."""
        branch = self.branches.get(trial.fingerprint)
        if branch is None or own.step >= branch.step:
            return own
        found = self._checkpoint(branch)
        reason = "its trunk kept no checkpoint there" if found is None else self._objection(branch, found, trial, shape)
        if any(one.cause == CORRUPT_CHECKPOINT and one.branched_from == branch.trunk for one in earlier):
            reason = "the trunk's checkpoint could not be loaded"
        if not reason and not self._has_records(branch):
            reason = "its trunk's records up to there are not whole"
        if reason or found is None:
            if trial.fingerprint not in self._told:
                self._told.add(trial.fingerprint)
                self._run.view.tell(f"no branch {trial_name(trial)} at step {branch.step}: {reason}")
            return own
        return ResumePoint(step=branch.step, checkpoint=found, trunk=branch.trunk)

    def tidy(self, ended: TrialRow) -> None:
        """Once a trunk has ended for good, remove what it kept for branches that have, too."""
        branch = self.branches.get(ended.fingerprint)
        trunk = ended.fingerprint if branch is None else branch.trunk
        steps = {one.step for one in self.branches.values() if one.trunk == trunk} - set(self.steps_of(trunk))
        if not steps or self._run.trials.by_fingerprint[trunk].state not in FINISHED:
            return
        visible = sorted(run_dir.visible_checkpoints(run_dir.trial_dir(self._run.home, trunk)), reverse=True)
        for step, path in visible[self._run.sweep.checkpoint.keep :]:
            if step in steps:
                remove(path)

    # -- the trunk ------------------------------------------------------------------------------------------

    def _is_to_come(self, branch: Branch) -> bool:
        """Whether the trunk is still going to write it."""
        trunk = self._run.trials.by_fingerprint[branch.trunk]
        if trunk.state not in ("WAITING", "RUNNING"):
            return False
        running = next((one for one in self._run.running if one.trial.fingerprint == branch.trunk), None)
        if running is not None and running.step < branch.step:
            return branch.step in running.spec.branch_steps  # the usual case, without a look at the disk
        if trunk.state == "WAITING" and not trunk.num_attempts:
            return True
        if self._checkpoint(branch) is not None:
            return False
        directory = self._directory(branch)
        if trunk.state == "WAITING":
            furthest = run_dir.latest_checkpoint(directory)
            return furthest is None or furthest[0] < branch.step
        spec = running.spec if running is not None else _newest_spec(directory)
        return spec is None or (branch.step in spec.branch_steps and spec.resume_step < branch.step)

    def _checkpoint(self, branch: Branch) -> Path | None:
        visible = run_dir.visible_checkpoints(self._directory(branch))
        return next((path for step, path in visible if step == branch.step and looks_whole(path)), None)

    def _directory(self, branch: Branch) -> Path:
        return run_dir.trial_dir(self._run.home, branch.trunk)

    def _objection(self, branch: Branch, checkpoint: Path, trial: TrialRow, shape: GangShape) -> str:
        """Why the branch would not be, to the bit, what it is from its beginning; empty if it would."""
        spec = run_dir.read_attempt_spec(checkpoint.parents[1])
        asked = spec.layout, spec.micro_batch_sequences, spec.device, spec.backend
        backend = self._run.sweep.resources.backend
        ours = shape.layout, self._run.micro_batches[trial.fingerprint], shape.device, backend
        rows = self._run.store.attempts(branch.trunk)
        if any(row.layout != shape.layout for row in rows if row.resume_step < branch.step):
            return "its trunk ran on another layout"
        return "" if asked == ours else "its trunk ran with another micro-batch, device or back end"

    def _has_records(self, branch: Branch) -> bool:
        rows = self._run.store.attempts(branch.trunk)
        recover_records(self._run.store, self._run.lease, self._directory(branch), rows, branch.step)
        return self._run.store.num_steps(branch.trunk, branch.step) == branch.step


def _newest_spec(directory: Path) -> run_dir.AttemptSpec | None:
    """Of an attempt that another controller runs; None while it has not said what it wants."""
    folders = sorted((directory / "attempts").glob("[0-9]*-*"))
    try:
        return run_dir.read_attempt_spec(folders[-1]) if folders else None
    except (OSError, ValueError):
        return None
