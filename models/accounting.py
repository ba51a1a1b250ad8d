"""Parameters and FLOPs in closed form, and the FFN width that matches an arm to its baseline.

All counts are exact for the models that ``layer_specs`` builds. FLOPs count a multiply-add as two and take the
whole S x S attention square, as PaLM (arXiv 2204.02311, appendix B) and torch's FlopCounterMode do.
"""

from __future__ import annotations

from collections.abc import Sequence

from models.config import GateConfig, ModelConfig


def gate_score_width(model: ModelConfig, gate: GateConfig) -> int:
    """Width of the gate's score a token, summed over heads (paper section 2.2)."""
    if gate.position == "dense":
        return model.hidden_size
    num_heads = model.num_query_heads if gate.position in ("sdpa", "query") else model.num_kv_heads
    return num_heads * (model.head_dim if gate.granularity == "elementwise" else 1)


Gates = GateConfig | Sequence[GateConfig] | None
"""One gate, several, or none."""


def _each(gates: Gates) -> Sequence[GateConfig]:
    if gates is None:
        return ()
    return (gates,) if isinstance(gates, GateConfig) else gates


def gate_parameters(model: ModelConfig, gates: Gates) -> int:
    """Parameters that gates add to one layer."""
    return _gate_matrix_parameters(model, gates) + sum(
        gate_score_width(model, gate) for gate in _each(gates) if gate.input == "none"
    )


def _gate_matrix_parameters(model: ModelConfig, gates: Gates) -> int:
    return sum(model.hidden_size * gate_score_width(model, gate) for gate in _each(gates) if gate.input == "hidden")


def _num_experts(model: ModelConfig, *, active: bool) -> int:
    """How many FFNs a layer has, or how many of them a token goes through."""
    if model.moe is None:
        return 1
    return model.moe.top_k if active else model.moe.num_experts


def _layer_matrix_parameters(model: ModelConfig, gates: Gates, *, active: bool) -> int:
    hidden = model.hidden_size
    attention_width = model.num_query_heads * model.head_dim
    kv_width = model.num_kv_heads * model.head_dim
    attention = hidden * (attention_width + 2 * kv_width) + attention_width * hidden
    router = hidden * model.moe.num_experts if model.moe is not None else 0
    experts = _num_experts(model, active=active) * 3 * hidden * model.ffn_size
    return attention + _gate_matrix_parameters(model, gates) + router + experts


def _layer_vector_parameters(model: ModelConfig, gates: Gates) -> int:
    """Norms, sink logits and input-independent gates."""
    norms = (4 if model.sandwich_norm else 2) * model.hidden_size + (2 * model.head_dim if model.qk_norm else 0)
    sdpa_norm = model.num_query_heads * model.head_dim if model.sdpa_output == "group_norm" else 0
    sinks = model.num_query_heads if model.softmax_sink else 0
    return norms + sdpa_norm + sinks + gate_parameters(model, gates) - _gate_matrix_parameters(model, gates)


def parameters(model: ModelConfig, gates: Gates, vocab_size: int) -> int:
    """All trainable parameters, embeddings included (tied ones once)."""
    return _parameters(model, gates, vocab_size, active=False)


def active_parameters(model: ModelConfig, gates: Gates, vocab_size: int) -> int:
    """Those that one token uses: of the experts only its ``top_k``; the embeddings whole."""
    return _parameters(model, gates, vocab_size, active=True)


def _parameters(model: ModelConfig, gates: Gates, vocab_size: int, *, active: bool) -> int:
    layer = _layer_matrix_parameters(model, gates, active=active) + _layer_vector_parameters(model, gates)
    embeddings = vocab_size * model.hidden_size * (1 if model.tied_embeddings else 2)
    return embeddings + model.num_layers * layer + model.hidden_size


def forward_flops_per_token(model: ModelConfig, gates: Gates, vocab_size: int, sequence_length: int) -> int:
    """Matrix-multiply FLOPs of one token's forward pass, output layer, attention and router included."""
    attention_width = model.num_query_heads * model.head_dim
    layer = 2 * _layer_matrix_parameters(model, gates, active=True) + 4 * sequence_length * attention_width
    return model.num_layers * layer + 2 * vocab_size * model.hidden_size


def training_flops_per_token(model: ModelConfig, gates: Gates, vocab_size: int, sequence_length: int) -> int:
    """Forward and backward: the backward pass costs two forward passes."""
    return 3 * forward_flops_per_token(model, gates, vocab_size, sequence_length)


def default_ffn_multiple(model: ModelConfig) -> int:
    """128 for GPU-sized models (the paper's 5504 instead of 6144 follows), 2 for small ones.

    8 for GPU-sized MoE models: what a gate takes is shared out over all experts, and steps of 128 would round it away.
    """
    if model.hidden_size < 1024:
        return 2
    return 128 if model.moe is None else 8


def match_ffn_size(model: ModelConfig, gates: Gates, multiple: int) -> int:
    """FFN width (of each expert) at which a gated model has its ungated twin's parameters, to the nearest ``multiple``.

    Raises ValueError when nothing would be left of the FFN.
    """
    return _narrowed(model, gate_parameters(model, gates), _num_experts(model, active=False), multiple)


def match_ffn_size_for_flops(model: ModelConfig, gates: Gates, multiple: int) -> int:
    """FFN width at which a gated model costs its ungated twin's FLOPs: an input-independent gate costs none.

    With experts it is narrower than the width for equal parameters: a token pays for its ``top_k`` experts only.
    """
    return _narrowed(model, _gate_matrix_parameters(model, gates), _num_experts(model, active=True), multiple)


def _narrowed(model: ModelConfig, added: int, num_ffns: int, multiple: int) -> int:
    removed = added / (3 * model.hidden_size * num_ffns)
    width = round((model.ffn_size - removed) / multiple) * multiple
    if width < multiple:
        raise ValueError(f"the gate's {added:,} parameters a layer exceed the FFN's")
    return model.ffn_size if removed == 0 else width
