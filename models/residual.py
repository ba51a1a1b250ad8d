"""Sandwich norm: the outputs of attention and FFN are normalised before they join the residual (paper, section 3.2)."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor, nn

from models.norms import mark_sequence_parallel, rms_norm

WithBias = tuple[Tensor, Tensor | None]


class NormalisedAdd(nn.Module):
    """In the place of Megatron's bias-dropout-add: ``residual + RMSNorm(output)``; dropout is 0 in these models."""

    def __init__(self, hidden_size: int, epsilon: float, sequence_parallel: bool = False) -> None:
        super().__init__()
        self.norm, self.epsilon = nn.RMSNorm(hidden_size, eps=epsilon), epsilon
        mark_sequence_parallel(self.norm.weight, sequence_parallel)

    def forward(self, training: bool, fused: bool) -> Callable[[WithBias, Tensor, float], Tensor]:
        return self._add

    def _add(self, output_with_bias: WithBias, residual: Tensor, dropout: float) -> Tensor:
        output, bias = output_with_bias
        normed = rms_norm(output if bias is None else output + bias, self.norm.weight, self.epsilon)
        return residual + normed
