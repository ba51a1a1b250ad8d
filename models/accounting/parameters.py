"""Parameters in closed form, exact for the models that ``layer_specs`` builds: whole, active, and a rank's part."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from models import plugins
from models.config import GateConfig, Layout, ModelConfig

Gates = GateConfig | Sequence[GateConfig] | None
"""One gate, several, or none."""


def each(gates: Gates) -> Sequence[GateConfig]:
    if gates is None:
        return ()
    return (gates,) if isinstance(gates, GateConfig) else gates


def gate_score_width(model: ModelConfig, gate: GateConfig) -> int:
    """Width of the gate's score a token, summed over heads (paper section 2.2)."""
    if gate.position == "dense":
        return model.hidden_size
    num_heads = model.num_query_heads if gate.position in ("sdpa", "query") else model.num_kv_heads
    return num_heads * (model.head_dim if gate.granularity == "elementwise" else 1)


def gate_parameters(model: ModelConfig, gates: Gates) -> int:
    """Parameters that gates add to one layer."""
    return gate_matrix_parameters(model, gates) + sum(
        gate_score_width(model, gate) for gate in each(gates) if gate.input == "none"
    )


def gate_matrix_parameters(model: ModelConfig, gates: Gates) -> int:
    """Those of them that take part in a matrix product."""
    return sum(model.hidden_size * gate_score_width(model, gate) for gate in each(gates) if gate.input == "hidden")


def num_ffns(model: ModelConfig, *, active: bool) -> int:
    """How many FFNs a layer has, or how many of them a token goes through."""
    if model.moe is None:
        return 1
    return model.moe.top_k if active else model.moe.num_experts


def attention_width(model: ModelConfig) -> int:
    """Of the queries, and of what attention gives: all heads together."""
    return model.num_query_heads * model.head_dim


def kv_width(model: ModelConfig) -> int:
    """Of the keys, and again of the values."""
    return model.num_kv_heads * model.head_dim


def kv_projection_width(model: ModelConfig, *, active: bool) -> int:
    """Outputs of the key and value projections, and of SwitchHead's routers; active are the ``top_k`` experts'."""
    heads, switch = model.num_kv_heads, model.switch_head
    if switch is None:
        return 2 * kv_width(model)
    experts = switch.top_k if active else switch.num_experts
    keys = experts if switch.projections == "key_value" else 1
    return heads * ((keys + experts) * model.head_dim + switch.num_experts)


@dataclass(frozen=True)
class LayerParameters:
    """One layer's, by how layouts cut them."""

    attention: int
    """Matrices of attention and of its gates: over tensor ranks."""
    ffn: int
    """Of one FFN: over tensor ranks, or over those of one expert."""
    router: int
    """Whole on every rank, like the norms."""
    norms: int
    heads: int
    """Vectors with a row a head: over tensor ranks."""


def layer_parameters(model: ModelConfig, gates: Gates) -> LayerParameters:
    hidden, width = model.hidden_size, attention_width(model)
    vectors = [(gate.position, gate_score_width(model, gate)) for gate in each(gates) if gate.input == "none"]
    norms = (4 if model.sandwich_norm else 2) * hidden + (2 * model.head_dim if model.qk_norm else 0)
    group_norm = width if model.sdpa_output == "group_norm" else 0
    sinks = model.num_query_heads if model.softmax_sink else 0
    projections = hidden * (2 * width + kv_projection_width(model, active=False))
    return LayerParameters(
        attention=projections + gate_matrix_parameters(model, gates),
        ffn=3 * hidden * model.ffn_size,
        router=hidden * model.moe.num_experts if model.moe is not None else 0,
        norms=norms + sum(size for position, size in vectors if position == "dense"),
        heads=group_norm + sinks + sum(size for position, size in vectors if position != "dense"),
    )


def plugin_parameters(model: ModelConfig) -> int:
    """What the plug-ins add to one layer, by their own account."""
    return sum(plugin.parameters(model, options) for _, plugin, options in plugins.of(model))


def parameters(model: ModelConfig, gates: Gates, vocab_size: int) -> int:
    """All trainable parameters, embeddings included (tied ones once)."""
    return _parameters(model, gates, vocab_size, active=False)


def active_parameters(model: ModelConfig, gates: Gates, vocab_size: int) -> int:
    """Those that one token uses: of experts, in FFNs and in heads, only its ``top_k``; the embeddings whole."""
    return _parameters(model, gates, vocab_size, active=True)


def _parameters(model: ModelConfig, gates: Gates, vocab_size: int, *, active: bool) -> int:
    layer = layer_parameters(model, gates)
    of_a_layer = layer.attention + layer.router + layer.norms + layer.heads + num_ffns(model, active=active) * layer.ffn
    of_a_layer += plugin_parameters(model)
    if active:
        idle = kv_projection_width(model, active=False) - kv_projection_width(model, active=True)
        of_a_layer -= model.hidden_size * idle
    embeddings = vocab_size * model.hidden_size * (1 if model.tied_embeddings else 2)
    return embeddings + model.num_layers * of_a_layer + model.hidden_size


@dataclass(frozen=True)
class RankParameters:
    """What one rank holds. The two are cut over different groups of ranks by the distributed optimizer."""

    shared: int
    """All but experts: the same on every data-parallel rank."""
    experts: int

    @property
    def total(self) -> int:
        return self.shared + self.experts


def rank_parameters(model: ModelConfig, gates: Gates, vocab_size: int, layout: Layout, stage: int) -> RankParameters:
    """Parameters of one rank of pipeline stage ``stage`` (0-based), tied embeddings on both ends counted twice.

    Ranks of a stage hold equal numbers; sizes are taken to be divisible as ``plan`` demands. How a plug-in is cut is
    its own affair: its parameters are taken to be whole on every rank.
    """
    layer, num_layers = layer_parameters(model, gates), model.num_layers // layout.pipeline
    ffn = layer.ffn // layout.tensor
    of_a_layer = (layer.attention + layer.heads) // layout.tensor + layer.router + layer.norms
    of_a_layer += plugin_parameters(model)
    experts = 0
    if model.moe is not None:
        ffn, experts = 0, model.moe.num_experts // layout.expert * (layer.ffn // layout.expert_tensor)
    is_first, is_last = stage == 0, stage == layout.pipeline - 1
    num_matrices = int(is_first) + int(is_last and not (is_first and model.tied_embeddings))
    embeddings = num_matrices * vocab_size * model.hidden_size // layout.tensor
    final_norm = model.hidden_size if is_last else 0
    return RankParameters(embeddings + num_layers * (of_a_layer + ffn) + final_norm, num_layers * experts)
