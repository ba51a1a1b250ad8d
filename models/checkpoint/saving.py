"""Save a trial without holding it up: the state is copied into host memory, the rest happens in the background.

The first checkpoint of an attempt settles, by collectives, which rank writes which piece; it holds for the later ones,
which need none. Every rank writes its file into a hidden folder, puts it on the disk, and hands size, checksum and
places of its tensors to rank 0 through the process group's store: no collective of training waits for a disk, and no
dead rank can hold up more than rank 0's own thread. Rank 0 then writes the manifest and renames the folder.
"""

from __future__ import annotations

import dataclasses
import functools
import io
import json
import logging
import os
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from concurrent.futures import wait as wait_for
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from megatron.core.dist_checkpointing.core import CheckpointingConfig, save_config
from megatron.core.dist_checkpointing.state_dict_utils import save_preprocess
from megatron.core.dist_checkpointing.strategies.common import COMMON_STATE_FNAME
from megatron.core.dist_checkpointing.strategies.torch import (
    MCoreSavePlanner,
    _replace_state_dict_keys_with_sharded_keys,
    mcore_to_pyt_state_dict,
)
from torch import distributed
from torch.distributed.checkpoint.filesystem import FileSystemWriter, _StorageInfo
from torch.distributed.checkpoint.metadata import Metadata, MetadataIndex
from torch.distributed.checkpoint.planner import SavePlan
from torch.distributed.checkpoint.storage import WriteResult

from models import device, retention, run_dir
from models.checkpoint.background import Writer
from models.checkpoint.manifest import checked, sync, write_manifest, written_by
from models.checkpoint.state import state_of

log = logging.getLogger(__name__)

PARTS_SECONDS = 600.0
"""How long rank 0 waits for what the others write; as long as a collective."""
ASK_SECONDS = 0.01


@dataclass(frozen=True)
class _Plan:
    """Who writes what, for all checkpoints of an attempt."""

    pieces: tuple[Any, ...]
    """Names and places of the tensors that this rank holds, by which a changed model would be seen."""
    own: SavePlan
    whole: Metadata


@dataclass(frozen=True)
class _Snapshot:
    """A rank's state at a step, in host memory."""

    step: int
    planner: Callable[[], MCoreSavePlanner]
    """Made by the writing thread, but for the first checkpoint, whose planner settles the plan."""
    plan: _Plan
    common: dict[str, Any]
    """What is no tensor of the model or the optimizer; the same on every rank."""
    copied: Any
    """The CUDA event after which the copies are there; None on the CPU."""


