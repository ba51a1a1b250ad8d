"""Trials, models and runs small enough for tests; shared by the tests of models/. Loads torch only when it builds."""

from __future__ import annotations

import json
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from models import run_dir
from models.config import (
    DataConfig,
    GateConfig,
    Layout,
    ModelConfig,
    Position,
    TrainConfig,
    TrialConfig,
    ValidationConfig,
)
from models.presets import PRESETS
from models.run_dir import AttemptSpec, DiagnosticRecord, StepRecord, Summary

SMALL = ModelConfig(num_layers=2, hidden_size=32, num_query_heads=4, num_kv_heads=2, head_dim=8, ffn_size=48)
SMALL_VOCABULARY = 30
SMALL_SEQUENCE = 12
VOCABULARY = 256


def gates_by_kind() -> dict[str, GateConfig | None]:
    """Every gate that differs in shape (position x granularity x input), and a few more; one name each."""
    kinds: dict[str, GateConfig | None] = {"baseline": None}
    positions: tuple[Position, ...] = ("sdpa", "value", "key", "query", "dense")
    for position in positions:
        for granularity in ("elementwise",) if position == "dense" else ("elementwise", "headwise"):
            for source in ("hidden", "none"):
                gate = GateConfig.model_validate({"position": position, "granularity": granularity, "input": source})
                kinds[f"{position}-{granularity}-{source}"] = gate
    return kinds | {
        "sdpa-shared": GateConfig(position="sdpa", sharing="head_shared"),
        "value-shared": GateConfig(position="value", sharing="head_shared"),
        "constant": GateConfig(position="sdpa", input="constant", scale=0.5),
    }


KINDS = gates_by_kind()


def shape_of(preset: str, gate: GateConfig | None, **changes: Any) -> TrialConfig:
    """A trial with the preset's model, at a vocabulary of bytes."""
    trial = small_trial(gate, PRESETS[preset].model_copy(update=changes))
    return trial.model_copy(update={"data": trial.data.model_copy(update={"vocab_size": VOCABULARY})})


def small_trial(gate: GateConfig | None = None, model: ModelConfig = SMALL, seed: int = 1) -> TrialConfig:
    """A config to build a model from; its batches come from ``small_batch``."""
    return TrialConfig(
        model=model,
        gate=gate,
        data=DataConfig(vocab_size=SMALL_VOCABULARY, sequence_length=SMALL_SEQUENCE),
        train=TrainConfig(tokens=10 * SMALL_SEQUENCE, batch_tokens=SMALL_SEQUENCE, lr=1e-3),
        seed=seed,
    )


