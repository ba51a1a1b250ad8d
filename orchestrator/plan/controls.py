"""Controls that are sized: the baseline, made larger by what the dearest gates of its cell add.

One that is no worse than the gated arms says that their gain may be one of parameters. Each grows one key only. Sizes
come in steps (of heads, of experts, of what the layout cuts evenly), so that the added parameters are equal as nearly
as a step allows, and ``plan`` shows what is left over.
"""

from __future__ import annotations

import math
from collections.abc import Iterable

from models.accounting import default_ffn_multiple, gate_parameters, parameters
from models.config import ModelConfig, TrialConfig
from orchestrator.sweep import ResourcesConfig

SIZED_KEYS = {
    "wider-ffn": "model.ffn_size",
    "more-kv-heads": "model.num_kv_heads",
    "more-query-heads": "model.num_query_heads",
    "more-experts": "model.moe.num_experts",
}
"""What each of them changes. Of more experts a token still goes through as many as before."""

MOST_OFF = 2.0
"""A control that adds over twice as much as the gates, or under half of it, controls for something else."""


def gates_add(configs: Iterable[TrialConfig]) -> int:
    """Parameters of the dearest gates among the configs of a cell; 0 without gates."""
    return max((one.model.num_layers * gate_parameters(one.model, one.gates) for one in configs), default=0)


def sized(config: TrialConfig, control: str, added: int, resources: ResourcesConfig) -> TrialConfig:
    """``config`` (the baseline's) with nearest to ``added`` parameters more; ValueError when no size comes near."""
    if not added:
        raise ValueError("no arm of this cell has gates with parameters of their own, so there is nothing to equal")
    candidates = {size: _with(config.model, control, size) for size in _sizes(config, control, added, resources)}
    off = {size: _added(config, model) for size, model in candidates.items()}
    key = SIZED_KEYS[control]
    if not off:
        raise ValueError(f"the layout and the heads allow no larger {key}")
    size = min(off, key=lambda one: abs(off[one] - added))
    if not 1 / MOST_OFF <= off[size] / added <= MOST_OFF:
        raise ValueError(
            f"the gates add {added:,} parameters; the nearest larger {key}, {size:,}, adds {off[size]:,}; allowed: "
            f"at least half and at most twice as many"
        )
    return config.model_copy(update={"model": candidates[size]})


def _sizes(config: TrialConfig, control: str, added: int, resources: ResourcesConfig) -> Iterable[int]:
    """Larger ones that the model and the layout allow, the nearest to ``added`` parameters among them."""
    model, layout = config.model, resources.layout
    if control == "more-kv-heads":
        more = range(model.num_kv_heads + 1, model.num_query_heads + 1)
        return [heads for heads in more if model.num_query_heads % heads == 0 and heads % layout.tensor == 0]
    if control == "wider-ffn":
        rows = layout.tensor * (config.fp8.multiple if config.fp8 is not None else 1)
        now, step = model.ffn_size, math.lcm(default_ffn_multiple(model), rows)
    elif control == "more-query-heads":
        now, step = model.num_query_heads, math.lcm(model.num_kv_heads, layout.tensor)
    elif model.moe is None:
        raise ValueError("the model has no experts")
    else:
        now, step = model.moe.num_experts, layout.expert
    first = (now // step + 1) * step
    each = _added(config, _with(model, control, first + step)) - _added(config, _with(model, control, first))
    steps = max(0, (added - _added(config, _with(model, control, first))) // each)
    return [first + steps * step, first + (steps + 1) * step]


def _with(model: ModelConfig, control: str, size: int) -> ModelConfig:
    name = SIZED_KEYS[control].rpartition(".")[2]
    if control == "more-experts":
        assert model.moe is not None
        return model.model_copy(update={"moe": model.moe.model_copy(update={name: size})})
    return model.model_copy(update={name: size})


def _added(config: TrialConfig, model: ModelConfig) -> int:
    """Parameters of ``model`` beyond the config's own; embeddings are the same in both."""
    return parameters(model, (), 0) - parameters(config.model, (), 0)
