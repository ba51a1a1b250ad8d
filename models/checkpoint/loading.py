"""Restore a trial from a checkpoint, or a model's weights alone, on any layout; a torn checkpoint is told."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from megatron.core import dist_checkpointing
from megatron.core.dist_checkpointing.core import CheckpointingException
from torch.distributed.checkpoint.api import CheckpointException

from models.checkpoint.manifest import CheckpointError, verify
from models.checkpoint.state import load_chunk, restore_moments, sharding_metadata, state_of, without_extra_state


def load(path: Path, chunks: Sequence[Any], optimizer: Any) -> int:
    """Restore ``chunks`` and ``optimizer`` in place and return the step; every rank calls it.

    Raises CheckpointError, on every rank, when the checkpoint is not there, not whole, or not of this model.
    """
    verify(path)
    restored = _read(path, state_of(chunks, optimizer, is_loading=True))
    for number, chunk in enumerate(chunks):
        load_chunk(chunk.module, restored["model"][f"model{number}"])
    step = int(restored["step"])
    restore_moments(optimizer, restored["optimizer"], step)
    torch.set_rng_state(restored["torch_rng"])
    return step


def load_weights(path: Path, model: Any) -> None:
    """Fill a bare GPTModel, whatever layout and back end wrote the checkpoint; no optimizer, no random state."""
    verify(path)
    state = without_extra_state(model.sharded_state_dict(metadata=sharding_metadata()), model.config)
    load_chunk(model, _read(path, {"model": state})["model"])


def _read(path: Path, state: dict[str, Any]) -> dict[str, Any]:
    """The tensors that ``state`` describes, and what is common to all ranks."""
    try:
        restored: dict[str, Any] = dist_checkpointing.load(state, str(path))
    except (CheckpointingException, CheckpointException) as failure:
        raise CheckpointError(f"checkpoint {path} does not hold this trial's model: {failure}") from failure
    return restored
