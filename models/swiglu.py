"""SwiGLU on the CPU in one autograd step.

Megatron's own form keeps five tensors as wide as the FFN for the backward pass, and adds zero to one of them; this
one keeps its input and computes the activated half anew. The numbers are the same to the last bit.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable
from typing import Any

import torch
from megatron.core.transformer.mlp import MLP
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional


def in_one_step(model: nn.Module) -> None:
    """Give ``swiglu`` to every FFN of a built model, experts too, as Megatron takes an activation of its own."""
    modules: Iterable[Any] = model.modules()
    for module in modules:
        if type(module) is MLP:
            # On the module's own copy: other modules read the same flag as a wish for Transformer Engine's activation.
            config = copy.copy(module.config)
            config.use_te_activation_func = True
            module.config, module.activation_func = config, swiglu


def swiglu(both: Tensor) -> Tensor:
    """[..., 2 * width] to [..., width]: ``silu(first half) * second half``."""
    activated: Tensor = _SwiGLU.apply(both)  # type: ignore[no-untyped-call]
    return activated


class _SwiGLU(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, both: Tensor) -> Tensor:
        ctx.save_for_backward(both)
        gate, up = both.chunk(2, dim=-1)
        return functional.silu(gate).mul_(up)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, d_activated: Tensor) -> Tensor:
        (both,) = ctx.saved_tensors
        d_both = torch.empty_like(both)
        (gate, up), (d_gate, d_up) = both.chunk(2, dim=-1), d_both.chunk(2, dim=-1)
        torch.mul(d_activated, functional.silu(gate), out=d_up)
        torch.ops.aten.silu_backward.grad_input(d_activated * up, gate, grad_input=d_gate)
        return d_both
