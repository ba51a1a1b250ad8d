"""Is an arm better than the baseline, and how sure are we? Simultaneous intervals, and the decision read from them.

Pure: no store, no I/O. Losses are in nats a token, and lower is better.
"""

from orchestrator.verdict.compare import FORMULA_VERSION, compare
from orchestrator.verdict.decision import MAX_SEEDS, MIN_SEEDS_EQUIVALENT, decide, more_seeds
from orchestrator.verdict.dunnett import critical_value
from orchestrator.verdict.gate import GATE_VERSION, gate_word
from orchestrator.verdict.intervals import equal_variances
from orchestrator.verdict.look_sequence import (
    SEQUENCE_VERSION,
    LookSequence,
    LookTaken,
    SeededLosses,
    take_looks,
)
from orchestrator.verdict.looks import Looks, level_of_look, spent
from orchestrator.verdict.samples import Comparison, Decision, Design, Method, NoiseFloor, Sample, Verdict, noise_floor

__all__ = [
    "FORMULA_VERSION",
    "GATE_VERSION",
    "MAX_SEEDS",
    "MIN_SEEDS_EQUIVALENT",
    "SEQUENCE_VERSION",
    "Comparison",
    "Decision",
    "Design",
    "LookSequence",
    "LookTaken",
    "Looks",
    "Method",
    "NoiseFloor",
    "Sample",
    "SeededLosses",
    "Verdict",
    "compare",
    "critical_value",
    "decide",
    "equal_variances",
    "gate_word",
    "level_of_look",
    "more_seeds",
    "noise_floor",
    "spent",
    "take_looks",
]
