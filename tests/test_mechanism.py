"""Table 4 of a stored sweep: means over layers and seeds, and what is missing is said, in every format."""

from __future__ import annotations

import csv
import io
import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console
from store_runs import probed

from models.run_dir import DiagnosticRecord, GateScores, Summary, ValidationRecord
from orchestrator.plan import PlannedTrial, expand
from orchestrator.report import (
    Mechanism,
    MechanismView,
    mechanism,
    mechanism_to_csv,
    mechanism_to_json,
    mechanism_to_markdown,
)
from orchestrator.store import Lease, Store
from orchestrator.sweep import parse

SWEEP = """
name: small
question: Does the gate work as the paper says?
base:
  model: {preset: cpu-tiny}
  data: {sequence_length: 64}
  train: {tokens: 5120, batch_tokens: 128}
baseline: baseline
arms:
  baseline: {}
  g1: {gate: {position: sdpa}}
axes: {train.lr: [1e-3, 4e-3]}
seeds: [1, 2]
controls: []
"""
STEPS = 40
BEST = 4e-3


class Bench:
    """A store with the sweep above; trials are ended as a test wants."""

    def __init__(self, store: Store) -> None:
        self.store, self.plan = store, expand(parse(SWEEP, "small.yaml"))
        self.lease: Lease = store.acquire_lease(store.add(self.plan).sweep_id, "host:1", 60)

    def complete(
        self, planned: PlannedTrial, probes: list[DiagnosticRecord], spike_steps: tuple[int, ...] = ()
    ) -> None:
        attempt = self.store.start_attempt(
            self.lease, planned.fingerprint, layout=planned.layout, provenance={}, resume_step=0
        )
        losses = {step: 2.5 + (0.5 if step in spike_steps else 0.0) for step in range(1, STEPS + 1)}
        loss = 2.4 - (planned.config.train.lr == BEST) / 10 + planned.seed / 100
        self.store.record(self.lease, attempt, [*_steps(losses), _validation(loss), *probes])
        self.store.end_attempt(
            self.lease, attempt, state="COMPLETE", cause="complete", reason="done", end_step=STEPS,
            summary=Summary(outcome="complete", step=STEPS, resume_step=0, seconds=1.0, tokens_per_second=9.0),
        )  # fmt: skip

    def complete_all(self, probes: Any) -> Mechanism:
        for planned in self.plan.trials:
            self.complete(planned, probes(planned))
        return mechanism(self.store, "small")


def _steps(losses: dict[int, float]) -> Iterator[Any]:
    from models.run_dir import StepRecord

    for step, loss in losses.items():
        yield StepRecord(
            step=step, tokens=step * 128, fraction=step / STEPS, lr=1e-3, loss_nats=loss, gradient_norm=1.0,
            tokens_per_second=9.0,
        )  # fmt: skip


def _validation(loss: float) -> ValidationRecord:
    return ValidationRecord(
        step=STEPS, tokens=STEPS * 128, fraction=1.0, split="slice", loss_nats=loss, bits_per_byte=loss,
        num_tokens=10, num_bytes=10,
    )  # fmt: skip


@pytest.fixture
def bench(tmp_path: Path) -> Iterator[Bench]:
    with Store(f"sqlite:///{tmp_path / 'store.db'}") as store:
        yield Bench(store)


def as_the_paper_says(planned: PlannedTrial) -> list[DiagnosticRecord]:
    """Half-way and at the end; numbers away from the best learning rate are absurd, so that they would show."""
    if planned.config.train.lr != BEST:
        return [probed(STEPS, attention=0.99, score=0.99, fraction=1.0)]
    if planned.arm == "baseline":
        return [probed(20, attention=0.9), probed(STEPS, attention=0.3 + planned.seed / 10, fraction=1.0)]
    return [probed(20, 0.9, 0.9), probed(STEPS, 0.25, score=0.1 * planned.seed, fraction=1.0)]


def printed(answer: Mechanism, width: int = 120) -> str:
    stream = io.StringIO()
    Console(file=stream, width=width, color_system=None).print(MechanismView(answer))
    return stream.getvalue()


def test_a_row_is_the_mean_over_layers_and_seeds_after_the_last_step_at_the_best_rate(bench: Bench):
    (table,) = bench.complete_all(as_the_paper_says).tables
    baseline, gated = table.rows
    assert (baseline.arm, baseline.best_lr, baseline.gate_scores) == ("baseline", BEST, {})
    assert baseline.first_token_attention.mean == pytest.approx(0.45)
    assert baseline.first_token_attention.sd == pytest.approx(0.1 / math.sqrt(2))
    assert (baseline.max_activation.mean, baseline.max_activation.sd) == (30.0, 0.0)
    assert gated.gate_scores["sdpa"].mean == pytest.approx(0.15)
    assert (gated.num_seeds, gated.num_probed) == (2, 2)
    best = {trial.fingerprint for trial in bench.plan.trials if trial.arm == "g1" and trial.config.train.lr == BEST}
    assert set(gated.gate_scores["sdpa"].trials) == set(gated.num_loss_spikes.trials) == best


