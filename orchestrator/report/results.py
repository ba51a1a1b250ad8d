"""A stored sweep's results: the one place that knows how the store tells them.

The surprise: a trial's numbers count only when its state is COMPLETE in the sweep's own list of trials, which is read
first. A trial that ends in between still counts as unfinished, never as complete without a loss.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from orchestrator.report.tables import tabulate
from orchestrator.report.tree import Results, SweepHeading, TrialResult

if TYPE_CHECKING:
    from orchestrator.store import Store, SweepRow, TrialRow


def results(store: Store, sweep_name: str) -> Results:
    """The verdict tables of a stored sweep, as its trials stand now. UserError when there is no such sweep."""
    sweep = store.sweep(sweep_name)
    return tabulate(_heading(sweep), _trial_results(store, sweep))


def _heading(sweep: SweepRow) -> SweepHeading:
    axes, derived = _axes(sweep.settings)
    seeds = sweep.settings.get("seeds")
    return SweepHeading(
        name=sweep.name,
        question=sweep.question,
        baseline=sweep.baseline,
        arms=sweep.arms,
        seeds=tuple(seeds) if seeds else None,
        margin_nats=sweep.verdict.get("margin"),
        alpha=sweep.verdict.get("alpha", 0.05),
        axis_names=axes,
        derived_axes=derived,
    )


def _axes(settings: Mapping[str, Any]) -> tuple[tuple[str, ...], frozenset[str]]:
    """The axes' names in file order, and those given as ``{of: PATH, times: NUMBER}``."""
    sources = [settings.get("axes") or {}, *(settings.get("zip") or ()), *(settings.get("rows") or ())]
    given = [(name, value) for source in sources for name, value in source.items()]
    derived = frozenset(name for name, value in given if isinstance(value, Mapping) and "of" in value)
    return tuple(dict.fromkeys(name for name, _ in given)), derived


def _trial_results(store: Store, sweep: SweepRow) -> list[TrialResult]:
    """The trials, with what the documented view ``results`` says was measured of them."""
    trials = store.trials(sweep.id)
    measured = {row["fingerprint"]: row for row in store.frame("results", sweep=sweep.name).to_dict("records")}
    return [_trial_result(trial, measured.get(trial.fingerprint, {}), sweep.name) for trial in trials]


def _trial_result(trial: TrialRow, measured: Mapping[Any, Any], sweep_name: str) -> TrialResult:
    is_complete = trial.state == "COMPLETE"

    def number(column: str) -> float | None:
        value = measured.get(column)
        return float(value) if is_complete and value is not None and math.isfinite(value) else None

    trained_in = measured.get("trained_in")
    return TrialResult(
        fingerprint=trial.fingerprint,
        arm=trial.arm,
        axes=trial.axes,
        lr=trial.config.train.lr,
        seed=trial.seed,
        state=trial.state,
        cause=trial.cause,
        reason=trial.reason,
        num_parameters=trial.num_parameters,
        training_flops=trial.training_flops,
        num_attempts=trial.num_attempts,
        slice_loss_nats=number("validation_loss_nats"),
        slice_bits_per_byte=number("bits_per_byte"),
        full_loss_nats=number("full_validation_loss_nats"),
        full_bits_per_byte=number("full_bits_per_byte"),
        tokens_per_second=number("tokens_per_second"),
        trained_in=trained_in if isinstance(trained_in, str) and trained_in != sweep_name else None,
    )
