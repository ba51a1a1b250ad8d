"""Expert parallelism whose initial weights are those of one rank."""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.transformer.mlp import MLP, MLPSubmodules
from megatron.core.transformer.moe.experts import SequentialMLP
from megatron.core.transformer.transformer_config import TransformerConfig


class DrawnExperts(SequentialMLP):  # type: ignore[misc]
    """Megatron's experts, one after the other, drawn as if this rank held them all.

    Experts of other ranks are built and dropped, so that every rank takes the same random numbers in the same order.
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
        rank, num_ranks = pg_collection.ep.rank(), pg_collection.ep.size()

        def drop(num_experts: int) -> None:
            for _ in range(num_experts):
                width = config.moe_ffn_hidden_size
                MLP(config, submodules, ffn_hidden_size=width, is_expert=True, tp_group=pg_collection.expt_tp)

        drop(rank * num_local_experts)
        super().__init__(num_local_experts, config, submodules, pg_collection, **more)
        drop((num_ranks - 1 - rank) * num_local_experts)


def with_experts(moe: Any, kind: type) -> Any:
    """The MoE layer's spec with experts of this class. Later versions of Megatron have partial calls for specs."""
    if not isinstance(moe, functools.partial):
        experts = dataclasses.replace(moe.submodules.experts, module=kind)
        return dataclasses.replace(moe, submodules=dataclasses.replace(moe.submodules, experts=experts))
    submodules = moe.keywords["submodules"]
    drawn = functools.partial(kind, **submodules.experts.keywords)
    return functools.partial(moe.func, **{**moe.keywords, "submodules": dataclasses.replace(submodules, experts=drawn)})
