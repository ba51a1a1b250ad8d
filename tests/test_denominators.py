"""Equal tokens, FLOPs, parameters, wall-clock: verdicts where amounts are equal, descriptions or refusals elsewhere."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Callable
from pathlib import Path

import pytest
from rich.console import Console

from models.run_dir import Summary, ValidationRecord
from orchestrator.plan import PlannedTrial, expand
from orchestrator.report import EqualView, at_equal, equal_to_csv, equal_to_json, results
from orchestrator.scaling import are_equal, read_at, shares_of_schedule
from orchestrator.store import Store
from orchestrator.sweep import parse

SWEEP = """
name: four
question: At equal what?
base:
  model: {preset: cpu-tiny}
  data: {sequence_length: 64}
  train: {batch_tokens: 128, lr: 1e-3, tokens: 51200}
baseline: baseline
arms: {baseline: {}, g1: {gate: {position: sdpa}}}
seeds: [1, 2]
controls: []
baseline_seeds: 2
verdict: {margin: 0.01}
"""


def same_place(_: PlannedTrial) -> tuple[str, float]:
    return "node-1", 1000.0


def trained(
    store: Store, text: str = SWEEP, place: Callable[[PlannedTrial], tuple[str, float]] = same_place
) -> dict[str, list[PlannedTrial]]:
    """Losses fall in a straight line over the schedule, from 3; G1 ends 0.1 below the baseline."""
    plan = expand(parse(text, "four.yaml"))
    assert not plan.refusals
    lease = store.acquire_lease(store.add(plan).sweep_id, "host:1", 60)
    arms: dict[str, list[PlannedTrial]] = {}
    for planned in plan.trials:
        arms.setdefault(planned.arm, []).append(planned)
        host, speed = place(planned)
        attempt = store.start_attempt(
            lease, planned.fingerprint, layout=planned.layout, provenance={}, hosts=[host], cpus=1
        )  # fmt: skip
        steps, batch = planned.config.train.num_steps, planned.config.train.batch_tokens
        end = 2.0 + planned.seed / 1000 - 0.1 * (planned.arm == "g1")
        records = []
        for quarter in (1, 2, 3, 4):
            step = steps * quarter // 4
            loss = 3.0 + (end - 3.0) * step / steps
            records.append(
                ValidationRecord(
                    step=step,
                    tokens=step * batch,
                    fraction=step / steps,
                    split="slice",
                    loss_nats=loss,
                    bits_per_byte=loss,
                    num_tokens=10,
                    num_bytes=10,
                )
            )
        store.record(lease, attempt, records)
        store.end_attempt(
            lease, attempt, state="COMPLETE", cause="complete", reason="done", end_step=steps,
            summary=Summary(outcome="complete", step=steps, resume_step=0, seconds=1.0, tokens_per_second=speed),
        )  # fmt: skip
    store.release_lease(lease)
    return arms


@pytest.fixture
def store(tmp_path: Path):
    with Store(f"sqlite:///{tmp_path / 'store.db'}") as opened:
        yield opened


def rows(found, table=0):
    return {row.arm: row for row in found.tables[table].rows}


def test_equal_tokens_are_the_verdict_table(store: Store):
    trained(store)
    row = rows(at_equal(store, "four", "tokens"))["g1"]
    judged = next(one for one in results(store, "four").tables[0].rows if one.arm == "g1")
    assert (row.decision, row.delta_nats, row.low_nats, row.high_nats) == (
        "better", judged.delta_nats, judged.low_nats, judged.high_nats,
    )  # fmt: skip
    assert row.ratios.tokens == 1.0
    assert row.ratios.flops > 1.01


@pytest.mark.parametrize("denominator", ["flops", "parameters"])
def test_unequal_amounts_describe_and_decide_nothing(store: Store, denominator: str):
    arms = trained(store)
    row = rows(at_equal(store, "four", denominator))["g1"]
    assert (row.decision, row.low_nats, row.high_nats) == (None, None, None)
    assert row.words.startswith("descriptive: ")
    assert "better" not in row.words
    if denominator == "parameters":
        assert (row.share, row.delta_nats) == (1.0, pytest.approx(-0.1))
        return
    share = arms["baseline"][0].training_flops / arms["g1"][0].training_flops
    assert row.share == pytest.approx(share)
    assert row.delta_nats == pytest.approx(3.0 + (1.9 - 3.0) * share - 2.0 - 0.0015 * (1 - share), abs=1e-6)


@pytest.mark.parametrize("by", ["parameters", "flops"])
def test_what_the_sweep_matched_is_equal_within_the_step_of_the_match(store: Store, by: str):
    arms = trained(store, SWEEP + f"match: {{by: {by}, ffn_multiple: 64}}\n")
    ratio = arms["g1"][0].num_parameters / arms["baseline"][0].num_parameters
    row = rows(at_equal(store, "four", by))["g1"]
    assert by == "flops" or not are_equal(ratio, 1.0)
    assert row.decision == "better"


def test_equal_flops_are_looked_for_among_the_budgets_of_an_axis(store: Store):
    flops = {one.arm: one.training_flops for one in expand(parse(SWEEP, "four.yaml")).trials}
    more = round(400 * flops["g1"] / flops["baseline"]) * 128
    text = SWEEP.replace(", tokens: 51200}", "}") + f"axes: {{train.tokens: [51200, {more}]}}\n"
    trained(store, text)
    found = at_equal(store, "four", "flops")
    row = rows(found, 1)["g1"]
    assert dict(row.axes) == {"train.tokens": 51200}
    assert dict(found.tables[1].axes) == {"train.tokens": more}
    assert row.decision == "better"
    assert row.ratios.flops == pytest.approx(1.0, abs=0.01)
    assert rows(found, 0)["g1"].decision is None


def test_an_arm_of_its_own_budget_is_judged_at_equal_flops_alone(store: Store):
    flops = {one.arm: one.training_flops for one in expand(parse(SWEEP, "four.yaml")).trials}
    fewer = round(400 * flops["baseline"] / flops["g1"]) * 128
    gate = "g1: {gate: {position: sdpa}"
    trained(store, SWEEP.replace(gate, f"{gate}, train: {{tokens: {fewer}}}"))
    assert rows(at_equal(store, "four", "flops"))["g1"].decision == "better"
    row = rows(at_equal(store, "four", "tokens"))["g1"]
    assert row.words.startswith(f"descriptive: {fewer / 51200:.3f} times the baseline's training tokens")


@pytest.mark.parametrize(
    ("place", "words", "decision"),
    [
        (same_place, "better", "better"),
        (lambda one: ("node-1", 1000.0 - 100 * (one.arm == "g1")), "descriptive: 1.111 times", None),
        (lambda one: (f"node-{1 + (one.arm == 'g1')}", 1000.0), "refused: on node-2 (1 CPUs, one rank), the", None),
        (lambda one: (f"node-{one.seed}", 1000.0), "refused: on node-1 (1 CPUs, one rank) and on node-2", None),
    ],
    ids=["equal", "slower", "another host", "both hosts"],
)
def test_wall_clock_is_compared_on_one_place_alone(store: Store, place, words: str, decision: str | None):
    trained(store, place=place)
    row = rows(at_equal(store, "four", "wall-clock"))["g1"]
    assert row.decision == decision
    assert row.words.startswith(words)
    assert (row.delta_nats is None) == words.startswith("refused")


def test_every_format_tells_it_whole(store: Store):
    trained(store)
    found = at_equal(store, "four", "flops")
    lines = list(csv.DictReader(io.StringIO(equal_to_csv(found))))
    assert [line["arm"] for line in lines] == ["baseline", "g1"]
    assert float(lines[1]["flops_ratio"]) == pytest.approx(rows(found)["g1"].ratios.flops)
    row = json.loads(equal_to_json(found))["tables"][0]["rows"][1]
    assert row["delta_nats"]["formula"] == "denominators-1"
    assert len(row["delta_nats"]["trials"]) == 4
    stream = io.StringIO()
    Console(file=stream, width=160, color_system=None).print(EqualView(found))
    assert "at equal training FLOPs" in stream.getvalue()
    assert "no decision is made of it" in stream.getvalue()


def test_curves_are_read_between_their_points_and_never_before_the_first():
    curve = [(0.25, 3.0), (0.5, 2.0), (1.0, None)]
    assert read_at([curve], 0.375) == 2.5
    assert read_at([curve, [(0.25, 4.0), (0.5, 3.0)]], 0.5) == 2.5
    assert read_at([curve], 0.1) is None
    assert read_at([curve], 0.75) is None
    assert shares_of_schedule(2.0, 1.0) == (0.5, 1.0)
