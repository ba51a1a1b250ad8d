"""One forward pass, watched from outside by hooks on the layers' modules. It moves nothing that training will see.

Every rank of the model takes part and gets the whole result: what a rank holds (its heads, its stage's layers) goes
into a table of all layers, and the tables are summed over tensor and pipeline ranks. Data-parallel ranks take the same
sequences and need no sum, so the numbers do not hang on the layout.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from megatron.core import parallel_state
from megatron.core.pipeline_parallel import get_forward_backward_func
from megatron.core.transformer.transformer_layer import TransformerLayer
from megatron.core.utils import get_model_config
from torch import Tensor, nn

from models.config import POSITIONS, GateConfig
from models.diagnostics.first_token import first_token_attention
from models.run_dir import SPARSITY_THRESHOLDS, GateScores, LayerDiagnostics, Layers, finite_or_none

UNBOUNDED_SCORES = 4.0
"""Histograms of SiLU and identity gates go from -4 to 4 times the gate's scale."""


@torch.no_grad()
def probe(
    model: nn.Module | Sequence[nn.Module], batch: Mapping[str, Tensor], histogram_bins: int = 20
) -> LayerDiagnostics:
    """Measure ``model`` (a GPTModel, in DDP or not, or its pipeline chunks) on ``batch``, the same on every rank.

    ``batch`` holds ``tokens`` and ``position_ids``, [B, S] with S >= 2, on the model's device. Megatron's parallel
    state must be up; all ranks of the model call it together. No gradient, no random number, no buffer is touched,
    and the training mode is as it was.
    """
    chunks = [model] if isinstance(model, nn.Module) else list(model)
    if batch["tokens"].shape[1] < 2:
        raise ValueError(f"a probe needs sequences of 2 tokens or more, got {batch['tokens'].shape[1]}")
    if parallel_state.get_context_parallel_world_size() > 1:
        raise NotImplementedError("a probe over context-parallel ranks, each of which sees a part of the keys")
    layers = [module for chunk in chunks for module in chunk.modules() if isinstance(module, TransformerLayer)]
    tally = _Tally(get_model_config(chunks[0]), histogram_bins, batch["tokens"].device)
    with _watched(layers, tally), _evaluating(chunks):
        _forward(chunks, batch)
    tally.sum_over_ranks()
    return tally.result()


def _forward(chunks: Sequence[nn.Module], batch: Mapping[str, Tensor]) -> None:
    def step(_: Any, chunk: nn.Module) -> tuple[Tensor, Callable[[Tensor], Any]]:
        output = chunk(input_ids=batch["tokens"], position_ids=batch["position_ids"], attention_mask=None)
        return output, lambda output: (output.new_zeros(()), {})

    num_sequences, length = batch["tokens"].shape
    get_forward_backward_func()(
        forward_step_func=step,
        data_iterator=[None] * len(chunks),
        model=list(chunks),
        # The interleaved schedule wants one a stage; what is measured is a mean, so repetition changes nothing.
        num_microbatches=parallel_state.get_pipeline_model_parallel_world_size() if len(chunks) > 1 else 1,
        seq_length=length,
        micro_batch_size=num_sequences,
        forward_only=True,
    )


@contextlib.contextmanager
def _evaluating(chunks: Sequence[nn.Module]) -> Iterator[None]:
    """In evaluation mode a router leaves its running counts alone, and nothing is recomputed."""
    modes = [chunk.training for chunk in chunks]
    for chunk in chunks:
        chunk.eval()
    try:
        yield
    finally:
        for chunk, mode in zip(chunks, modes, strict=True):
            chunk.train(mode)


@contextlib.contextmanager
def _watched(layers: Sequence[TransformerLayer], tally: _Tally) -> Iterator[None]:
    """Hooks on the outputs of layers, attention and FFN, on the inputs of core attention, and a tap on gate scores."""
    handles: list[Any] = []
    try:
        for layer in layers:
            number, attention = layer.layer_number - 1, layer.self_attention
            handles += [
                attention.core_attention.register_forward_pre_hook(tally.on_attention(number, attention)),
                attention.register_forward_hook(tally.on_output(number, "attention")),
                layer.mlp.register_forward_hook(tally.on_output(number, "ffn")),
                layer.register_forward_hook(tally.on_output(number, "residual")),
            ]
            attention.score_tap = tally.on_scores(number, attention.gate_configs)
        yield
    finally:
        for handle in handles:
            handle.remove()
        for layer in layers:
            layer.self_attention.score_tap = None


