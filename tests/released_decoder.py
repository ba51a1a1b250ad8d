"""The decoder of a folder in the released layout, in plain torch: what its tensors must mean.

Written from the layout's description (q_proj is fused per key/value group: the queries of the group, then its gates; a
gate's sigmoid times the head's attention output) and from config.json. It knows nothing of models/export, and
``published`` are the tensors as they lie in the files.

Shapes: B batch, S sequence, K key/value heads, Q query heads of one, D head dimension.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor


def logits(config: Mapping[str, Any], published: Mapping[str, Tensor], tokens_BS: Tensor) -> Tensor:
    """[B, S, vocabulary]."""
    x = published["model.embed_tokens.weight"][tokens_BS]
    for layer in range(config["num_hidden_layers"]):
        own = {
            name.removeprefix(f"model.layers.{layer}."): tensor
            for name, tensor in published.items()
            if name.startswith(f"model.layers.{layer}.")
        }
        x = x + _attention(config, own, _norm(config, x, own["input_layernorm.weight"]))
        normed = _norm(config, x, own["post_attention_layernorm.weight"])
        up, gate = normed @ own["mlp.up_proj.weight"].T, normed @ own["mlp.gate_proj.weight"].T
        x = x + (gate * torch.sigmoid(gate) * up) @ own["mlp.down_proj.weight"].T
    x = _norm(config, x, published["model.norm.weight"])
    tied = config["tie_word_embeddings"]
    return x @ published["model.embed_tokens.weight" if tied else "lm_head.weight"].T


def _norm(config: Mapping[str, Any], x: Tensor, weight: Tensor) -> Tensor:
    return weight * x * torch.rsqrt((x * x).mean(-1, keepdim=True) + config["rms_norm_eps"])


def _attention(config: Mapping[str, Any], own: Mapping[str, Tensor], x: Tensor) -> Tensor:
    groups, dim = config["num_key_value_heads"], config["head_dim"]
    per_group = config["num_attention_heads"] // groups
    fused = (x @ own["self_attn.q_proj.weight"].T).unflatten(-1, (groups, -1))
    query = fused[..., : per_group * dim].unflatten(-1, (per_group, dim))
    key = (x @ own["self_attn.k_proj.weight"].T).unflatten(-1, (groups, dim))
    value = (x @ own["self_attn.v_proj.weight"].T).unflatten(-1, (groups, dim))
    if config["use_qk_norm"]:
        query = _norm(config, query, own["self_attn.q_norm.weight"])
        key = _norm(config, key, own["self_attn.k_norm.weight"])
    query, key = _rotated(config, query), _rotated(config, key)
    scores = torch.einsum("bskqd,btkd->bkqst", query, key) / math.sqrt(dim)
    future = torch.ones(x.shape[1], x.shape[1], dtype=torch.bool).triu(1)
    mixed = torch.einsum("bkqst,btkd->bskqd", scores.masked_fill(future, -math.inf).softmax(-1), value)
    gates = fused[..., per_group * dim :]
    if config["headwise_attn_output_gate"]:
        mixed = mixed * torch.sigmoid(gates)[..., None]
    elif config["elementwise_attn_output_gate"]:
        mixed = mixed * torch.sigmoid(gates.unflatten(-1, (per_group, dim)))
    return mixed.flatten(2) @ own["self_attn.o_proj.weight"].T


def _rotated(config: Mapping[str, Any], x: Tensor) -> Tensor:
    """RoPE on [B, S, ..., D], pairs (i, i + D/2)."""
    half = config["head_dim"] // 2
    frequency = config["rope_theta"] ** (-torch.arange(half, dtype=torch.float64) / half)
    angle = torch.outer(torch.arange(x.shape[1], dtype=torch.float64), frequency)
    angle = angle.view(x.shape[1], *[1] * (x.dim() - 3), half)
    cos, sin = angle.cos().to(x.dtype), angle.sin().to(x.dtype)
    first, second = x[..., :half], x[..., half:]
    return torch.cat([first * cos - second * sin, second * cos + first * sin], dim=-1)
