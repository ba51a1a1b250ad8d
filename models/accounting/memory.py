"""Bytes that one rank needs: weights, gradients, optimizer, activations, and working space; and what fits.

Weights, gradients and optimizer states are exact. Activations are what autograd saves (``activations``), times the
micro-batches that a pipeline stage has in flight: the first stage of 1F1B holds as many as there are stages.
"""

from __future__ import annotations

from dataclasses import dataclass

from models.accounting.activations import FP32, Saved
from models.accounting.parameters import parameters, rank_parameters
from models.config import Layout, TrialConfig

GIB = 2**30
SPARE_FRACTION = 0.1
"""Of a device's memory, left for what is not modelled: the CUDA context, communication buffers, fragmentation."""


@dataclass(frozen=True)
class RankMemory:
    """Bytes of one rank of pipeline stage ``stage``."""

    stage: int
    weights: int
    gradients: int
    optimizer: int
    activations: int
    working: int
    """The largest temporary that lives beside all activations."""

    @property
    def total(self) -> int:
        return self.weights + self.gradients + self.optimizer + self.activations + self.working


def fullest_rank(trial: TrialConfig, layout: Layout, micro_batch_sequences: int, device: str) -> RankMemory:
    """The rank that needs most: on the first stage, which has most in flight, or the last, which has the logits."""
    stages = range(layout.pipeline)
    return max((rank_memory(trial, layout, micro_batch_sequences, device, s) for s in stages), key=lambda m: m.total)


def rank_memory(
    trial: TrialConfig, layout: Layout, micro_batch_sequences: int, device: str, stage: int = 0
) -> RankMemory:
    """Of a rank of pipeline stage ``stage`` (0-based) on ``cpu`` or ``cuda``."""
    model, vocab_size = trial.model, trial.data.vocab_size
    held = rank_parameters(model, trial.gates, vocab_size, layout, stage)
    item = FP32 if trial.precision == "fp32" else 2
    activations, working = _activations(trial, layout, micro_batch_sequences, device, stage)
    return RankMemory(
        stage=stage,
        weights=item * held.total,
        gradients=FP32 * held.total,
        optimizer=_optimizer(held.shared, held.experts, layout, item, device),
        activations=activations,
        working=working,
    )


def checkpoint_bytes(trial: TrialConfig) -> int:
    """Of a checkpoint on disk, whatever the layout: weights and the optimizer's state. The random state, the names and
    the manifest beside them were 0.2 MB on one rank of the CPU.
    """
    item = FP32 if trial.precision == "fp32" else 2
    held = parameters(trial.model, trial.gates, trial.data.vocab_size)
    return held * (item + _optimizer_bytes(item))


def _optimizer_bytes(item: int) -> int:
    """Of one parameter: Adam's two moments, and with bf16 the master weights, all fp32."""
    return 2 * FP32 + (FP32 if item < FP32 else 0)


def _optimizer(shared: int, experts: int, layout: Layout, item: int, device: str) -> int:
    """Of a rank; on CUDA cut over the data-parallel ranks."""
    each = _optimizer_bytes(item)
    if device == "cpu":
        return each * (shared + experts)
    copies = layout.data * layout.context
    expert_copies = layout.tensor * copies // (layout.expert * layout.expert_tensor)
    return each * (-(-shared // copies) + -(-experts // expert_copies))


def _activations(
    trial: TrialConfig, layout: Layout, micro_batch_sequences: int, device: str, stage: int
) -> tuple[int, int]:
    model, sequence = trial.model, trial.data.sequence_length
    item = FP32 if trial.precision == "fp32" else 2
    saved = Saved(model, trial.gates, layout, sequence, item, on_cuda=device == "cuda")
    positions = sequence / layout.context
    tokens = micro_batch_sequences * positions
    layer, is_last = saved.layer(), stage == layout.pipeline - 1
    once = 0.0 if layout.recompute == "full" else saved.a_position() * positions
    chunk = model.num_layers // (layout.pipeline * layout.virtual_pipeline)
    of_a_chunk = chunk * (layer.kept(layout.recompute) * tokens + once)
    # What went to the next stage is freed but by the interleaved schedule on the CPU.
    of_a_chunk += saved.boundary() * tokens if layout.virtual_pipeline > 1 and device == "cpu" else 0.0
    num_micro_batches = max(1, trial.batch_sequences // (micro_batch_sequences * layout.data))
    total = in_flight(layout, stage, num_micro_batches) * of_a_chunk
    ends = saved.ends(trial.data.vocab_size) if is_last else 0.0
    total += ends * tokens
    total += saved.angles() * positions
    total += 8 * tokens if stage == 0 else 0.0  # token ids, for the embedding's gradient
    again = {
        "none": 0.0,
        "selective": layer.core_attention * tokens,
        "full": layer.total * tokens + saved.a_position() * positions,
    }
    return round(total), round(again[layout.recompute] + _temporary(trial, layout, tokens, item, ends))


def in_flight(layout: Layout, stage: int, num_micro_batches: int) -> int:
    """Model chunks whose activations a stage holds at once: Megatron's warm-up, and the one it works on."""
    after = layout.pipeline - stage - 1
    more_chunks = layout.virtual_pipeline - 1
    warm_up = 2 * after + more_chunks * layout.pipeline if more_chunks else after
    return min(warm_up + 1, num_micro_batches * layout.virtual_pipeline)


def _temporary(trial: TrialConfig, layout: Layout, tokens: float, item: int, ends: float) -> float:
    """The larger of what two moments of the backward pass need: at the output layer its matrix's gradient and its
    input's (the logits' own is written over the softmax, but with bf16 there is a copy in bf16); in the last FFN its
    gradients, when ``ends`` bytes a token are free again."""
    model, cut = trial.model, layout.tensor
    ffn = (
        max(0.0, item * 2 * model.ffn_size / cut - ends) * tokens + item * 2 * model.ffn_size * model.hidden_size / cut
    )
    if not ends:
        return ffn
    vocab_size = trial.data.vocab_size / cut
    width = 2 * model.hidden_size + (vocab_size if item < FP32 else 0)
    return max(ffn, item * (width * tokens + vocab_size * model.hidden_size))


def micro_batches(trial: TrialConfig, layout: Layout) -> list[int]:
    """Sequences that a rank may take at once, best first: the divisors of its share of the batch, most first.

    Pipeline stages idle for (stages - 1) / micro-batches of a step: no size leaves fewer than four micro-batches a
    stage, if the batch has as many. The interleaved schedule takes them by whole groups of stages.
    """
    share, stages = trial.batch_sequences // layout.data, layout.pipeline
    group = stages if layout.virtual_pipeline > 1 else 1
    sizes = [size for size in range(share, 0, -1) if share % size == 0 and share // size % group == 0]
    busy = [size for size in sizes if share // size >= (4 * stages if stages > 1 else 1)]
    return busy or sizes[-1:]


def largest_micro_batch(trial: TrialConfig, layout: Layout, device: str, memory_bytes: float | None) -> int | None:
    """The largest that fits; None when none does. Without a limit the largest of all."""
    for size in micro_batches(trial, layout):
        if memory_bytes is None or fits(fullest_rank(trial, layout, size, device), memory_bytes):
            return size
    return None


def fits(memory: RankMemory, memory_bytes: float) -> bool:
    """Whether SPARE_FRACTION is left free."""
    return memory.total <= (1 - SPARE_FRACTION) * memory_bytes
