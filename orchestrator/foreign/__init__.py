"""Loss curves that other programs wrote: Megatron's logs, exports of W&B and MLflow, CSV. Read, never trusted: what
they were trained on is not known here, so they are shown beside verdicts and are no part of any."""

from orchestrator.foreign.curve_files import FORMATS, read_curves

__all__ = ["FORMATS", "read_curves"]
