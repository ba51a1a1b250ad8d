"""Save and restore a trial exactly: model, optimizer, step and random state, by Megatron's distributed checkpointing.

A checkpoint is written into a hidden folder and renamed when every rank is done: one that has its name is whole.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from megatron.core import dist_checkpointing, parallel_state
from megatron.core.dist_checkpointing.strategies.torch import (
    MCoreSavePlanner,
    TorchDistSaveShardedStrategy,
    _replace_state_dict_keys_with_sharded_keys,
    mcore_to_pyt_state_dict,
)
from megatron.core.dist_checkpointing.utils import extract_sharded_base
from megatron.core.transformer.transformer_config import TransformerConfig
from torch.distributed.checkpoint.filesystem import FileSystemWriter
from torch.distributed.checkpoint.state_dict_saver import save as save_state_dict

from models import run_dir

_METADATA = {"distrib_optim_sharding_type": "fully_sharded_model_space", "chained_optim_avoid_prefix": True}
"""Names of tensors that do not tell the layout that wrote them."""


class _InProcessStrategy(TorchDistSaveShardedStrategy):  # type: ignore[misc]
    """Megatron's format, written by this process.

    Megatron's own ``save`` starts a multiprocessing manager and forks a writer, also for a synchronous save: 1.7 s
    for the smallest model, a fork of a process with threads, and a hang when the writer dies.
    """

    def save(self, sharded_state_dict: Any, checkpoint_dir: Any) -> None:
        state, _, _ = _replace_state_dict_keys_with_sharded_keys(sharded_state_dict, self.keep_only_main_replica)
        save_state_dict(
            mcore_to_pyt_state_dict(state, False),
            storage_writer=FileSystemWriter(checkpoint_dir, thread_count=1),
            planner=MCoreSavePlanner(dedup_replicated_tensors=False, flatten_state_dict=False),
        )


def _metadata() -> dict[str, Any]:
    return {**_METADATA, "dp_cp_group": parallel_state.get_data_parallel_group(with_context_parallel=True)}


def _state(chunks: Sequence[Any], optimizer: Any, *, is_loading: bool) -> dict[str, Any]:
    """Weights and moments as Megatron's sharded tensors, which know their place in the whole model.

    Nothing else of the optimizer: its groups follow from the trial, its number of updates is the step, and both look
    different on other layouts.
    """
    metadata = _metadata()
    model = {
        f"model{i}": _without_extra_state(chunk.module.sharded_state_dict(metadata=metadata), chunk.config)
        for i, chunk in enumerate(chunks)
    }
    moments, _ = extract_sharded_base(optimizer.sharded_state_dict(model, is_loading=is_loading, metadata=metadata))
    return {"model": model, "optimizer": moments}


def _without_extra_state(state: dict[str, Any], config: TransformerConfig) -> dict[str, Any]:
    """What is learnt, and of Transformer Engine's extra state what the next step depends on: past maxima of FP8.

    Without the rest a checkpoint is the same whichever back end wrote it, and is read by either.
    """
    if config.fp8 is not None and config.fp8_recipe == "delayed":
        return state
    return {name: value for name, value in state.items() if "._extra_state" not in name}


def _load_chunk(module: Any, restored: dict[str, Any]) -> None:
    """Extra state that was left out stays what it is."""
    own = {name: value for name, value in module.state_dict().items() if "._extra_state" in name}
    module.load_state_dict(own | restored)


def save(attempt_dir: Path, step: int, chunks: Sequence[Any], optimizer: Any, keep: int) -> Path:
    """Write the checkpoint of ``step``; every rank calls it. Older ones beyond ``keep`` are removed after it stands."""
    final = run_dir.checkpoint_path(attempt_dir, step)
    aside = final.with_name(f".{final.name}")
    rank = torch.distributed.get_rank()
    if rank == 0:
        shutil.rmtree(aside, ignore_errors=True)
        aside.mkdir(parents=True)
    torch.distributed.barrier()
    state = _state(chunks, optimizer, is_loading=False)
    state |= {"step": step, "torch_rng": torch.get_rng_state()}
    dist_checkpointing.save(state, str(aside), sharded_strategy=_InProcessStrategy("torch_dist", 1))
    torch.distributed.barrier()
    if rank == 0:
        if final.exists():
            shutil.rmtree(final)
        os.replace(aside, final)
        for _, old in list(run_dir.complete_checkpoints(attempt_dir))[keep:]:
            shutil.rmtree(old, ignore_errors=True)
    torch.distributed.barrier()
    return final


def load(path: Path, chunks: Sequence[Any], optimizer: Any) -> int:
    """Restore ``chunks`` and ``optimizer`` in place and return the step. Raises when the checkpoint is not whole."""
    if not path.is_dir():
        raise FileNotFoundError(f"checkpoint {path} does not exist")
    restored = dist_checkpointing.load(_state(chunks, optimizer, is_loading=True), str(path))
    for number, chunk in enumerate(chunks):
        _load_chunk(chunk.module, restored["model"][f"model{number}"])
    step = int(restored["step"])
    _restore_moments(optimizer, restored["optimizer"], step)
    torch.set_rng_state(restored["torch_rng"])
    return step


def _restore_moments(optimizer: Any, moments: dict[Any, Any], step: int) -> None:
    """Megatron's optimizer is a chain: one of all parameters, and under expert parallelism a second of the experts'."""
    parts = optimizer.chained_optimizers
    for number, part in enumerate(parts):
        own = moments if len(parts) == 1 else moments[number]
        state = {**own["state"], "common_step": torch.tensor(float(step))}
        part.load_state_dict({"state": state, "param_groups": part.state_dict()["param_groups"]})


def load_weights(path: Path, model: Any) -> None:
    """Fill a bare GPTModel, whatever layout and back end wrote the checkpoint; no optimizer, no random state."""
    if not path.is_dir():
        raise FileNotFoundError(f"checkpoint {path} does not exist")
    state = _without_extra_state(model.sharded_state_dict(metadata=_metadata()), model.config)
    _load_chunk(model, dist_checkpointing.load({"model": state}, str(path))["model"])
