"""Which back ends and precisions a cell can have on the sweep's resources, as far as can be known without a GPU."""

from __future__ import annotations

from collections.abc import Iterator

from models.config import FP8Config, TrialConfig
from orchestrator.sweep import ResourcesConfig


def backend_refusals(config: TrialConfig, resources: ResourcesConfig) -> Iterator[str]:
    """Why precision or back end cannot be had."""
    if resources.backend == "transformer_engine" and resources.gpus == 0:
        yield "resources.backend transformer_engine needs GPUs (resources.gpus is 0); a CPU takes local"
    if config.precision != "fp32" and resources.gpus == 0:
        yield f"precision {config.precision} needs GPUs (resources.gpus is 0); a CPU takes fp32"
    if config.fp8 is not None:
        if resources.backend == "local":
            yield "precision fp8 needs Transformer Engine; allowed: resources.backend auto or transformer_engine"
        yield from _shape_refusals(config, config.fp8, resources)


def _shape_refusals(config: TrialConfig, fp8: FP8Config, resources: ResourcesConfig) -> Iterator[str]:
    """Dimensions of matrix products, on one rank, that are no multiple of what the recipe asks for.

    Not among them are the rows of queries, gates, keys and values, which are filled up with zeros, and the tokens of an
    expert, which Transformer Engine fills up.
    """
    model, layout = config.model, resources.layout
    micro = resources.micro_batch_sequences or config.batch_sequences // layout.data
    ffn_ranks = layout.tensor if model.moe is None else layout.expert_tensor
    sizes = {
        "model.hidden_size": model.hidden_size,
        "model.num_query_heads x head_dim / layout.tensor": model.num_query_heads * model.head_dim // layout.tensor,
        "a rank's share of model.ffn_size": model.ffn_size // ffn_ranks,
        "the tokens of a micro-batch on a rank": micro * config.data.sequence_length,
    }
    for name, size in sizes.items():
        if size % fp8.multiple:
            yield f"precision fp8, recipe {fp8.recipe}: {name} is {size:,}, no multiple of {fp8.multiple}"
