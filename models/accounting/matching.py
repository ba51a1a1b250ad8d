"""FFN widths at which a gated model has its ungated twin's parameters, or costs its FLOPs."""

from __future__ import annotations

from models.accounting.parameters import Gates, gate_matrix_parameters, gate_parameters, num_ffns
from models.config import ModelConfig


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
    return _narrowed(model, gate_parameters(model, gates), num_ffns(model, active=False), multiple)


def match_ffn_size_for_flops(model: ModelConfig, gates: Gates, multiple: int) -> int:
    """FFN width at which a gated model costs its ungated twin's FLOPs: an input-independent gate costs none.

    With experts it is narrower than the width for equal parameters: a token pays for its ``top_k`` experts only.
    """
    return _narrowed(model, gate_matrix_parameters(model, gates), num_ffns(model, active=True), multiple)


def _narrowed(model: ModelConfig, added: int, num_narrowed: int, multiple: int) -> int:
    removed = added / (3 * model.hidden_size * num_narrowed)
    width = round((model.ffn_size - removed) / multiple) * multiple
    if width < multiple:
        raise ValueError(f"the gate's {added:,} parameters a layer exceed the FFN's")
    return model.ffn_size if removed == 0 else width
