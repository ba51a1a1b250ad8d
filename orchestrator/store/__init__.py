"""SQL: the memory of all sweeps. The only owner of SQLAlchemy and Alembic; README.md here documents the views."""

from orchestrator.store.face import Store
from orchestrator.store.rows import (
    HOST_EXCLUDED,
    Added,
    AttemptRow,
    Curve,
    EventRow,
    FinishedIsFinal,
    Lease,
    LeaseHeld,
    LeaseLost,
    StepRow,
    StoreError,
    SweepRow,
    TrialRow,
    TrialTaken,
    ValidationRow,
)
from orchestrator.store.schema import FINISHED, STATES

__all__ = [
    "FINISHED",
    "HOST_EXCLUDED",
    "STATES",
    "Added",
    "AttemptRow",
    "Curve",
    "EventRow",
    "FinishedIsFinal",
    "Lease",
    "LeaseHeld",
    "LeaseLost",
    "StepRow",
    "Store",
    "StoreError",
    "SweepRow",
    "TrialRow",
    "TrialTaken",
    "ValidationRow",
]
