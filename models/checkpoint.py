"""Save and restore a trial exactly: model, optimizer, step and random state, by Megatron's distributed checkpointing.

A checkpoint is written into a hidden folder, synced with the size and checksum of every file, and renamed when every
rank is done: one that has its name is whole, also after a power cut, and what a disk did to it later is found out.
Tensors are saved by their place in the whole model, so that any layout loads what another has written.
"""

from __future__ import annotations

import json
import os
import shutil
import zlib
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import torch
from megatron.core import dist_checkpointing, parallel_state
from megatron.core.dist_checkpointing.core import CheckpointingException
from megatron.core.dist_checkpointing.strategies.torch import (
    MCoreSavePlanner,
    TorchDistSaveShardedStrategy,
    _replace_state_dict_keys_with_sharded_keys,
    mcore_to_pyt_state_dict,
)
from megatron.core.dist_checkpointing.utils import extract_sharded_base
from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import distributed
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.filesystem import FileSystemWriter
from torch.distributed.checkpoint.state_dict_saver import save as save_state_dict

from models import run_dir

_SHARDING = "fully_reshardable"
"""The only form of Megatron's distributed optimizer that every layout can load, and the plain optimizer too."""
_METADATA = {"distrib_optim_sharding_type": _SHARDING, "chained_optim_avoid_prefix": True}
"""Names of tensors that do not tell the layout that wrote them."""

MANIFEST = "manifest.json"
"""Size and CRC-32 of every other file of a checkpoint, by name."""
_BLOCK_BYTES = 1 << 22


class CheckpointError(Exception):
    """A checkpoint cannot be used: it is not there, not whole, or of another trial. The one before may be."""


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


def save(attempt_dir: Path, step: int, chunks: Sequence[Any], optimizer: Any, keep: int) -> Path:
    """Write the checkpoint of ``step``; every rank calls it. Older ones beyond ``keep`` are removed after it stands."""
    final = run_dir.checkpoint_path(attempt_dir, step)
    aside = final.with_name(f".{final.name}")
    rank = distributed.get_rank()
    if rank == 0:
        shutil.rmtree(aside, ignore_errors=True)
        aside.mkdir(parents=True)
    distributed.barrier()
    state = _state(chunks, optimizer, is_loading=False)
    # Nothing draws in training: dropout is 0 in every model here. So the state is the same on every rank.
    state |= {"step": step, "torch_rng": torch.get_rng_state()}
    try:
        dist_checkpointing.save(state, str(aside), sharded_strategy=_InProcessStrategy("torch_dist", 1))
    except CheckpointException as failure:  # a BaseException: no handler of errors would see it
        cause = next(iter(failure.failures.values()))[0]
        raise OSError(f"checkpoint {final} could not be written: {cause}") from failure
    manifest = _gathered(_checked(aside, _written_by(rank, aside)))
    if rank == 0:
        _write_manifest(aside, manifest)
        if final.exists():
            shutil.rmtree(final)
        os.replace(aside, final)
        _sync(final.parent)
        for _, old in list(run_dir.complete_checkpoints(attempt_dir))[keep:]:
            shutil.rmtree(old, ignore_errors=True)
    distributed.barrier()
    return final


def load(path: Path, chunks: Sequence[Any], optimizer: Any) -> int:
    """Restore ``chunks`` and ``optimizer`` in place and return the step; every rank calls it.

    Raises CheckpointError, on every rank, when the checkpoint is not there, not whole, or not of this model.
    """
    _verify(path)
    restored = _read(path, _state(chunks, optimizer, is_loading=True))
    for number, chunk in enumerate(chunks):
        _load_chunk(chunk.module, restored["model"][f"model{number}"])
    step = int(restored["step"])
    _restore_moments(optimizer, restored["optimizer"], step)
    torch.set_rng_state(restored["torch_rng"])
    return step


def load_weights(path: Path, model: Any) -> None:
    """Fill a bare GPTModel, whatever layout and back end wrote the checkpoint; no optimizer, no random state."""
    _verify(path)
    state = _without_extra_state(model.sharded_state_dict(metadata=_metadata()), model.config)
    _load_chunk(model, _read(path, {"model": state})["model"])


def _read(path: Path, state: dict[str, Any]) -> dict[str, Any]:
    """The tensors that ``state`` describes, and what is common to all ranks."""
    try:
        restored: dict[str, Any] = dist_checkpointing.load(state, str(path))
    except (CheckpointingException, CheckpointException) as failure:
        raise CheckpointError(f"checkpoint {path} does not hold this trial's model: {failure}") from failure
    return restored


# -- what is saved --------------------------------------------------------------------------------------------


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
    for part in optimizer.chained_optimizers:
        if isinstance(part, DistributedOptimizer):
            _start_moments(part)
    moments, _ = extract_sharded_base(optimizer.sharded_state_dict(model, is_loading=is_loading, metadata=metadata))
    for part, own in _by_part(optimizer, moments):
        if isinstance(part, DistributedOptimizer) and _weights_are_the_models(part):
            for tensors in own["param_state"].values():
                del tensors["param"]
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


