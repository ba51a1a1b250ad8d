"""Transformer Engine's grouped experts with the initial weights of Megatron's experts, one after the other."""

from __future__ import annotations

import copy
from typing import Any

import torch
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.tensor_parallel.layers import _initialize_affine_weight_cpu
from megatron.core.transformer.mlp import MLPSubmodules
from megatron.core.transformer.moe.experts import TEGroupedMLP
from megatron.core.transformer.transformer_config import TransformerConfig


class DrawnGroupedExperts(TEGroupedMLP):  # type: ignore[misc]
    """One grouped product for all of a rank's experts, each drawn as if the experts were modules of their own.

    Transformer Engine would draw all first matrices and then all second ones, each rank its own: the same trial would
    start elsewhere on another back end or another layout.
    """

    def __init__(
        self,
        num_local_experts: int,
        config: TransformerConfig,
        submodules: MLPSubmodules,
        pg_collection: ProcessGroupCollection | None = None,
        **more: Any,
    ) -> None:
        assert pg_collection is not None
        undrawn = copy.copy(config)
        undrawn.perform_initialization = False
        super().__init__(num_local_experts, undrawn, submodules, pg_collection, **more)
        self.config = config
        first = pg_collection.ep.rank() * num_local_experts
        for expert in range(pg_collection.ep.size() * num_local_experts):
            self._draw(expert - first if first <= expert < first + num_local_experts else None, pg_collection)

    def _draw(self, local: int | None, pg_collection: ProcessGroupCollection) -> None:
        """Draw the matrices of one expert; those of another rank's (None) are thrown away."""
        config, tensor = self.config, pg_collection.expt_tp
        width, hidden = config.moe_ffn_hidden_size, config.hidden_size
        matrices = (
            (self.linear_fc1, config.init_method, (2 * width, hidden), 0, 2),  # [gate | up], each cut by itself
            (self.linear_fc2, config.output_layer_init_method, (hidden, width), 1, 1),
        )
        for linear, init_method, shape, cut, stride in matrices:
            if local is None:
                init_method(torch.empty(shape))
                continue
            weight = getattr(linear, f"weight{local}")
            _initialize_affine_weight_cpu(
                weight,
                *shape,
                shape[cut] // tensor.size(),
                cut,
                init_method,
                stride=stride,
                params_dtype=config.params_dtype,
                rank=tensor.rank(),
                world_size=tensor.size(),
                # Unmarked where Megatron hides the cut from Transformer Engine: norms and counts would miss a part.
                skip_set_tensor_parallel_attributes=hasattr(weight, "tensor_model_parallel"),
            )
