"""From configs to Megatron: the transformer config, the layer's module spec, and the built GPTModel.

The one place where a model is constructed. Megatron's parallel state must be up before ``build_model``.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import torch
from megatron.core import parallel_state
from megatron.core.models.gpt import GPTModel
from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
from megatron.core.transformer import ModuleSpec, TransformerConfig
from megatron.core.transformer.moe.moe_utils import get_moe_layer_wise_logging_tracker
from torch import nn
from torch.nn import functional

from models.attention import GatedSelfAttention
from models.config import GateConfig, Layout, ModelConfig, MoEConfig, TrialConfig
from models.core_attention import SinkCoreAttention, TorchCoreAttention
from models.residual import NormalisedAdd


def transformer_config(model: ModelConfig, precision: str, layout: Layout, device: str) -> TransformerConfig:
    """Megatron's config for a model of the paper's family. Kernel fusions need CUDA and are off on the CPU."""
    on_cuda = device == "cuda"
    bf16 = precision == "bf16"
    return TransformerConfig(
        num_layers=model.num_layers,
        hidden_size=model.hidden_size,
        num_attention_heads=model.num_query_heads,
        num_query_groups=model.num_kv_heads,
        kv_channels=model.head_dim,
        ffn_hidden_size=model.ffn_size,
        normalization="RMSNorm",
        layernorm_epsilon=model.norm_epsilon,
        qk_layernorm=model.qk_norm,
        activation_func=functional.silu,
        gated_linear_unit=True,
        add_bias_linear=False,
        hidden_dropout=0.0,
        attention_dropout=0.0,
        init_method_std=model.init_std,
        tensor_model_parallel_size=layout.tensor,
        pipeline_model_parallel_size=layout.pipeline,
        pipeline_dtype=torch.bfloat16 if bf16 else torch.float32,
        params_dtype=torch.bfloat16 if bf16 else torch.float32,
        bf16=bf16,
        # Drawing whole weights on the CPU and cutting them makes the initial weights independent of the layout.
        use_cpu_initialization=True,
        attention_softmax_in_fp32=True,
        softmax_type="learnable" if model.softmax_sink else "vanilla",
        apply_rope_fusion=False,
        bias_activation_fusion=False,
        bias_dropout_fusion=False,
        masked_softmax_fusion=on_cuda,
        gradient_accumulation_fusion=False,
        persist_layer_norm=False,
        **(_moe_options(model.moe, model.ffn_size, layout) if model.moe is not None else {}),
    )


def _moe_options(moe: MoEConfig, expert_size: int, layout: Layout) -> dict[str, Any]:
    """Megatron's dropless top-k MoE layer, an expert after the other: grouped products need CUDA libraries."""
    return {
        "num_moe_experts": moe.num_experts,
        "moe_ffn_hidden_size": expert_size,
        "moe_router_topk": moe.top_k,
        "moe_router_score_function": "softmax",
        # A softmax over the chosen logits is the softmax over all, chosen and normalised again. With one expert it
        # would be the constant one, without a gradient.
        "moe_router_pre_softmax": moe.top_k == 1,
        "moe_router_dtype": "fp32",
        "moe_router_load_balancing_type": "global_aux_loss",
        # Megatron divides each rank's share of this loss by the tokens of all ranks, and then averages over the ranks
        # as if it were a mean already: without the factor the loss would fade with data parallelism.
        "moe_aux_loss_coeff": moe.aux_loss_coefficient * layout.data,
        "moe_z_loss_coeff": moe.z_loss_coefficient or None,
        "moe_token_dispatcher_type": "allgather",
        "moe_grouped_gemm": False,
    }


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


def build_model(trial: TrialConfig, layout: Layout, device: str) -> GPTModel:
    """This rank's part of the model, on ``device``, its weights drawn from torch's current seed."""
    config = transformer_config(trial.model, trial.precision, layout, device)
    # Megatron sums router losses by layer in a process-wide table, which a warm gang's next model may not fit.
    get_moe_layer_wise_logging_tracker().clear()
    model = GPTModel(
        config=config,
        transformer_layer_spec=layer_spec(trial.model, trial.gates),
        vocab_size=trial.data.vocab_size,
        max_sequence_length=trial.data.sequence_length,
        pre_process=parallel_state.is_pipeline_first_stage(),
        post_process=parallel_state.is_pipeline_last_stage(),
        parallel_output=True,
        share_embeddings_and_output_weights=trial.model.tied_embeddings,
        position_embedding_type="rope",
        rotary_base=trial.model.rope_base,
    )
    return model.to(device) if device == "cuda" else model


def num_parameters(model: nn.Module) -> int:
    """Parameters of the whole model, counted once each over tensor- and pipeline-parallel ranks."""
    from megatron.core.tensor_parallel import param_is_not_tensor_parallel_duplicate

    own = sum(
        parameter.numel()
        for parameter in model.parameters()
        if param_is_not_tensor_parallel_duplicate(parameter) and not getattr(parameter, "shared", False)
    )
    total = torch.tensor([own], dtype=torch.int64, device=next(model.parameters()).device)
    torch.distributed.all_reduce(total, group=parallel_state.get_model_parallel_group())
    return int(total.item())
