"""Tiny sweeps, one shared Ray, and ways to look at a run, for the tests of gangs, controller and command line."""

from __future__ import annotations

import functools
import json
import random
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import astuple
from pathlib import Path
from typing import Any, TypeVar

import pytest

from models import run_dir
from models.config import TrialConfig
from models.run_dir import AttemptSpec, StepRecord, ValidationRecord
from orchestrator.controller import Snapshot
from orchestrator.gang import Cluster
from orchestrator.plan import Plan, expand
from orchestrator.store import Store
from orchestrator.sweep import load

T = TypeVar("T")

PATIENCE_SECONDS = 240.0
"""Far more than anything here takes: on a busy machine a test is slow, not wrong."""

SWEEP = """\
name: tiny
question: does it run?
base:
  model: {preset: cpu-tiny}
  data: {corpus: corpus.jsonl, sequence_length: 64, validation: {slice_bytes: 1024, points: 2}}
  train: {tokens: 5120, batch_tokens: 256, lr: 3e-3}
baseline: baseline
arms:
  baseline: {}
  g1: {gate: {position: sdpa}}
seeds: [1]
checkpoint: {every_steps: 5}
controls: []
"""
"""20 steps a trial, in well under a second."""

LONG = ("train.tokens=128000",)
"""500 steps: some seconds, long enough to be killed or stopped in the middle."""


@functools.cache
def the_cluster() -> Cluster:
    """One Ray for the whole test session; Ray itself ends it with the process."""
    return Cluster()


@pytest.fixture(scope="session")
def cluster() -> Cluster:
    return the_cluster()


def wait_for(condition: Callable[[], T | None], what: str) -> T:
    """The first true answer of ``condition``, asked again and again; an error after PATIENCE_SECONDS."""
    deadline = time.monotonic() + PATIENCE_SECONDS
    while time.monotonic() < deadline:
        answer = condition()
        if answer:
            return answer
        time.sleep(0.02)
    raise AssertionError(f"waited {PATIENCE_SECONDS:g} s in vain for {what}")


def write_corpus(path: Path, seed: int = 0, num_documents: int = 60) -> Path:
    """Documents of a few words drawn at random: a tiny model learns their frequencies in a few steps."""
    draw = random.Random(seed)
    words = ["gate", "score", "layer", "token", "sink", "value", "query", "key", "dense", "union", "people", "state"]
    with path.open("w") as stream:
        for _ in range(num_documents):
            stream.write(json.dumps({"text": " ".join(draw.choices(words, k=120))}) + "\n")
    return path


def write_sweep(folder: Path, text: str = SWEEP, name: str = "tiny.yaml") -> Path:
    """The sweep's file with its corpus beside it."""
    folder.mkdir(parents=True, exist_ok=True)
    if not (folder / "corpus.jsonl").exists():
        write_corpus(folder / "corpus.jsonl")
    path = folder / name
    path.write_text(text)
    return path


def plan_of(folder: Path, overrides: Sequence[str] = (), text: str = SWEEP) -> Plan:
    return expand(load(write_sweep(folder, text), overrides))


class NoMirror:
    """Counts how often it was told that there is news."""

    def __init__(self) -> None:
        self.num_nudges = 0

    def nudge(self) -> None:
        self.num_nudges += 1


class Watcher:
    """A view that remembers; ``on_tick`` and ``on_line`` let a test act in the middle of a run."""

    def __init__(self) -> None:
        self.lines: list[str] = []
        self.snapshots: list[Snapshot] = []
        self.on_tick: Callable[[Snapshot], None] = lambda _: None
        self.on_line: Callable[[str], None] = lambda _: None

    def tick(self, snapshot: Snapshot) -> None:
        self.snapshots.append(snapshot)
        self.on_tick(snapshot)

    def tell(self, line: str) -> None:
        self.lines.append(line)
        self.on_line(line)

    def started(self) -> list[str]:
        """Names of the trials in the order in which they were started."""
        return [line.removeprefix("started").strip() for line in self.lines if line.startswith("started")]


def attempt_spec(home: Path, config: TrialConfig, token: str, number: int = 1, **changes: Any) -> AttemptSpec:
    """A trial's run dir, made for an attempt that no controller asked for."""
    directory = run_dir.trial_dir(home, config.fingerprint())
    run_dir.write_trial_config(directory, config)
    return AttemptSpec.model_validate(
        {
            "fingerprint": config.fingerprint(),
            "number": number,
            "token": token,
            "trial_dir": str(directory),
            "data_dir": str(home / "data"),
            **changes,
        }
    )


def written_numbers(spec: AttemptSpec) -> list[dict[str, Any]]:
    """Every record of an attempt without its speed, which is the only thing that may differ between two runs."""
    return [_without_speed(record) for record in run_dir.read_records(spec.attempt_dir)[0]]


def _without_speed(record: StepRecord | ValidationRecord) -> dict[str, Any]:
    return {name: value for name, value in record.model_dump().items() if name != "tokens_per_second"}


def curve_numbers(store: Store, fingerprint: str) -> list[tuple[Any, ...]]:
    """A trial's curve and probes as the store tells them, without speed and without saying which attempt made what."""
    curve = store.curve(fingerprint)
    steps: Iterator[tuple[Any, ...]] = (
        (row.step, row.tokens, row.fraction, row.lr, row.loss_nats, row.gradient_norm, row.nonfinite)
        for row in curve.steps
    )
    validations = (
        (row.step, row.split, row.tokens, row.fraction, row.loss_nats, row.bits_per_byte, row.num_bytes)
        for row in curve.validations
    )
    layers = (astuple(row)[1:] for row in store.layers(fingerprint))
    return [*steps, *validations, *layers]
