"""Tables of a plan, and of what a store holds."""

import io
import json
import math

import pytest
from rich.console import Console
from store_backends import postgres_server, store_url  # noqa: F401
from verdict_tables import note

from models.run_dir import Summary, ValidationRecord
from orchestrator.plan import Plan, Refusal, expand
from orchestrator.report import (
    plan_table,
    results,
    status_table,
    to_json,
    to_markdown,
    to_text,
)
from orchestrator.store import Store
from orchestrator.sweep import UserError, parse
from orchestrator.verdict import Looks

SWEEP = """
name: small
question: Is it better?
base:
  model: {preset: cpu-tiny}
  data: {sequence_length: 64, validation: {slice_bytes: 1024, points: 1}}
  train: {tokens: 2560, batch_tokens: 256}
baseline: baseline
arms:
  baseline: {}
  gated: {gate: {position: sdpa}}
match: parameters
axes: {train.lr: [1e-3, 1.0]}
seeds: [1, 2]
verdict: {margin: 0.01}
controls: []
"""


@pytest.fixture(scope="module")
def plan():
    return expand(parse(SWEEP, "small.yaml"))


def printed(renderable, width=120):
    stream = io.StringIO()
    Console(file=stream, width=width, color_system=None).print(renderable)
    return "\n".join(line.rstrip() for line in stream.getvalue().splitlines())


@pytest.mark.parametrize("width", [120, 45])
def test_the_plan_shows_every_trial_and_what_exists_already(plan, width):
    states = {plan.trials[0].fingerprint: "COMPLETE", plan.trials[1].fingerprint: "FAILED"}
    text = printed(plan_table(plan, states), width)
    for planned in plan.trials:
        assert f"{planned.num_parameters:,}" in text
    assert text.count("new") == 6 + 1
    assert "8 trials: 6 new, 1 complete, 1 failed; 0 cells refused" in text.replace("\n", " ")
    flops = f"{plan.training_flops:.2e}".replace("e+", "e").replace("e0", "e")
    assert f"{flops} training FLOPs in all" in text.replace("\n", " ")


def test_refusals_come_first_under_their_reason(plan):
    refusals = (Refusal("gated", {"train.lr": 1.0}, "too wide"), Refusal("wide", {}, "too wide"))
    lines = printed(plan_table(Plan(plan.sweep, plan.trials, refusals))).splitlines()
    assert lines[2:6] == ["refused: 2 cells", "  too wide", "    gated, train.lr = 1", "    wide"]
    assert lines.index("    wide") < next(i for i, line in enumerate(lines) if "parameters" in line)
    nothing = printed(plan_table(Plan(plan.sweep, (), refusals)))
    assert nothing.endswith("0 trials: none; 2 cells refused")


def end(store, lease, planned, state, loss=None, log_tail=None):
    attempt = store.start_attempt(lease, planned.fingerprint, layout=planned.layout, provenance={})
    if loss is not None:
        measured = ValidationRecord(
            step=10, tokens=2560, fraction=1.0, split="slice", loss_nats=loss, bits_per_byte=loss / math.log(2),
            num_tokens=1024, num_bytes=1024,
        )  # fmt: skip
        store.record(lease, attempt, [measured])
    summary = Summary(outcome="complete", step=10, resume_step=0, seconds=1.0, tokens_per_second=500.0)
    cause = {"COMPLETE": "complete", "DIVERGED": "nonfinite", "FAILED": "error"}[state]
    store.end_attempt(
        lease, attempt, state=state, cause=cause, reason=f"it was {cause}", end_step=10,
        summary=summary if state == "COMPLETE" else None, log_tail=log_tail,
    )  # fmt: skip


def fill(store, plan, lease):
    for planned in plan.trials:
        if planned.config.train.lr == 1.0:
            end(store, lease, planned, "DIVERGED")
        else:
            end(store, lease, planned, "COMPLETE", 2.4 + planned.seed / 100 - (planned.arm == "gated") / 10)


def test_a_stored_sweep_becomes_the_same_table_on_every_back_end(plan, store_url):  # noqa: F811
    with Store(store_url) as store:
        lease = store.acquire_lease(store.add(plan).sweep_id, "host:1", 60)
        assert {row.decision for row in results(store, "small").tables[0].rows} == {"no result"}
        fill(store, plan, lease)
        answer = results(store, "small")
    (table,) = answer.tables
    baseline, gated = table.rows
    assert (answer.margin_nats, answer.alpha, answer.counts) == (0.01, 0.05, {"COMPLETE": 4, "DIVERGED": 4})
    assert (baseline.arm, baseline.best_lr, baseline.tokens_per_second) == ("baseline", 1e-3, 500.0)
    assert gated.losses_nats == pytest.approx((2.31, 2.32))
    assert gated.delta_nats == pytest.approx(-0.1)
    assert gated.bits_per_byte == pytest.approx(2.315 / math.log(2))
    assert (gated.decision, gated.rank, gated.exploratory) == ("better", 1, False)
    assert (gated.diverged_lr, gated.diverged_lr_num_diverged) == (1.0, 2)
    assert gated.num_parameters == next(t.num_parameters for t in plan.trials if t.arm == "gated")
    assert note(table, "reused") is None
    json.loads(to_json(answer))


