"""SwitchHead: a mixture of value, or of key and value, projections in each kv head (arXiv 2312.07987, section 2.2).

Routers and experts are rows of the fused QKV projection, in their query group's block, so that tensor parallelism
shards whole groups and one matrix multiply serves all. Every expert is computed for every token and the best are chosen
then: sparse in parameters that count for a token, not in work.
"""

from __future__ import annotations

import torch
from torch import Tensor

from models.config import SwitchHeadConfig


def rows_per_group(switch: SwitchHeadConfig | None, head_dim: int) -> tuple[int, int, int]:
    """Rows of a query group's block: router, key, value. Without SwitchHead no router, and a head's own width."""
    if switch is None:
        return 0, head_dim, head_dim
    experts = switch.num_experts * head_dim
    return switch.num_experts, experts if switch.projections == "key_value" else head_dim, experts


def mixed(switch: SwitchHeadConfig, logits_SBGE: Tensor, projections_SBGN: Tensor) -> Tensor:
    """The ``top_k`` experts of each token and head, weighted by their sigmoid scores: [S, B, G, D], N = E x D."""
    # Ties of a saturated sigmoid in bf16 would make the choice arbitrary, and Megatron routes in fp32 as well.
    scores = torch.sigmoid(logits_SBGE.float())
    weights = scores
    if switch.top_k < switch.num_experts:
        chosen = torch.zeros_like(scores).scatter_(-1, logits_SBGE.topk(switch.top_k, dim=-1).indices, 1.0)
        weights = scores * chosen
    experts = projections_SBGN.view(*projections_SBGN.shape[:-1], switch.num_experts, -1)
    mixture: Tensor = (experts * weights.to(experts.dtype).unsqueeze(-1)).sum(dim=-2)
    return mixture