def _by_part(optimizer: Any, moments: dict[Any, Any]) -> list[tuple[Any, dict[Any, Any]]]:
    """Megatron's optimizer is a chain: one of all parameters, and under expert parallelism a second of the experts'."""
    parts = optimizer.chained_optimizers
    # Before its first step a part has no moments, and is not in there.
    return [(part, moments if len(parts) == 1 else moments.get(number, {})) for number, part in enumerate(parts)]


def _start_moments(part: Any) -> None:
    """Megatron asks the inner optimizer for its step, and torch's AdamW has none before the first."""
    part.init_state_fn(part.optimizer, part.config)
    if isinstance(part.optimizer, torch.optim.Adam | torch.optim.AdamW):
        for state in part.optimizer.state.values():
            state.setdefault("step", torch.zeros(()))


def _weights_are_the_models(part: Any) -> bool:
    """In fp32 the optimizer moves the model's weights; with bf16 it has fp32 ones, which are saved beside them."""
    return not any(part.model_float16_groups)


def _restore_moments(optimizer: Any, moments: dict[Any, Any], step: int) -> None:
    for part, own in _by_part(optimizer, moments):
        if isinstance(part, DistributedOptimizer):
            _restore_distributed(part, own["param_state"], step)
        else:
            state = {**own["state"], "common_step": torch.tensor(float(step))}
            part.load_state_dict({"state": state, "param_groups": part.state_dict()["param_groups"]})


@torch.no_grad()
def _restore_distributed(part: Any, param_state: dict[int, dict[str, Any]], step: int) -> None:
    """``param_state``: whole tensors by number of the parameter in Megatron's buffers; a rank takes its part."""
    if _weights_are_the_models(part):
        parameters = [parameter for buffer in part.buffers for parameter in buffer.param_index_map]
        for number, parameter in enumerate(parameters):
            param_state[number]["param"] = parameter.detach()
    groups = part.state_dict()["optimizer"]
    for group in groups["param_groups"]:
        group["step"] = step
    part.load_state_dict({"optimizer": groups})
    # Of torch's AdamW Megatron would look for a step among the tensors, and gives all parameters one step to count in.
    in_states = [state for state in part.optimizer.state.values() if state.pop("step", None) is not None]
    part.load_parameter_state_from_fully_reshardable(param_state)
    for state in in_states:
        state["step"] = torch.tensor(float(step))


# -- whole or torn --------------------------------------------------------------------------------------------


def _written_by(rank: int, folder: Path) -> list[Path]:
    """A rank's files of tensors; what is common to all ranks is rank 0's."""
    return [
        path
        for path in sorted(folder.iterdir())
        if (path.name.startswith(f"__{rank}_") if path.name.startswith("__") else rank == 0)
    ]


def _checked(folder: Path, paths: Iterable[Path]) -> dict[str, dict[str, int]]:
    """Put the files on the disk for good, and return size and checksum by name."""
    found = {}
    for path in paths:
        _sync(path)
        found[path.relative_to(folder).as_posix()] = {"bytes": path.stat().st_size, "crc32": _crc32(path)}
    return found


def _crc32(path: Path) -> int:
    value = 0
    with path.open("rb") as stream:
        while block := stream.read(_BLOCK_BYTES):
            value = zlib.crc32(block, value)
    return value


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _gathered(own: dict[str, Any]) -> dict[str, Any]:
    """The entries of all ranks, on all."""
    everyone: list[Any] = [None] * distributed.get_world_size()
    distributed.all_gather_object(everyone, own)
    return {name: entry for entries in everyone for name, entry in entries.items()}


def _write_manifest(folder: Path, files: dict[str, Any]) -> None:
    path = folder / MANIFEST
    path.write_text(json.dumps({"files": dict(sorted(files.items()))}, indent=1) + "\n")
    _sync(path)
    _sync(folder)


def _verify(path: Path) -> None:
    """Compare every file with the manifest, each on one of the ranks, and raise on all what any has found."""
    if not path.is_dir():
        raise CheckpointError(f"checkpoint {path} does not exist")
    try:
        files = json.loads((path / MANIFEST).read_text())["files"]
    except FileNotFoundError:
        raise CheckpointError(
            f"checkpoint {path} has no {MANIFEST}: it is torn, or of a version that wrote none"
        ) from None
    except (ValueError, KeyError, TypeError) as failure:
        raise CheckpointError(f"checkpoint {path} is torn: {MANIFEST} is not readable ({failure})") from failure
    own = sorted(files)[distributed.get_rank() :: distributed.get_world_size()]
    wrong = _gathered({name: fault for name in own if (fault := _fault(path / name, files[name]))})
    if wrong:
        told = "; ".join(f"{name} {fault}" for name, fault in sorted(wrong.items()))
        raise CheckpointError(f"checkpoint {path} is torn: {told}")


def _fault(path: Path, expected: dict[str, int]) -> str | None:
    if not path.is_file():
        return "is missing"
    if (size := path.stat().st_size) != expected["bytes"]:
        return f"has {size:,} bytes of {expected['bytes']:,}"
    if (found := _crc32(path)) != expected["crc32"]:
        return f"has the checksum {found:08x} instead of {expected['crc32']:08x}"
    return None
