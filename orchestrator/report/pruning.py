"""Pruning by rank, told: the audit of a sweep's trials, and its sentence."""

from __future__ import annotations

from collections.abc import Sequence

from orchestrator.report.figures import plural
from orchestrator.report.tree import LR_AXIS, Split, SweepHeading, TrialResult
from orchestrator.scaling import AUDIT_VERSION, EndedTrial, PruningAudit, audit_pruning
from orchestrator.sweep import arm_key


def audit(heading: SweepHeading, split: Split, trials: Sequence[TrialResult]) -> PruningAudit | None:
    """Over all tables of the sweep: false prunes are few. Confirming trials were never ranked, and are left out."""
    if not heading.rank_decisions:
        return None
    fresh, hidden = heading.fresh_seeds, {LR_AXIS, *heading.derived_axes}
    ended = [
        EndedTrial(
            group=arm_key(trial.arm, {name: value for name, value in trial.axes.items() if name not in hidden}),
            lr=trial.lr,
            state=trial.state,
            loss_nats=trial.full_loss_nats if split == "full" else trial.slice_loss_nats,
            training_flops=trial.training_flops or 0.0,
            share_done=trial.share_done,
        )
        for trial in trials
        if trial.seed not in fresh
    ]
    return audit_pruning(heading.rank_decisions, ended)


def audit_in_words(found: PruningAudit) -> str:
    places = " and ".join(f"{100 * fraction:g}" for fraction in found.fractions)
    diverged = f", of which {found.num_diverged} had diverged" if found.num_diverged else ""
    ranked = found.num_dropped - found.num_diverged
    cells = f"{found.num_dropped} of {plural(found.num_cells, 'cell')}{diverged}"
    said = f"pruned by rank at {places} % of the schedule: {cells}"
    drawn = f"; {found.num_drawn} of the {ranked} ranked too low are finished all the same" if ranked else ""
    if found.num_audited:
        rate = f"false-prune rate {found.num_false} of {found.num_audited} [{found.low:.2f}, {found.high:.2f}]"
        drawn += f": {rate} (95 %, Clopper and Pearson; better at the end than the best that was kept)"
    elif found.num_drawn:
        drawn += ", not yet at their end"
    saved = f"; {100 * found.share_saved:.0f} % of the grid's FLOPs saved"
    rest = "; a pruned cell has no mean: it is neither a best rate nor a point of the parabola"
    return f"{said}{drawn}{saved}{rest} ({AUDIT_VERSION})"
