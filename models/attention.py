"""Megatron's self-attention with gates at up to five places, SwitchHead, and non-linearities without a gate.

The gates' logits come out of the fused QKV projection: each query group's block is widened to
[queries | gate rows, one block a gate | key | value], with SwitchHead to [... | router | keys | values], so that tensor
parallelism shards whole groups and one matrix multiply serves all. A gate on the output projection (``dense``) has a
projection of its own: its width is the model's.

Shapes: S sequence, B batch, G query groups, H heads, D head dimension, all per tensor-parallel rank. Logits are
[S, B, heads, D or 1], or [S, B, G, heads a group, D or 1] as they come out of the projection.
"""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import torch
from megatron.core.tensor_parallel import ColumnParallelLinear
from megatron.core.tensor_parallel.layers import set_tensor_model_parallel_attributes
from megatron.core.tensor_parallel.mappings import all_to_all_hp2sp
from megatron.core.transformer.attention import SelfAttention, SelfAttentionSubmodules
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.core.transformer.utils import make_sharded_tensors_for_checkpoint
from torch import Tensor, nn
from torch.distributed.nn.functional import all_reduce
from torch.nn import functional

from models import gates, kernels
from models import switch_head as experts
from models.config import GateConfig, SwitchHeadConfig
from models.norms import mark_sequence_parallel

Logits = dict[str, Tensor]


