"""The CPU as a Megatron device: the only place that patches Megatron-Core or torch.cuda.

Megatron-Core asks for CUDA by name in a few factories and contexts. ``prepare`` turns those into their CPU
counterparts once a process; on a CUDA machine it mends a missing name and no more, so that there is one model code.
"""

from __future__ import annotations

import contextlib
import functools
import logging
import resource
import sys
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch.overrides import TorchFunctionMode

from models import one_rank, rope

log = logging.getLogger(__name__)

_FACTORIES = frozenset(
    getattr(torch, name) for name in ("tensor", "zeros", "ones", "empty", "full", "arange", "zeros_like", "empty_like")
)


class CudaFactoriesOnCpu(TorchFunctionMode):
    """Sends tensor factories that were called with ``device="cuda"`` to the CPU, and leaves there what asks to go.

    Tensors give their type as CUDA's: Megatron's distributed optimizer knows its parameters by that name.
    """

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        if func is torch.Tensor.cuda:
            return args[0]
        if func is torch.Tensor.type and len(args) == 1 and not kwargs:
            return func(*args).replace("torch.", "torch.cuda.")
        if kwargs and func in _FACTORIES and str(kwargs.get("device", "")).startswith("cuda"):
            kwargs = {**kwargs, "device": "cpu"}
        return func(*args, **(kwargs or {}))


_prepared = False


def prepare(device: str, local_rank: int = 0) -> None:
    """Make this process ready to train on ``cpu`` or ``cuda``; safe to call again.

    Raises RuntimeError when CUDA is asked for and not there.
    """
    global _prepared
    _mend_router()
    if device == "cuda":
        if not torch.cuda.is_available():
            raise RuntimeError("resources.gpus asks for CUDA, and torch sees no CUDA device in this process")
        torch.cuda.set_device(local_rank)
        return
    if _prepared:
        return
    torch.cuda.current_device = lambda: "cpu"  # type: ignore[assignment, return-value]
    torch.cuda.synchronize = lambda *_: None
    # Asked for from 0.19 on where gradients are reduced, to wait for graphs, of which there are none.
    if torch.cuda.current_stream.__module__ == "torch.cuda" and not torch.cuda.is_available():
        torch.cuda.current_stream = lambda *_: None  # type: ignore[assignment]
    from megatron.core.tensor_parallel import random as megatron_random

    # Dropout is 0 in every model here, so nothing draws inside a fork; the CUDA state it saves does not exist.
    megatron_random.CudaRNGStatesTracker.fork = lambda self, *_: contextlib.nullcontext()
    # Recomputation of activations keeps it as well.
    megatron_random._get_cuda_rng_state = lambda *_, **__: None
    megatron_random._set_cuda_rng_state = lambda *_, **__: None
    from megatron.core.transformer import attention

    attention.apply_rotary_pos_emb = rope.on_cpu(attention.apply_rotary_pos_emb)
    _shorten()
    _prepared = True


def _shorten() -> None:
    """Take out of a step what costs time on the CPU and changes no bit."""
    from megatron.core.fusions import fused_softmax
    from megatron.core.models.common.language_module.language_module import LanguageModule
    from megatron.core.pipeline_parallel import schedules
    from megatron.core.tensor_parallel import layers
    from megatron.core.tensor_parallel.cross_entropy import VocabParallelCrossEntropy
    from megatron.core.transformer.moe import router

    torch.distributed.all_reduce = one_rank.all_reduce(torch.distributed.all_reduce)
    torch.distributed.all_gather_object = one_rank.all_gather_object(torch.distributed.all_gather_object)
    name = "linear_with_grad_accumulation_and_async_allreduce"
    setattr(layers, name, one_rank.linear(getattr(layers, name)))
    VocabParallelCrossEntropy.calculate_logits_max = staticmethod(one_rank.largest_logits)
    schedules.backward_step = _within(lambda: as_it_is(), schedules.backward_step)
    # When built, and in a forward pass, these do ask for CUDA by name.
    name = "setup_embeddings_and_output_layer"
    setattr(LanguageModule, name, _within(_as_on, getattr(LanguageModule, name)))
    fused_softmax.get_default_causal_mask = _within(_as_on, fused_softmax.get_default_causal_mask)
    name = "save_to_aux_losses_tracker"  # its successor in later versions asks for the loss's own device
    if hasattr(router, name):
        setattr(router, name, _within(_as_on, getattr(router, name)))


