"""A probe's record as rows: one a layer, so that SQL can group them; what is by head or by gate stays JSON."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from statistics import fmean
from typing import Any

from models.run_dir import DiagnosticRecord

_BY_LAYER = (
    "max_activation", "attention_output_rms", "ffn_output_rms", "residual_rms", "gradient_norm", "update_ratio",
)  # fmt: skip


def layer_rows(record: DiagnosticRecord) -> Iterator[dict[str, Any]]:
    """Rows of the table ``layer_diagnostic``, without their attempt; the first layer is 1.

    ``first_token_attention`` is the mean over heads, ``gate_score`` the one over the positions that have gates.
    """
    for index, attention in enumerate(record.first_token_attention):
        heads = [_finite(value) for value in attention]
        gates: dict[str, dict[str, Any]] = {
            position: {
                "mean": _finite(scores.mean[index]),
                "share_below": {name: _finite(shares[index]) for name, shares in scores.share_below.items()},
                "low": scores.low,
                "high": scores.high,
                "histogram": scores.histogram[index],
            }
            for position, scores in record.gate_scores.items()
        }
        measured = {name: _finite(getattr(record, name)[index]) for name in _BY_LAYER}
        yield {
            "step": record.step,
            "layer": index + 1,
            "tokens": record.tokens,
            "fraction": record.fraction,
            "first_token_attention": mean_or_none(heads),
            **measured,
            "gate_score": mean_or_none([gate["mean"] for gate in gates.values()]),
            "heads": heads,
            "gates": gates,
            "nonfinite": record.nonfinite,
        }


def mean_or_none(values: Sequence[float | None]) -> float | None:
    """None when one is missing: a mean over what is left would not be comparable. None of nothing, too."""
    known = [value for value in values if value is not None]
    return fmean(known) if known and len(known) == len(values) else None


def _finite(value: float | None) -> float | None:
    return value if value is not None and math.isfinite(value) else None