def test_loss_spikes_are_counted_on_the_training_curve(bench: Bench):
    for planned in bench.plan.trials:
        spikes = {("baseline", 1): (20, 30, 31), ("baseline", 2): (25,)}.get((planned.arm, planned.seed), ())
        bench.complete(planned, [], spikes)
    (table,) = mechanism(bench.store, "small").tables
    assert [row.num_loss_spikes.mean for row in table.rows] == [2.0, 0.0]
    assert table.rows[0].num_loss_spikes.sd == pytest.approx(math.sqrt(2))


def test_a_trial_without_a_probe_at_the_end_is_left_out_and_named(bench: Bench):
    def probes(planned: PlannedTrial) -> list[DiagnosticRecord]:
        return as_the_paper_says(planned)[: 1 if planned.seed == 1 else 2]

    (table,) = bench.complete_all(probes).tables
    assert [(row.num_seeds, row.num_probed) for row in table.rows] == [(2, 1), (2, 1)]
    assert table.rows[0].first_token_attention.mean == pytest.approx(0.5)
    assert table.rows[0].first_token_attention.sd is None
    (note,) = [note for note in table.footnotes if note.startswith("without a probe")]
    assert note.endswith("baseline (1 of 2), g1 (1 of 2)")


def test_a_number_that_was_not_finite_leaves_no_mean(bench: Bench):
    def probes(planned: PlannedTrial) -> list[DiagnosticRecord]:
        bad = {"max_activation": [None, 50.0], "nonfinite": True} if planned.seed == 1 else {}
        return [probed(STEPS, fraction=1.0, **bad)]

    (table,) = bench.complete_all(probes).tables
    assert table.rows[0].max_activation.mean is None
    assert table.rows[0].first_token_attention.mean == pytest.approx(0.5)


def test_a_sweep_without_diagnostics_or_complete_trials_has_dashes_and_says_why(bench: Bench):
    text = printed(mechanism(bench.store, "small"))
    assert "no arm has a learning rate with all its seeds complete" in text
    text = printed(bench.complete_all(lambda _: []))
    assert [line.split()[2:5] for line in text.splitlines() if line.startswith(("baseline ", "g1 "))] == [["-"] * 3] * 2
    assert "M-Act (" not in text.replace("\n", " ")


def test_several_gates_are_told_apart(bench: Bench):
    def scores(mean: float) -> GateScores:
        return GateScores(mean=[mean, mean], share_below={}, low=0, high=1, histogram=[None, None])

    def probes(_: PlannedTrial) -> list[DiagnosticRecord]:
        return [probed(STEPS, fraction=1.0, gate_scores={"value": scores(0.2), "sdpa": scores(0.6)})]

    answer = bench.complete_all(probes)
    assert "value 0.2000 ±0.0000, sdpa 0.6000 ±0.0000" in mechanism_to_markdown(answer)
    row = next(csv.DictReader(io.StringIO(mechanism_to_csv(answer))))
    assert (float(row["gate_score_value"]), float(row["gate_score_sdpa"])) == pytest.approx((0.2, 0.6))


def test_every_format_tells_the_same(bench: Bench):
    answer = bench.complete_all(as_the_paper_says)
    text = printed(answer)
    (gated,) = [line for line in text.splitlines() if line.startswith("g1 ")]
    assert gated.split() == [
        "g1", "4e-3", "0.1500", "±0.0707", "30", "±0", "0.2500", "±0.0000", "0", "±0", "2.3150", "±0.0071",
    ]  # fmt: skip
    assert "over the first window of the validation slice" in " ".join(text.split())
    markdown = mechanism_to_markdown(answer)
    assert "| baseline | 4e-3 | - | 30 ±0 | 0.4500 ±0.0707 | 0 ±0 | 2.3150 ±0.0071 |" in markdown
    lines = list(csv.DictReader(io.StringIO(mechanism_to_csv(answer))))
    assert lines[0]["gate_score_sdpa"] == ""
    assert float(lines[1]["gate_score_sdpa"]) == pytest.approx(0.15)
    content = json.loads(mechanism_to_json(answer))
    cell = content["tables"][0]["rows"][1]["gate_score_sdpa"]
    assert (cell["value"], cell["formula"]) == (pytest.approx(0.15), "mechanism-1")
    assert len(cell["trials"]) == 2
    narrow = printed(answer, width=60)
    assert "0.4500" in narrow
    assert max(map(len, narrow.splitlines())) <= 60