def test_more_seeds_than_looks_mark_the_stored_sweep_and_changed_settings_are_shown(plan, tmp_path):
    with Store(f"sqlite:///{tmp_path / 'store.db'}") as store:
        lease = store.acquire_lease(store.add(plan).sweep_id, "host:1", 60)
        fill(store, plan, lease)
        longer = expand(parse(SWEEP, "small.yaml", ["seeds=[1, 2, 3]", "verdict.margin=0.2", "verdict.looks=2"]))
        store.add(longer)
        fill(store, Plan(longer.sweep, tuple(t for t in longer.trials if t.seed == 3), ()), lease)
        answer = results(store, "small")
        (table,) = answer.tables
        assert (answer.margin_nats, answer.design.looks) == (0.01, Looks(1, ((2, 2),)))
        assert note(table, "* exploratory").endswith("verdicts were read 2 times, 1 declared (verdict.looks)")
        assert all(row.exploratory for row in table.rows)
        assert "margin 0.01 holds, not 0.2; looks 1 holds, not 2." in note(table, "verdict settings")
        store.add(expand(parse(SWEEP, "small.yaml", ["seeds=[4, 5]"])))
        assert [row.losses_nats for row in results(store, "small").tables[0].rows] == [(), ()]
        assert results(store, "small").design.looks.number == 3
        store.add(expand(parse(SWEEP, "small.yaml", ["seeds=[1, 2]"])))
        again = results(store, "small")
        assert again.design.looks.number == 1
        assert "read 2 times, 1 declared" in note(again.tables[0], "* exploratory")


def test_declared_looks_are_counted_and_leave_no_mark(plan, tmp_path):
    text = SWEEP.replace("{margin: 0.01}", "{margin: 0.01, looks: 2}")
    with Store(f"sqlite:///{tmp_path / 'store.db'}") as store:
        first, second = (expand(parse(text, "small.yaml", [f"seeds={seeds}"])) for seeds in ([1, 2], [1, 2, 3]))
        lease = store.acquire_lease(store.add(first).sweep_id, "host:1", 60)
        fill(store, first, lease)
        assert note(results(store, "small").tables[0], "look").startswith("look 1 of 2")
        store.add(second)
        fill(store, Plan(second.sweep, tuple(t for t in second.trials if t.seed == 3), ()), lease)
        (table,) = results(store, "small").tables
        assert note(table, "look").startswith("look 2 of 2: O'Brien and Fleming's spending, 0.05 of alpha 0.05")
        assert not any(row.exploratory for row in table.rows)


def test_utilisation_is_shown_where_the_peak_is_known(plan, tmp_path):
    """500 tokens/s at 2,560 tokens a trial, by a declared peak; without one the figure is absent, not zero."""
    flops_per_second = 500.0 * plan.trials[0].training_flops / 2560
    declared = expand(parse(SWEEP + f"resources: {{peak_flops: {4 * flops_per_second}}}\n", "small.yaml"))
    twin = expand(parse(SWEEP.replace("small", "twin") + "resources: {peak_flops: 1e12}\n", "twin.yaml"))
    for number, (known, shown) in enumerate(((plan, None), (declared, 0.25))):
        with Store(f"sqlite:///{tmp_path / f'{number}.db'}") as store:
            lease = store.acquire_lease(store.add(known).sweep_id, "host:1", 60)
            fill(store, known, lease)
            answer = results(store, "small")
            baseline, gated = answer.tables[0].rows
            assert baseline.flops_per_second == pytest.approx(flops_per_second)
            assert gated.flops_per_second != baseline.flops_per_second
            assert baseline.utilisation == (shown and pytest.approx(shown))
            for text in (to_text(answer), to_text(answer, 40), to_markdown(answer)):
                assert ("25.0% MFU" in text) == (shown is not None)
            store.add(twin)
            assert all(row.utilisation is None for row in results(store, "twin").tables[0].rows)


def test_a_trial_that_another_sweep_trained_is_marked_reused(plan, tmp_path):
    twin = expand(parse(SWEEP.replace("name: small", "name: twin"), "twin.yaml"))
    with Store(f"sqlite:///{tmp_path / 'store.db'}") as store:
        lease = store.acquire_lease(store.add(plan).sweep_id, "host:1", 60)
        fill(store, plan, lease)
        store.add(twin)
        assert note(results(store, "twin").tables[0], "reused") == "reused trials: 8 from small"
        with pytest.raises(UserError, match=r"no sweep 'smal' in the store \(did you mean 'small'\?"):
            results(store, "smal")


def test_status_has_a_row_a_sweep_and_the_reasons_of_failure(plan, tmp_path):
    with Store(f"sqlite:///{tmp_path / 'store.db'}") as store:
        assert "no sweep yet" in printed(status_table(store))
        sweep_id = store.add(plan).sweep_id
        lease = store.acquire_lease(sweep_id, "host:1", 60)
        end(store, lease, plan.trials[0], "FAILED", log_tail="\n".join(f"line {n} [of the log]" for n in range(30)))
        store.add_event(sweep_id, "budget", "80 % of the wall hours are used")
        for width in (120, 60):
            text = " ".join(printed(status_table(store), width).split())
            assert "budget: 80 % of the wall hours are used" in text
            assert f"{plan.trials[0].fingerprint} {plan.trials[0].arm}, train.lr = " in text
            assert "error: it was error" in text
            assert "| line 29 [of the log]" in text
            assert "line 20" not in text
            assert "gatesweep rerun small --failed" in text
        header, _, counts = printed(status_table(store)).splitlines()[:3]
        assert header.split() == ["sweep", "failed", "waiting", "all", "run", "by"]
        assert counts.split() == ["small", "1", "7", "8", "host:1"]
