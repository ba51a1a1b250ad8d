"""What a model costs, in closed form and without torch: parameters, FLOPs, and FFN widths that match arms."""

from models.accounting.flops import (
    FlopsPerToken,
    flops_per_token,
    forward_flops_per_token,
    training_flops_per_token,
    utilisation,
)
from models.accounting.matching import default_ffn_multiple, match_ffn_size, match_ffn_size_for_flops
from models.accounting.parameters import (
    Gates,
    RankParameters,
    active_parameters,
    gate_parameters,
    gate_score_width,
    parameters,
    rank_parameters,
)

__all__ = [
    "FlopsPerToken",
    "Gates",
    "RankParameters",
    "active_parameters",
    "default_ffn_multiple",
    "flops_per_token",
    "forward_flops_per_token",
    "gate_parameters",
    "gate_score_width",
    "match_ffn_size",
    "match_ffn_size_for_flops",
    "parameters",
    "rank_parameters",
    "training_flops_per_token",
    "utilisation",
]
