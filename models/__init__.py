"""What runs in the training processes. Never imports orchestrator."""

from __future__ import annotations

import importlib
import importlib.abc
import sys
from typing import Any


class _BeforeMegatron(importlib.abc.MetaPathFinder):
    """Looks at Transformer Engine when Megatron is about to be imported, from wherever.

    Megatron takes it for absent only at an ImportError; one that is broken (beside a CPU build of torch it raises
    RuntimeError) would take ``import megatron.core`` down with it.
    """

    def find_spec(self, name: str, *_: Any) -> None:
        if name == "megatron.core":
            sys.meta_path.remove(self)
            # By name: the orchestrator imports this package too, but neither Megatron nor what loads torch.
            importlib.import_module("models.device").transformer_engine_problem()


if not any(type(finder).__name__ == _BeforeMegatron.__name__ for finder in sys.meta_path):
    sys.meta_path.insert(0, _BeforeMegatron())
