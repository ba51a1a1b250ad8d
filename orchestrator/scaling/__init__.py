"""Which learning rate is an arm's best, between those that were tried too, at which it breaks, which are stopped for
their rank; how an arm's loss falls with size. Pure."""

from orchestrator.scaling.audit import AUDIT_VERSION, EndedTrial, PruningAudit, audit_pruning
from orchestrator.scaling.denominators import (
    DENOMINATORS_VERSION,
    TOLERANCE,
    Denominator,
    are_equal,
    read_at,
    shares_of_schedule,
)
from orchestrator.scaling.extension import extension
from orchestrator.scaling.grid import (
    FORMULA_VERSION,
    BestLearningRate,
    CellResult,
    Edge,
    LearningRatePoint,
    best_learning_rate,
)
from orchestrator.scaling.halving import HALVING_VERSION, RankedTrial, RankPolicy
from orchestrator.scaling.laws import (
    EXTRAPOLATION,
    LAWS_VERSION,
    Estimate,
    LadderLaws,
    LeftOut,
    RungLosses,
    ScalingLaw,
    SpeedUp,
    fit_ladder,
)
from orchestrator.scaling.optimum import OPTIMUM_VERSION, Optimum, fit_optimum, pooled_variance
from orchestrator.scaling.rungs import RungPoint, loss_at, rung_point

__all__ = [
    "AUDIT_VERSION",
    "DENOMINATORS_VERSION",
    "EXTRAPOLATION",
    "FORMULA_VERSION",
    "HALVING_VERSION",
    "LAWS_VERSION",
    "OPTIMUM_VERSION",
    "TOLERANCE",
    "BestLearningRate",
    "CellResult",
    "Denominator",
    "Edge",
    "EndedTrial",
    "Estimate",
    "LadderLaws",
    "LearningRatePoint",
    "LeftOut",
    "Optimum",
    "PruningAudit",
    "RankPolicy",
    "RankedTrial",
    "RungLosses",
    "RungPoint",
    "ScalingLaw",
    "SpeedUp",
    "are_equal",
    "audit_pruning",
    "best_learning_rate",
    "extension",
    "fit_ladder",
    "fit_optimum",
    "loss_at",
    "pooled_variance",
    "read_at",
    "rung_point",
    "shares_of_schedule",
]
