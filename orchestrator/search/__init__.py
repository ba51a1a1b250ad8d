"""Optuna, and the rules that stop what diverges. The only package that knows Optuna.

``Search`` decides in memory; ``StudyMirror`` copies finished trials from the store to Optuna's own storage.
"""

from orchestrator.search.divergence import DivergenceRule, Stop
from orchestrator.search.points import PlannedCell
from orchestrator.search.rates import SEARCH_VERSION, suggest_rate
from orchestrator.search.study import DivergencePruner, Search
from orchestrator.search.study_mirror import MirrorError, StudyMirror

__all__ = [
    "SEARCH_VERSION",
    "DivergencePruner",
    "DivergenceRule",
    "MirrorError",
    "PlannedCell",
    "Search",
    "Stop",
    "StudyMirror",
    "suggest_rate",
]
