"""A submitted sweep, its records and a controller's lease, for the tests of the store on every back end."""

# ruff: noqa: F811 (fixtures are imported by name)

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import Any

import pytest
from store_backends import postgres_server, store_url  # noqa: F401

from models.accounting import rank_memory
from models.config import DataConfig, Layout, TrainConfig, TrialConfig
from models.presets import PRESETS
from models.run_dir import DiagnosticRecord, GateScores, StepRecord, ValidationRecord
from orchestrator.plan import Plan, PlannedTrial
from orchestrator.store import (
    AttemptRow,
    Outcome,
    Store,
)
from orchestrator.sweep import ResourcesConfig, Sweep, VerdictConfig

STEPS = 20


def a_plan(
    name: str = "quick",
    lrs: Sequence[float] = (1e-3, 4e-3),
    arms: Sequence[str] = ("baseline", "gated"),
    verdict: VerdictConfig | None = None,
) -> Plan:
    """Arms differ in the width of the FFN, which is enough to tell their fingerprints apart."""
    sweep = Sweep(
        name=name,
        question="Is it better?",
        base={},
        baseline=arms[0],
        arms={arm: {"gate": {"position": "sdpa"}} if arm != "baseline" else {} for arm in arms},
        axes={"train.lr": tuple(lrs)},
        seeds=(1,),
        verdict=verdict or VerdictConfig(margin=0.01),
        text=f"name: {name}\n",
        overrides=("train.tokens=1e4",),
    )
    trials = []
    for index, arm in enumerate(arms):
        model = PRESETS["cpu-tiny"].model_copy(update={"ffn_size": 192 + 2 * index})
        for lr in lrs:
            train = TrainConfig(tokens=STEPS * 256, batch_tokens=256, lr=lr)
            config = TrialConfig(model=model, data=DataConfig(), train=train, seed=1)
            planned = PlannedTrial(
                position=len(trials),
                arm=arm,
                axes={"train.lr": lr},
                seed=1,
                config=config,
                fingerprint=config.fingerprint(),
                resources=ResourcesConfig(),
                num_parameters=1234,
                training_flops=5678,
                num_active_parameters=1234,
                micro_batch_sequences=1,
                memory=rank_memory(config, Layout(), 1, "cpu"),
            )
            trials.append(planned)
    return Plan(sweep, tuple(trials), refusals=())


def steps(first: int, last: int, loss: float = 3.0) -> list[StepRecord]:
    return [
        StepRecord(
            step=step,
            tokens=step * 256,
            fraction=step / STEPS,
            lr=1e-3,
            loss_nats=loss,
            gradient_norm=1.0,
            tokens_per_second=100.0,
        )
        for step in range(first, last + 1)
    ]


def validation(step: int, loss: float, split: str = "slice") -> ValidationRecord:
    return ValidationRecord(
        step=step,
        tokens=step * 256,
        fraction=step / STEPS,
        split="full" if split == "full" else "slice",
        loss_nats=loss,
        bits_per_byte=loss / math.log(2),
        num_tokens=32768,
        num_bytes=32768,
    )


def probed(step: int, attention: float = 0.5, score: float | None = None, **changes: Any) -> DiagnosticRecord:
    """Two layers of two heads; F-Attn is ``attention``, M-Act 30, and the score, if any, is that of a gate at sdpa."""
    scores = None if score is None else _scores(score)
    record = DiagnosticRecord(
        step=step,
        tokens=step * 256,
        fraction=step / STEPS,
        first_token_attention=[[attention, attention + 0.2], [attention - 0.2, attention]],
        max_activation=[10.0, 50.0],
        attention_output_rms=[0.1, 0.2],
        ffn_output_rms=[0.3, 0.4],
        residual_rms=[1.0, 2.0],
        gradient_norm=[0.5, 0.25],
        update_ratio=[1e-3, 2e-3],
        gate_scores={} if scores is None else {"sdpa": scores},
    )
    return record.model_copy(update=changes)


def _scores(mean: float) -> GateScores:
    shares = {"0.1": [0.25, 0.75], "0.5": [0.5, 1.0]}
    histogram: list[list[float] | None] = [[0.75, 0.25], [1.0, 0.0]]
    return GateScores(mean=[mean + 0.1, mean - 0.1], share_below=shares, low=0.0, high=1.0, histogram=histogram)


@pytest.fixture
def store(store_url: str) -> Iterator[Store]:
    with Store(store_url) as opened:
        yield opened


class Run:
    """A store with one submitted sweep and a controller's lease on it."""

    def __init__(self, store: Store, plan: Plan | None = None) -> None:
        self.store = store
        self.plan = plan or a_plan()
        self.sweep_id = store.add(self.plan).sweep_id
        self.lease = store.acquire_lease(self.sweep_id, "host-a:1", 60)
        self.fingerprint = self.plan.trials[0].fingerprint

    def start(
        self,
        resume_step: int = 0,
        resumed_from: int | None = None,
        fingerprint: str | None = None,
        hosts: Sequence[str] = (),
    ) -> AttemptRow:
        return self.store.start_attempt(
            self.lease,
            fingerprint or self.fingerprint,
            layout=Layout(data=2),
            provenance={"commit": "abc123", "dirty": True, "packages": {"torch": "2.13.0"}},
            resume_step=resume_step,
            resumed_from=resumed_from,
            hosts=hosts,
        )

    def end(self, attempt: AttemptRow, state: str, cause: str = "finished", **more: Any) -> None:
        self.store.end_attempt(self.lease, attempt, state=state, cause=cause, reason="because", **more)

    def trial(self, fingerprint: str | None = None) -> Any:
        wanted = fingerprint or self.fingerprint
        return next(trial for trial in self.store.trials(self.sweep_id) if trial.fingerprint == wanted)

    def outcome(self, fingerprint: str | None = None, tail: float = 0.1) -> Outcome:
        wanted = fingerprint or self.fingerprint
        return next(one for one in self.store.outcomes(self.sweep_id, tail) if one.fingerprint == wanted)

    def complete(self, fingerprint: str, loss: float) -> None:
        attempt = self.start(fingerprint=fingerprint)
        self.store.record(self.lease, attempt, [*steps(1, STEPS), validation(STEPS, loss)])
        self.end(attempt, "COMPLETE")


@pytest.fixture
def run(store: Store) -> Run:
    return Run(store)
