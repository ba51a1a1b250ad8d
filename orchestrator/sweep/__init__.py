"""A sweep file, read: ``load`` for a path, ``parse`` for a text that the store kept. The only reader of YAML.

What is wrong with a file, its data or an override comes out as one UserError that is a whole message.
"""

from orchestrator.sweep.arm_key import arm_key
from orchestrator.sweep.budget import BUDGETS, BudgetConfig, check_extension, limits, refuse_extensions
from orchestrator.sweep.caps import check_cap
from orchestrator.sweep.document import DocumentPath, Places, Problems, UserError
from orchestrator.sweep.fields import KnownField, check_value, config_fields, known_field
from orchestrator.sweep.gate_rule import GateWord, PromoteConfig
from orchestrator.sweep.look_seeds import LookSeeds, look_seeds, seeds_of_looks
from orchestrator.sweep.notices import NOTICE_KINDS, NoticeKind, NoticesConfig, WaveConfig, check_https
from orchestrator.sweep.parsing import load, parse
from orchestrator.sweep.pruning import DivergenceConfig, PruneConfig, RankConfig
from orchestrator.sweep.rates import ExtendedRates, GrowingRates, SearchedRates, rounded_rate
from orchestrator.sweep.resources import WARM_BELOW_SECONDS, Placement, ResourcesConfig
from orchestrator.sweep.settings import (
    NUM_PARAMETERS,
    AllocateConfig,
    ArmName,
    CheckpointConfig,
    CountsAs,
    Derived,
    FailureRule,
    MatchConfig,
    RetryConfig,
    Sweep,
    VerdictConfig,
    compile_pattern,
)

__all__ = [
    "BUDGETS",
    "NOTICE_KINDS",
    "NUM_PARAMETERS",
    "WARM_BELOW_SECONDS",
    "AllocateConfig",
    "ArmName",
    "BudgetConfig",
    "CheckpointConfig",
    "CountsAs",
    "Derived",
    "DivergenceConfig",
    "DocumentPath",
    "ExtendedRates",
    "FailureRule",
    "GateWord",
    "GrowingRates",
    "KnownField",
    "LookSeeds",
    "MatchConfig",
    "NoticeKind",
    "NoticesConfig",
    "Placement",
    "Places",
    "Problems",
    "PromoteConfig",
    "PruneConfig",
    "RankConfig",
    "ResourcesConfig",
    "RetryConfig",
    "SearchedRates",
    "Sweep",
    "UserError",
    "VerdictConfig",
    "WaveConfig",
    "arm_key",
    "check_cap",
    "check_extension",
    "check_https",
    "check_value",
    "compile_pattern",
    "config_fields",
    "known_field",
    "limits",
    "load",
    "look_seeds",
    "parse",
    "refuse_extensions",
    "rounded_rate",
    "seeds_of_looks",
]
