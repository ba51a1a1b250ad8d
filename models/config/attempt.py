"""Where and how an attempt runs, which changes no number but by rounding: no part of the fingerprint."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import BeforeValidator, Field

from models.config.base import Count, Frozen, evenly_spaced, integral

Backend = Literal["auto", "local", "transformer_engine"]
"""Whose modules a model is made of: Megatron's own, or Transformer Engine's; ``auto``: the latter on CUDA, if it can be
imported. Not part of the fingerprint: the two agree to rounding (bf16 and fp32; fp8 has only the one)."""


class Layout(Frozen):
    """How an attempt is spread over ranks, and what it computes twice to save memory. Not part of the fingerprint.

    Every layout gives the same numbers but for rounding. Ranks are ordered tensor, context, data, pipeline: those
    that differ in tensor alone are adjacent.
    """

    tensor: Count = 1
    """Ranks over which the heads, the FFN and the vocabulary are cut."""
    pipeline: Count = 1
    """Stages of consecutive layers."""
    virtual_pipeline: Count = 1
    """Model chunks a stage (Megatron's interleaved schedule): more communication, less idling."""
    expert: Count = 1
    """Ranks over which whole experts are dealt out; they are ranks of tensor x context x data, not further ones."""
    context: Count = 1
    """Ranks over which a sequence is cut, attention included."""
    data: Count = 1
    """Copies of all of this, each of which takes its share of the batch."""
    sequence_parallel: bool = False
    """Between its matrix products, a layer keeps 1/tensor of the sequence on each of the tensor ranks."""
    distributed_optimizer: bool = False
    """Each data-parallel rank keeps and moves its part of the optimizer's state. On CUDA it is so in any case."""
    recompute: Literal["none", "selective", "full"] = "none"
    """Activations computed anew in the backward pass: none, those of core attention, or all but each layer's input."""

    @property
    def world_size(self) -> int:
        return self.tensor * self.context * self.data * self.pipeline

    @property
    def expert_tensor(self) -> int:
        """Ranks over which one expert is cut: experts are either cut like the other layers, or dealt out whole."""
        return self.tensor if self.expert == 1 else 1


class DiagnosticsConfig(Frozen):
    """How often an attempt looks inside its model, and on how much. It changes no other number: no fingerprint."""

    points: Annotated[int, BeforeValidator(integral), Field(ge=0)] = 4
    """Probes, evenly spaced over the schedule, the last one at its end; 0: none."""
    sequences: Count = 1
    """Of the validation slice's first windows, the same for every probe."""
    histogram_bins: Annotated[int, BeforeValidator(integral), Field(ge=2)] = 20
    """Of the gate scores."""

    def steps(self, num_steps: int) -> tuple[int, ...]:
        """The optimizer steps that are probed, ascending."""
        return evenly_spaced(num_steps, self.points)
