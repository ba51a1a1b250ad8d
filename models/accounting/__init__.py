"""What a model costs, in closed form and without torch: parameters, FLOPs, memory, and FFN widths that match arms."""

from models.accounting.accelerators import ACCELERATORS, Accelerator, AcceleratorName
from models.accounting.flops import (
    FlopsPerToken,
    flops_per_token,
    forward_flops_per_token,
    training_flops_per_token,
    utilisation,
)
from models.accounting.matching import default_ffn_multiple, match_ffn_size, match_ffn_size_for_flops
from models.accounting.memory import (
    GIB,
    SPARE_FRACTION,
    RankMemory,
    checkpoint_bytes,
    fits,
    fullest_rank,
    largest_micro_batch,
    micro_batches,
    rank_memory,
)
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
    "ACCELERATORS",
    "GIB",
    "SPARE_FRACTION",
    "Accelerator",
    "AcceleratorName",
    "FlopsPerToken",
    "Gates",
    "RankMemory",
    "RankParameters",
    "active_parameters",
    "checkpoint_bytes",
    "default_ffn_multiple",
    "fits",
    "flops_per_token",
    "forward_flops_per_token",
    "fullest_rank",
    "gate_parameters",
    "gate_score_width",
    "largest_micro_batch",
    "match_ffn_size",
    "match_ffn_size_for_flops",
    "micro_batches",
    "parameters",
    "rank_memory",
    "rank_parameters",
    "training_flops_per_token",
    "utilisation",
]
