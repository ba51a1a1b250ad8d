"""A trained model in this process, whole, whatever layout trained it: from a trial's checkpoint or a published folder.

In fp32 on the CPU, which takes every stored precision; on CUDA in the precision of what is loaded.
"""

from __future__ import annotations

import contextlib
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
from megatron.core.models.gpt import GPTModel

from models import checkpoint, export, layer_specs, run_dir
from models import device as devices
from models.config import Layout, TrialConfig
from models.trainer import World


@dataclass(frozen=True)
class Checkpoint:
    """The newest whole checkpoint of a trial."""

    trial: TrialConfig
    step: int
    path: Path


@contextlib.contextmanager
def one_rank(device: Literal["cpu", "cuda"]) -> Iterator[World]:
    """A world of this process alone."""
    with tempfile.TemporaryDirectory() as folder:
        world = World.join(0, Layout(), device, f"file://{folder}/meet", num_threads=torch.get_num_threads())
        try:
            with devices.on(device):
                yield world
        finally:
            world.leave()


def fastest_device() -> Literal["cpu", "cuda"]:
    return "cuda" if torch.cuda.is_available() else "cpu"


def newest_checkpoint(trial_dir: Path) -> Checkpoint:
    found = run_dir.latest_checkpoint(trial_dir)
    if found is None:
        raise export.Refused(
            f"trial {trial_dir.name} has no checkpoint (checkpoint: {{final: true}} in its sweep keeps one of its end)"
        )
    step, path = found
    return Checkpoint(run_dir.read_trial_config(trial_dir), step, path)


def restored(found: Checkpoint, world: World, *, as_stored: bool = False) -> GPTModel:
    """The trial's model with its weights; ``as_stored`` keeps bf16 on the CPU as well, where it cannot run.

    Of Megatron's own modules, whose names of tensors checkpoints of every back end share.
    """
    trial = in_plain_precision(found.trial, bf16=world.device == "cuda" or as_stored)
    model = layer_specs.build_model(trial, world.layout, world.device)
    try:
        checkpoint.load_weights(found.path, model)
    except checkpoint.CheckpointError as failure:
        raise export.Refused(str(failure).splitlines()[0]) from failure
    return model


def in_plain_precision(trial: TrialConfig, *, bf16: bool) -> TrialConfig:
    """fp32, or bf16 where that is allowed and was trained in: FP8 is a way to multiply, its weights are bf16."""
    precision = "bf16" if bf16 and trial.precision != "fp32" else "fp32"
    return trial.model_copy(update={"precision": precision, "fp8": None})


def imported(folder: export.PublishedFolder, sequence_length: int, world: World) -> tuple[TrialConfig, GPTModel]:
    """The folder's model, and the config that it was built from."""
    stored = "fp32" if folder.dtype is torch.float32 else "bf16"
    precision: Literal["fp32", "bf16"] = "bf16" if world.device == "cuda" and stored == "bf16" else "fp32"
    trial = folder.architecture.trial(sequence_length, precision)
    model = layer_specs.build_model(trial, world.layout, world.device)
    export.load_into(model, folder)
    return trial, model
