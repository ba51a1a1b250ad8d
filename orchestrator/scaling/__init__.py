"""Which learning rate is an arm's best, between those that were tried too, at which it breaks, which are stopped for
their rank. Pure."""

from orchestrator.scaling.audit import AUDIT_VERSION, EndedTrial, PruningAudit, audit_pruning
from orchestrator.scaling.extension import extension
from orchestrator.scaling.grid import (
    FORMULA_VERSION,
    BestLearningRate,
    CellResult,
    Edge,
    LearningRatePoint,
    best_learning_rate,
)
from orchestrator.scaling.halving import HALVING_VERSION, RankedTrial, RankPolicy, group_key
from orchestrator.scaling.optimum import OPTIMUM_VERSION, Optimum, fit_optimum, pooled_variance
from orchestrator.scaling.rungs import RungPoint, loss_at, rung_point

__all__ = [
    "AUDIT_VERSION",
    "FORMULA_VERSION",
    "HALVING_VERSION",
    "OPTIMUM_VERSION",
    "BestLearningRate",
    "CellResult",
    "Edge",
    "EndedTrial",
    "LearningRatePoint",
    "Optimum",
    "PruningAudit",
    "RankPolicy",
    "RankedTrial",
    "RungPoint",
    "audit_pruning",
    "best_learning_rate",
    "extension",
    "fit_optimum",
    "group_key",
    "loss_at",
    "pooled_variance",
    "rung_point",
]
