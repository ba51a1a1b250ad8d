"""Rotary position embedding on the CPU: Megatron's, to the last bit, with a third of its passes over memory."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable


def on_cpu(original: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """Megatron's ``apply_rotary_pos_emb`` with the common case done here; ``original`` does the others.

    The common case: signals [S, B, H, D] on the CPU whose whole heads are rotated, first half against second, by
    angles [S, 1, 1, D].
    """

    def apply(t: Tensor, freqs: Tensor, config: Any, cu_seqlens: Tensor | None = None, **kwargs: Any) -> Tensor:
        is_common = cu_seqlens is None and kwargs.get("mscale", 1.0) == 1.0 and t.device.type == "cpu"
        if not is_common or config.rotary_interleaved or freqs.shape[-1] != t.shape[-1]:
            return original(t, freqs, config, cu_seqlens, **kwargs)
        cos, sin = _cos_sin(freqs, t.dtype)
        rotated: Tensor = _Rotation.apply(t, cos, sin)  # type: ignore[no-untyped-call]
        return rotated

    return apply


def _cos_sin(angles: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Kept on the angles, which Megatron makes once a length: every layer asks for them twice a step."""
    known: dict[torch.dtype, tuple[Tensor, Tensor]] = angles.__dict__.setdefault("_cos_sin", {})
    if dtype not in known:
        known[dtype] = angles.cos().to(dtype), angles.sin().to(dtype)
    return known[dtype]


class _Rotation(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, t: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        ctx.save_for_backward(cos, sin)
        rotated = t * cos
        turned = t * sin
        (first, second), (turned_first, turned_second) = rotated.chunk(2, dim=-1), turned.chunk(2, dim=-1)
        first.sub_(turned_second)
        second.add_(turned_first)
        return rotated

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, d_rotated: Tensor) -> tuple[Tensor, None, None]:
        cos, sin = ctx.saved_tensors
        # Contiguous like torch's, whatever attention's gradients are: sums behind it hang on the order in memory.
        d_t = torch.mul(d_rotated, cos, out=torch.empty(d_rotated.shape, dtype=d_rotated.dtype))
        turned = d_rotated * sin
        (first, second), (turned_first, turned_second) = d_t.chunk(2, dim=-1), turned.chunk(2, dim=-1)
        first.add_(turned_second)
        second.sub_(turned_first)
        return d_t, None, None
