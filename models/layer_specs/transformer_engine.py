"""The layer's module spec of Transformer Engine's modules; the gates, and all names in checkpoints, are the local ones.

A norm and the projection behind it are one module wherever nothing else reads the normalised input. A gate on the
output projection (``dense``) does, so there the norm stands by itself. That gate's own projection is Megatron's, in the
model's dtype also under FP8.

Megatron's wrappers are imported inside: it defines them only where Transformer Engine can be imported.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_with_transformer_engine_spec
from megatron.core.transformer import ModuleSpec

from models.attention import GatedSelfAttention
from models.config import FP8Config, GateConfig, ModelConfig
from models.layer_specs.experts import with_experts
from models.layer_specs.grouped_experts import DrawnGroupedExperts
from models.layer_specs.local import attention_options
from models.residual import NormalisedAdd


def layer_spec(
    model: ModelConfig, gates: Sequence[GateConfig], fp8: FP8Config | None = None, *, sequence_parallel: bool = False
) -> ModuleSpec:
    """Megatron's Transformer Engine layer, its self-attention replaced by the gated one."""
    from megatron.core.extensions.transformer_engine import TEColumnParallelLinear, TENorm

    spec = get_gpt_layer_with_transformer_engine_spec(
        num_experts=model.moe.num_experts if model.moe is not None else None,
        moe_grouped_gemm=model.moe is not None,
        qk_layernorm=model.qk_norm,
    )
    attention = spec.submodules.self_attention
    inner = attention.submodules
    if model.softmax_sink:
        inner = dataclasses.replace(inner, core_attention=_sink_core_attention())
    outer: dict[str, Any] = {}
    names = {}  # of the local spec, by which checkpoints go
    if any(gate.position == "dense" and gate.input == "hidden" for gate in gates):
        inner = dataclasses.replace(inner, linear_qkv=TEColumnParallelLinear)
        outer["input_layernorm"] = TENorm
        names["input_layernorm."] = "self_attention.linear_qkv.layer_norm_"
    if model.moe is not None:
        names["pre_mlp_layernorm."] = "mlp.linear_fc1.layer_norm_"
        outer["mlp"] = with_experts(spec.submodules.mlp, DrawnGroupedExperts)
    outer["self_attention"] = dataclasses.replace(
        attention,
        module=GatedSelfAttention,
        params={
            **attention.params,
            **attention_options(model, gates),
            "row_multiple": 1 if fp8 is None else fp8.multiple,
        },
        submodules=inner,
    )
    if model.sandwich_norm:
        sizes = {"hidden_size": model.hidden_size, "epsilon": model.norm_epsilon}
        add = ModuleSpec(NormalisedAdd, {**sizes, "sequence_parallel": sequence_parallel})
        outer |= {"self_attn_bda": add, "mlp_bda": add}
    submodules = dataclasses.replace(spec.submodules, **outer, sharded_state_dict_keys_map=names)
    return dataclasses.replace(spec, submodules=submodules)


def norm() -> type:
    """The module of a norm that stands by itself."""
    from megatron.core.extensions.transformer_engine import TENorm

    kind: type = TENorm
    return kind


def _sink_core_attention() -> type:
    """Transformer Engine's attention with ``softmax_type="learnable"``, its sinks like ``SinkCoreAttention``'s."""
    import torch
    from megatron.core.extensions.transformer_engine import TEDotProductAttention
    from megatron.core.tensor_parallel.layers import set_tensor_model_parallel_attributes

    class SinkTEAttention(TEDotProductAttention):  # type: ignore[misc]
        def __init__(self, config: Any, **kwargs: Any) -> None:
            super().__init__(config, **kwargs)
            # Some versions leave it uninitialised; and it is fp32, where the local one has the model's dtype.
            sinks = torch.zeros_like(self.get_parameter("softmax_offset"), dtype=config.params_dtype)
            self.softmax_offset = torch.nn.Parameter(sinks)
            set_tensor_model_parallel_attributes(self.softmax_offset, True, 0, 1)

    return SinkTEAttention
