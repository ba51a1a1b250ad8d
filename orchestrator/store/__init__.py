"""SQL: the memory of all sweeps. The only owner of SQLAlchemy and Alembic; README.md here documents the views."""

from orchestrator.store.face import Store
from orchestrator.store.layers import mean_or_none
from orchestrator.store.rows import (
    CANCEL_WANTED,
    CAP_SET,
    HOST_EXCLUDED,
    Added,
    AttemptRow,
    Curve,
    EventRow,
    FailedRow,
    FinishedIsFinal,
    LayerRow,
    Lease,
    LeaseHeld,
    LeaseLost,
    Outcome,
    StepRow,
    StoreError,
    SweepRow,
    TailRow,
    TrialRow,
    TrialTaken,
    ValidationRow,
)
from orchestrator.store.schema import FINISHED, STATES
from orchestrator.store.submission import find_choice, verdict_seeds

__all__ = [
    "CANCEL_WANTED",
    "CAP_SET",
    "FINISHED",
    "HOST_EXCLUDED",
    "STATES",
    "Added",
    "AttemptRow",
    "Curve",
    "EventRow",
    "FailedRow",
    "FinishedIsFinal",
    "LayerRow",
    "Lease",
    "LeaseHeld",
    "LeaseLost",
    "Outcome",
    "StepRow",
    "Store",
    "StoreError",
    "SweepRow",
    "TailRow",
    "TrialRow",
    "TrialTaken",
    "ValidationRow",
    "find_choice",
    "mean_or_none",
    "verdict_seeds",
]
