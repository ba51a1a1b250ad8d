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
        **_layout_options(layout, on_cuda),
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
        **(_moe_options(model.moe, model.ffn_size, layout, on_cuda) if model.moe is not None else {}),
    )


def _layout_options(layout: Layout, on_cuda: bool) -> dict[str, Any]:
    interleaved = layout.virtual_pipeline > 1
    return {
        "tensor_model_parallel_size": layout.tensor,
        "sequence_parallel": layout.sequence_parallel,
        "context_parallel_size": layout.context,
        "expert_model_parallel_size": layout.expert,
        "expert_tensor_parallel_size": layout.expert_tensor,
        "pipeline_model_parallel_size": layout.pipeline,
        "virtual_pipeline_model_parallel_size": layout.virtual_pipeline if interleaved else None,
        # An interleaved stage sends forward and backward in one batch, and with two stages to the same rank: only the
        # unbatched form, which takes a process group a direction, keeps the two apart.
        "batch_p2p_comm": not interleaved,
        "overlap_p2p_comm": interleaved,
        # While an interleaved stage frees what it sent, gloo may still be reading it; CUDA's streams are in order.
        "deallocate_pipeline_outputs": layout.pipeline > 1 and (on_cuda or not interleaved),
        "recompute_granularity": None if layout.recompute == "none" else layout.recompute,
        "recompute_method": "uniform" if layout.recompute == "full" else None,
        "recompute_num_layers": 1 if layout.recompute == "full" else None,
    }


def _moe_options(moe: MoEConfig, expert_size: int, layout: Layout, on_cuda: bool) -> dict[str, Any]:
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
        # Megatron divides each rank's share of this loss by the tokens of all ranks, and then averages over the
        # data-parallel ranks as if it were a mean already: without the factor the loss would fade. Shares of tensor
        # ranks are summed (the router's weight is marked), and context ranks have the factor in Megatron's scale.
        "moe_aux_loss_coeff": moe.aux_loss_coefficient * layout.data,
        "moe_z_loss_coeff": moe.z_loss_coefficient or None,
        "moe_token_dispatcher_type": "alltoall" if on_cuda and layout.expert > 1 else "allgather",
        "moe_grouped_gemm": False,
    }
