"""How two trials differ: by what was resolved, not by how it was written, and by where their last attempts ran."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
from fake_gangs import Bench, bench, plan  # noqa: F401
from rich.console import Console

from orchestrator.plan import Plan
from orchestrator.report import DifferencesView, differences, differences_to_json


@pytest.fixture
def ran(bench: Bench, plan: Plan):  # noqa: F811
    bench.run(plan)
    rows = list(bench.trials(plan).values())
    last = {row.fingerprint: bench.store.attempts(row.fingerprint)[-1] for row in rows}
    return rows, last


def keys(told):
    return [one.key for one in told]


def test_arms_differ_in_what_they_set_and_in_what_follows_from_it(ran) -> None:
    rows, last = ran
    told = differences(rows[0], rows[1], last)
    assert "gate.position" in keys(told.config)
    assert not any(key.startswith(("train.", "data.", "seed")) for key in keys(told.config))
    assert not told.environment


def test_a_trial_does_not_differ_from_itself(ran) -> None:
    rows, last = ran
    told = differences(rows[0], rows[0], last)
    assert (told.config, told.environment) == ((), ())


def test_packages_hosts_and_layout_of_the_last_attempts_are_compared(ran) -> None:
    rows, last = ran
    other = last[rows[1].fingerprint]
    packages = {**other.provenance["packages"], "torch": "1.0"}
    moved = replace(
        other,
        provenance={**other.provenance, "packages": packages, "commit": "beef"},
        hosts=("elsewhere",),
        layout=other.layout.model_copy(update={"tensor": 2}),
    )
    told = differences(rows[0], rows[1], {**last, rows[1].fingerprint: moved})
    assert keys(told.environment) == ["commit", "packages.torch", "hosts", "layout.tensor"]


def test_a_trial_that_has_not_run_has_no_environment(ran) -> None:
    rows, last = ran
    told = differences(rows[0], rows[1], {**last, rows[1].fingerprint: None})
    assert told.unrun == (rows[1].fingerprint,)
    console = Console(width=100, record=True, quiet=False)
    with console.capture() as shown:
        console.print(DifferencesView(told))
    assert "not run yet" in shown.get()
    assert "gate.position" in shown.get()
    assert json.loads(differences_to_json(told))["unrun"] == [rows[1].fingerprint]
