"""Curves from elsewhere: read whole or refused with their place, shown with a mark, and seen by no verdict."""

# ruff: noqa: F811 (fixtures are imported by name)

from __future__ import annotations

import csv
import io
import json

import pytest
from store_backends import postgres_server, store_url  # noqa: F401
from store_runs import STEPS, Run, a_plan, steps, validation
from typer.testing import CliRunner

from orchestrator.cli import app
from orchestrator.foreign import read_curves
from orchestrator.report import results, to_csv, to_json, to_markdown, write_report
from orchestrator.report.terminal import to_text
from orchestrator.store import Store, check_store
from orchestrator.sweep import UserError

MEGATRON = """\
using world size: 8
 [2026-01-05 10:00:00] iteration       10/      30 | consumed samples:   2560 | elapsed time per iteration (ms): 9.1 | \
learning rate: 1.0E-03 | global batch size:   256 | lm loss: 3.100000E+00 | loss scale: 1.0 | grad norm: 0.9 |
 [2026-01-05 10:00:01] iteration       20/      30 | consumed samples:   5120 | lm loss: 2.900000E+00 | grad norm: 0.9 |
 validation loss at iteration 20 | lm loss value: 2.950000E+00 | lm loss PPL: 1.910595E+01 |
 [2026-01-05 11:00:00] iteration       20/      30 | consumed samples:   5120 | lm loss: 2.800000E+00 | grad norm: 0.9 |
 [2026-01-05 11:00:01] iteration       30/      30 | consumed samples:   7680 | lm loss: nan | grad norm: 0.9 |
 validation loss at iteration 30 | lm loss value: 2.700000E+00 | lm loss PPL: 1.487973E+01 |
 validation loss at iteration 30 on test set | lm loss value: 9.000000E+00 | lm loss PPL: 8.1E+03 |
"""
CSV = "step,validation_loss,loss,seed,tokens\n10,3.0,3.1,1,2560\n20,2.5,2.6,1,5120\n10,3.2,,2,2560\n20,2.7,2.8,2,5120\n"
WANDB = "".join(
    json.dumps(row) + "\n"
    for row in ({"_step": 1, "train/loss": 3.0}, {"_step": 2, "train/loss": 2.5, "val/loss": "NaN"}, {"_step": 3})
)
WANDB_CHART = (
    '"Step","calm-sun-1 - val/loss","calm-sun-1 - val/loss__MIN","wild-sea-2 - val/loss"\n1,3.0,2.9,3.3\n2,2.5,2,\n'
)
MLFLOW = "run_id,key,value,step,timestamp\nr1,val_loss,3.0,1,1\nr1,val_loss,2.4,2,2\nr1,val_loss,2.5,2,3\nr1,lr,1,1,1\n"
MLFLOW_JSON = json.dumps({"metrics": [{"key": "val_loss", "value": 2.5, "step": 1, "timestamp": 7}]})


def read(tmp_path, text, name="given", **options):
    path = tmp_path / name
    path.write_text(text)
    return read_curves(path, options.pop("format", None), options.pop("seed", None), **options)


def losses(curve, split="validation"):
    return {point.step: point.loss_nats for point in curve.points if point.split == split}


def test_a_megatron_log_gives_both_losses_and_the_later_line_holds(tmp_path):
    found, (curve,) = read(tmp_path, MEGATRON)
    assert found == "megatron"
    assert losses(curve) == {20: 2.95, 30: 2.7}
    assert losses(curve, "training") == {10: 3.1, 20: 2.8, 30: None}


def test_a_csv_gives_a_curve_a_seed_with_gaps_where_a_field_is_empty(tmp_path):
    found, curves = read(tmp_path, CSV)
    assert found == "csv"
    assert [curve.seed for curve in curves] == [1, 2]
    assert [losses(curve) for curve in curves] == [{10: 3.0, 20: 2.5}, {10: 3.2, 20: 2.7}]
    assert losses(curves[1], "training") == {20: 2.8}
    assert {point.tokens for point in curves[0].points} == {2560, 5120}


