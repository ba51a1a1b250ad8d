"""Which learning rate is an arm's best, between the rates that were tried too, and at which it breaks. Pure."""

from orchestrator.scaling.grid import (
    FORMULA_VERSION,
    BestLearningRate,
    CellResult,
    Edge,
    LearningRatePoint,
    best_learning_rate,
)
from orchestrator.scaling.optimum import OPTIMUM_VERSION, Optimum, fit_optimum, pooled_variance

__all__ = [
    "FORMULA_VERSION",
    "OPTIMUM_VERSION",
    "BestLearningRate",
    "CellResult",
    "Edge",
    "LearningRatePoint",
    "Optimum",
    "best_learning_rate",
    "fit_optimum",
    "pooled_variance",
]
