"""What arXiv 2505.06708 published, as claims about two arms: the figures of its tables, and what they are said to show.

Perplexities are of the paper's own held-out text, so that the difference in nats of two arms is the logarithm of their
ratio. All its runs have one seed. An arm is known by what it is, not only by its name: ``MECHANISMS``.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from models.config import GateConfig, TrialConfig

Measure = Literal["loss", "gate score", "M-Act", "F-Attn", "loss spikes", "divergence", "benchmarks"]
"""``loss``: validation loss at the end. ``divergence``: how often a trial diverges at a learning rate that both arms
tried. ``benchmarks``: downstream scores, which nothing here measures."""


@dataclass(frozen=True)
class Claim:
    """``arm`` is lower (or higher) in ``measure`` than ``reference``."""

    source: str
    arm: str
    reference: str
    measure: Measure
    published: tuple[float, float] | None = None
    """Of the arm and of the reference: perplexities where the measure is the loss."""
    direction: Literal["lower", "higher"] = "lower"
    setting: Mapping[str, Any] = field(default_factory=dict)
    """The axis values of the paper's run, where its table has several."""
    note: str = ""

    @property
    def published_effect(self) -> float | None:
        """Arm minus reference: nats for the loss."""
        if self.published is None:
            return None
        arm, reference = self.published
        return math.log(arm / reference) if self.measure == "loss" else arm - reference


_BASELINE = 6.026
_PERPLEXITY = {
    "more-kv-heads": ("Table 1, row 2", 5.979),
    "more-query-heads": ("Table 1, row 3", 5.953),
    "more-experts": ("Table 1, row 4", 5.964),
    "g1-elementwise": ("Table 1, row 5", 5.761),
    "g2-elementwise": ("Table 1, row 6", 5.820),
    "g3-elementwise": ("Table 1, row 7", 6.016),
    "g4-elementwise": ("Table 1, row 8", 5.981),
    "g5-dense": ("Table 1, row 9", 6.017),
    "g1-headwise": ("Table 1, row 10", 5.792),
    "g2-headwise": ("Table 1, row 11", 5.808),
    "g1-shared": ("Table 1, row 12", 5.801),
    "g2-shared": ("Table 1, row 13", 5.867),
    "g1-additive-silu": ("Table 1, row 14", 5.821),
    "g1-silu": ("Table 1, row 15", 5.822),
    "sdpa-group-norm": ("Table 3", 5.847),
    "sdpa-silu": ("Table 3", 5.975),
    "g1-additive-identity": ("Table 3", 5.882),
    "g1-input-independent": ("Table 4", 5.917),
    "g1-ns-sigmoid": ("Table 4", 5.900),
    "kv-8top8": ("Table 6", 5.847),
    "kv-4top4": ("Table 6", 5.935),
    "v-4top4": ("Table 6", 5.820),
    "v-8top2": ("Table 6", 5.870),
}
"""MoE 15A2B, 400 B tokens."""

_BETWEEN = (
    ("g1-elementwise", "g2-elementwise", "the SDPA output is the best place"),
    ("g1-elementwise", "more-kv-heads", "more than its parameters"),
    ("g1-elementwise", "more-query-heads", "more than its parameters"),
    ("g1-elementwise", "more-experts", "more than its parameters"),
    ("g1-headwise", "g1-shared", "heads want gates of their own"),
    ("g2-elementwise", "g2-shared", "heads want gates of their own"),
    ("g1-elementwise", "g1-additive-silu", "multiplicative rather than additive"),
    ("g1-elementwise", "g1-silu", "sigmoid rather than SiLU"),
    ("g1-additive-silu", "g1-additive-identity", "a non-linearity"),
    ("g1-elementwise", "sdpa-group-norm", "more than a non-linearity"),
    ("g1-elementwise", "g1-input-independent", "scores that depend on the query"),
    ("g1-elementwise", "g1-ns-sigmoid", "sparse scores"),
)
"""What Tables 1, 3 and 4 are said to show between two arms."""

_28L_400B = {"model.preset": "dense-1.7b-28l", "train.tokens": 400_000_000_000}
_28L_3500B = {"model.preset": "dense-1.7b-28l", "train.tokens": 3_500_000_000_000}
_48L_400B = {"model.preset": "dense-1.7b-48l", "train.tokens": 400_000_000_000}
_48L_1T = {"model.preset": "dense-1.7b-48l", "train.tokens": 1_000_000_000_000}

_DENSE = (
    Claim("Table 2, rows 1, 2", "g1-elementwise", "baseline", "loss", (7.404, 7.499), setting=_28L_400B),
    Claim("Table 2, rows 3, 4", "g1-elementwise", "baseline", "loss", (6.130, 6.180), setting=_28L_3500B),
    Claim("Table 2, rows 5, 8", "g1-elementwise", "baseline", "loss", (7.288, 7.421), setting=_48L_400B),
    Claim("Table 2, rows 5, 9", "g1-headwise", "baseline", "loss", (7.370, 7.421), setting=_48L_400B),
    Claim("Table 2, rows 11, 13", "g1-elementwise", "baseline", "loss", (7.101, 7.363), setting=_48L_1T),
    Claim("Table 2, rows 12, 14", "g1-elementwise", "baseline", "divergence", setting=_48L_1T),
    Claim("Table 2, rows 6, 7", "sandwich", "baseline", "divergence", setting=_48L_400B),
)