def test_exports_of_wandb_and_mlflow_are_told_apart_by_their_looks(tmp_path):
    found, (curve,) = read(tmp_path, WANDB)
    assert (found, losses(curve), losses(curve, "training")) == ("wandb", {2: None}, {1: 3.0, 2: 2.5})
    found, curves = read(tmp_path, WANDB_CHART)
    assert (found, [losses(one) for one in curves]) == ("wandb", [{1: 3.0, 2: 2.5}, {1: 3.3}])
    found, (curve,) = read(tmp_path, MLFLOW)
    assert (found, losses(curve)) == ("mlflow", {1: 3.0, 2: 2.5})
    found, (curve,) = read(tmp_path, MLFLOW_JSON, seed=4)
    assert (found, curve.seed, losses(curve)) == ("mlflow", 4, {1: 2.5})


def test_a_column_of_any_name_is_a_loss_when_the_user_says_so(tmp_path):
    text = "step,perplexing\n1,2.0\n"
    with pytest.raises(UserError, match=r"given: no loss among perplexing; allowed: name one with --validation-loss"):
        read(tmp_path, text)
    _, (curve,) = read(tmp_path, text, validation="perplexing")
    assert losses(curve) == {1: 2.0}
    with pytest.raises(UserError, match="--validation-loss other: not there; allowed: perplexing"):
        read(tmp_path, text, validation="other")


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("step,loss\n1,2.0\n2,abc\n", r"given:3: loss: got 'abc'; allowed: a number"),
        ("step,loss\n1,2.0\n1.5,2\n", r"given:3: step: got '1.5'; allowed: a whole number from 0"),
        ("step,loss\n1,2.0\n1,2.1\n", r"given:3: step 1 comes twice; allowed: once, or a column seed"),
        ("step,loss\n1,2.0,9\n", r"given:2: got 3 fields; allowed: 2"),
        ("step,loss,loss\n1,2,2\n", r"given:1: a column is named twice"),
        ("step,loss,seed\n1,2.0,-3\n", r"given:2: seed: got '-3'; allowed: a whole number from 0"),
        ("what is this\n", r"given:1: got 'what is this', which is none of megatron, wandb, mlflow, csv"),
        ('[{"_step": 1, "loss": true}]', r"given:1: loss: got 'True'; allowed: a number"),
        ('{"_step": 1, "loss": 2}\n{"_step": \n', r"given:2: no JSON"),
        ('{"key": "loss", "value": 1}', r"given:1: got key, value; allowed: key \(or metric\), value and step"),
        ("step,loss\n", r"no losses found in it as csv|no column step"),
        ("", r"given:1: got '', which is none of"),
    ],
)
def test_what_is_wrong_with_a_file_is_told_with_its_line_and_nothing_of_it_is_taken(tmp_path, text, said):
    with pytest.raises(UserError, match=said):
        read(tmp_path, text)


def test_a_seed_is_for_one_curve_that_has_none_and_a_missing_file_is_told(tmp_path):
    with pytest.raises(UserError, match=r"--seed 3: .* holds 2 curves; allowed: for one curve"):
        read(tmp_path, CSV, seed=3)
    with pytest.raises(UserError, match=r"no-such: cannot be read: No such file"):
        read_curves(tmp_path / "no-such", None, None)
    (tmp_path / "binary").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(UserError, match="not UTF-8 text"):
        read_curves(tmp_path / "binary", None, None)


@pytest.fixture
def home(tmp_path, monkeypatch):
    """A home whose store holds the sweep ``quick``, one trial of each arm and rate complete."""
    monkeypatch.setenv("GATESWEEP_HOME", str(tmp_path / "home"))
    (tmp_path / "home").mkdir()
    with Store(f"sqlite:///{tmp_path / 'home' / 'gatesweep.db'}") as store:
        run = Run(store, a_plan())
        for planned in run.plan.trials:
            attempt = run.start(fingerprint=planned.fingerprint)
            store.record(run.lease, attempt, [*steps(1, STEPS), validation(STEPS, 2.5 - planned.position / 10)])
            run.end(attempt, "COMPLETE")
    return tmp_path / "home"