def _within(context: Callable[[], contextlib.AbstractContextManager[None]], function: Callable[..., Any]) -> Any:
    @functools.wraps(function)
    def apply(*args: Any, **kwargs: Any) -> Any:
        with context():
            return function(*args, **kwargs)

    return apply


def _mend_router() -> None:
    """Without Transformer Engine Megatron's MoE router asks for a name that was never bound (0.16.1)."""
    from megatron.core.transformer.moe import moe_utils

    if not hasattr(moe_utils, "te_general_gemm"):
        moe_utils.te_general_gemm = None


@functools.cache
def transformer_engine_problem() -> str | None:
    """Why Transformer Engine cannot be imported here, or None when it can.

    One that is installed but broken is hidden for the rest of the process, so that Megatron takes it for absent.
    ``models/__init__.py`` asks before Megatron is imported.
    """
    try:
        import transformer_engine.pytorch  # noqa: F401
    except Exception as error:  # a library that does not load raises what it likes
        if isinstance(error, ModuleNotFoundError) and error.name == "transformer_engine":
            return "it is not installed"
        problem = f"{type(error).__name__}: {' '.join(str(error).split())}"
    else:
        return None
    for name in [name for name in sys.modules if name.partition(".")[0] == "transformer_engine"]:
        del sys.modules[name]
    sys.modules["transformer_engine"] = None  # type: ignore[assignment]
    log.warning("Transformer Engine is installed but cannot be imported, and is taken for absent: %s", problem)
    return problem


@contextlib.contextmanager
def on(device: str) -> Iterator[None]:
    """The context in which Megatron is built and run. Per thread: torch's function modes are."""
    with CudaFactoriesOnCpu() if device == "cpu" else contextlib.nullcontext():
        yield


def as_it_is() -> contextlib.AbstractContextManager[None]:
    """Within ``on``: calls of torch go past it. For building the model, the passes through it and the update, which do
    not ask for CUDA by name: a thousand calls in a step would each take a turn through Python."""
    if not _prepared:  # on CUDA, where Transformer Engine's tensors have functions of their own
        return contextlib.nullcontext()
    without: contextlib.AbstractContextManager[None] = torch._C.DisableTorchFunction()
    return without


def _as_on() -> contextlib.AbstractContextManager[None]:
    """Within ``as_it_is``: back to what ``on`` said."""
    again: contextlib.AbstractContextManager[None] = torch._C._EnableTorchFunction()
    return again


def collective_backend(device: str) -> str:
    return "nccl" if device == "cuda" else "gloo"


def seed_everything(seed: int, device: str) -> None:
    """The same seed on every rank: Megatron draws whole weights and cuts them, so layouts agree."""
    if device == "cpu":
        torch.default_generator.manual_seed(seed)  # torch.manual_seed also looks for every other kind of device
        return
    from megatron.core.tensor_parallel import model_parallel_cuda_manual_seed

    torch.manual_seed(seed)
    model_parallel_cuda_manual_seed(seed)


def peak_memory_bytes(device: str) -> int:
    """Peak of the CUDA allocator, or of the resident set. The latter is the process's, warm trials included."""
    if device == "cuda":
        return torch.cuda.max_memory_allocated()
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def scale_gradients(gradients: list[torch.Tensor], norm: float, max_norm: float) -> None:
    """Clip by global norm, in place. Megatron's own clipping asserts a CUDA tensor type."""
    factor = max_norm / (norm + 1e-6)
    if factor < 1.0:
        torch._foreach_mul_(gradients, factor)
