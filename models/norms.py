"""RMSNorm as Megatron's module specs build it."""

from __future__ import annotations

from typing import Any

import torch
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional


class RMSNorm(nn.RMSNorm):
    """torch's RMSNorm, for sequence parallelism too, which Megatron's wrapper of it refuses.

    There each tensor-parallel rank normalises its part of the sequence, and has its part of the weight's gradient: the
    mark on the weight is what makes ``finalize_model_grads`` sum them.
    """

    def __init__(self, config: TransformerConfig, hidden_size: int, eps: float, **_: Any) -> None:
        super().__init__(hidden_size, eps=eps)
        mark_sequence_parallel(self.weight, config.sequence_parallel)

    def forward(self, x: Tensor) -> Tensor:
        return rms_norm(x, self.weight, self.eps or 0.0)


def mark_sequence_parallel(parameter: nn.Parameter, sequence_parallel: bool) -> None:
    """Whether a whole copy of ``parameter`` on each tensor-parallel rank sees only the rank's part of the sequence."""
    parameter.sequence_parallel = sequence_parallel  # type: ignore[attr-defined]


def rms_norm(x: Tensor, weight: Tensor, epsilon: float) -> Tensor:
    """x / sqrt(mean(x^2) + epsilon) * weight over the last dimension.

    torch has a fused form on CUDA; on the CPU it takes the equation apart, and its backward pass takes twice the time
    of the one below, which gives the same numbers to the last bit and keeps half as much for it.
    """
    if x.is_cuda:
        return functional.rms_norm(x, weight.shape, weight, epsilon)
    normed: Tensor = _RMSNorm.apply(x, x, weight, epsilon)  # type: ignore[no-untyped-call]
    return normed


class _RMSNorm(torch.autograd.Function):
    """Takes ``x`` twice, to hand its gradient back in torch's two parts: autograd adds each by itself to the residual's
    gradient, and the sum of three floats hangs on the order."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, _: Tensor, weight: Tensor, epsilon: float) -> Tensor:
        inverse_rms = x.pow(2).mean(-1, keepdim=True).add_(epsilon).rsqrt_()
        ctx.save_for_backward(x, weight, inverse_rms)
        return (x * inverse_rms).mul_(weight)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, d_normed: Tensor) -> tuple[Tensor, Tensor, Tensor, None]:
        x, weight, inverse_rms = ctx.saved_tensors
        width = x.shape[-1]
        work = x * inverse_rms
        d_weight = work.mul_(d_normed).reshape(-1, width).sum(0)
        d_x = d_normed * weight
        d_inverse_rms = torch.mul(d_x, x, out=work).sum(-1, keepdim=True)
        through_rms = (-0.5 * d_inverse_rms * inverse_rms.pow(3)).div_(width).mul_(2)
        return d_x.mul_(inverse_rms), torch.mul(x, through_rms, out=work), d_weight, None
