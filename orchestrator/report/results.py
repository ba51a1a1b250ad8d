"""A stored sweep's results: the one place that knows how the store tells them.

The surprise: a trial's numbers count only when its state is COMPLETE in the sweep's own list of trials, which is read
first. A trial that ends in between still counts as unfinished, never as complete without a loss.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from models.accounting import utilisation
from models.config import Layout
from orchestrator.report.figures import plural
from orchestrator.report.tables import tabulate
from orchestrator.report.tree import Results, SweepHeading, TrialResult
from orchestrator.store import verdict_seeds
from orchestrator.sweep import ResourcesConfig, VerdictConfig
from orchestrator.verdict import Design, Looks

if TYPE_CHECKING:
    from orchestrator.store import Store, SweepRow, TailRow, TrialRow


def results(store: Store, sweep_name: str) -> Results:
    """The verdict tables of a stored sweep, as its trials stand now. UserError when there is no such sweep."""
    sweep = store.sweep(sweep_name)
    heading = _heading(sweep)
    return tabulate(heading, _trial_results(store, sweep, heading.tail))


def _heading(sweep: SweepRow) -> SweepHeading:
    axes, derived = _axes(sweep.settings)
    seeds = sweep.settings.get("seeds")
    rules = VerdictConfig.model_validate(
        {name: value for name, value in sweep.verdict.items() if name in VerdictConfig.model_fields}
    )
    looks, exploratory = _looks(sweep, rules.looks)
    confirming = tuple(sweep.settings.get("confirm_seeds") or ())
    return SweepHeading(
        name=sweep.name,
        question=sweep.question,
        baseline=sweep.baseline,
        arms=sweep.arms,
        seeds=tuple(seeds) if seeds else None,
        extra_baseline_seeds=tuple(sweep.settings.get("extra_baseline_seeds") or ()),
        margin_nats=rules.margin,
        alpha=rules.alpha,
        design=Design(rules.method, rules.paired, looks),
        tail=rules.tail,
        exploratory=(*exploratory, *(_unsound_choices(sweep) if confirming else ())),
        changes=_changes(sweep, rules),
        axis_names=axes,
        derived_axes=derived,
        confirm_seeds=confirming,
    )


def _looks(sweep: SweepRow, declared: int) -> tuple[Looks, tuple[str, ...]]:
    """This look among those that the sweep's submissions made possible, and why that may be too many."""
    now = verdict_seeds(sweep.settings)
    taken: list[dict[str, list[int]]] = sweep.verdict.get("looks_taken", [])
    if "select" in now:
        # What was seen on seeds that now only choose learning rates is no look at the seeds of the verdict.
        taken = [one for one in taken if not set(one["seeds"]) <= set(now["select"])]
    earlier = taken[: taken.index(now)] if now in taken else taken
    total = len(taken) + (now not in taken)
    reasons = []
    if total > declared:
        reasons.append(f"verdicts were read {total} times, {declared} declared (verdict.looks)")
    keys = ("seeds", "extra_baseline_seeds")
    if any(not set(before[key]) <= {*now["seeds"], *now[key]} for before in earlier for key in keys):
        reasons.append("seeds of an earlier look were taken away")
    sizes = tuple((len(one["seeds"]), len(one["seeds"]) + len(one["extra_baseline_seeds"])) for one in earlier)
    return Looks(declared, sizes), tuple(reasons)


def _unsound_choices(sweep: SweepRow) -> list[str]:
    """Why the confirming seeds may be no fresh data."""
    chosen: list[dict[str, Any]] = sweep.verdict.get("chosen", [])
    reasons = []
    seen = sum(len(one["seen"]) for one in chosen)
    if seen:
        reasons.append(f"{plural(seen, 'confirming trial')} had run before the learning rate was chosen")
    rates: dict[str, set[float]] = {}
    for one in chosen:
        rates.setdefault(json.dumps([one["arm"], one["axes"]], default=str), set()).add(one["lr"])
    again = sorted({json.loads(key)[0] for key, found in rates.items() if len(found) > 1})
    if again:
        reasons.append(f"the learning rate was chosen anew for {', '.join(again)}, after confirming trials had begun")
    return reasons


