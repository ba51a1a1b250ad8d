"""--explain: what it prints is enough to compute the row again, with nothing but the printed numbers."""

from __future__ import annotations

import json
import math
from statistics import fmean, stdev

import pytest
from rich.console import Console
from scipy.stats import dunnett
from verdict_tables import heading, quickstart

from orchestrator.report import ExplanationView, explain, explanation_to_json, tabulate
from orchestrator.report.explanation import FORMULAS
from orchestrator.sweep import UserError

ARM = "g1-headwise"


def told(arm: str = ARM):
    (one,) = json.loads(explanation_to_json(explain(tabulate(heading(), quickstart()), arm)))["rows"]
    return (
        one,
        {value["name"]: value for value in one["values"]},
        {trial["fingerprint"]: trial for trial in one["trials"]},
    )


def test_the_row_is_computed_again_from_what_is_told() -> None:
    one, values, trials = told()
    losses = [trials[name]["loss_nats"] for name in values["loss_nats"]["trials"]]
    assert values["loss_nats"]["value"] == pytest.approx(fmean(losses))
    assert values["loss_sd_nats"]["value"] == pytest.approx(stdev(losses))
    assert values["perplexity"]["value"] == pytest.approx(math.exp(fmean(losses)))

    compared = [trials[name] for name in values["low_nats"]["trials"]]
    by_arm: dict[str, list[float]] = {}
    for trial in compared:
        by_arm.setdefault(trial["arm"], []).append(trial["loss_nats"])
    control = by_arm.pop(one["settings"]["baseline"])
    assert values["delta_nats"]["value"] == pytest.approx(fmean(losses) - fmean(control))
    # An independent Dunnett: scipy integrates by quasi-random numbers, so to half a percent.
    place = list(by_arm).index(ARM)
    interval = dunnett(*by_arm.values(), control=control, random_state=0).confidence_interval(
        1 - one["settings"]["alpha"]
    )
    width = values["high_nats"]["value"] - values["low_nats"]["value"]
    assert width == pytest.approx(interval.high[place] - interval.low[place], rel=0.01)


def test_the_best_learning_rate_is_told_with_all_that_it_was_chosen_from() -> None:
    _, values, trials = told()
    chosen_from = [trials[name] for name in values["best_lr"]["trials"]]
    means = {}
    for lr in {trial["lr"] for trial in chosen_from}:
        losses = [trial["loss_nats"] for trial in chosen_from if trial["lr"] == lr]
        if None not in losses:
            means[lr] = fmean(losses)
    assert min(means, key=means.__getitem__) == values["best_lr"]["value"]
    assert {trial["state"] for trial in chosen_from} == {"COMPLETE", "DIVERGED"}


def test_every_formula_that_a_value_names_has_words_and_a_place() -> None:
    found = explain(tabulate(heading(), quickstart()), ARM)
    assert {value.formula for value in found[0].values} <= set(FORMULAS)
    console = Console(width=120)
    with console.capture() as shown:
        console.print(ExplanationView(found))
    for value in found[0].values:
        assert value.formula in shown.get()
    assert "Dunnett" in shown.get()


def test_an_unknown_arm_is_told_with_those_there_are() -> None:
    with pytest.raises(UserError, match="no such arm in quickstart; allowed: baseline, g1-elementwise"):
        told("g9")
