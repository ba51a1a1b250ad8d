"""Which back end a model is built from: Megatron's own modules, or Transformer Engine's."""

from __future__ import annotations

import logging
from typing import Literal

from models import device as devices
from models.config import Backend, TrialConfig

log = logging.getLogger(__name__)

Taken = Literal["local", "transformer_engine"]
_MEND = "install it beside a CUDA build of torch (pip install --no-build-isolation '.[gpu]'), or set backend: local"


def choose(trial: TrialConfig, asked: Backend, device: str) -> Taken:
    """What ``asked`` comes to in this process. ``auto`` takes Transformer Engine on CUDA when it can be imported.

    Raises RuntimeError when Transformer Engine is needed and cannot be had: what was tried, and the mend.
    """
    taken: Taken
    if trial.data.separate_documents:
        taken, problem = "local", "data.separate_documents needs Megatron's own modules: the mask is theirs to take"
        if asked == "transformer_engine":
            raise RuntimeError(f"backend transformer_engine: {problem}; set backend: local")
        log.info("backend %s takes local, as %s", asked, problem)
    elif asked == "local" or (asked == "auto" and device != "cuda"):
        taken = "local"
        problem = f"backend {asked} on {device} takes Megatron's own modules"
    elif device != "cuda":
        raise RuntimeError(f"backend transformer_engine needs a CUDA device, and this attempt runs on {device}")
    else:
        found = devices.transformer_engine_problem()
        if found is None:
            return "transformer_engine"
        problem = f"`import transformer_engine.pytorch` failed: {found}"
        if asked == "transformer_engine":
            raise RuntimeError(f"backend transformer_engine: {problem}; {_MEND}")
        taken = "local"
        log.info("backend auto takes local, as %s", problem)
    if trial.precision == "fp8":
        raise RuntimeError(f"precision fp8 needs Transformer Engine, and {problem}; {_MEND}")
    return taken
