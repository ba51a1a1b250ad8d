"""Softmax attention by torch's scaled_dot_product_attention, in the place of Megatron's S x S matrix.

Causal, without dropout, packed sequences or bias: what these models need. Equal to Megatron's own core attention
within rounding, with memory linear in the sequence.
"""

from __future__ import annotations

from typing import Any

from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor
from torch.nn import functional


class TorchCoreAttention(MegatronModule):  # type: ignore[misc]
    """Query [S, B, H, D], key and value [S, B, G, D] to [S, B, H*D], per tensor-parallel rank."""

    def __init__(
        self,
        config: TransformerConfig,
        layer_number: int,
        attn_mask_type: AttnMaskType,
        attention_type: str,
        softmax_scale: float | None = None,
        **_: Any,
    ) -> None:
        super().__init__(config)
        if attention_type != "self" or attn_mask_type is not AttnMaskType.causal:
            raise ValueError(
                f"layer {layer_number}: only causal self-attention, got {attention_type}, {attn_mask_type}"
            )
        if config.attention_dropout:
            raise ValueError(f"layer {layer_number}: attention_dropout must be 0, got {config.attention_dropout}")
        self.softmax_scale = softmax_scale

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Tensor | None = None,
        attn_mask_type: AttnMaskType | None = None,
        attention_bias: Tensor | None = None,
        packed_seq_params: Any = None,
    ) -> Tensor:
        if attention_bias is not None or packed_seq_params is not None:
            raise NotImplementedError("attention bias and packed sequences")
        output_BHSD = functional.scaled_dot_product_attention(
            query.permute(1, 2, 0, 3),
            key.permute(1, 2, 0, 3),
            value.permute(1, 2, 0, 3),
            is_causal=True,
            scale=self.softmax_scale,
            enable_gqa=query.shape[2] != key.shape[2],
        )
        sequence, batch = query.shape[:2]
        return output_BHSD.permute(2, 0, 1, 3).reshape(sequence, batch, -1)
