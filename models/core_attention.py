"""Softmax attention: by torch's scaled_dot_product_attention, or Megatron's own with a learned sink logit a head.

Causal, without dropout, packed sequences or bias: what these models need. ``document_mask`` keeps attention within a
document, where documents are separate.
"""

from __future__ import annotations

import copy
from typing import Any

import torch
from megatron.core.tensor_parallel.layers import set_tensor_model_parallel_attributes
from megatron.core.transformer.dot_product_attention import DotProductAttention
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor, nn
from torch.nn import functional


def document_mask(document_ids_BS: Tensor) -> Tensor:
    """[B, 1, S, S], true where a query (row) may not look: at what comes later, and at other documents.

    Positions need no reset: RoPE acts by distance, which is the same within a document.
    """
    other_BSS = document_ids_BS[:, :, None] != document_ids_BS[:, None, :]
    return (other_BSS | torch.ones_like(other_BSS[0]).triu(1))[:, None]


class TorchCoreAttention(MegatronModule):  # type: ignore[misc]
    """Query [S, B, H, D], key and value [S, B, G, D] to [S, B, H*D], per tensor-parallel rank.

    Equal to Megatron's core attention within rounding, with memory linear in the sequence. ``attention_mask`` is
    None for plain causal attention, or a whole mask, true where hidden.
    """

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
            attn_mask=None if attention_mask is None else ~attention_mask,
            is_causal=attention_mask is None,
            scale=self.softmax_scale,
            enable_gqa=query.shape[2] != key.shape[2],
        )
        sequence, batch = query.shape[:2]
        return output_BHSD.permute(2, 0, 1, 3).reshape(sequence, batch, -1)


class SinkCoreAttention(DotProductAttention):  # type: ignore[misc]
    """Megatron's S x S attention with ``softmax_type="learnable"``: e^sink joins each head's denominator.

    Sinks start at zero. A drawn start would take each rank's own number of draws, and the other initial weights would
    hang on the layout.
    """

    def __init__(self, config: TransformerConfig, **kwargs: Any) -> None:
        config = copy.copy(config)
        config.init_method = nn.init.zeros_
        super().__init__(config, **kwargs)
        # Megatron leaves them unmarked: norms and counts over tensor-parallel ranks would miss all but rank 0's.
        set_tensor_model_parallel_attributes(self.softmax_offset, True, 0, 1)
