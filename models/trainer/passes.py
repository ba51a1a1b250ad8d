"""Micro-batches through this rank's chunks, forward and backward, by Megatron's schedule for the layout."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from megatron.core.pipeline_parallel import get_forward_backward_func
from megatron.core.utils import get_attr_wrapped_model

from models import device as devices
from models.core_attention import document_mask
from models.corpus import Batch


def token_losses(chunk: torch.nn.Module, batch: Batch) -> torch.Tensor:
    """Cross-entropy in nats of every target, [B, S]; of a chunk in front of the last one, what it hands on.

    Without separate documents the mask is None: Megatron's attention is causal by itself.
    """
    separate = batch.get("document_ids")
    with devices.as_it_is():
        output: torch.Tensor = chunk(
            input_ids=batch.get("tokens"),
            position_ids=batch.get("position_ids"),
            attention_mask=None if separate is None else document_mask(separate),
            labels=batch.get("labels"),
        )
    return output


def run(
    chunks: Sequence[torch.nn.Module],
    batches: Callable[[], Iterator[Batch]],
    loss: Callable[[torch.Tensor, Batch], torch.Tensor],
    *,
    num_micro_batches: int,
    micro_batch_sequences: int,
    sequence_length: int,
    forward_only: bool = False,
    separate_documents: bool = False,
) -> list[torch.Tensor]:
    """``loss`` of every micro-batch in order; empty but on the last pipeline stage.

    ``loss`` makes token losses [B, S] one number. Each chunk that takes tokens or labels has its own ``batches()``;
    with separate documents every chunk has, as its attention must know where they begin.
    """

    def forward_step(own_batches: Iterator[Batch], chunk: torch.nn.Module) -> tuple[torch.Tensor, Any]:
        ends = (get_attr_wrapped_model(chunk, "pre_process"), get_attr_wrapped_model(chunk, "post_process"))
        batch = next(own_batches) if any(ends) or separate_documents else {}

        def reduced(losses: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
            value = loss(losses, batch)
            # A copy: Megatron divides the loss by the number of micro-batches in place.
            return value, value.detach().clone()

        return token_losses(chunk, batch), reduced

    iterators = [batches() for _ in chunks]
    losses: list[torch.Tensor] = get_forward_backward_func()(
        forward_step_func=forward_step,
        data_iterator=iterators if len(chunks) > 1 else iterators[0],
        model=list(chunks),
        num_microbatches=num_micro_batches,
        seq_length=sequence_length,
        micro_batch_size=micro_batch_sequences,
        forward_only=forward_only,
    )
    return losses


def mean_loss(losses: torch.Tensor, batch: Batch) -> torch.Tensor:
    """What training minimises: the mean over the targets that count."""
    return (losses.float() * batch["loss_mask"]).sum() / batch["loss_mask"].sum()


def sum_loss(losses: torch.Tensor, batch: Batch) -> torch.Tensor:
    """What an evaluation adds up. float64: the sum over a large split must not lose what tells two arms apart."""
    return (losses.double() * batch["loss_mask"]).sum()
