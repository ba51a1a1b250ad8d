"""Decay branches in words: what a plan saves by them, and the note under a table whose trials are some."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from orchestrator.report.figures import flops_text, lr_text, plural
from orchestrator.report.tree import TrialResult

if TYPE_CHECKING:
    from orchestrator.plan import Plan

MOST_NAMED = 6


def work_of(plan: Plan) -> dict[str, float]:
    """The FLOPs that each trial of a plan will take, by fingerprint: of a branch without what its trunk has done."""
    from orchestrator.plan import trained_flops

    return trained_flops(plan.trials, plan.sweep)


def branch_lines(plan: Plan) -> list[str]:
    """What it saves that shorter budgets start from checkpoints of longer ones; nothing where none do."""
    from orchestrator.plan import planned_branches

    branches = planned_branches(plan.trials, plan.sweep)
    if not branches:
        return []
    number = f"{len(branches):,} branch{'es' * (len(branches) > 1)}"
    number += f" of {plural(len({branch.trunk for branch in branches.values()}), 'trunk')}"
    whole = flops_text(sum(trial.training_flops for trial in plan.trials))
    trained = flops_text(sum(work_of(plan).values()))
    return [f"{number} start from their trunk's checkpoints: {trained} training FLOPs instead of {whole}"]


def branched_note(trials: Sequence[TrialResult]) -> str:
    """They are named while they are few: who reads several tables must know which trials share their noise."""
    found = [(trial, *trial.branched) for trial in trials if trial.branched is not None]
    if not found:
        return ""
    named = [
        f"{trial.arm} at LR {lr_text(trial.lr)}, seed {trial.seed}, from {trunk} at step {step}"
        for trial, trunk, step in found[:MOST_NAMED]
    ]
    named += [f"{len(found) - MOST_NAMED} more"] if len(found) > MOST_NAMED else []
    return f"branched from a longer run, with whose loss theirs goes up and down: {'; '.join(named)}"
