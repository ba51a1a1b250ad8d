"""Megatron's DDP and AdamW around a model, and one update with clipping."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig, finalize_model_grads
from megatron.core.models.gpt import GPTModel
from megatron.core.optimizer import OptimizerConfig, get_megatron_optimizer
from megatron.core.optimizer.optimizer_config import ParamKey, ParamPredicate

from models import device as devices
from models.config import TrialConfig
from models.diagnostics import UpdateWatch


def wrap(
    trial: TrialConfig, chunks: Sequence[GPTModel], device: str, *, distributed_optimizer: bool = False
) -> tuple[list[DistributedDataParallel], Any]:
    """Each chunk in Megatron's DDP, and the optimizer of all: on CUDA always the distributed one."""
    on_cuda = device == "cuda"
    distributed_optimizer |= on_cuda
    mixed = trial.precision != "fp32"
    if mixed and not on_cuda:
        raise ValueError(
            f"precision {trial.precision} needs a CUDA device: Megatron's optimizer for it takes no CPU tensors"
        )
    ddp_config = DistributedDataParallelConfig(
        grad_reduce_in_fp32=True, use_distributed_optimizer=distributed_optimizer, overlap_grad_reduce=False
    )
    wrapped = []
    for chunk in chunks:
        chunk.config.finalize_model_grads_func = finalize_model_grads
        wrapped.append(DistributedDataParallel(config=chunk.config, ddp_config=ddp_config, module=chunk))
    train = trial.train
    config = OptimizerConfig(
        optimizer="adam",
        lr=train.lr,
        min_lr=train.lr * train.min_lr_fraction,
        weight_decay=train.weight_decay,
        adam_beta1=train.beta1,
        adam_beta2=train.beta2,
        adam_eps=train.epsilon,
        bf16=mixed,
        params_dtype=torch.bfloat16 if mixed else torch.float32,
        use_distributed_optimizer=distributed_optimizer,
        clip_grad=0.0,  # clipped in ``update``, so that a non-finite gradient never reaches the weights
    )
    # Any match exempts a parameter: one-dimensional ones are norms, biases and sink logits.
    without_decay = ParamKey(
        name=("*gate_parameters.*", "*sdpa_norm_weight"),
        predicate=ParamPredicate("one_dimensional", lambda parameter: parameter.ndim == 1),
    )
    optimizer = get_megatron_optimizer(config, wrapped, config_overrides={without_decay: {"wd_mult": 0.0}})
    # Megatron leaves the multiplier to its own scheduler, which is not used here.
    for group in optimizer.param_groups:
        group["weight_decay"] = train.weight_decay * group["wd_mult"]
        if not on_cuda:
            group["foreach"] = True  # torch takes it by itself only on CUDA; the numbers are the same
    return wrapped, optimizer


def zero_gradients(chunks: Sequence[DistributedDataParallel], optimizer: Any) -> None:
    with devices.as_it_is():
        for chunk in chunks:
            chunk.zero_grad_buffer()
        optimizer.zero_grad()


def update(optimizer: Any, lr: float, max_norm: float, watch: UpdateWatch | None = None) -> float:
    """Clip by global norm and step. Returns the norm before clipping; a non-finite one leaves the weights alone."""
    for group in optimizer.param_groups:
        group["lr"] = lr
    optimizer.prepare_grads()
    norm = float(optimizer.get_grad_norm())
    if not math.isfinite(norm):
        return norm
    if watch is not None:
        watch.before()
    with devices.as_it_is():
        parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
        gradients = [gradient for parameter in parameters if (gradient := parameter.grad) is not None]
        devices.scale_gradients(gradients, norm, max_norm)
        optimizer.step_with_ready_grads()
    if watch is not None:
        watch.after()
    return norm