def imported(home, text, *options, name="given.csv"):
    path = home / name
    path.write_text(text)
    return CliRunner().invoke(app.app, ["import", str(path), "--sweep", "quick", *options])


def test_imported_rows_stand_below_the_table_with_their_mark_and_verdicts_stay_as_they_were(home):
    with Store(f"sqlite:///{home / 'gatesweep.db'}") as store:
        before = results(store, "quick")
        assert imported(home, CSV, "--as", "lab-baseline").exit_code == 0
        assert imported(home, MEGATRON, "--as", "old-log", name="log.txt").exit_code == 0
        after = results(store, "quick")
        assert after.tables == before.tables
        assert after.trials == before.trials
        first, second = after.imported
        assert (first.seeds, first.split, first.loss_nats) == ((1, 2), "validation", pytest.approx(2.6))
        baseline = next(row for row in before.tables[0].rows if row.is_baseline)
        assert first.delta_nats == pytest.approx(2.6 - baseline.loss_nats)
        assert (second.seeds, second.loss_nats, second.delta_nats) == ((), 2.7, None)  # no seeds, no difference

        for text in (to_text(after, 160), to_text(after, 60), to_markdown(after)):
            assert "imported, unverified" in text
            assert "no part of any" in " ".join(text.split())
        content = json.loads(to_json(after))
        assert [(one["name"], one["status"]) for one in content["imported"]] == [
            ("lab-baseline", "imported, unverified"), ("old-log", "imported, unverified"),
        ]  # fmt: skip
        lines = list(csv.DictReader(io.StringIO(to_csv(after))))
        assert [line["arm"] for line in lines if line["decision"] == "imported, unverified"] == [
            "lab-baseline", "old-log",
        ]  # fmt: skip
        assert all(line["low_nats"] == "" for line in lines if line["arm"] == "lab-baseline")
        page = write_report(store, "quick", home / "report")[0].read_text()
        assert "<h2>Imported, unverified</h2>" in page
        assert "lab-baseline (imported, unverified)" in page


def test_a_name_is_imported_once_and_can_be_removed(home):
    assert imported(home, CSV, "--as", "theirs").exit_code == 0
    again = imported(home, CSV, "--as", "theirs")
    assert "--as theirs: there already; allowed: another name, or first" in str(again.exception)
    taken = imported(home, CSV, "--as", "baseline")
    assert "--as baseline: an arm of quick" in str(taken.exception)
    bad = imported(home, CSV + "30,x,,1,\n", "--as", "more")
    assert "given.csv:6: validation_loss: got 'x'" in str(bad.exception)
    with Store(f"sqlite:///{home / 'gatesweep.db'}") as store:
        assert [one.name for one in store.imported(1)] == ["theirs"]
        gone = CliRunner().invoke(app.app, ["import", "--sweep", "quick", "--as", "theirs", "--remove"])
        assert "theirs removed, 2 curve(s)" in gone.output
        assert store.imported(1) == []
    none = CliRunner().invoke(app.app, ["import", "--sweep", "quick", "--as", "theirs", "--remove"])
    assert "nothing of that name in quick" in str(none.exception)
    neither = CliRunner().invoke(app.app, ["import", "--sweep", "quick", "--as", "theirs"])
    assert "allowed: a FILE, or --remove without one" in str(neither.exception)


def test_imported_curves_are_kept_as_they_came_on_every_back_end(store_url, tmp_path):
    from datetime import UTC, datetime

    from orchestrator.store import Imported

    (tmp_path / "given").write_text(CSV)
    _, curves = read_curves(tmp_path / "given", None, None)
    given = Imported("theirs", "given", "csv", "0" * 64, datetime.now(UTC), tuple(curves))
    with Store(store_url) as store:
        store.add(a_plan())
        store.put_imported(store.sweep("quick"), given)
        (found,) = store.imported(store.sweep("quick").id)
        assert found == given
    assert "problem" not in {one.level for one in check_store(store_url, tmp_path)}
