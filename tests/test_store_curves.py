"""What the store tells of trials, on both back ends: curves by the reader's rule, and the documented views."""

# ruff: noqa: F811 (fixtures are imported by name)

from __future__ import annotations

import math
from pathlib import Path

import pandas as pd
import pytest
from store_runs import STEPS, Run, postgres_server, probed, run, steps, store, store_url, validation  # noqa: F401

from models.run_dir import Summary
from orchestrator.store import (
    Store,
    query,
    views,
)

# Records and curves


def test_recording_twice_keeps_one_row(run: Run) -> None:
    attempt = run.start()
    records = [*steps(1, 5), validation(5, 2.0)]
    run.store.record(run.lease, attempt, records)
    run.store.record(run.lease, attempt, [*records, *steps(6, 6)])
    run.store.record(run.lease, attempt, [])
    curve = run.store.curve(run.fingerprint)
    assert [row.step for row in curve.steps] == [1, 2, 3, 4, 5, 6]
    assert [row.step for row in curve.validations] == [5]


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf, None])
def test_a_number_that_is_not_finite_is_null_and_said_so(run: Run, bad: float | None) -> None:
    attempt = run.start()
    said = bad is None
    step = steps(1, 1)[0].model_copy(update={"loss_nats": bad, "gradient_norm": bad, "nonfinite": said})
    check = validation(1, 1.0).model_copy(update={"loss_nats": bad, "bits_per_byte": bad, "nonfinite": said})
    run.store.record(run.lease, attempt, [step, check])
    curve = run.store.curve(run.fingerprint)
    assert (curve.steps[0].loss_nats, curve.steps[0].gradient_norm, curve.steps[0].nonfinite) == (None, None, True)
    assert (curve.validations[0].loss_nats, curve.validations[0].nonfinite) == (None, True)
    found = run.store.query("SELECT COUNT(*) AS n FROM curves WHERE loss_nats IS NULL AND bits_per_byte IS NULL")
    assert found.n[0] == 1
    assert bool(run.store.frame("curves", "quick").nonfinite[0]) is True
    summary = Summary(outcome="nonfinite", step=1, resume_step=0, seconds=1.0, tokens_per_second=bad)
    run.end(attempt, "DIVERGED", summary=summary)
    assert run.store.attempts(run.fingerprint)[0].tokens_per_second is None


def test_a_curve_takes_the_newest_attempt_cut_at_its_successors_resume_step(run: Run) -> None:
    """Three attempts: the second resumed after step 6, the third went back to step 4."""
    first = run.start()
    run.store.record(run.lease, first, [*steps(1, 8, loss=1.0), validation(4, 1.0), validation(8, 1.0)])
    run.end(first, "WAITING", cause="killed")
    second = run.start(resume_step=6, resumed_from=1)
    run.store.record(run.lease, second, [*steps(7, 10, loss=2.0), validation(8, 2.0)])
    run.end(second, "WAITING", cause="killed")
    seen = run.store.curve(run.fingerprint)
    assert [(row.attempt, row.step) for row in seen.steps] == [(1, s) for s in range(1, 7)] + [
        (2, s) for s in range(7, 11)
    ]
    assert [(row.attempt, row.step) for row in seen.validations] == [(1, 4), (2, 8)]
    third = run.start(resume_step=4, resumed_from=1)
    run.store.record(run.lease, third, steps(5, 6, loss=3.0))
    run.store.record(run.lease, second, steps(11, 12, loss=2.0))  # a late writer hurts nothing
    curve = run.store.curve(run.fingerprint)
    assert [(row.step, row.loss_nats) for row in curve.steps] == [(s, 1.0) for s in range(1, 5)] + [(5, 3.0), (6, 3.0)]
    assert [(row.attempt, row.step) for row in curve.validations] == [(1, 4)]
    frame = run.store.frame("curves", "quick")
    assert list(zip(frame.attempt, frame.step, strict=True)) == [(row.attempt, row.step) for row in curve.steps]
    assert list(frame.validation_loss_nats.dropna()) == [1.0]


def test_an_evaluation_made_again_after_the_resumption_counts_once(run: Run) -> None:
    first = run.start()
    run.store.record(run.lease, first, [*steps(1, 5), validation(5, 1.0)])
    run.end(first, "WAITING", cause="killed")
    second = run.start(resume_step=5, resumed_from=1)
    run.store.record(run.lease, second, [validation(5, 2.0), *steps(6, 6)])
    (only,) = run.store.curve(run.fingerprint).validations
    assert (only.attempt, only.loss_nats) == (2, 2.0)
    frame = run.store.frame("curves", "quick")
    assert list(frame.step) == [1, 2, 3, 4, 5, 6]
    assert list(frame.validation_loss_nats.dropna()) == [2.0]


