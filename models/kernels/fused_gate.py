"""A gate in one pass over memory: Y' = Y * scale * activation(logits), or Y + it, and its gradients.

The plain form (``gates.scores``, then ``gates.apply``) writes its fp32 intermediates to memory and keeps them for
the backward pass; this one keeps only signal and logits. It computes in fp32 as well, so the two agree to rounding.

Shapes: S sequence, B batch, H heads = G query groups * Q heads a group, D head dimension. Logits have D = 1 when
headwise. All are taken by their strides: logits and values are slices of the fused QKV projection's output.
"""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from models.config import OPEN_OFFSET, GateConfig

_DTYPES = (torch.bfloat16, torch.float32)
_WIDEST_HEAD = 1024
"""A headwise gate's gradient is a sum over the head, which one program holds as a whole."""


@functools.cache
def available() -> bool:
    """Whether Triton can be imported. torch's CPU builds come without it."""
    try:
        import models.kernels.gate_kernels  # noqa: F401
    except ImportError:
        return False
    return True


def supports(gate: GateConfig, signal: Tensor, logits: Tensor) -> bool:
    """Whether ``gated`` can take these; if not, the caller takes the plain form.

    False for a head-shared gate (its average goes over all ranks) and on the CPU, unless TRITON_INTERPRET was set.
    """
    if gate.sharing != "head_specific" or gate.input == "constant":
        return False
    if signal.dtype not in _DTYPES or logits.dtype not in _DTYPES or signal.device != logits.device:
        return False
    if signal.dim() not in (3, 4) or signal.shape[:-1] != _leading(logits, signal.dim()):
        return False
    if logits.shape[-1] != signal.shape[-1] and (logits.shape[-1] != 1 or signal.shape[-1] > _WIDEST_HEAD):
        return False
    if not available():
        return False
    from models.kernels import gate_kernels

    return signal.is_cuda or (signal.device.type == "cpu" and gate_kernels.INTERPRETED)


def gated(gate: GateConfig, signal: Tensor, logits: Tensor) -> Tensor:
    """The gated signal, contiguous, in the signal's shape and dtype. Ask ``supports`` first.

    ``signal`` is [S, B, H, D], or [S, B, D] when it has no heads. ``logits`` has the same leading dimensions, or
    [S, B, G, Q, D or 1]: heads that lie in groups with something between them cannot be one dimension without a copy.
    """
    output: Tensor = _FusedGate.apply(signal, logits, gate)  # type: ignore[no-untyped-call]
    return output


class _FusedGate(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, signal: Tensor, logits: Tensor, gate: GateConfig) -> Tensor:
        from models.kernels import gate_kernels

        ctx.save_for_backward(signal, logits)
        ctx.gate = gate
        output = torch.empty(signal.shape, dtype=signal.dtype, device=signal.device)
        signal_SBGQD, logits_SBGQD = _grouped(signal, logits)
        gate_kernels.launch_forward(output, signal_SBGQD, logits_SBGQD, **_constants(gate))
        return output

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, d_output: Tensor) -> tuple[Tensor, Tensor, None]:
        from models.kernels import gate_kernels

        signal, logits = ctx.saved_tensors
        d_signal = torch.empty(signal.shape, dtype=signal.dtype, device=signal.device)
        d_logits = torch.empty(logits.shape, dtype=logits.dtype, device=logits.device)
        signal_SBGQD, logits_SBGQD = _grouped(signal, logits)
        d_output_SBGQD, _ = _grouped(d_output, logits)
        gate_kernels.launch_backward(
            d_signal, d_logits, d_output_SBGQD, signal_SBGQD, logits_SBGQD, **_constants(ctx.gate)
        )
        return d_signal, d_logits, None


def _leading(logits: Tensor, dim: int) -> torch.Size:
    """All dimensions of ``logits`` but the last, with groups and heads as one when the signal has ``dim`` = 4."""
    if logits.dim() == dim + 1 == 5:
        return torch.Size((*logits.shape[:2], logits.shape[2] * logits.shape[3]))
    return logits.shape[:-1]


def _grouped(signal: Tensor, logits: Tensor) -> tuple[Tensor, Tensor]:
    """Views [S, B, G, Q, D] of both, the last dimension contiguous (copied only where it is not)."""
    if signal.dim() == 3:
        signal, logits = signal.unsqueeze(2), logits.unsqueeze(2)
    if logits.dim() == 4:
        logits = logits.unsqueeze(3)
    signal = signal.view(*signal.shape[:2], *logits.shape[2:4], signal.shape[-1])
    return _last_contiguous(signal), _last_contiguous(logits)


def _last_contiguous(x: Tensor) -> Tensor:
    return x if x.stride(-1) == 1 or x.shape[-1] == 1 else x.contiguous()


def _constants(gate: GateConfig) -> dict[str, Any]:
    return {
        "scale": gate.scale,
        "offset": OPEN_OFFSET if gate.init == "open" else 0.0,
        "activation": gate.activation,
        "additive": gate.combine == "additive",
    }