class Saver:
    """The checkpoints of one attempt on one rank. At most one is being written: the next one waits for it."""

    def __init__(self, attempt_dir: Path, keep: int, writer: Writer) -> None:
        self.attempt_dir, self.keep, self.writer = attempt_dir, keep, writer
        self._rank, self._num_ranks = distributed.get_rank(), distributed.get_world_size()
        # torch has no public name for it; it is where the ranks met.
        self._store = distributed.distributed_c10d._get_default_store() if self._num_ranks > 1 else None
        self._plan: _Plan | None = None
        self._writing: Future[None] | None = None
        self._is_abandoned = threading.Event()

    def save(self, step: int, chunks: Sequence[Any], optimizer: Any) -> None:
        """Begin the checkpoint of ``step``; every rank calls it. Raises what the one before it met."""
        self.wait()
        self.writer.wait()  # for an earlier attempt's: it has its own account of it
        snapshot = self._snapshot(step, chunks, optimizer)
        self._writing = self.writer.submit(lambda: self._write(snapshot))

    def check(self) -> None:
        """Raise what the last write met, if it is over."""
        if self._writing is not None and self._writing.done():
            self._writing.result()

    def wait(self) -> None:
        """Until the last checkpoint stands. Raises OSError when it could not be written."""
        if self._writing is not None:
            self._writing.result()

    def abandon(self, seconds: float) -> None:
        """Give what is being written some time, and stop waiting for other ranks: the attempt has failed."""
        if self._writing is not None:
            wait_for([self._writing], timeout=seconds)
        self._is_abandoned.set()

    # -- at the step ----------------------------------------------------------------------------------------

    def _snapshot(self, step: int, chunks: Sequence[Any], optimizer: Any) -> _Snapshot:
        state = state_of(chunks, optimizer, is_loading=False)
        # Nothing draws in training: dropout is 0 in every model here. So the state is the same on every rank.
        state |= {"step": step, "torch_rng": torch.get_rng_state()}
        with device.as_it_is():
            sharded, common = save_preprocess(state, validate_access_integrity=self._plan is None)
            pieces, _, _ = _replace_state_dict_keys_with_sharded_keys(sharded, keep_only_main_replica=True)
            copied = _copy_to_host(pieces)
        names = tuple((name, *(shard.global_offset for shard in shards)) for name, shards in pieces.items())
        make = functools.partial(self._planner, pieces)
        if self._plan is None:
            planner = make()
            self._plan = self._agreed(planner, names)
            return _Snapshot(step, lambda: planner, self._plan, common, copied)
        if self._plan.pieces != names:
            raise RuntimeError(f"rank {self._rank} holds other tensors at step {step} than at its first checkpoint")
        return _Snapshot(step, make, self._plan, common, copied)

    def _planner(self, pieces: dict[str, list[Any]]) -> MCoreSavePlanner:
        """What torch writes by. It takes ``pieces`` over."""
        with device.as_it_is():
            tensors = mcore_to_pyt_state_dict(pieces, False)
        planner = MCoreSavePlanner(dedup_replicated_tensors=False, flatten_state_dict=False)
        planner.set_up_planner(tensors, is_coordinator=self._rank == 0)
        return planner

    def _agreed(self, planner: MCoreSavePlanner, pieces: tuple[Any, ...]) -> _Plan:
        """Every rank's own plan, seen by all: each comes to the same whole."""
        plans: list[Any] = [None] * self._num_ranks
        distributed.all_gather_object(plans, planner.create_local_plan())
        plans, whole = planner.create_global_plan(plans)
        own = FileSystemWriter(self.attempt_dir).prepare_global_plan(plans)[self._rank]
        return _Plan(pieces, own, whole)

    # -- in the background ----------------------------------------------------------------------------------

    def _write(self, snapshot: _Snapshot) -> None:
        final = run_dir.checkpoint_path(self.attempt_dir, snapshot.step)
        aside = final.with_name(f".{final.name}")
        try:
            part = self._write_part(snapshot, aside)
            if self._rank == 0:
                self._complete(snapshot, aside, [part, *self._parts_of_others(aside)])
                os.replace(aside, final)
                sync(final.parent)
        except Exception as failure:
            told = f"checkpoint {final} could not be written: {_cause(failure)}"
            self._hand_over(aside, {"failed": told})
            raise OSError(told) from failure
        if self._rank == 0:
            retention.prune_attempt(self.attempt_dir, self.keep)

    def _write_part(self, snapshot: _Snapshot, aside: Path) -> dict[str, Any]:
        """This rank's file, synced; its places in it and its checksum, which rank 0 gets."""
        if snapshot.copied is not None:
            snapshot.copied.synchronize()
        aside.mkdir(parents=True, exist_ok=True)
        # Without a copy ahead: what is in host memory needs no stream of CUDA's.
        writer = FileSystemWriter(aside, thread_count=1, per_thread_copy_ahead=0)
        planner = snapshot.planner()
        results = writer.write_data(planner.finish_plan(snapshot.plan.own), planner).value()
        if self._rank == 0:
            _write_common(snapshot.common, aside)
        part = {"files": checked(aside, written_by(self._rank, aside)), "written": [_place(one) for one in results]}
        self._hand_over(aside, part)
        return part

    def _complete(self, snapshot: _Snapshot, aside: Path, parts: list[dict[str, Any]]) -> None:
        """The index and the manifest over all ranks' files; and the records that the checkpoint is the end of."""
        writer = FileSystemWriter(aside)
        written = [[_written(place) for place in part["written"]] for part in parts]
        writer.finish(dataclasses.replace(snapshot.plan.whole), written)
        index = checked(aside, [aside / ".metadata"])
        if (metrics := run_dir.metrics_path(self.attempt_dir)).exists():
            sync(metrics)
        write_manifest(aside, {name: entry for part in parts for name, entry in part["files"].items()} | index)

    # -- from rank to rank ----------------------------------------------------------------------------------

    def _hand_over(self, aside: Path, part: dict[str, Any]) -> None:
        if self._store is not None and self._rank != 0:
            self._store.set(f"{aside}/{self._rank}", json.dumps(part))

    def _parts_of_others(self, aside: Path) -> list[dict[str, Any]]:
        if self._store is None:
            return []
        deadline, parts = time.monotonic() + PARTS_SECONDS, []
        for rank in range(1, self._num_ranks):
            key = f"{aside}/{rank}"
            while not self._store.check([key]):
                if self._is_abandoned.wait(ASK_SECONDS) or time.monotonic() > deadline:
                    raise TimeoutError(f"rank {rank} has not written its part")
            part = json.loads(self._store.get(key))
            self._store.delete_key(key)
            if "failed" in part:
                raise OSError(f"rank {rank}: {part['failed']}")
            parts.append(part)
        return parts


def _copy_to_host(pieces: dict[str, list[Any]]) -> Any:
    """Replace the tensors by copies that training does not touch. Of CUDA tensors pinned ones, filled by the stream
    that training goes on in, in order: the event that is returned tells when."""
    on_cuda = False
    for shards in pieces.values():
        for shard in shards:
            if isinstance(data := shard.data, torch.Tensor):
                on_cuda |= data.is_cuda
                shard.data = data.detach().to("cpu", non_blocking=True) if data.is_cuda else data.detach().clone()
    return torch.cuda.current_stream().record_event() if on_cuda else None


def _write_common(common: dict[str, Any], folder: Path) -> None:
    content = io.BytesIO()  # torch would tell a full disk as an error without a name
    torch.save(common, content)
    (folder / COMMON_STATE_FNAME).write_bytes(content.getbuffer())
    save_config(CheckpointingConfig("torch_dist", 1), str(folder))


def _place(result: WriteResult) -> list[Any]:
    index, place = result.index, result.storage_data
    offset = None if index.offset is None else list(index.offset)
    return [index.fqn, offset, index.index, result.size_in_bytes, place.relative_path, place.offset, place.length]


def _written(place: list[Any]) -> WriteResult:
    name, offset, number, size, path, start, length = place
    return WriteResult(MetadataIndex(name, offset, number), size, _StorageInfo(path, start, length))


def _cause(failure: BaseException) -> str:
    """In words: the error of the system, where torch hides one behind its own."""
    seen: BaseException | None = failure
    while seen is not None and not isinstance(seen, OSError):
        seen = seen.__cause__ or seen.__context__
    told = seen or failure
    return str(told) if isinstance(told, OSError) else f"{type(told).__name__}: {told}"
