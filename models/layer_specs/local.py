"""The layer's module spec of Megatron's own (local) modules."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
from megatron.core.transformer import ModuleSpec

from models.attention import GatedSelfAttention
from models.config import GateConfig, ModelConfig
from models.core_attention import SinkCoreAttention, TorchCoreAttention
from models.residual import NormalisedAdd


def layer_spec(model: ModelConfig, gates: Sequence[GateConfig]) -> ModuleSpec:
    """Megatron's local layer, its self-attention replaced by the gated one, its core attention by ours."""
    spec = get_gpt_layer_local_spec(
        num_experts=model.moe.num_experts if model.moe is not None else None,
        qk_layernorm=model.qk_norm,
        normalization="RMSNorm",
    )
    attention = spec.submodules.self_attention
    core_attention = SinkCoreAttention if model.softmax_sink else TorchCoreAttention
    inner = dataclasses.replace(attention.submodules, core_attention=core_attention)
    gated = dataclasses.replace(
        attention,
        module=GatedSelfAttention,
        params={**attention.params, "gate_configs": tuple(gates), "sdpa_output": model.sdpa_output},
        submodules=inner,
    )
    submodules = dataclasses.replace(spec.submodules, self_attention=gated)
    if model.sandwich_norm:
        add = ModuleSpec(NormalisedAdd, {"hidden_size": model.hidden_size, "epsilon": model.norm_epsilon})
        submodules = dataclasses.replace(submodules, self_attn_bda=add, mlp_bda=add)
    return dataclasses.replace(spec, submodules=submodules)
