"""What a checkpoint holds, as Megatron's sharded tensors, which know their place in the whole model; and back."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from megatron.core import parallel_state
from megatron.core.dist_checkpointing.utils import extract_sharded_base
from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer
from megatron.core.transformer.transformer_config import TransformerConfig

from models import device

_SHARDING = "fully_reshardable"
"""The only form of Megatron's distributed optimizer that every layout can load, and the plain optimizer too."""
_METADATA = {"distrib_optim_sharding_type": _SHARDING, "chained_optim_avoid_prefix": True}
"""Names of tensors that do not tell the layout that wrote them."""


def sharding_metadata() -> dict[str, Any]:
    return {**_METADATA, "dp_cp_group": parallel_state.get_data_parallel_group(with_context_parallel=True)}


def state_of(chunks: Sequence[Any], optimizer: Any, *, is_loading: bool) -> dict[str, Any]:
    """Weights and moments as Megatron's sharded tensors, which know their place in the whole model.

    Nothing else of the optimizer: its groups follow from the trial, its number of updates is the step, and both look
    different on other layouts.
    """
    metadata = sharding_metadata()
    with device.as_it_is():
        model = {
            f"model{i}": without_extra_state(chunk.module.sharded_state_dict(metadata=metadata), chunk.config)
            for i, chunk in enumerate(chunks)
        }
    for part in optimizer.chained_optimizers:
        if isinstance(part, DistributedOptimizer):
            _start_moments(part)
    moments, _ = extract_sharded_base(optimizer.sharded_state_dict(model, is_loading=is_loading, metadata=metadata))
    for part, own in _by_part(optimizer, moments):
        if isinstance(part, DistributedOptimizer) and _weights_are_the_models(part):
            for tensors in own["param_state"].values():
                del tensors["param"]
    return {"model": model, "optimizer": moments}


def without_extra_state(state: dict[str, Any], config: TransformerConfig) -> dict[str, Any]:
    """What is learnt, and of Transformer Engine's extra state what the next step depends on: past maxima of FP8.

    Without the rest a checkpoint is the same whichever back end wrote it, and is read by either.
    """
    if config.fp8 is not None and config.fp8_recipe == "delayed":
        return state
    return {name: value for name, value in state.items() if "._extra_state" not in name}


def load_chunk(module: Any, restored: dict[str, Any]) -> None:
    """Extra state that was left out stays what it is."""
    own = {name: value for name, value in module.state_dict().items() if "._extra_state" in name}
    module.load_state_dict(own | restored)


def _by_part(optimizer: Any, moments: dict[Any, Any]) -> list[tuple[Any, dict[Any, Any]]]:
    """Megatron's optimizer is a chain: one of all parameters, and under expert parallelism a second of the experts'."""
    parts = optimizer.chained_optimizers
    # Before its first step a part has no moments, and is not in there.
    return [(part, moments if len(parts) == 1 else moments.get(number, {})) for number, part in enumerate(parts)]


def _start_moments(part: Any) -> None:
    """Megatron asks the inner optimizer for its step, and torch's AdamW has none before the first."""
    part.init_state_fn(part.optimizer, part.config)
    if isinstance(part.optimizer, torch.optim.Adam | torch.optim.AdamW):
        for state in part.optimizer.state.values():
            state.setdefault("step", torch.zeros(()))


def _weights_are_the_models(part: Any) -> bool:
    """In fp32 the optimizer moves the model's weights; with bf16 it has fp32 ones, which are saved beside them."""
    return not any(part.model_float16_groups)


def restore_moments(optimizer: Any, moments: dict[Any, Any], step: int) -> None:
    for part, own in _by_part(optimizer, moments):
        if isinstance(part, DistributedOptimizer):
            _restore_distributed(part, own["param_state"], step)
        else:
            state = {**own["state"], "common_step": torch.tensor(float(step))}
            part.load_state_dict({"state": state, "param_groups": part.state_dict()["param_groups"]})


@torch.no_grad()
def _restore_distributed(part: Any, param_state: dict[int, dict[str, Any]], step: int) -> None:
    """``param_state``: whole tensors by number of the parameter in Megatron's buffers; a rank takes its part."""
    if _weights_are_the_models(part):
        parameters = [parameter for buffer in part.buffers for parameter in buffer.param_index_map]
        for number, parameter in enumerate(parameters):
            param_state[number]["param"] = parameter.detach()
    groups = part.state_dict()["optimizer"]
    for group in groups["param_groups"]:
        group["step"] = step
    part.load_state_dict({"optimizer": groups})
    # Of torch's AdamW Megatron would look for a step among the tensors, and gives all parameters one step to count in.
    in_states = [state for state in part.optimizer.state.values() if state.pop("step", None) is not None]
    part.load_parameter_state_from_fully_reshardable(param_state)
    for state in in_states:
        state["step"] = torch.tensor(float(step))