@pytest.mark.parametrize(("state", "last"), [("DIVERGED", 5), ("PRUNED", 5), ("FAILED", 8)])
def test_a_stopped_trial_ends_where_it_was_stopped(run: Run, state: str, last: int) -> None:
    attempt = run.start()
    run.store.record(run.lease, attempt, steps(1, 8))
    run.end(attempt, state, end_step=5)
    assert run.store.curve(run.fingerprint).steps[-1].step == last
    assert run.store.frame("curves", "quick").step.max() == last
    assert run.store.frame("results", "quick").steps_done[0] == last


def test_a_cursor_gives_only_newer_steps(run: Run) -> None:
    first = run.start()
    run.store.record(run.lease, first, [*steps(1, 4), validation(2, 1.0)])
    assert [row.step for row in run.store.curve(run.fingerprint, after=(1, 2)).steps] == [3, 4]
    run.end(first, "WAITING", cause="killed")
    second = run.start(resume_step=2)
    run.store.record(run.lease, second, steps(3, 3))
    newer = run.store.curve(run.fingerprint, after=(1, 4))
    assert [(row.attempt, row.step) for row in newer.steps] == [(2, 3)]
    assert len(newer.validations) == 1


# Diagnostics


def test_a_probe_is_a_row_a_layer(run: Run) -> None:
    attempt = run.start()
    records = [*steps(1, 5), probed(5, attention=0.4, score=0.3)]
    run.store.record(run.lease, attempt, records)
    run.store.record(run.lease, attempt, records)
    first, second = run.store.layers(run.fingerprint)
    assert (first.attempt, first.step, first.layer, first.tokens, first.fraction) == (1, 5, 1, 5 * 256, 0.25)
    assert first.heads == (0.4, pytest.approx(0.6))
    assert first.first_token_attention == pytest.approx(0.5)
    assert first.gates["sdpa"] == {
        "mean": 0.4, "share_below": {"0.1": 0.25, "0.5": 0.5}, "low": 0.0, "high": 1.0, "histogram": [0.75, 0.25],
    }  # fmt: skip
    assert (second.layer, second.max_activation, second.attention_output_rms, second.ffn_output_rms) == (
        2,
        50,
        0.2,
        0.4,
    )
    assert (second.residual_rms, second.gradient_norm, second.update_ratio) == (2.0, 0.25, 2e-3)
    frame = run.store.frame("diagnostics", "quick")
    assert list(frame.layer) == [1, 2]
    assert list(frame.gate_score) == pytest.approx([0.4, 0.2])
    assert (frame.heads[1], frame.gates[1]["sdpa"]["histogram"]) == (list(second.heads), [1.0, 0.0])
    assert (frame.arm[0], frame["train.lr"][0], frame.nonfinite[0]) == ("baseline", 1e-3, False)


def test_layers_without_a_gate_or_a_finite_number_have_null(run: Run) -> None:
    record = probed(5, max_activation=[None, 50.0], update_ratio=[math.inf, 1e-3], nonfinite=True)
    run.store.record(run.lease, run.start(), [record])
    first, second = run.store.layers(run.fingerprint)
    assert (first.max_activation, first.update_ratio, first.gates) == (None, None, {})
    assert (second.max_activation, second.update_ratio) == (50.0, 1e-3)
    frame = run.store.frame("diagnostics", "quick")
    assert frame.gate_score.isna().all()
    assert frame.nonfinite.all()
    assert str(frame.gate_score.dtype) == "float64"


def test_diagnostics_take_the_newest_attempt_cut_at_its_successors_resume_step(run: Run) -> None:
    first = run.start()
    run.store.record(run.lease, first, [*steps(1, 11), probed(5, 0.3), probed(10, 0.3)])
    run.end(first, "WAITING", cause="killed")
    second = run.start(resume_step=8, resumed_from=1)
    assert [(row.attempt, row.step) for row in run.store.layers(run.fingerprint)] == [(1, 5), (1, 5)]
    run.store.record(run.lease, second, [*steps(9, 15), probed(10, 0.4), probed(15, 0.4)])
    seen = [(1, 5), (2, 10), (2, 15)]
    assert [(row.attempt, row.step) for row in run.store.layers(run.fingerprint) if row.layer == 1] == seen
    assert [row.step for row in run.store.layers(run.fingerprint, after=10)] == [15, 15]
    run.end(second, "DIVERGED", end_step=12)
    frame = run.store.frame("diagnostics", "quick")
    assert list(zip(frame.attempt, frame.step, frame.layer, strict=True)) == [
        (*point, layer) for point in seen[:2] for layer in (1, 2)
    ]


