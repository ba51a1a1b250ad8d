"""Why a config that is right cannot run on a layout: what Megatron would raise in the ranks, told before they start.

Each rule is told with what was got and, where that is not plain, what is allowed.
"""

from __future__ import annotations

from collections.abc import Iterator

from models import plugins
from models.config import TrialConfig
from orchestrator.plan.backend import backend_refusals
from orchestrator.sweep import ResourcesConfig


def refusals(config: TrialConfig, resources: ResourcesConfig) -> list[str]:
    """Why this version cannot run the config with these resources; empty when it can."""
    rules = (
        _tensor,
        _sequence,
        _pipeline,
        _expert,
        _context,
        _documents,
        _batch,
        _one_node,
        backend_refusals,
        _plugins,
    )
    return [reason for rule in rules for reason in rule(config, resources)]


def _tensor(config: TrialConfig, resources: ResourcesConfig) -> Iterator[str]:
    layout, model = resources.layout, config.model
    sizes = {
        "model.num_query_heads": model.num_query_heads,
        "model.num_kv_heads": model.num_kv_heads,
        "model.ffn_size": model.ffn_size if model.moe is None or layout.expert_tensor > 1 else 0,
        "vocabulary": config.data.vocab_size,
    }
    for name, size in sizes.items():
        if size % layout.tensor:
            yield f"{name} {size:,} is not divisible by layout.tensor {layout.tensor}"
    if model.moe is not None and layout.tensor > 1 and not layout.sequence_parallel:
        yield (
            f"model.moe with layout.tensor {layout.tensor}: Megatron trains experts over tensor ranks only with "
            "layout.sequence_parallel true"
        )


def _sequence(config: TrialConfig, resources: ResourcesConfig) -> Iterator[str]:
    layout, length = resources.layout, config.data.sequence_length
    if not layout.sequence_parallel:
        return
    if layout.tensor == 1:
        yield "layout.sequence_parallel spreads the sequence over tensor ranks, and layout.tensor is 1"
    elif length % layout.tensor:
        yield (
            f"layout.sequence_parallel: data.sequence_length {length:,} is not divisible by layout.tensor "
            f"{layout.tensor}"
        )


def _pipeline(config: TrialConfig, resources: ResourcesConfig) -> Iterator[str]:
    layout, num_layers = resources.layout, config.model.num_layers
    chunks = layout.pipeline * layout.virtual_pipeline
    if num_layers % chunks:
        said = f"layout.pipeline {layout.pipeline}"
        said += f" x layout.virtual_pipeline {layout.virtual_pipeline}" if layout.virtual_pipeline > 1 else ""
        yield f"model.num_layers {num_layers} is not divisible by {said}"
    if layout.virtual_pipeline == 1:
        return
    if layout.pipeline == 1:
        yield f"layout.virtual_pipeline {layout.virtual_pipeline} interleaves pipeline stages, and layout.pipeline is 1"
    elif (number := _num_micro_batches(config, resources)) % layout.pipeline:
        yield (
            f"layout.virtual_pipeline {layout.virtual_pipeline}: a rank's {number} micro-batch(es) a step are not a "
            f"multiple of layout.pipeline {layout.pipeline}; set resources.micro_batch_sequences"
        )


def _num_micro_batches(config: TrialConfig, resources: ResourcesConfig) -> int:
    """The most that there can be: a micro-batch that is not given is chosen to fit the schedule."""
    return config.batch_sequences // resources.layout.data // (resources.micro_batch_sequences or 1)


def _expert(config: TrialConfig, resources: ResourcesConfig) -> Iterator[str]:
    layout, moe = resources.layout, config.model.moe
    if layout.expert == 1:
        return
    if moe is None:
        yield f"layout.expert {layout.expert} deals out experts, and there is no model.moe"
    elif moe.num_experts % layout.expert:
        yield f"model.moe.num_experts {moe.num_experts} is not divisible by layout.expert {layout.expert}"
    ranks = layout.tensor * layout.context * layout.data
    if ranks % layout.expert:
        yield (
            f"layout.expert {layout.expert} does not divide the {ranks} rank(s) of layout.tensor x context x data over "
            f"which experts are dealt out; allowed for instance: layout.data {layout.expert}"
        )


def _context(config: TrialConfig, resources: ResourcesConfig) -> Iterator[str]:
    if (ranks := resources.layout.context) > 1:
        yield (
            f"layout.context {ranks}: not in this version. Of Megatron's core attentions only Transformer Engine's "
            "sees past its rank's part of a sequence; allowed: 1"
        )


def _documents(config: TrialConfig, resources: ResourcesConfig) -> Iterator[str]:
    if config.data.separate_documents and resources.layout.context > 1:
        yield (
            f"data.separate_documents with layout.context {resources.layout.context}: a rank that holds a part of the "
            "sequence does not see where its documents begin; allowed: layout.context 1"
        )
    if config.data.separate_documents and resources.backend == "transformer_engine":
        yield (
            "data.separate_documents with resources.backend transformer_engine: its causal attention takes no mask of "
            "ours; allowed: local, or auto, which then takes local"
        )
    if config.data.separate_documents and config.precision == "fp8":
        yield "data.separate_documents with precision fp8, which needs Transformer Engine; allowed: bf16"


def _batch(config: TrialConfig, resources: ResourcesConfig) -> Iterator[str]:
    sequences, micro, data = config.batch_sequences, resources.micro_batch_sequences, resources.layout.data
    batch = f"a batch of {sequences:,} sequences ({config.train.batch_tokens:,} tokens)"
    if sequences % data:
        yield f"{batch} is not divisible by layout.data {data}"
    elif micro is not None and sequences % (micro * data):
        yield f"{batch} is not divisible by micro_batch_sequences {micro} x layout.data {data}"


def _one_node(_config: TrialConfig, resources: ResourcesConfig) -> Iterator[str]:
    """Tensor ranks share a bundle of Ray's, which deals out parts of one GPU, or whole ones."""
    ranks, gpus = resources.layout.tensor, resources.gpus
    if ranks > 1 and gpus * ranks > 1 and not float(gpus).is_integer():
        yield (
            f"layout.tensor {ranks} with resources.gpus {gpus:g}: they share {gpus * ranks:g} GPUs of one node; "
            "allowed: whole GPUs a rank, or all ranks on one GPU"
        )


def _plugins(config: TrialConfig, resources: ResourcesConfig) -> Iterator[str]:
    for name, plugin, options in plugins.of(config.model):
        for reason in plugin.refusals(config.model, options, resources.layout):
            yield f"plug-in {name}: {reason}"
