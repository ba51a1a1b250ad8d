"""A trial's model as Megatron's TransformerConfig: shape, precision, layout, device."""

from __future__ import annotations

from typing import Any

import torch
from megatron.core.transformer import TransformerConfig
from torch.nn import functional

from models.config import Layout, ModelConfig, MoEConfig


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
