"""The layer's module spec of Megatron's own (local) modules."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
from megatron.core.transformer import ModuleSpec

from models.attention import GatedSelfAttention
from models.config import GateConfig, ModelConfig
from models.core_attention import SinkCoreAttention, TorchCoreAttention
from models.layer_specs.experts import DrawnExperts, with_experts
from models.norms import RMSNorm
from models.residual import NormalisedAdd


def attention_options(model: ModelConfig, gates: Sequence[GateConfig]) -> dict[str, Any]:
    """What GatedSelfAttention takes beside Megatron's own, on every back end."""
    return {"gate_configs": tuple(gates), "sdpa_output": model.sdpa_output, "switch_head": model.switch_head}


def layer_spec(model: ModelConfig, gates: Sequence[GateConfig], *, sequence_parallel: bool = False) -> ModuleSpec:
    """Megatron's local layer, its self-attention replaced by the gated one, its core attention and norms by ours."""
    spec = get_gpt_layer_local_spec(
        num_experts=model.moe.num_experts if model.moe is not None else None,
        qk_layernorm=model.qk_norm,
        normalization="RMSNorm",
    )
    attention = spec.submodules.self_attention
    core_attention = SinkCoreAttention if model.softmax_sink else TorchCoreAttention
    inner = dataclasses.replace(attention.submodules, core_attention=core_attention)
    if model.qk_norm:
        inner = dataclasses.replace(inner, q_layernorm=RMSNorm, k_layernorm=RMSNorm)
    gated = dataclasses.replace(
        attention,
        module=GatedSelfAttention,
        params={**attention.params, **attention_options(model, gates)},
        submodules=inner,
    )
    submodules = dataclasses.replace(
        spec.submodules, self_attention=gated, input_layernorm=RMSNorm, pre_mlp_layernorm=RMSNorm
    )
    if model.moe is not None:
        submodules = dataclasses.replace(submodules, mlp=with_experts(submodules.mlp, DrawnExperts))
    if model.sandwich_norm:
        sizes = {"hidden_size": model.hidden_size, "epsilon": model.norm_epsilon}
        add = ModuleSpec(NormalisedAdd, {**sizes, "sequence_parallel": sequence_parallel})
        submodules = dataclasses.replace(submodules, self_attn_bda=add, mlp_bda=add)
    return dataclasses.replace(spec, submodules=submodules)