# Views


def test_results_hold_a_row_a_trial_with_its_final_loss(run: Run) -> None:
    done, running = run.plan.trials[0].fingerprint, run.plan.trials[1].fingerprint
    first = run.start(fingerprint=done)
    run.store.record(run.lease, first, [*steps(1, 12), validation(10, 9.0)])
    run.end(first, "WAITING", cause="killed")
    second = run.start(resume_step=10, resumed_from=1, fingerprint=done)
    run.store.record(run.lease, second, [*steps(11, STEPS), validation(STEPS, 2.0), validation(STEPS, 2.1, "full")])
    summary = Summary(outcome="complete", step=STEPS, resume_step=10, seconds=5.0, tokens_per_second=800.0)
    run.end(second, "COMPLETE", summary=summary)
    third = run.start(fingerprint=running)
    run.store.record(run.lease, third, [*steps(1, STEPS), validation(STEPS, 1.5)])
    rows = run.store.frame("results", "quick").set_index("fingerprint")
    assert list(rows.index) == [trial.fingerprint for trial in run.plan.trials]
    row = rows.loc[done]
    assert (row.validation_loss_nats, row.full_validation_loss_nats) == (2.0, 2.1)
    assert row.bits_per_byte == pytest.approx(2.0 / math.log(2))
    assert (row.num_attempts, row.steps_done, row.num_steps, row.tokens_per_second) == (2, STEPS, STEPS, 800.0)
    assert 5.0 <= row.seconds < 60.0
    assert (row["train.lr"], row.lr, row.arm, row.seed) == (1e-3, 1e-3, "baseline", 1)
    assert pd.isna(rows.loc[running].validation_loss_nats)  # not COMPLETE: no final loss
    waiting = rows.iloc[2]
    assert (waiting.state, waiting.steps_done, waiting.num_attempts) == ("WAITING", 0, 0)
    assert pd.isna(waiting.seconds)


def test_axes_can_be_asked_for_in_sql(run: Run) -> None:
    run.complete(run.fingerprint, 2.0)
    key = '$."train.lr"' if run.store.url.startswith("sqlite") else "train.lr"
    sql = f"SELECT arm, CAST(axes ->> '{key}' AS FLOAT) AS lr FROM results WHERE state = 'COMPLETE'"
    assert run.store.query(sql).to_dict("records") == [{"arm": "baseline", "lr": 1e-3}]
    assert run.store.query("SELECT axes FROM results ORDER BY position LIMIT 1")["axes"][0] == '{"train.lr": 0.001}'


def test_the_denominators_of_a_loss_grow_with_its_step(run: Run) -> None:
    run.store.record(run.lease, run.start(), [*steps(1, STEPS), validation(5, 3.0), validation(STEPS, 2.0)])
    run.end(run.store.attempts(run.fingerprint)[0], "COMPLETE")
    frame = run.store.frame("denominators", "quick")
    speed = run.store.curve(run.fingerprint).steps[0].tokens_per_second
    assert speed is not None
    assert list(frame.validation_loss_nats) == [3.0, 2.0]
    assert list(frame.seconds) == pytest.approx([5 * 256 / speed, STEPS * 256 / speed])
    assert frame.flops[0] / frame.flops[1] == pytest.approx(5 / STEPS)


def test_every_column_of_a_view_is_documented(store: Store) -> None:
    readme = Path(views.__file__).with_name("README.md").read_text()
    for view in query.VIEW_ORDER:
        section = readme.split(f"## `{view}`")[1].split("\n## ")[0]
        for column in store.query(f"SELECT * FROM {view} LIMIT 0").columns:
            assert f"| `{column}` |" in section, f"{view}.{column} is not documented"


def test_the_readmes_example_queries_run(run: Run) -> None:
    run.store.record(run.lease, run.start(), [*steps(1, STEPS), validation(STEPS, 2.0), probed(STEPS)])
    run.end(run.store.attempts(run.fingerprint)[0], "COMPLETE")
    readme = Path(views.__file__).with_name("README.md").read_text()
    examples = [block.split("```")[0] for block in readme.split("```sql\n")[1:]]
    assert len(examples) >= 3
    for example in examples:
        assert len(run.store.query(example)) > 0, example
