"""The gate equations of the paper (arXiv 2505.06708, section 2.2) in plain torch.

Shapes: S sequence, B batch, H heads, D head dimension. Scores have D = 1 when headwise.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional

from models.config import OPEN_OFFSET, GateConfig


def _ns_sigmoid(logits: Tensor) -> Tensor:
    """NS-sigmoid, the paper's non-sparse control: 0.5 + 0.5 sigmoid(x), never below a half."""
    return 0.5 + 0.5 * torch.sigmoid(logits)


ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "sigmoid": torch.sigmoid,
    "silu": functional.silu,
    "ns_sigmoid": _ns_sigmoid,
    "identity": lambda logits: logits,
}


def scores(gate: GateConfig, logits_SBHD: Tensor, mean_over_heads: Callable[[Tensor], Tensor]) -> Tensor:
    """Gate scores from logits, [S, B, H, D or 1] in and out (H = 1 when head-shared).

    ``mean_over_heads`` averages dimension 2 over *all* heads, those on other tensor-parallel ranks included.
    """
    activate = ACTIVATIONS[gate.activation]
    # Saturating functions lose their tails in bf16; Megatron's own gate computes in fp32 as well.
    logits_SBHD = logits_SBHD.float()
    if gate.init == "open":
        logits_SBHD = logits_SBHD + OPEN_OFFSET
    if gate.sharing == "head_specific":
        score_SBHD = activate(logits_SBHD)
    elif gate.shared_average == "logits":
        score_SBHD = activate(mean_over_heads(logits_SBHD))
    else:
        score_SBHD = mean_over_heads(activate(logits_SBHD))
    # A product with one would take three passes over memory and keep a copy.
    return score_SBHD if gate.scale == 1.0 else gate.scale * score_SBHD


def apply(gate: GateConfig, signal_SBHD: Tensor, score_SBHD: Tensor) -> Tensor:
    """Y * score, or Y + score when additive, in the signal's dtype."""
    combined = signal_SBHD * score_SBHD if gate.combine == "multiplicative" else signal_SBHD + score_SBHD
    return combined.to(signal_SBHD.dtype)


def gate_rows_per_group(gate: GateConfig | None, num_query_heads_per_group: int, head_dim: int) -> int:
    """Rows that a gate adds to each query group's block of the fused QKV projection.

    The block is [queries | gate | key | value], so that tensor parallelism shards whole groups.
    """
    if gate is None or gate.input != "hidden" or gate.position == "dense":
        return 0
    num_heads = num_query_heads_per_group if gate.position in ("sdpa", "query") else 1
    return num_heads * (head_dim if gate.granularity == "elementwise" else 1)


def zero_gate_rows(weight: Tensor, group_rows: int, gate_start: int, num_gate_rows: int) -> None:
    """Zero the gate's rows of a fused QKV weight [groups * group_rows, hidden], in place."""
    blocks = weight.view(-1, group_rows, weight.shape[-1])
    blocks[:, gate_start : gate_start + num_gate_rows].zero_()
