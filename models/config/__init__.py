"""What is learnt: model, gate, data, optimiser, precision, budget and seed, and their fingerprint.

Layout, back end and diagnostics are an attempt's, and not in the fingerprint. Pure and frozen; no torch.
"""

from models.config.attempt import Backend, DiagnosticsConfig, Layout
from models.config.base import Count, Frozen, Integer, Positive
from models.config.data import BlendMember, DataConfig, ValidationConfig, ValidationSet
from models.config.gate import OPEN_OFFSET, POSITIONS, GateConfig, Position
from models.config.model import ModelConfig, MoEConfig, PluginConfig, SwitchHeadConfig
from models.config.train import FP8Config, TrainConfig
from models.config.trial import NUMERICS, TrialConfig

__all__ = [
    "NUMERICS",
    "OPEN_OFFSET",
    "POSITIONS",
    "Backend",
    "BlendMember",
    "Count",
    "DataConfig",
    "DiagnosticsConfig",
    "FP8Config",
    "Frozen",
    "GateConfig",
    "Integer",
    "Layout",
    "MoEConfig",
    "ModelConfig",
    "PluginConfig",
    "Position",
    "Positive",
    "SwitchHeadConfig",
    "TrainConfig",
    "TrialConfig",
    "ValidationConfig",
    "ValidationSet",
]
