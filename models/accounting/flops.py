"""FLOPs of a token in closed form, and what share of a device's peak they make.

A multiply-add counts as two; only matrix products count, as in PaLM (arXiv 2204.02311, appendix B) and torch's
FlopCounterMode. Attention takes the whole S x S square unless ``causal`` says that only the half below the diagonal
is computed: kernels that skip the other half then show the utilisation that they really have.
"""

from __future__ import annotations

from dataclasses import dataclass

from models import plugins
from models.accounting.parameters import Gates, attention_width, layer_parameters, num_ffns
from models.config import ModelConfig


@dataclass(frozen=True)
class FlopsPerToken:
    """Forward pass by its parts; the backward pass costs each of them twice (a gradient for either factor)."""

    matrices: int
    """Projections, FFN (of its ``top_k`` experts), router and output layer.

    SwitchHead's experts count all: each is computed for every token, and the best are chosen then.
    """
    attention: int
    """Queries x keys, and weights x values."""
    recomputation: int = 0
    """Of the forward pass once more, in the backward pass: hardware does it, the model does not need it."""

    @property
    def forward(self) -> int:
        return self.matrices + self.attention

    @property
    def backward(self) -> int:
        return 2 * self.forward

    @property
    def training(self) -> int:
        """Model FLOPs: what utilisation counts."""
        return self.forward + self.backward

    @property
    def hardware(self) -> int:
        return self.training + self.recomputation


def flops_per_token(
    model: ModelConfig,
    gates: Gates,
    vocab_size: int,
    sequence_length: int,
    *,
    causal: bool = False,
    recompute: str = "none",
) -> FlopsPerToken:
    """Mean over a sequence's tokens. ``recompute`` as in Layout: none, selective (core attention) or full (layers)."""
    layer = layer_parameters(model, gates)
    of_a_layer = 2 * (layer.attention + layer.router + num_ffns(model, active=True) * layer.ffn)
    of_a_layer += sum(
        plugin.forward_flops_per_token(model, options, sequence_length) for _, plugin, options in plugins.of(model)
    )
    keys = (sequence_length + 1) / 2 if causal else sequence_length
    attention = int(model.num_layers * 4 * keys * attention_width(model))
    layers = model.num_layers * of_a_layer
    again = {"none": 0, "selective": attention, "full": layers + attention}[recompute]
    return FlopsPerToken(layers + 2 * vocab_size * model.hidden_size, attention, again)


def forward_flops_per_token(model: ModelConfig, gates: Gates, vocab_size: int, sequence_length: int) -> int:
    """Matrix-multiply FLOPs of one token's forward pass, output layer, attention and router included."""
    return flops_per_token(model, gates, vocab_size, sequence_length).forward


def training_flops_per_token(model: ModelConfig, gates: Gates, vocab_size: int, sequence_length: int) -> int:
    """Forward and backward: the backward pass costs two forward passes."""
    return flops_per_token(model, gates, vocab_size, sequence_length).training


def utilisation(flops_per_second: float | None, peak_flops: float | None, num_ranks: int) -> float | None:
    """Model-FLOPs utilisation, 0 to 1: model FLOPs a second over the peak of all ranks; None where one is unknown."""
    if flops_per_second is None or peak_flops is None:
        return None
    return flops_per_second / (peak_flops * num_ranks)
