"""The built GPTModel: the one place where a model is constructed. Megatron's parallel state must be up before."""

from __future__ import annotations

import torch
from megatron.core import parallel_state
from megatron.core.models.gpt import GPTModel
from megatron.core.transformer.moe.moe_utils import get_moe_layer_wise_logging_tracker
from torch import nn

from models.config import Layout, TrialConfig
from models.layer_specs.local import layer_spec
from models.layer_specs.settings import transformer_config


def build_model(trial: TrialConfig, layout: Layout, device: str) -> GPTModel:
    """This rank's part of the model, on ``device``, its weights drawn from torch's current seed."""
    config = transformer_config(trial.model, trial.precision, layout, device)
    # Megatron sums router losses by layer in a process-wide table, which a warm gang's next model may not fit.
    get_moe_layer_wise_logging_tracker().clear()
    model = GPTModel(
        config=config,
        transformer_layer_spec=layer_spec(trial.model, trial.gates),
        vocab_size=trial.data.vocab_size,
        max_sequence_length=trial.data.sequence_length,
        pre_process=parallel_state.is_pipeline_first_stage(),
        post_process=parallel_state.is_pipeline_last_stage(),
        parallel_output=True,
        share_embeddings_and_output_weights=trial.model.tied_embeddings,
        position_embedding_type="rope",
        rotary_base=trial.model.rope_base,
    )
    return model.to(device) if device == "cuda" else model


def num_parameters(model: nn.Module) -> int:
    """Parameters of the whole model, counted once each over tensor- and pipeline-parallel ranks."""
    from megatron.core.tensor_parallel import param_is_not_tensor_parallel_duplicate

    own = sum(
        parameter.numel()
        for parameter in model.parameters()
        if param_is_not_tensor_parallel_duplicate(parameter) and not getattr(parameter, "shared", False)
    )
    total = torch.tensor([own], dtype=torch.int64, device=next(model.parameters()).device)
    torch.distributed.all_reduce(total, group=parallel_state.get_model_parallel_group())
    return int(total.item())