def build(trial: TrialConfig, layout: Layout | None = None) -> Any:
    """The GPTModel of ``trial``, every parameter redrawn with a size that matters: zeros and 0.02s hide mistakes."""
    import torch

    from models import device, layer_specs

    with device.on("cpu"):
        device.seed_everything(trial.seed, "cpu")
        model = layer_specs.build_model(trial, layout or Layout(), "cpu")
    generator = torch.Generator().manual_seed(trial.seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            if name.endswith("norm.weight"):
                parameter.copy_(1.0 + 0.3 * noise)
            elif "gate_parameters." in name:
                parameter.copy_(noise)
            else:
                parameter.copy_(noise / parameter.shape[-1] ** 0.5)
    return model


def small_batch(seed: int = 0, num_sequences: int = 2) -> tuple[Any, Any]:
    """(tokens, labels), [B, S]."""
    import torch

    generator = torch.Generator().manual_seed(seed)
    shape = (num_sequences, SMALL_SEQUENCE + 1)
    stream = torch.randint(SMALL_VOCABULARY, shape, generator=generator)
    return stream[:, :-1].contiguous(), stream[:, 1:].contiguous()


def token_losses(model: Any, tokens: Any, labels: Any) -> Any:
    """[B, S], of a Megatron model."""
    import torch

    from models import device
    from models.trainer import passes

    positions = torch.arange(tokens.shape[1]).expand_as(tokens)
    with device.on("cpu"):
        return passes.token_losses(model, {"tokens": tokens, "labels": labels, "position_ids": positions})


# -- whole attempts on a tiny corpus --------------------------------------------------------------------------


def write_corpus(path: Path) -> Path:
    """A corpus of 12 documents, some 10 kB, with a few multi-byte characters."""
    rng = random.Random(0)
    words = ["gate", "value", "query", "softmax", "Frühling", "слово", "a", "the", "sink", "token"]
    texts = [" ".join(rng.choices(words, k=rng.randint(80, 200))) for _ in range(12)]
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    return path


def corpus_trial(
    corpus: Path, gate: GateConfig | None = None, steps: int = 5, seed: int = 1, **train: Any
) -> TrialConfig:
    """cpu-tiny on ``write_corpus``, 8 sequences of 32 tokens a step, validated half way and at the end."""
    validation = ValidationConfig(slice_bytes=600, points=2)
    return TrialConfig(
        model=PRESETS["cpu-tiny"],
        gate=gate,
        data=DataConfig(corpus=str(corpus), sequence_length=32, validation_every=4, validation=validation),
        train=TrainConfig(**{"tokens": steps * 256, "batch_tokens": 256, "lr": 3e-3, **train}),
        seed=seed,
    )


def new_attempt(home: Path, trial: TrialConfig, number: int = 1, **spec: Any) -> AttemptSpec:
    """A run dir as the controller would make it."""
    directory = run_dir.trial_dir(home, trial.fingerprint())
    run_dir.write_trial_config(directory, trial)
    attempt = AttemptSpec(
        fingerprint=trial.fingerprint(),
        number=number,
        token="test",
        trial_dir=str(directory),
        data_dir=str(home / "data"),
        **spec,
    )
    run_dir.write_json(attempt.attempt_dir / "attempt.json", attempt)
    return attempt


def everything(spec: AttemptSpec) -> list[dict[str, Any]]:
    """The records of an attempt without what differs from run to run."""
    records, _ = run_dir.read_records(spec.attempt_dir)
    return [record.model_dump(exclude={"tokens_per_second"}) for record in records]


def metrics(spec: AttemptSpec) -> list[dict[str, Any]]:
    """Of these, what was learnt: steps and validations."""
    return [record for record in everything(spec) if record["kind"] != "diagnostics"]


def diagnostics(spec: AttemptSpec) -> list[DiagnosticRecord]:
    return [record for record in run_dir.read_records(spec.attempt_dir)[0] if isinstance(record, DiagnosticRecord)]


def assert_same_diagnostics(found: list[DiagnosticRecord], expected: list[DiagnosticRecord]) -> None:
    """Equal within rounding, number by number. A share counts scores, and a rounding may move one over a limit."""
    assert expected
    assert [record.step for record in found] == [record.step for record in expected]
    for ours, theirs in zip(found, expected, strict=True):
        pairs = zip(_flat(ours.model_dump()), _flat(theirs.model_dump()), strict=True)
        for (path, number), (same_path, reference) in pairs:
            assert path == same_path
            if isinstance(reference, float):
                size = abs(reference)
                tolerance = 1e-3 if "share_below" in path or "histogram" in path else 2e-5 * size + 1e-8
                assert abs(number - reference) <= tolerance, (theirs.step, path, number, reference)
            else:
                assert number == reference, (theirs.step, path)


def _flat(content: Any, path: str = "") -> Iterator[tuple[str, Any]]:
    if isinstance(content, dict | list):
        for key, value in content.items() if isinstance(content, dict) else enumerate(content):
            yield from _flat(value, f"{path}.{key}")
    else:
        yield path, content


def checkpoint_tensors(checkpoint: Path) -> dict[str, Any]:
    """Every tensor in a checkpoint by its path, as numpy's: weights and the optimizer's moments."""
    from megatron.core import dist_checkpointing

    tensors = dist_checkpointing.load_plain_tensors(str(checkpoint))
    return {path: tensor.numpy() for path, tensor in _flat(tensors) if hasattr(tensor, "numpy")}


def steps_of(spec: AttemptSpec) -> list[StepRecord]:
    return [record for record in run_dir.read_records(spec.attempt_dir)[0] if isinstance(record, StepRecord)]


def summary_of(spec: AttemptSpec) -> Summary:
    summary = run_dir.read_summary(spec.attempt_dir)
    assert summary is not None, f"{spec.attempt_dir} has no summary"
    return summary
