"""What Megatron does for tensors that lie over several ranks, where one rank has all of them: the same bits, sooner.

Each function takes Megatron's own, or torch's, and hands on to it whatever is not the simple case.
"""

from __future__ import annotations

import functools
import pickle
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, distributed
from torch.autograd.function import once_differentiable
from torch.nn import functional

CACHE_LINE = 16
"""In fp32 numbers."""


class _Done:
    """The handle of a collective that had nothing to do."""

    def wait(self) -> bool:
        return True

    def is_completed(self) -> bool:
        return True


def all_reduce(original: Callable[..., Any]) -> Callable[..., Any]:
    """torch's ``all_reduce`` without the trip through gloo's thread, which on a busy machine waits for its turn."""

    def apply(tensor: Tensor, op: Any = distributed.ReduceOp.SUM, group: Any = None, async_op: bool = False) -> Any:
        if distributed.get_world_size(group) == 1:
            return _Done() if async_op else None
        return original(tensor, op, group, async_op)

    return apply


def all_gather_object(original: Callable[..., None]) -> Callable[..., None]:
    """torch's ``all_gather_object``: of one rank a copy of its own object, by a pickle as it would come from others."""

    @functools.wraps(original)
    def apply(object_list: list[Any], obj: Any, group: Any = None) -> None:
        if distributed.get_world_size(group) == 1:
            object_list[0] = pickle.loads(pickle.dumps(obj))
        else:
            original(object_list, obj, group)

    return apply


def linear(original: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """Megatron's ``linear_with_grad_accumulation_and_async_allreduce`` as torch's own product, whose backward pass
    does not go through Python, where nothing is gathered, reduced, deferred or fused."""

    @functools.wraps(original)  # with the mark that Megatron keeps on it
    def apply(
        input: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        gradient_accumulation_fusion: bool,
        allreduce_dgrad: bool,
        sequence_parallel: bool,
        grad_output_buffer: list[Tensor] | None = None,
        **kwargs: Any,
    ) -> Tensor:
        is_special = gradient_accumulation_fusion or allreduce_dgrad or sequence_parallel
        if is_special or bias is not None or grad_output_buffer is not None:
            return original(
                input,
                weight,
                bias,
                gradient_accumulation_fusion,
                allreduce_dgrad,
                sequence_parallel,
                grad_output_buffer,
                **kwargs,
            )
        return functional.linear(input, weight)

    return apply


def aligned(forward: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """A column-parallel product's ``_forward_impl`` that leaves room at the ends of its result's rows, so that each
    begins at a cache line: where it is not so by itself, a fifth of the product's time. The result is not contiguous.
    """

    def apply(
        *, input: Tensor, weight: Tensor, allreduce_dgrad: bool, sequence_parallel: bool, **others: Any
    ) -> Tensor:
        is_simple = not (allreduce_dgrad or sequence_parallel) and weight.requires_grad and others["bias"] is None
        if not is_simple or weight.dtype != torch.float32 or weight.shape[0] % CACHE_LINE == 0:
            return forward(
                input=input,
                weight=weight,
                allreduce_dgrad=allreduce_dgrad,
                sequence_parallel=sequence_parallel,
                **others,
            )
        product: Tensor = _Aligned.apply(input, weight)  # type: ignore[no-untyped-call]
        return product

    return apply


class _Aligned(torch.autograd.Function):
    """x [..., in] times weight [out, in], by the products that torch's own linear takes."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor) -> Tensor:
        ctx.save_for_backward(x, weight)
        width = weight.shape[0]
        rows = x.reshape(-1, x.shape[-1])
        room = x.new_empty(len(rows), -(-width // CACHE_LINE) * CACHE_LINE)
        product = torch.mm(rows, weight.t(), out=room[:, :width])
        return product.view(*x.shape[:-1], width)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, d_product: Tensor) -> tuple[Tensor, Tensor]:
        x, weight = ctx.saved_tensors
        d_rows = d_product.reshape(-1, weight.shape[0])
        return torch.mm(d_rows, weight).view_as(x), torch.mm(d_rows.t(), x.reshape(-1, x.shape[-1]))


def largest_logits(logits: Tensor) -> tuple[Tensor, Tensor]:
    """``VocabParallelCrossEntropy.calculate_logits_max``, [..., V] to itself in fp32 and [...]: Megatron asks for the
    places of the largest as well, drops them, and pays ten times as much on the CPU."""
    logits = logits.float()
    return logits, torch.amax(logits, dim=-1)
