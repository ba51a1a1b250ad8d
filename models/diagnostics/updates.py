"""What one optimizer step does to each layer: its gradient's norm, and how far it moves relative to its weights.

Measured on the tensors that the optimizer holds: with mixed precision its fp32 weights (a bf16 copy is too coarse to
show an update of one in a thousand), with the distributed optimizer this rank's part of them.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from megatron.core.tensor_parallel import param_is_not_tensor_parallel_duplicate
from megatron.core.transformer.transformer_layer import TransformerLayer
from megatron.core.utils import get_model_config
from torch import Tensor, nn

from models.run_dir import Layers, finite_or_none


class UpdateWatch:
    """Around one step: ``before`` when gradients are ready and not yet clipped, ``after`` when weights have moved.

    ``result`` then holds (gradient norms, update-to-weight ratios), by layer. All ranks take part, and each gets the
    numbers of all layers. The weights before the step are kept on the host,
    so that a GPU's memory need not hold them twice.
    """

    def __init__(self, model: nn.Module | Sequence[nn.Module], optimizer: Any) -> None:
        chunks = [model] if isinstance(model, nn.Module) else list(model)
        layer_of = {
            parameter: layer.layer_number - 1
            for chunk in chunks
            for layer in chunk.modules()
            if isinstance(layer, TransformerLayer)
            for parameter in layer.parameters()
        }
        num_layers = get_model_config(chunks[0]).num_layers
        self.result: tuple[Layers, Layers] = ([], [])
        self._parts = [
            _Part(part, layer_of, num_layers) for part in getattr(optimizer, "chained_optimizers", [optimizer])
        ]

    @torch.no_grad()
    def before(self) -> None:
        for part in self._parts:
            part.before()

    @torch.no_grad()
    def after(self) -> None:
        gradient, weight, change = torch.stack([part.after() for part in self._parts]).sum(dim=0).sqrt()
        self.result = _listed(gradient), _listed(change / weight)


class _Part:
    """One of a chain of optimizers: experts have their own, with its own group of ranks."""

    def __init__(self, optimizer: Any, layer_of: dict[nn.Parameter, int], num_layers: int) -> None:
        self._group, self._num_layers = optimizer.get_grad_stats_parallel_group(), num_layers
        self._held = [(held, layer_of[parameter]) for parameter, held in _held(optimizer) if parameter in layer_of]
        self._device = next(iter(layer_of)).device if layer_of else torch.device("cpu")
        self._gradient_squares: list[Tensor] = []
        self._copies: list[Tensor] = []

    def before(self) -> None:
        self._gradient_squares = [_squares(held.grad) for held, _ in self._held]
        self._copies = [held.detach().to("cpu", copy=True) for held, _ in self._held]

    def after(self) -> Tensor:
        """Sums of squares [3 (gradient, weight, change), layers] over all ranks that hold a part, each counted once."""
        sums = torch.zeros(3, self._num_layers, dtype=torch.float64, device=self._device)
        for (held, layer), gradient, copy in zip(self._held, self._gradient_squares, self._copies, strict=True):
            before = copy.to(held.device)
            sums[:, layer] += torch.stack((gradient, _squares(before), _squares(held - before)))
        self._gradient_squares, self._copies = [], []
        torch.distributed.all_reduce(sums, group=self._group)
        return sums


def _held(optimizer: Any) -> list[tuple[nn.Parameter, Tensor]]:
    """(model's parameter, the tensor that the optimizer moves for it), without what another rank counts."""
    if hasattr(optimizer, "shard_fp32_groups"):
        groups = (
            (optimizer.model_float16_groups, optimizer.shard_fp32_from_float16_groups),
            (optimizer.model_fp32_groups, optimizer.shard_fp32_groups),
        )
    elif hasattr(optimizer, "fp32_from_float16_groups"):
        groups = (
            (optimizer.float16_groups, optimizer.fp32_from_float16_groups),
            (optimizer.fp32_from_fp32_groups, optimizer.fp32_from_fp32_groups),
        )
    else:
        groups = (([optimizer.get_parameters()], [optimizer.get_parameters()]), ([], []))
    pairs = [
        pair
        for models, parts in groups
        for in_model, in_optimizer in zip(models, parts, strict=True)
        for pair in zip(in_model, in_optimizer, strict=True)
    ]
    return [pair for pair in pairs if param_is_not_tensor_parallel_duplicate(pair[0])]


def _squares(values: Tensor | None) -> Tensor:
    if values is None:
        return torch.zeros((), dtype=torch.float64)
    norm: Tensor = torch.linalg.vector_norm(values, dtype=torch.float64)
    return norm.square()


def _listed(values: Tensor) -> Layers:
    return [finite_or_none(value) for value in values.tolist()]
