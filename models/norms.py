"""RMSNorm as Megatron's module specs build it."""

from __future__ import annotations

from typing import Any

from megatron.core.transformer.transformer_config import TransformerConfig
from torch import nn


class RMSNorm(nn.RMSNorm):
    """torch's RMSNorm, for sequence parallelism too, which Megatron's wrapper of it refuses.

    There each tensor-parallel rank normalises its part of the sequence, and has its part of the weight's gradient: the
    mark on the weight is what makes ``finalize_model_grads`` sum them.
    """

    def __init__(self, config: TransformerConfig, hidden_size: int, eps: float, **_: Any) -> None:
        super().__init__(hidden_size, eps=eps)
        mark_sequence_parallel(self.weight, config.sequence_parallel)


def mark_sequence_parallel(parameter: nn.Parameter, sequence_parallel: bool) -> None:
    """Whether a whole copy of ``parameter`` on each tensor-parallel rank sees only the rank's part of the sequence."""
    parameter.sequence_parallel = sequence_parallel  # type: ignore[attr-defined]