_INSIDE: dict[Measure, dict[str, float]] = {
    "gate score": {
        "g1-elementwise": 0.116, "g1-headwise": 0.172, "g1-shared": 0.271, "g2-elementwise": 0.221,
        "g1-input-independent": 0.335, "g1-ns-sigmoid": 0.653,
    },
    "M-Act": {
        "baseline": 1053.0, "g1-elementwise": 94.0, "g1-headwise": 98.0, "g1-shared": 286.0, "g2-elementwise": 125.0,
        "g1-input-independent": 471.0, "g1-ns-sigmoid": 892.0,
    },
    "F-Attn": {
        "baseline": 0.467, "g1-elementwise": 0.048, "g1-headwise": 0.073, "g1-shared": 0.301, "g2-elementwise": 0.297,
        "g1-input-independent": 0.364, "g1-ns-sigmoid": 0.451,
    },
}  # fmt: skip
"""Table 4."""


def _table_4() -> list[Claim]:
    claims = []
    for measure, values in _INSIDE.items():
        # Scores are held against the sparsest, which has no rival in a model without a gate.
        reference = "g1-elementwise" if measure == "gate score" else "baseline"
        for arm in values:
            if arm != reference:
                pair = (values[arm], values[reference])
                direction: Literal["lower", "higher"] = "higher" if pair[0] > pair[1] else "lower"
                claims.append(Claim("Table 4", arm, reference, measure, pair, direction))
    return claims


def _between() -> list[Claim]:
    claims = []
    for arm, other, why in _BETWEEN:
        (source, value), (_, reference) = _PERPLEXITY[arm], _PERPLEXITY[other]
        claims.append(Claim(source.split(",")[0], arm, other, "loss", (value, reference), note=why))
    return claims


CLAIMS: tuple[Claim, ...] = (
    *(Claim(source, arm, "baseline", "loss", (value, _BASELINE)) for arm, (source, value) in _PERPLEXITY.items()),
    *_between(),
    *_DENSE,
    *_table_4(),
    Claim("section 3.2, 28 layers, 3.5 T tokens", "g1-elementwise", "baseline", "loss spikes", (0.0, 41.0)),
    *(
        Claim(source, arm, "baseline", "benchmarks", direction="higher", note=what)
        for arm, source, what in (
            ("g1-elementwise", "Tables 1, 2", "HellaSwag, MMLU, GSM8k, C-eval"),
            ("g1-headwise", "Tables 1, 2", "HellaSwag, MMLU, GSM8k, C-eval"),
            ("g2-elementwise", "Table 1", "HellaSwag, MMLU, GSM8k, C-eval"),
            ("g1-elementwise", "Table 5", "RULER, extended to 128 k"),
        )
    ),
)


def _gate(**options: Any) -> dict[str, Any]:
    return {"gate": GateConfig(**{"position": "sdpa", **options})}


MECHANISMS: dict[str, dict[str, Any]] = {
    "baseline": {"gate": None},
    "g1-elementwise": _gate(),
    "g2-elementwise": _gate(position="value"),
    "g3-elementwise": _gate(position="key"),
    "g4-elementwise": _gate(position="query"),
    "g5-dense": _gate(position="dense"),
    "g1-headwise": _gate(granularity="headwise"),
    "g2-headwise": _gate(position="value", granularity="headwise"),
    "g1-shared": _gate(sharing="head_shared"),
    "g2-shared": _gate(position="value", sharing="head_shared"),
    "g1-additive-silu": _gate(combine="additive", activation="silu"),
    "g1-additive-identity": _gate(combine="additive", activation="identity"),
    "g1-silu": _gate(activation="silu"),
    "g1-input-independent": _gate(input="none"),
    "g1-ns-sigmoid": _gate(activation="ns_sigmoid"),
    "sdpa-group-norm": {"gate": None, "model.sdpa_output": "group_norm"},
    "sdpa-silu": {"gate": None, "model.sdpa_output": "silu"},
    "sandwich": {"gate": None, "model.sandwich_norm": True},
}
"""By the arms' names in sweeps/paper: the values that make the mechanism. All other mechanisms are off."""

_OFF = {"more_gates": (), "model.sdpa_output": None, "model.sandwich_norm": False, "model.switch_head": None}


def is_the_papers(arm: str, config: TrialConfig) -> bool:
    """Whether an arm of this name is the paper's mechanism; True for those that only a comparison could tell (more
    heads, more experts, SwitchHead)."""
    wanted = MECHANISMS.get(arm)
    return wanted is None or all(_at(config, path) == value for path, value in {**_OFF, **wanted}.items())


def _at(config: TrialConfig, path: str) -> Any:
    value: Any = config
    for name in path.split("."):
        value = getattr(value, name)
    return value
