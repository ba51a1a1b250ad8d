"""First-token attention (F-Attn of the paper's Table 4) from queries and keys: fused attention keeps no probabilities.

Shapes: S sequence, B batch, H query heads, G key heads, D head dimension, R rows of queries at a time.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

_ELEMENTS_AT_ONCE = 2**24
"""Of the logits: 64 MB in fp32, whatever the sequence length."""


def first_token_attention(query_SBHD: Tensor, key_SBGD: Tensor, scale: float, sinks_H: Tensor | None) -> Tensor:
    """[H]: the causal softmax's probability on key 0, summed over sequences and the queries from 1 on (float64).

    Query 0 is left out: it can attend to nothing else. A sink logit joins the denominator and takes its share.
    Divide by B * (S - 1) for the mean.
    """
    length, batch, num_heads, head_dim = query_SBHD.shape
    num_groups = key_SBGD.shape[2]
    query_BGQSD = query_SBHD.float().reshape(length, batch, num_groups, -1, head_dim).permute(1, 2, 3, 0, 4)
    key_BGDS = key_SBGD.float().permute(1, 2, 3, 0)
    sinks_GQ1 = None if sinks_H is None else sinks_H.float().reshape(num_groups, -1, 1)
    position = torch.arange(length, device=query_SBHD.device)
    total_H = torch.zeros(num_heads, dtype=torch.float64, device=query_SBHD.device)
    rows = max(1, _ELEMENTS_AT_ONCE // (batch * num_heads * length))
    for start in range(1, length, rows):
        end = min(start + rows, length)
        block = query_BGQSD[..., start:end, :]
        logits = scale * (block.flatten(2, 3) @ key_BGDS[..., :end]).view(*block.shape[:-1], end)
        logits.masked_fill_(position[:end] > position[start:end, None], -math.inf)
        denominator = torch.logsumexp(logits, dim=-1)
        if sinks_GQ1 is not None:
            denominator = torch.logaddexp(denominator, sinks_GQ1)
        total_H += torch.exp(logits[..., 0] - denominator).double().sum(dim=(0, 3)).flatten()
    return total_H