class GatedSelfAttention(SelfAttention):  # type: ignore[misc]
    """SelfAttention with ``gate_configs``, one a position, ``sdpa_output`` (``group_norm``, ``silu``) and SwitchHead.

    With none it is Megatron's own, unchanged. A group's block has a multiple of ``row_multiple`` rows, which FP8
    asks for: rows of zeros at its end fill it up. They are read by nobody, so their gradient is zero and they stay
    zero; they are in checkpoints, and no count of parameters has them.
    """

    def __init__(
        self,
        config: TransformerConfig,
        submodules: SelfAttentionSubmodules,
        layer_number: int,
        gate_configs: Sequence[GateConfig] = (),
        sdpa_output: str | None = None,
        row_multiple: int = 1,
        switch_head: SwitchHeadConfig | None = None,
        **kwargs: Any,
    ) -> None:
        queries_per_group = config.num_attention_heads // config.num_query_groups
        rows: dict[str, int] = {
            gate.position: gates.gate_rows_per_group(gate, queries_per_group, config.kv_channels)
            for gate in gate_configs
        }
        kv_rows = experts.rows_per_group(switch_head, config.kv_channels)
        expert_rows = sum(kv_rows) - 2 * config.kv_channels
        pad_rows = -(queries_per_group * config.kv_channels + sum(rows.values()) + sum(kv_rows)) % row_multiple
        if any(rows.values()) or expert_rows or pad_rows:
            widened = _widened(submodules.linear_qkv, config, gate_configs, rows, expert_rows, pad_rows)
            submodules = dataclasses.replace(submodules, linear_qkv=widened)
        super().__init__(config, submodules, layer_number, **kwargs)
        self.pad_rows = pad_rows
        self.gate_configs: dict[str, GateConfig] = {gate.position: gate for gate in gate_configs}
        self.gate_rows = {position: number for position, number in rows.items() if number}
        self.sdpa_output = sdpa_output
        self.score_tap: Callable[[str, Tensor], None] | None = None
        """Shown every gate's position and scores [S, B, heads, D or 1] while it is set, at the price of the kernel."""
        self.switch_head, self.kv_rows = switch_head, kv_rows
        self._queries_per_group = queries_per_group
        dense = self.gate_configs.get("dense")
        if dense is not None and dense.input == "hidden":
            self.linear_gate = self._gate_projection(dense)
        self.gate_parameters = nn.ParameterDict(
            {gate.position: self._gate_parameter(gate) for gate in gate_configs if gate.input == "none"}
        )
        if sdpa_output == "group_norm":
            self.sdpa_norm_weight = self._per_head(torch.ones, self.num_attention_heads_per_partition)
        if "sdpa" in self.gate_configs or sdpa_output is not None:
            # Megatron's forward hands a fourth tensor to _apply_output_gate when this is set. Set on this
            # module's own copy and only now, or the base class would widen the projection by itself.
            self.config = copy.copy(config)
            self.config.attention_output_gate = True

    @property
    def num_pad_parameters(self) -> int:
        """Zeros that this rank's projection carries and that are no parameters of the model."""
        number: int = self.pad_rows * self.num_query_groups_per_partition * self.config.hidden_size
        return number

    # -- construction ---------------------------------------------------------------------------------------

    def _gate_projection(self, gate: GateConfig) -> nn.Module:
        linear: nn.Module = ColumnParallelLinear(
            self.config.hidden_size,
            self.config.hidden_size,
            config=self.config,
            init_method=nn.init.zeros_ if gate.init == "zero" else self.config.init_method,
            # Under sequence parallelism the columns are exchanged for parts of the sequence: see ``forward``.
            gather_output=not self.config.sequence_parallel,
            bias=False,
            skip_bias_add=False,
            is_expert=False,
            tp_group=self.pg_collection.tp,
        )
        return linear

    def _gate_parameter(self, gate: GateConfig) -> nn.Parameter:
        """Zero-initialised logits of an input-independent gate: [H, D or 1], or [hidden] at ``dense``."""
        if gate.position == "dense":
            parameter = nn.Parameter(torch.zeros(self.config.hidden_size, **self._where()))
            mark_sequence_parallel(parameter, self.config.sequence_parallel)
            return parameter
        on_queries = gate.position in ("sdpa", "query")
        num_heads = self.num_attention_heads_per_partition if on_queries else self.num_query_groups_per_partition
        return self._per_head(torch.zeros, num_heads, None if gate.granularity == "elementwise" else 1)

    def _per_head(self, fill: Callable[..., Tensor], num_heads: int, width: int | None = None) -> nn.Parameter:
        """A parameter [heads, D or ``width``], its heads sharded over tensor-parallel ranks."""
        parameter = nn.Parameter(fill(num_heads, width or self.config.kv_channels, **self._where()))
        set_tensor_model_parallel_attributes(parameter, is_parallel=True, dim=0, stride=1)
        return parameter

    def _where(self) -> dict[str, Any]:
        device = "cpu" if self.config.use_cpu_initialization else torch.cuda.current_device()
        return {"dtype": self.config.params_dtype, "device": device}

    def sharded_state_dict(
        self, prefix: str = "", sharded_offsets: tuple[Any, ...] = (), metadata: dict[str, Any] | None = None
    ) -> dict[str, Any]:
        """Megatron's, with the parameters that have a row a head sharded over tensor-parallel ranks."""
        state: dict[str, Any] = super().sharded_state_dict(prefix, sharded_offsets, metadata)
        per_head = {
            f"gate_parameters.{position}": parameter
            for position, parameter in self.gate_parameters.items()
            if position != "dense"
        }
        if self.sdpa_output == "group_norm":
            per_head["sdpa_norm_weight"] = self.sdpa_norm_weight
        sharded: dict[str, Any] = make_sharded_tensors_for_checkpoint(
            per_head,
            prefix,
            dict.fromkeys(per_head, 0),
            sharded_offsets,
            tp_group=self.pg_collection.tp,
            dp_cp_group=metadata["dp_cp_group"] if metadata else None,
        )
        return state | sharded

    # -- the forward pass, in its order ---------------------------------------------------------------------

    def get_query_key_value_tensors(
        self,
        hidden_states: Tensor,
        key_value_states: Tensor | None = None,
        output_gate: bool = False,
        split_qkv: bool = True,
    ) -> Any:
        """Query [S, B, H, D], key and value [S, B, G, D]; with ``output_gate`` also the logits of the output gate."""
        is_plain = self.gate_configs.keys() <= {"dense"} and self.switch_head is None and not self.pad_rows
        if is_plain and not output_gate:
            return super().get_query_key_value_tensors(hidden_states, key_value_states, output_gate, split_qkv)
        query, logits, key, value = self._project(hidden_states)
        value = self._gate_at("value", value, logits)
        query = self._gate_at("query", query, logits, "before_norm")
        key = self._gate_at("key", key, logits, "before_norm")
        query = query if self.q_layernorm is None else self.q_layernorm(query)
        key = key if self.k_layernorm is None else self.k_layernorm(key)
        query = self._gate_at("query", query, logits, "after_norm")
        key = self._gate_at("key", key, logits, "after_norm")
        if not output_gate:
            return query, key, value
        # Never None, though a gate may have no logits: Megatron's forward would leave out _apply_output_gate.
        return query, key, value, logits.get("sdpa", query)

    def _project(self, hidden_states: Tensor) -> tuple[Tensor, Logits, Tensor, Tensor]:
        """One matrix multiply: query [S, B, H, D], each gate's logits, key, value [S, B, G, D]."""
        mixed, _ = self.linear_qkv(hidden_states)
        head_dim = self.hidden_size_per_attention_head
        mixed = mixed.view(*mixed.shape[:2], self.num_query_groups_per_partition, -1)
        rows = [self._queries_per_group * head_dim, *self.gate_rows.values(), *self.kv_rows, self.pad_rows]
        query, *gate_blocks, router, key, value, _ = torch.split(mixed, rows, dim=3)
        logits = {}
        for position, block in zip(self.gate_rows, gate_blocks, strict=True):
            width = head_dim if self.gate_configs[position].granularity == "elementwise" else 1
            logits[position] = block.view(*block.shape[:3], -1, width)
        if self.switch_head is not None:
            value = experts.mixed(self.switch_head, router, value)
            if self.switch_head.projections == "key_value":
                key = experts.mixed(self.switch_head, router, key)
        return query.reshape(*query.shape[:2], -1, head_dim), logits, key, value

    def _gate_at(self, position: str, signal: Tensor, logits: Logits, qk_order: str | None = None) -> Tensor:
        """The signal, gated if there is a gate at this place (for key and query: on this side of the norm)."""
        gate = self.gate_configs.get(position)
        if gate is None or (qk_order is not None and gate.qk_order != qk_order):
            return signal
        return self._gated(gate, signal, logits.get(position))

    def _gated(self, gate: GateConfig, signal: Tensor, logits: Tensor | None) -> Tensor:
        """The fused kernel where it serves (CUDA), else the plain torch form."""
        if gate.input == "constant":
            return gates.apply(gate, signal, signal.new_full((), gate.scale))
        if gate.input == "none":
            parameter = self.gate_parameters[gate.position]
            logits = parameter.expand(*signal.shape[:2], *parameter.shape)
        assert logits is not None
        if self.score_tap is None and kernels.supports(gate, signal, logits):
            return kernels.gated(gate, signal, logits)
        logits = logits.flatten(2, 3) if logits.dim() == 5 else logits
        scores = gates.scores(gate, logits, self._mean_over_heads)
        if self.score_tap is not None:
            self.score_tap(gate.position, scores)
        return gates.apply(gate, signal, scores)

    def _apply_output_gate(self, x: Tensor, gate: Tensor) -> Tensor:
        """What is done to the SDPA output ``x`` [S, B, H*D]: its non-linearity, then its gate from logits ``gate``."""
        signal_SBHD = x.view(*x.shape[:2], -1, self.hidden_size_per_attention_head)
        if self.sdpa_output == "group_norm":
            normed = functional.rms_norm(signal_SBHD, signal_SBHD.shape[-1:], eps=self.config.layernorm_epsilon)
            signal_SBHD = normed * self.sdpa_norm_weight
        elif self.sdpa_output == "silu":
            signal_SBHD = functional.silu(signal_SBHD)
        return self._gate_at("sdpa", signal_SBHD, {"sdpa": gate}).reshape_as(x)

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
        """[S, B, hidden] to ([S, B, hidden], bias); ``hidden_states`` is normalised already.

        Under sequence parallelism S is the rank's part of the sequence, here and at a gate on the output.
        """
        output, bias = super().forward(hidden_states, *args, **kwargs)
        gate = self.gate_configs.get("dense")
        if gate is None:
            return output, bias
        if bias is not None:
            output, bias = output + bias, None
        logits = self.linear_gate(hidden_states)[0] if gate.input == "hidden" else None
        if logits is not None and self.config.sequence_parallel:
            logits = all_to_all_hp2sp(logits, group=self.pg_collection.tp).view_as(output)
        return self._gated(gate, output, logits), bias


