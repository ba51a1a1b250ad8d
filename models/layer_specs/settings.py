"""A trial's model as Megatron's TransformerConfig: shape, precision, layout, device."""

from __future__ import annotations

from typing import Any

import torch
from megatron.core.tensor_parallel.layers import _grad_accum_fusion_available
from megatron.core.transformer import TransformerConfig
from torch.nn import functional

from models.config import Layout, MoEConfig, TrialConfig
from models.layer_specs.backend import Taken


def transformer_config(trial: TrialConfig, layout: Layout, device: str, backend: Taken = "local") -> TransformerConfig:
    """Megatron's config for a model of the paper's family."""
    model, bf16, on_cuda = trial.model, trial.precision != "fp32", device == "cuda"
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
        fp8=trial.fp8.format if trial.fp8 is not None else None,
        fp8_recipe=trial.fp8.recipe if trial.fp8 is not None else None,
        **_fusions(on_cuda, backend),
        **(_moe_options(model.moe, model.ffn_size, layout, on_cuda, backend) if model.moe is not None else {}),
    )


def _fusions(on_cuda: bool, backend: Taken) -> dict[str, bool]:
    """Kernels that do several steps in one: CUDA only.

    None of them reaches into a gate: those act on the projections' outputs and on the attention's, before RoPE and
    after the softmax. Megatron's fused softmax is left out, since no attention used here has it.
    """
    return {
        "bias_activation_fusion": on_cuda,  # SwiGLU
        "bias_dropout_fusion": on_cuda,
        "apply_rope_fusion": on_cuda and backend == "transformer_engine",
        # Weight gradients straight into the fp32 buffer; the output layer's kernel is apex's.
        "gradient_accumulation_fusion": on_cuda and _grad_accum_fusion_available,
        "masked_softmax_fusion": False,
        "persist_layer_norm": False,
    }


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


def _moe_options(moe: MoEConfig, expert_size: int, layout: Layout, on_cuda: bool, backend: Taken) -> dict[str, Any]:
    """Megatron's dropless top-k MoE layer; an expert after the other, where Transformer Engine cannot group them."""
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
        "moe_grouped_gemm": backend == "transformer_engine",
    }