def _changes(sweep: SweepRow, rules: VerdictConfig) -> tuple[str, ...]:
    later = sweep.settings.get("verdict") or {}
    changes = [
        f"{name} {_shown(value)} holds, not {_shown(later[name])}"
        for name, value in rules.model_dump(mode="json").items()
        if name in later and later[name] != value
    ]
    first = sweep.verdict.get("baseline", sweep.baseline)
    return (*changes, *([f"the baseline was {first}"] if first != sweep.baseline else []))


def _shown(value: object) -> str:
    if value is None or isinstance(value, bool):
        return {None: "none", True: "true", False: "false"}[value]
    return f"{value:g}" if isinstance(value, int | float) else str(value)


def _axes(settings: Mapping[str, Any]) -> tuple[tuple[str, ...], frozenset[str]]:
    """The axes' names in file order, and those given as ``{of: PATH, times: NUMBER}``."""
    sources = [settings.get("axes") or {}, *(settings.get("zip") or ()), *(settings.get("rows") or ())]
    given = [(name, value) for source in sources for name, value in source.items()]
    derived = frozenset(name for name, value in given if isinstance(value, Mapping) and "of" in value)
    return tuple(dict.fromkeys(name for name, _ in given)), derived


def _trial_results(store: Store, sweep: SweepRow, tail: float) -> list[TrialResult]:
    """The trials, with what was measured of them: the documented view ``results``, and the tail of the schedule."""
    trials = store.trials(sweep.id)
    measured = {row["fingerprint"]: row for row in store.frame("results", sweep=sweep.name).to_dict("records")}
    tails = {(row.fingerprint, row.split): row for row in store.tails(sweep.id, tail)}
    backends, layouts = store.backends(sweep.id), store.layouts(sweep.id)
    resources = ResourcesConfig.model_validate(sweep.settings.get("resources") or {})
    return [
        replace(
            _trial_result(trial, measured.get(trial.fingerprint, {}), tails, sweep.name, resources),
            backends=backends.get(trial.fingerprint, ()),
            layouts=tuple(map(_layout, layouts.get(trial.fingerprint, ()))),
        )
        for trial in trials
    ]


def _layout(layout: Layout) -> str:
    """What differs from one rank, as the sweep file names it."""
    set_fields = layout.model_dump(exclude_defaults=True)
    return ", ".join(f"{name} {value}" for name, value in set_fields.items()) or "one rank"


def _trial_result(
    trial: TrialRow,
    measured: Mapping[Any, Any],
    tails: Mapping[tuple[str, str], TailRow],
    sweep_name: str,
    resources: ResourcesConfig,
) -> TrialResult:
    is_complete = trial.state == "COMPLETE"
    on_slice, on_all = (tails.get((trial.fingerprint, split)) if is_complete else None for split in ("slice", "full"))
    trained_in = measured.get("trained_in")
    trained_in = trained_in if isinstance(trained_in, str) and trained_in != sweep_name else None
    speed, train = measured.get("tokens_per_second"), trial.config.train
    tokens_per_second = float(speed) if is_complete and speed is not None and math.isfinite(speed) else None
    flops_per_token = trial.training_flops / (train.num_steps * train.batch_tokens)
    flops_per_second = None if tokens_per_second is None else tokens_per_second * flops_per_token
    # What another sweep trained may have run on other devices.
    peak = resources.rank_peak_flops(trial.config.precision) if trained_in is None else None
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
        slice_loss_nats=None if on_slice is None else on_slice.loss_nats,
        slice_bits_per_byte=None if on_slice is None else on_slice.bits_per_byte,
        full_loss_nats=None if on_all is None else on_all.loss_nats,
        full_bits_per_byte=None if on_all is None else on_all.bits_per_byte,
        num_tail_points=0 if on_slice is None else on_slice.num_points,
        tokens_per_second=tokens_per_second,
        flops_per_second=flops_per_second,
        utilisation=utilisation(flops_per_second, peak, resources.layout.world_size),
        trained_in=trained_in,
    )
