"""Megatron's self-attention with a gate at one of five places.

The gate's logits come out of the fused QKV projection: each query group's block is widened to
[queries | gate | key | value], so that tensor parallelism shards whole groups and one matrix multiply serves all.
A gate on the output projection (``dense``) has a projection of its own, since its width is the model's.

Shapes: S sequence, B batch, G query groups, H heads, D head dimension, all per tensor-parallel rank.
"""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Callable
from typing import Any

import torch
from megatron.core.tensor_parallel import ColumnParallelLinear
from megatron.core.tensor_parallel.layers import set_tensor_model_parallel_attributes
from megatron.core.transformer.attention import SelfAttention, SelfAttentionSubmodules
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor, nn
from torch.distributed.nn.functional import all_reduce

from models import gates
from models.config import GateConfig


class GatedSelfAttention(SelfAttention):  # type: ignore[misc]
    """SelfAttention whose gate is given as a spec parameter; ``gate=None`` is Megatron's own, unchanged."""

    def __init__(
        self,
        config: TransformerConfig,
        submodules: SelfAttentionSubmodules,
        layer_number: int,
        gate: GateConfig | None = None,
        **kwargs: Any,
    ) -> None:
        queries_per_group = config.num_attention_heads // config.num_query_groups
        num_gate_rows = gates.gate_rows_per_group(gate, queries_per_group, config.kv_channels)
        if gate is not None and num_gate_rows:
            submodules = dataclasses.replace(
                submodules, linear_qkv=_widened(submodules.linear_qkv, config, gate, num_gate_rows)
            )
        super().__init__(config, submodules, layer_number, **kwargs)
        self.gate_config = gate
        self.num_gate_rows = num_gate_rows
        self._queries_per_group = queries_per_group
        if gate is None:
            return
        if gate.position == "dense" and gate.input == "hidden":
            self.linear_gate = self._gate_projection(gate)
        if gate.input == "none":
            self.gate_parameter = self._gate_parameter(gate)
        if gate.position == "sdpa":
            # Megatron's forward hands a fourth tensor to _apply_output_gate when this is set. Set on this
            # module's own copy and only now, or the base class would widen the projection by itself.
            self.config = copy.copy(config)
            self.config.attention_output_gate = True

    # -- construction ---------------------------------------------------------------------------------------

    def _gate_projection(self, gate: GateConfig) -> nn.Module:
        linear: nn.Module = ColumnParallelLinear(
            self.config.hidden_size,
            self.config.hidden_size,
            config=self.config,
            init_method=nn.init.zeros_ if gate.init == "zero" else self.config.init_method,
            gather_output=True,
            bias=False,
            skip_bias_add=False,
            is_expert=False,
            tp_group=self.pg_collection.tp,
        )
        return linear

    def _gate_parameter(self, gate: GateConfig) -> nn.Parameter:
        """Zero-initialised logits of an input-independent gate: [H, D or 1], or [hidden] at ``dense``."""
        if gate.position == "dense":
            shape: tuple[int, ...] = (self.config.hidden_size,)
        else:
            on_queries = gate.position in ("sdpa", "query")
            num_heads = self.num_attention_heads_per_partition if on_queries else self.num_query_groups_per_partition
            shape = (num_heads, self.config.kv_channels if gate.granularity == "elementwise" else 1)
        device = "cpu" if self.config.use_cpu_initialization else torch.cuda.current_device()
        parameter = nn.Parameter(torch.zeros(shape, dtype=self.config.params_dtype, device=device))
        if gate.position != "dense":
            set_tensor_model_parallel_attributes(parameter, is_parallel=True, dim=0, stride=1)
        return parameter

    def sharded_state_dict(
        self, prefix: str = "", sharded_offsets: tuple[Any, ...] = (), metadata: dict[str, Any] | None = None
    ) -> dict[str, Any]:
        """Megatron's, plus the heads of an input-independent gate sharded over tensor-parallel ranks."""
        from megatron.core.transformer.utils import make_sharded_tensors_for_checkpoint

        state: dict[str, Any] = super().sharded_state_dict(prefix, sharded_offsets, metadata)
        gate = self.gate_config
        if gate is not None and gate.input == "none" and gate.position != "dense":
            state.update(
                make_sharded_tensors_for_checkpoint(
                    {"gate_parameter": self.gate_parameter},
                    prefix,
                    {"gate_parameter": 0},
                    sharded_offsets,
                    tp_group=self.pg_collection.tp,
                    dp_cp_group=metadata["dp_cp_group"] if metadata else None,
                )
            )
        return state

    # -- the forward pass, in its order ---------------------------------------------------------------------

    def get_query_key_value_tensors(
        self,
        hidden_states: Tensor,
        key_value_states: Tensor | None = None,
        output_gate: bool = False,
        split_qkv: bool = True,
    ) -> Any:
        """Query [S, B, H, D], key and value [S, B, G, D]; with ``output_gate`` also the scores for the output."""
        gate = self.gate_config
        if gate is None or gate.position == "dense":
            return super().get_query_key_value_tensors(hidden_states, key_value_states, output_gate, split_qkv)
        query, logits, key, value = self._project(hidden_states, gate)
        score = self._score(gate, logits, query)
        if gate.position == "value":
            value = gates.apply(gate, value, score)
        if gate.qk_order == "before_norm":
            query, key = self._gate_query_or_key(gate, query, key, score)
        query = query if self.q_layernorm is None else self.q_layernorm(query)
        key = key if self.k_layernorm is None else self.k_layernorm(key)
        if gate.qk_order == "after_norm":
            query, key = self._gate_query_or_key(gate, query, key, score)
        return (query, key, value, score) if output_gate else (query, key, value)

    def _project(self, hidden_states: Tensor, gate: GateConfig) -> tuple[Tensor, Tensor | None, Tensor, Tensor]:
        """One matrix multiply: query [S, B, H, D], gate logits [S, B, heads, D or 1] or None, key, value."""
        mixed, _ = self.linear_qkv(hidden_states)
        head_dim = self.hidden_size_per_attention_head
        mixed = mixed.view(*mixed.shape[:2], self.num_query_groups_per_partition, -1)
        rows = [self._queries_per_group * head_dim, self.num_gate_rows, head_dim, head_dim]
        query, logits, key, value = torch.split(mixed, rows, dim=3)
        query = query.reshape(*query.shape[:2], -1, head_dim)
        if not self.num_gate_rows:
            return query, None, key, value
        width = head_dim if gate.granularity == "elementwise" else 1
        return query, logits.reshape(*logits.shape[:2], -1, width), key, value

    def _score(self, gate: GateConfig, logits: Tensor | None, like: Tensor) -> Tensor:
        if gate.input == "constant":
            return like.new_full((), gate.scale)
        if gate.input == "none":
            logits = self.gate_parameter.expand(*like.shape[:2], *self.gate_parameter.shape)
        assert logits is not None
        return gates.scores(gate, logits, self._mean_over_heads)

    def _gate_query_or_key(self, gate: GateConfig, query: Tensor, key: Tensor, score: Tensor) -> tuple[Tensor, Tensor]:
        if gate.position == "query":
            query = gates.apply(gate, query, score)
        elif gate.position == "key":
            key = gates.apply(gate, key, score)
        return query, key

    def _apply_output_gate(self, x: Tensor, gate: Tensor) -> Tensor:
        """The gate on the SDPA output: ``x`` [S, B, H*D], ``gate`` the scores [S, B, H or 1, D or 1] or []."""
        assert self.gate_config is not None
        signal_SBHD = x.view(*x.shape[:2], -1, self.hidden_size_per_attention_head)
        return gates.apply(self.gate_config, signal_SBHD, gate).view_as(x)

    def _mean_over_heads(self, scores_SBHD: Tensor) -> Tensor:
        """Mean over the heads of all tensor-parallel ranks, [S, B, 1, D]; its gradient is summed over them."""
        total = scores_SBHD.sum(dim=2, keepdim=True)
        num_heads = scores_SBHD.shape[2] * self.world_size
        if self.world_size > 1:
            # Not Megatron's pair of mappings: they leave a non-contiguous tensor or gradient unreduced, silently.
            total = all_reduce(total, group=self.pg_collection.tp)  # type: ignore[no-untyped-call]
        mean: Tensor = total / num_heads
        return mean

    def forward(self, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Any:
        """[S, B, hidden] to ([S, B, hidden], bias); ``hidden_states`` is normalised already."""
        output, bias = super().forward(hidden_states, *args, **kwargs)
        gate = self.gate_config
        if gate is None or gate.position != "dense":
            return output, bias
        if bias is not None:
            output, bias = output + bias, None
        logits = self.linear_gate(hidden_states)[0] if gate.input == "hidden" else None
        return gates.apply(gate, output, self._score(gate, logits, output)), bias


def _widened(
    linear_qkv: Callable[..., nn.Module], config: TransformerConfig, gate: GateConfig, num_gate_rows: int
) -> Callable[..., nn.Module]:
    """The spec's QKV projection, with the gate's rows inside each query group's block."""
    query_rows = config.num_attention_heads // config.num_query_groups * config.kv_channels
    group_rows = query_rows + num_gate_rows + 2 * config.kv_channels

    def build(
        input_size: int,
        output_size: int,
        *,
        init_method: Callable[[Tensor], Any],
        **kwargs: Any,
    ) -> nn.Module:
        def initialise(weight: Tensor) -> None:
            init_method(weight)
            if gate.init == "zero":
                with torch.no_grad():
                    gates.zero_gate_rows(weight, group_rows, query_rows, num_gate_rows)

        widened_size = output_size + num_gate_rows * config.num_query_groups
        return linear_qkv(input_size, widened_size, init_method=initialise, **kwargs)

    return build
