"""What pruning by rank did: how often it was wrong, by the rates that were finished all the same, and what it saved.

Of the rates that ranked too low a random share is trained to its end, drawn before anything was stopped. Such a rate
was stopped *falsely* if it ends with a lower mean loss than the best one that was kept in its arm. Only these tell:
what was stopped has no end, and a rate that another sweep finished is no random draw.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import fmean

from orchestrator.scaling.proportion import clopper_pearson
from orchestrator.store import RankDecision
from orchestrator.sweep import arm_key

AUDIT_VERSION = "false-prune-1"


@dataclass(frozen=True)
class EndedTrial:
    """A trial of the selection as the audit sees it. ``loss_nats``: its final one, if it is complete."""

    group: str
    """Of ``arm_key``: what its learning rate was ranked within."""
    lr: float
    state: str
    loss_nats: float | None
    training_flops: float
    """Of the whole schedule."""
    share_done: float
    """Of its schedule, 0 to 1."""


@dataclass(frozen=True)
class PruningAudit:
    """Numbers of cells, a cell being an arm at one learning rate."""

    num_cells: int
    fractions: tuple[float, ...]
    """The rungs at which something was stopped."""
    num_dropped: int
    num_diverged: int
    """Of the dropped, those that had diverged: no ranking was needed."""
    num_drawn: int
    """Of the dropped, those that are finished all the same."""
    num_audited: int
    """Of the drawn, those whose end is known, and their arm's best, too."""
    num_false: int
    """Of the audited, those that ended better than the best that was kept."""
    low: float | None
    high: float | None
    """95 % interval of Clopper and Pearson for the chance that a dropped cell was better; None without any audited."""
    flops: float
    """Training FLOPs of the whole grid."""
    flops_saved: float

    @property
    def false_rate(self) -> float | None:
        return self.num_false / self.num_audited if self.num_audited else None

    @property
    def share_saved(self) -> float:
        return self.flops_saved / self.flops if self.flops else 0.0


def audit_pruning(decisions: Sequence[RankDecision], trials: Sequence[EndedTrial]) -> PruningAudit | None:
    """None where nothing was stopped by rank."""
    losses = {(arm_key(one.arm, one.axes), lr): one.losses_nats.get(lr) for one in decisions for lr in one.dropped}
    if not losses:
        return None
    drawn = {(arm_key(one.arm, one.axes), lr) for one in decisions for lr in one.audited}
    cells: dict[tuple[str, float], list[EndedTrial]] = {}
    for trial in trials:
        cells.setdefault((trial.group, trial.lr), []).append(trial)
    ends = {key: mean for key, of_cell in cells.items() if (mean := _mean(of_cell)) is not None}
    num_audited = num_false = 0
    for group, lr in sorted(drawn):
        kept = [end for key, end in ends.items() if key[0] == group and key not in losses]
        # Nothing that is kept has an end yet, or the draw has none.
        if not kept or (group, lr) not in ends:
            continue
        num_audited += 1
        num_false += ends[group, lr] < min(kept)
    low, high = clopper_pearson(num_false, num_audited) if num_audited else (None, None)
    return PruningAudit(
        num_cells=len(cells),
        fractions=tuple(sorted({one.fraction for one in decisions})),
        num_dropped=len(losses),
        num_diverged=sum(loss is None for loss in losses.values()),
        num_drawn=len(drawn),
        num_audited=num_audited,
        num_false=num_false,
        low=low,
        high=high,
        flops=sum(trial.training_flops for trial in trials),
        flops_saved=sum(t.training_flops * (1.0 - t.share_done) for t in trials if t.state == "PRUNED"),
    )


def _mean(trials: Sequence[EndedTrial]) -> float | None:
    """Of a cell all of whose trials are complete."""
    losses = [t.loss_nats for t in trials if t.state == "COMPLETE" and t.loss_nats is not None]
    return fmean(losses) if len(losses) == len(trials) and all(map(math.isfinite, losses)) else None
