"""Sweep -> trials in the order they run, what each one costs, and which cells cannot run. Pure but for reading files.

The same file gives the same trials in the same order with the same fingerprints, on every machine. Mistakes that only
a whole config shows are UserErrors; what is right but beyond this version or this layout is a Refusal.
"""

from orchestrator.plan.branches import Branch, decay_branches, planned_branches, trained_flops
from orchestrator.plan.contrasts import Change, Contrast
from orchestrator.plan.expansion import MAX_TRIALS, Plan, expand
from orchestrator.plan.fit import after_out_of_memory, micro_batch_sizes
from orchestrator.plan.ordering import LR
from orchestrator.plan.planned import Confirmation, GrownRate, HeldBack, PlannedRung, PlannedTrial, RateGroup, Refusal
from orchestrator.plan.resolve import match_residual

__all__ = [
    "LR",
    "MAX_TRIALS",
    "Branch",
    "Change",
    "Confirmation",
    "Contrast",
    "GrownRate",
    "HeldBack",
    "Plan",
    "PlannedRung",
    "PlannedTrial",
    "RateGroup",
    "Refusal",
    "after_out_of_memory",
    "decay_branches",
    "expand",
    "match_residual",
    "micro_batch_sizes",
    "planned_branches",
    "trained_flops",
]
