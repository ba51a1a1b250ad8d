"""A trained model measured on a corpus: validation loss, bits per byte, and what goes on inside it by layer."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from megatron.core.models.gpt import GPTModel
from torch import nn

from models import corpus, export, layer_specs
from models.config import DataConfig, TrialConfig
from models.corpus.tokens import Tokenizer, load_tokenizer
from models.diagnostics import probe
from models.run_dir import LayerDiagnostics, finite_or_none
from models.trainer import World, passes
from models.verbs.one_rank import fastest_device, imported, newest_checkpoint, one_rank, restored

SplitName = Literal["slice", "full"]
MICRO_BATCH_TOKENS = 2048
CONTEXT = 2048
"""Tokens of context for a published model that was made for more: what a CPU takes in reasonable time."""


@dataclass(frozen=True)
class Wanted:
    """What to measure on; None: the trial's own, or for a folder the built-in corpus."""

    data_dir: Path
    corpus: str | None = None
    tokenizer: str | None = None
    sequence_length: int | None = None
    validation_every: int | None = None
    split: SplitName = "slice"


def diagnose_trial(trial_dir: Path, wanted: Wanted) -> dict[str, Any]:
    """The newest checkpoint of a trial, on its own corpus unless ``wanted`` says another."""
    if wanted.tokenizer is not None:
        raise export.Refused("a trial is measured with its own tokenizer: its tokens have no other meaning")
    found = newest_checkpoint(trial_dir)
    data = _with(found.trial.data, wanted)
    with one_rank(fastest_device()) as world:
        model = restored(found, world)
        told = {"trial": trial_dir.name, "step": found.step, "steps_planned": found.trial.train.num_steps, "notes": []}
        return told | _measure(found.trial.model_copy(update={"data": data}), model, world, wanted)


def diagnose_folder(directory: Path, wanted: Wanted) -> dict[str, Any]:
    """A published model, with the tokenizer.json of its folder unless ``wanted`` names one."""
    folder = export.open_folder(directory)
    architecture = folder.architecture
    name = wanted.tokenizer or str(directory / "tokenizer.json")
    if wanted.tokenizer is None and not Path(name).is_file():
        raise export.Refused(f"{directory} has no tokenizer.json; name its tokenizer with --tokenizer PATH (or bytes)")
    tokenizer = load_tokenizer(name)
    separator = _separator(folder, tokenizer)
    length = wanted.sequence_length or min(architecture.context, CONTEXT)
    data = _with(DataConfig(tokenizer=name, vocab_size=tokenizer.vocab_size, sequence_length=length), wanted)
    with one_rank(fastest_device()) as world:
        trial, model = imported(folder, length, world)
        _end_documents_with(model, tokenizer.eod, separator)
        notes = [f"config.json has keys unknown here, which were left out: {', '.join(architecture.not_understood)}"]
        told = {
            "folder": str(directory),
            "format": architecture.form,
            "stored_dtype": str(folder.dtype).removeprefix("torch."),
            "notes": notes if architecture.not_understood else [],
        }
        return told | _measure(trial.model_copy(update={"data": data}), model, world, wanted)


def _with(data: DataConfig, wanted: Wanted) -> DataConfig:
    changes = {name: getattr(wanted, name) for name in ("corpus", "sequence_length", "validation_every")}
    changes = {name: value for name, value in changes.items() if value is not None}
    return data.model_copy(update=changes | ({"corpus_sha256": ""} if wanted.corpus is not None else {}))


def _separator(folder: export.PublishedFolder, tokenizer: Tokenizer) -> int:
    """The model's token between documents, and before the first. Ours is one past the file's own and means nothing."""
    architecture = folder.architecture
    if tokenizer.vocab_size - 1 > architecture.vocab_size:
        raise export.Refused(
            f"{folder.directory}: the tokenizer has ids up to {tokenizer.vocab_size - 2:,}, the model only "
            f"{architecture.vocab_size:,} tokens"
        )
    if architecture.separator is None:
        raise export.Refused(
            f"{folder.directory}/config.json has no eos_token_id, the token that a document's first is predicted from"
        )
    if not 0 <= architecture.separator < architecture.vocab_size:
        raise export.Refused(
            f"{folder.directory}/config.json: eos_token_id {architecture.separator} is not in the vocabulary of "
            f"{architecture.vocab_size:,}"
        )
    return architecture.separator


def _end_documents_with(model: nn.Module, ours: int, theirs: int) -> None:
    """Let the model see its own separator where the corpus has ours; as a target it is masked out either way."""

    def translate(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], Any]:
        for name in ("input_ids", "labels"):
            if kwargs.get(name) is not None:
                kwargs[name] = kwargs[name].masked_fill(kwargs[name] == ours, theirs)
        return args, kwargs

    model.register_forward_pre_hook(translate, with_kwargs=True)


@torch.no_grad()
def _measure(trial: TrialConfig, model: GPTModel, world: World, wanted: Wanted) -> dict[str, Any]:
    """``trial`` names the data; its training part is not looked at."""
    prepared = corpus.prepare(trial.data, wanted.data_dir)
    micro_batch = max(1, MICRO_BATCH_TOKENS // trial.data.sequence_length)
    windows = corpus.validation_batches(prepared, trial.data, wanted.split, batch_sequences=micro_batch)
    nats = passes.run(
        [model.eval()],
        lambda: _on_device(windows, world),
        passes.sum_loss,
        num_micro_batches=len(windows),
        micro_batch_sequences=micro_batch,
        sequence_length=trial.data.sequence_length,
        forward_only=True,
        separate_documents=trial.data.separate_documents,
    )
    total = float(torch.stack(nats).sum())
    seen, num_sequences = _look_inside(trial, model, prepared, world, micro_batch, wanted.split)
    return {
        "model": trial.model.model_dump(mode="json"),
        "gates": [gate.model_dump(mode="json") for gate in trial.gates],
        "num_parameters": layer_specs.num_parameters(model),
        "corpus": trial.data.corpus,
        "split": wanted.split,
        "sequence_length": trial.data.sequence_length,
        "loss_nats": finite_or_none(total / windows.num_tokens),
        "bits_per_byte": finite_or_none(windows.bits_per_byte(total)),
        "num_tokens": windows.num_tokens,
        "num_bytes": windows.num_bytes,
        "probe_sequences": num_sequences,
        "diagnostics": seen.model_dump(mode="json"),
    }


def _look_inside(
    trial: TrialConfig, model: GPTModel, prepared: corpus.Prepared, world: World, at_most: int, split: SplitName
) -> tuple[LayerDiagnostics, int]:
    """The probe on the first windows of the split, and how many they were: never one that is mostly padding."""
    content = prepared.split("slice" if split == "slice" else "validation")
    num_sequences = max(1, min(at_most, content.num_tokens // trial.data.sequence_length))
    windows = corpus.validation_batches(prepared, trial.data, split, batch_sequences=num_sequences)
    return probe(model, next(_on_device(windows, world))), num_sequences


def _on_device(windows: corpus.ValidationBatches, world: World) -> Iterator[corpus.Batch]:
    for batch in windows:
        yield {name: tensor.to(world.device) for name, tensor in batch.items()}
