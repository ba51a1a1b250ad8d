"""A stored sweep's results: the one place that knows how the store tells them.

All is read in one snapshot: a trial that ends meanwhile is unfinished here, never complete without a loss.
"""

from __future__ import annotations

import gc
import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from models.accounting import utilisation
from models.config import Layout
from orchestrator.report.figures import lr_text, plural
from orchestrator.report.gated import kept_back
from orchestrator.report.imported import with_imported
from orchestrator.report.tables import tabulate
from orchestrator.report.tree import LR_AXIS, Results, SweepHeading, TrialResult
from orchestrator.store import REPRODUCED, allotments, passages, verdict_seeds
from orchestrator.sweep import ResourcesConfig, SearchedRates, VerdictConfig, look_seeds
from orchestrator.verdict import Design, Looks

if TYPE_CHECKING:
    from orchestrator.store import Store, SweepRow


def results(store: Store, sweep_name: str) -> Results:
    """The verdict tables of a stored sweep, as its trials stand now. UserError when there is no such sweep."""
    sweep = store.sweep(sweep_name)
    decisions, compared = tuple(store.rank_decisions(sweep.id)), store.comparisons(sweep.id)
    heading = replace(_heading(sweep), rank_decisions=decisions, comparisons=compared)
    with _uncollected():
        found = tabulate(heading, _trial_results(store, sweep, heading.tail))
    return with_imported(found, store.imported(sweep.id))


@contextmanager
def _uncollected() -> Iterator[None]:
    """Without Python's collector of cycles: nothing here makes any, and it would walk 10^5 trials again and again."""
    was_on = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_on:
            gc.enable()


def _heading(sweep: SweepRow) -> SweepHeading:
    axes, derived = _axes(sweep.settings)
    seeds = sweep.settings.get("seeds")
    rules = VerdictConfig.model_validate(
        {name: value for name, value in sweep.verdict.items() if name in VerdictConfig.model_fields}
    )
    looks, exploratory = _looks(sweep, rules.looks)
    confirming = tuple(sweep.settings.get("confirm_seeds") or ())
    searched, note = _growing_rates(sweep)
    extra = tuple(sweep.settings.get("extra_baseline_seeds") or ())
    by_look = None
    if rules.allocate is not None and confirming:
        by_look = look_seeds(seeds or (), confirming, extra, rules.looks, rules.allocate.seeds_per_look)
        if looks.earlier:
            exploratory = (*exploratory, "verdicts could be read with other seeds before the first look was taken")
        looks = Looks(rules.looks)
    return SweepHeading(
        name=sweep.name,
        question=sweep.question,
        baseline=sweep.baseline,
        arms=sweep.arms,
        seeds=tuple(seeds) if seeds else None,
        extra_baseline_seeds=extra,
        margin_nats=rules.margin,
        alpha=rules.alpha,
        design=Design(rules.method, rules.paired, looks),
        tail=rules.tail,
        exploratory=(*exploratory, *(_unsound_choices(sweep) if confirming else ())),
        changes=_changes(sweep, rules),
        axis_names=axes,
        derived_axes=derived,
        confirm_seeds=confirming,
        look_seeds=by_look,
        allotments=tuple(allotments(sweep.verdict)),
        gates={kept.key: kept.words for kept in kept_back(sweep)},
        passages=tuple(passages(sweep.verdict)),
        searched_rates=searched,
        rates_note=note,
        declared={arm: tuple(keys) for arm, keys in (sweep.settings.get("declared") or {}).items()},
    )


def _growing_rates(sweep: SweepRow) -> tuple[int | None, str]:
    """How many rates an arm has by search, and a footnote; (None, "") where the file names all rates."""
    axis = (sweep.settings.get("axes") or {}).get(LR_AXIS)
    if not isinstance(axis, Mapping):
        return None, ""
    if "search" in axis:
        low, high = map(lr_text, axis["search"])
        number = SearchedRates.model_validate(axis).trials
        first = len(SearchedRates.model_validate(axis).first)
        how = f"{first} spread evenly in log LR, then one by one along a parabola (Optuna)"
        return number, f"learning rates searched between {low} and {high}: {number} an arm, {how}; arms differ in rates"
    if "extend" not in axis:
        return None, ""
    added = sorted({one["lr"] for one in sweep.verdict.get("grown", ())})
    named = f": {', '.join(map(lr_text, added))}" if added else ""
    return (
        None,
        f"the grid was extended at its edge by {len(added)} of at most {axis['extend']} rates, in all arms{named}",
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
    """Column by column, since there may be 10^5 of them."""
    given = store.outcome_columns(sweep.id, tail)
    stamps = {one.fingerprint: one.message.partition(":")[0] for one in store.events(kind=REPRODUCED)}
    in_state = zip(given["state"], given["tokens_per_second"], strict=True)
    speeds = [speed if state == "COMPLETE" else None for state, speed in in_state]
    work = zip(speeds, given["training_flops"], given["num_steps"], given["batch_tokens"], strict=True)
    flops_per_second = [
        None if speed is None else speed * (flops / (num_steps * batch_tokens))
        for speed, flops, num_steps, batch_tokens in work
    ]
    trained_in = [None if name == sweep.name else name for name in given["trained_in"]]
    drifts = {one.fingerprint: one.drift for one in store.reused(sweep.id)} if any(trained_in) else {}
    done = zip(given["end_step"], given["num_steps"], strict=True)
    columns: dict[str, Iterable[Any]] = {
        **given,
        "training_flops": map(int, given["training_flops"]),
        "num_tail_points": [points or 0 for points in given["slice_points"]],
        "tokens_per_second": speeds,
        "layouts": _of_each(lambda layouts: tuple(map(layout_text, layouts)), given["layouts"]),
        "flops_per_second": flops_per_second,
        "utilisation": _utilisations(sweep, given, flops_per_second, trained_in),
        "reproduced": map(stamps.get, given["fingerprint"]),
        "drift": [drifts.get(fingerprint, ()) for fingerprint in given["fingerprint"]],
        "trained_in": trained_in,
        "share_done": [(end_step or 0) / num_steps for end_step, num_steps in done],
    }
    return list(map(TrialResult._make, zip(*(columns[name] for name in TrialResult._fields), strict=True)))


def _utilisations(
    sweep: SweepRow, given: Mapping[str, Sequence[Any]], flops: Sequence[float | None], trained_in: Sequence[str | None]
) -> list[float | None]:
    """What another sweep trained may have run on other devices."""
    resources = ResourcesConfig.model_validate(sweep.settings.get("resources") or {})
    ranks: dict[tuple[Any, ...], tuple[float | None, int]] = {}
    found = []
    for arm, axes, precision, speed, other in zip(
        given["arm"], given["axes"], given["precision"], flops, trained_in, strict=True
    ):
        cell = (precision, arm, id(axes)) if resources.by else (precision,)
        if cell not in ranks:
            own = resources.of(arm, axes) if resources.by else resources
            ranks[cell] = own.rank_peak_flops(precision), own.layout.world_size
        found.append(None if other is not None else utilisation(speed, *ranks[cell]))
    return found


def _of_each(function: Callable[[Any], Any], values: Sequence[Any]) -> list[Any]:
    """``function`` of values that are shared, once for each of them."""
    found = {key: function(value) for key, value in {id(value): value for value in values}.items()}
    return [found[id(value)] for value in values]


def layout_text(values: Mapping[str, Any]) -> str:
    """What differs from one rank, as the sweep file names it."""
    set_fields = Layout.model_validate(values).model_dump(exclude_defaults=True)
    return ", ".join(f"{name} {value}" for name, value in set_fields.items()) or "one rank"
