"""The built GPTModel: the one place where a model is constructed. Megatron's parallel state must be up before.

Initial weights do not depend on the layout. Every rank takes the random numbers of the whole model in the order of
one rank (embedding, layers, output), and builds and drops the layers that others hold in front of its own.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from megatron.core import parallel_state
from megatron.core.models.common.embeddings.language_model_embedding import LanguageModelEmbedding
from megatron.core.models.gpt import GPTModel
from megatron.core.transformer import ModuleSpec, TransformerConfig
from megatron.core.transformer.spec_utils import build_module
from megatron.core.transformer.transformer_block import TransformerBlockSubmodules, get_num_layers_to_build
from megatron.core.transformer.transformer_layer import get_transformer_layer_offset
from torch import nn

from models import plugins
from models.config import Layout, TrialConfig
from models.layer_specs import local, transformer_engine
from models.layer_specs.backend import Taken
from models.layer_specs.settings import transformer_config
from models.norms import RMSNorm
from models.swiglu import in_one_step


def build_chunks(trial: TrialConfig, layout: Layout, device: str, backend: Taken = "local") -> list[GPTModel]:
    """This rank's parts of the model, a chunk a virtual pipeline stage, drawn from torch's current seed."""
    config = transformer_config(trial, layout, device, backend)
    _forget_router_losses()
    layer, norm = _parts(trial, layout, backend)
    chunks: list[GPTModel] = []
    num_drawn = -1  # layers; -1: not even the embedding
    for stage in range(layout.virtual_pipeline):
        vp_stage = stage if layout.virtual_pipeline > 1 else None
        first_layer = get_transformer_layer_offset(config, vp_stage)
        if first_layer > 0:
            _drop(trial, config, layer, range(num_drawn, first_layer), vp_stage)
        chunk = _chunk(trial, config, layer, norm, vp_stage)
        num_drawn = first_layer + len(chunk.decoder.layers)
        if device == "cpu":
            in_one_step(chunk)
        chunks.append(chunk.to(device) if device == "cuda" else chunk)
    return chunks


def _forget_router_losses() -> None:
    """Megatron sums them by layer in a process-wide table, which a warm gang's next model may not fit."""
    try:
        from megatron.core.transformer.moe.moe_logging import destroy_moe_metrics_tracker
    except ImportError:  # up to 0.16
        from megatron.core.transformer.moe.moe_utils import get_moe_layer_wise_logging_tracker

        get_moe_layer_wise_logging_tracker().clear()
    else:
        destroy_moe_metrics_tracker()


def _parts(trial: TrialConfig, layout: Layout, backend: Taken) -> tuple[ModuleSpec, type]:
    """The layer's spec, and the module of the norm behind the last one."""
    on_sequence = layout.sequence_parallel
    norm: type
    if backend == "local":
        spec, norm = local.layer_spec(trial.model, trial.gates, sequence_parallel=on_sequence), RMSNorm
    else:
        spec = transformer_engine.layer_spec(trial.model, trial.gates, trial.fp8, sequence_parallel=on_sequence)
        norm = transformer_engine.norm()
    for _, plugin, options in plugins.of(trial.model):
        spec = plugin.layer_spec(spec, trial.model, options)
    return spec, norm


def build_model(trial: TrialConfig, layout: Layout, device: str, backend: Taken = "local") -> GPTModel:
    """This rank's only chunk, on a layout without virtual pipeline stages."""
    (model,) = build_chunks(trial, layout, device, backend)
    return model


def _drop(
    trial: TrialConfig, config: TransformerConfig, layer: ModuleSpec, layers: Iterable[int], vp_stage: int | None
) -> None:
    """Take the random numbers of the embedding (-1) and of layers (0-based) that another chunk holds."""
    offset = get_transformer_layer_offset(config, vp_stage)
    for number in layers:
        if number < 0:
            LanguageModelEmbedding(config, trial.data.vocab_size, trial.data.sequence_length, "rope")
        else:
            build_module(layer, config=config, layer_number=number + 1 - offset, vp_stage=vp_stage)


def _chunk(
    trial: TrialConfig, config: TransformerConfig, layer: ModuleSpec, norm: type, vp_stage: int | None
) -> GPTModel:
    num_layers = get_num_layers_to_build(config, vp_stage)
    return GPTModel(
        config=config,
        transformer_layer_spec=TransformerBlockSubmodules([layer] * num_layers, norm),
        vocab_size=trial.data.vocab_size,
        max_sequence_length=trial.data.sequence_length,
        pre_process=parallel_state.is_pipeline_first_stage(ignore_virtual=False, vp_stage=vp_stage),
        post_process=parallel_state.is_pipeline_last_stage(ignore_virtual=False, vp_stage=vp_stage),
        parallel_output=True,
        share_embeddings_and_output_weights=trial.model.tied_embeddings,
        position_embedding_type="rope",
        rotary_base=trial.model.rope_base,
        vp_stage=vp_stage,
    )


def num_parameters(chunks: Iterable[nn.Module] | nn.Module) -> int:
    """Parameters of the whole model, counted once each over tensor-, expert- and pipeline-parallel ranks."""
    from megatron.core.tensor_parallel import param_is_not_tensor_parallel_duplicate

    shared_out = experts = 0
    for chunk in [chunks] if isinstance(chunks, nn.Module) else chunks:
        for parameter in chunk.parameters():
            if not getattr(parameter, "allreduce", True):
                experts += parameter.numel()
            elif param_is_not_tensor_parallel_duplicate(parameter) and not getattr(parameter, "shared", False):
                shared_out += parameter.numel()
        shared_out -= sum(getattr(module, "num_pad_parameters", 0) for module in chunk.modules())
    groups = {
        parallel_state.get_model_parallel_group(): shared_out,
        # Experts that are dealt out: other ranks hold others, data-parallel ones among them.
        parallel_state.get_expert_tensor_model_pipeline_parallel_group(): experts,
    }
    total = 0
    for group, own in groups.items():
        number = torch.tensor([own], dtype=torch.int64, device=torch.cuda.current_device())
        torch.distributed.all_reduce(number, group=group)
        total += int(number.item())
    return total