class _Tally:
    """Sums and counts by layer, [layers, columns] in float64, on the device: no value is read before the end."""

    def __init__(self, config: Any, bins: int, device: torch.device) -> None:
        self.num_layers, self.num_heads, self.bins = config.num_layers, config.num_attention_heads, bins
        self.softmax_scale = config.softmax_scale or config.kv_channels**-0.5
        widths = {"first_token": self.num_heads, "queries": 1}
        widths |= dict.fromkeys(("attention", "ffn", "residual"), 2)
        widths |= dict.fromkeys(POSITIONS, 2 + len(SPARSITY_THRESHOLDS) + bins)
        self.sums = torch.zeros(self.num_layers, sum(widths.values()), dtype=torch.float64, device=device)
        self.columns = dict(zip(widths, torch.split(self.sums, list(widths.values()), dim=1), strict=True))
        self.largest = torch.zeros(self.num_layers, dtype=torch.float64, device=device)
        self.score_range: dict[str, tuple[float, float]] = {}

    # -- what the hooks call --------------------------------------------------------------------------------

    def on_attention(self, layer: int, attention: Any) -> Callable[..., None]:
        """For core attention, which is called with query [S, B, H, D] and key [S, B, G, D], this rank's heads."""

        def hook(core: nn.Module, inputs: tuple[Tensor, ...]) -> None:
            query, key = inputs[:2]
            sinks = getattr(core, "softmax_offset", None)
            total = first_token_attention(query, key, self.softmax_scale, sinks)
            tensor_rank, num_heads = parallel_state.get_tensor_model_parallel_rank(), query.shape[2]
            own = slice(tensor_rank * num_heads, (tensor_rank + 1) * num_heads)
            self.columns["first_token"][layer, own] += total
            # Counted on one tensor rank, as each head is.
            if tensor_rank == 0:
                self.columns["queries"][layer] += (query.shape[0] - 1) * query.shape[1]

        return hook

    def on_output(self, layer: int, name: str) -> Callable[..., None]:
        """For a module that returns [S, B, hidden] first: whole on every tensor rank, or a part of the sequence."""

        def hook(_module: nn.Module, _inputs: Any, output: Any) -> None:
            hidden = output[0].float()
            self.columns[name][layer] += torch.stack((hidden.square().sum(dtype=torch.float64), _size(hidden)))
            if name == "residual":
                # A NaN would be lost in a maximum over ranks.
                largest = torch.nan_to_num(hidden.abs().amax().double(), nan=math.inf, posinf=math.inf)
                self.largest[layer] = torch.maximum(self.largest[layer], largest)

        return hook

    def on_scores(self, layer: int, gate_configs: Mapping[str, GateConfig]) -> Callable[[str, Tensor], None]:
        def tap(position: str, scores: Tensor) -> None:
            gate, scores = gate_configs[position], scores.detach().float()
            size = gate.scale if gate.activation in ("sigmoid", "ns_sigmoid") else UNBOUNDED_SCORES * gate.scale
            low, high = (0.0 if gate.activation in ("sigmoid", "ns_sigmoid") else -size), size
            self.score_range[position] = low, high
            bin_of = torch.nan_to_num((scores - low) * (self.bins / (high - low))).clamp(0, self.bins - 1).long()
            closed = [(scores.abs() < threshold).sum() for threshold in SPARSITY_THRESHOLDS]
            measured = torch.stack((scores.sum(dtype=torch.float64), _size(scores), *closed))
            histogram = torch.bincount(bin_of.flatten(), minlength=self.bins)
            self.columns[position][layer] += torch.cat((measured, histogram))

        return tap

    # -- what comes of it -----------------------------------------------------------------------------------

    def sum_over_ranks(self) -> None:
        group = parallel_state.get_model_parallel_group()
        torch.distributed.all_reduce(self.sums, group=group)
        torch.distributed.all_reduce(self.largest, op=torch.distributed.ReduceOp.MAX, group=group)

    def result(self) -> LayerDiagnostics:
        attention = self.columns["first_token"] / self.columns["queries"]
        return LayerDiagnostics(
            first_token_attention=[_listed(heads) for heads in attention],
            max_activation=_listed(self.largest),
            attention_output_rms=self._rms("attention"),
            ffn_output_rms=self._rms("ffn"),
            residual_rms=self._rms("residual"),
            gate_scores={
                position: self._gate_scores(position) for position in POSITIONS if position in self.score_range
            },
            nonfinite=not bool(torch.isfinite(self.sums).all() and torch.isfinite(self.largest).all()),
        )

    def _rms(self, name: str) -> Layers:
        squares, count = self.columns[name].unbind(dim=1)
        return _listed(torch.sqrt(squares / count))

    def _gate_scores(self, position: str) -> GateScores:
        columns = self.columns[position]
        total, count = columns[:, 0], columns[:, 1]
        shares = columns[:, 2:] / count[:, None]
        below, histogram = torch.split(shares, [len(SPARSITY_THRESHOLDS), self.bins], dim=1)
        low, high = self.score_range[position]
        return GateScores(
            mean=_listed(total / count),
            share_below={str(limit): _listed(below[:, i]) for i, limit in enumerate(SPARSITY_THRESHOLDS)},
            low=low,
            high=high,
            histogram=[
                row.tolist() if math.isfinite(float(sum_)) and float(number) > 0 else None
                for row, sum_, number in zip(histogram, total, count, strict=True)
            ],
        )


def _size(values: Tensor) -> Tensor:
    return torch.tensor(values.numel(), dtype=torch.float64, device=values.device)


def _listed(values: Tensor) -> Layers:
    return [finite_or_none(value) for value in values.tolist()]