def _widened(
    linear_qkv: Callable[..., nn.Module],
    config: TransformerConfig,
    gate_configs: Sequence[GateConfig],
    gate_rows: dict[str, int],
    expert_rows: int,
    pad_rows: int,
) -> Callable[..., nn.Module]:
    """The spec's QKV projection, with the rows of gates, experts and padding inside each query group's block."""
    query_rows = config.num_attention_heads // config.num_query_groups * config.kv_channels
    added_rows = sum(gate_rows.values()) + expert_rows + pad_rows
    group_rows = query_rows + added_rows + 2 * config.kv_channels

    def build(
        input_size: int,
        output_size: int,
        *,
        init_method: Callable[[Tensor], Any],
        **kwargs: Any,
    ) -> nn.Module:
        def initialise(weight: Tensor) -> None:
            init_method(weight)
            start = query_rows
            with torch.no_grad():
                for gate in gate_configs:
                    if gate.init == "zero":
                        gates.zero_gate_rows(weight, group_rows, start, gate_rows[gate.position])
                    start += gate_rows[gate.position]
                gates.zero_gate_rows(weight, group_rows, group_rows - pad_rows, pad_rows)

        widened_size = output_size + added_rows * config.num_query_groups
        return linear_qkv(input_size, widened_size, init_method=initialise, **kwargs)

    return build
