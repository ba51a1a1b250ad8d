"""What ended an attempt, and what follows: a final state, another attempt, or a pause of the sweep. Pure."""

from orchestrator.failures.causes import (
    CORRUPT_CHECKPOINT,
    DISK_FULL,
    DISK_READ_ONLY,
    ERROR,
    EXCLUDED_AT,
    GPU_OUT_OF_MEMORY,
    HANG,
    NONFINITE,
    PREEMPTED,
    RANK_DIED,
    Cause,
    Evidence,
    diagnose,
)
from orchestrator.failures.decision import Consequence, Ending, Wish, consequence

__all__ = [
    "CORRUPT_CHECKPOINT",
    "DISK_FULL",
    "DISK_READ_ONLY",
    "ERROR",
    "EXCLUDED_AT",
    "GPU_OUT_OF_MEMORY",
    "HANG",
    "NONFINITE",
    "PREEMPTED",
    "RANK_DIED",
    "Cause",
    "Consequence",
    "Ending",
    "Evidence",
    "Wish",
    "consequence",
    "diagnose",
]
