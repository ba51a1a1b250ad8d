"""One baseline for many sweeps: what is reused is marked with its drift and counted, and what must be fresh is."""

# ruff: noqa: F811 (fixtures are imported by name)

from __future__ import annotations

from pathlib import Path

import pytest
from fake_gangs import Bench, bench, plan  # noqa: F401
from store_backends import postgres_server, store_url  # noqa: F401
from store_runs import Run, store  # noqa: F401
from sweep_runs import SWEEP, plan_of

from orchestrator import report
from orchestrator.cli.fresh import refuse_reuse, refuse_stale
from orchestrator.plan import Plan
from orchestrator.store import Store
from orchestrator.sweep import UserError

OTHER = SWEEP.replace("name: tiny", "name: other").replace(
    "g1: {gate: {position: sdpa}}", "g1: {gate: {position: sdpa}}\n  g2: {gate: {position: value}}"
)
CHOOSING = (
    SWEEP.replace("seeds: [1]", "seeds: {select: [1], confirm: [2]}\naxes: {train.lr: [1e-3, 3e-3]}")
    .replace("lr: 3e-3}", "}")
    .replace("name: tiny", "name: choosing")
)


def notes(bench: Bench, name: str) -> str:
    return "\n".join(report.results(bench.store, name).tables[0].footnotes)


def test_reused_trials_are_told_with_what_has_changed_since(
    bench: Bench, plan: Plan, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    bench.run(plan)
    other = plan_of(tmp_path, text=OTHER)
    then = {"commit": "a" * 40, "packages": {"torch": "9.9"}, "source_hash": "x", "python": "3.11"}
    monkeypatch.setattr("orchestrator.controller.launching.provenance", lambda: then)
    bench.run(other)
    told = notes(bench, "other")
    assert "reused trials: 2 from tiny; not as they were (trials): " in told
    assert "-> 9.9 (2)" in told
    assert "-> aaaaaaaaaaaa (2)" in told
    assert "source_hash" not in told
    # The sweep that trained them reuses nothing.
    assert "reused" not in notes(bench, "tiny")


def test_comparisons_against_one_baseline_are_counted_over_sweeps(bench: Bench, plan: Plan, tmp_path: Path) -> None:
    bench.run(plan)
    assert "lean on" not in notes(bench, "tiny")
    bench.run(plan_of(tmp_path, text=OTHER))
    assert "3 comparisons lean on this baseline's trials, 2 here and 1 in tiny" in notes(bench, "other")
    assert "3 comparisons lean on this baseline's trials, 1 here and 2 in other" in notes(bench, "tiny")


def test_no_reuse_refuses_other_sweeps_trials_and_goes_on_with_its_own(
    bench: Bench, plan: Plan, tmp_path: Path
) -> None:
    other = plan_of(tmp_path, text=OTHER)
    refuse_reuse(plan, bench.store)
    bench.run(plan)
    refuse_reuse(plan, bench.store)
    with pytest.raises(UserError, match=r"2 of 3 trials would be taken from tiny \(2\); .* such as 2$"):
        refuse_reuse(other, bench.store)
    bench.run(other)
    with pytest.raises(UserError, match="would be taken from tiny"):
        refuse_reuse(other, bench.store)


def test_confirming_trials_are_fresh_over_all_sweeps(bench: Bench, tmp_path: Path) -> None:
    choosing = plan_of(tmp_path, text=CHOOSING)
    refuse_stale(choosing, bench.store)
    bench.run(choosing)
    refuse_stale(choosing, bench.store)  # its own: it goes on
    again = plan_of(tmp_path, text=CHOOSING.replace("name: choosing", "name: again"))
    with pytest.raises(UserError, match=r"seeds.confirm: choosing \(2\) trained 2 of .* seed\(s\) 2; .* such as 3"):
        refuse_stale(again, bench.store)
    # Seeds that only choose may be shared.
    fresh = plan_of(tmp_path, text=CHOOSING.replace("name: choosing", "name: again").replace("[2]", "[3]"))
    refuse_stale(fresh, bench.store)


def test_what_sweeps_share_is_told_on_both_databases(store: Store) -> None:
    run = Run(store)
    sweep_id = run.lease.sweep_id
    assert store.trained_elsewhere("no such sweep", ["unknown"]) == {}
    assert store.reused(sweep_id) == []
    assert list(store.comparisons(sweep_id)) == [store.sweeps()[0].name]
