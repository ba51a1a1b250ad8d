"""From trials to verdict tables. Pure.

Axes other than the learning rate split a sweep into tables, one for each combination of their values, and arms are
compared within a table only. The surprise: a row counts all the arm's trials, while its losses and its verdict are
those at the arm's own best learning rate.
"""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import repeat
from operator import attrgetter
from statistics import fmean, median
from typing import Any, TypeVar

from orchestrator.report.footnotes import footnotes
from orchestrator.report.look_words import sequence_of
from orchestrator.report.pruning import audit, audit_in_words
from orchestrator.report.tree import (
    LR_AXIS,
    STATES,
    UNFINISHED,
    ArmRow,
    CellStates,
    Results,
    Split,
    SweepHeading,
    TrialResult,
    VerdictTable,
)
from orchestrator.scaling import (
    BestLearningRate,
    CellResult,
    best_learning_rate,
    fit_optimum,
    pooled_variance,
)
from orchestrator.store import FINISHED
from orchestrator.sweep import arm_key
from orchestrator.verdict import LookSequence, Sample, Verdict, compare

R = TypeVar("R")


def tabulate(heading: SweepHeading, trials: Sequence[TrialResult]) -> Results:
    """The verdict tables of a sweep whose trials stand as ``trials`` say, finished or not."""
    split = _split(trials)
    places, cells = (
        _of_axes(trials, lambda axes: _place(heading, axes)),
        _of_axes(trials, lambda axes: _cell(heading, axes)),
    )
    axes_of = dict(places.values())
    groups: dict[str, list[TrialResult]] = {key: [] for key in axes_of}
    of_axes = {key: groups[place] for key, (place, _) in places.items()}
    for trial in trials:
        of_axes[id(trial.axes)].append(trial)
    pruning = audit(heading, split, trials)
    pruned = "" if pruning is None else audit_in_words(pruning)
    ordered = sorted(groups, key=lambda key: [_sort_key(value) for _, value in axes_of[key]])
    return Results(
        sweep=heading.name,
        question=heading.question,
        baseline=heading.baseline,
        margin_nats=heading.margin_nats,
        alpha=heading.alpha,
        design=heading.design,
        tail=heading.tail,
        split=split,
        counts=_counts(trials),
        tables=tuple(_table(heading, split, axes_of[key], groups[key], cells, pruned) for key in ordered),
        pruning=pruning,
        trials=tuple(trials),
        allotments=heading.allotments,
        passages=heading.passages,
    )


def _split(trials: Sequence[TrialResult]) -> Split:
    """The whole split only if every complete trial was measured on it: the two losses are never mixed."""
    on_all = [trial.full_loss_nats for trial in trials if trial.state == "COMPLETE"]
    return "full" if on_all and None not in on_all else "slice"


def _of_axes(trials: Sequence[TrialResult], function: Callable[[Mapping[str, Any]], R]) -> dict[int, R]:
    """``function`` of trials' axes, by their identity: 10^5 trials share a few hundred."""
    return {key: function(axes) for key, axes in {id(trial.axes): trial.axes for trial in trials}.items()}


def _place(heading: SweepHeading, axes: Mapping[str, Any]) -> tuple[str, tuple[tuple[str, Any], ...]]:
    """The table that a trial belongs to: its key, and the axes that it is about."""
    order = {name: index for index, name in enumerate(heading.axis_names)}
    names = [name for name in axes if name != LR_AXIS and name not in heading.derived_axes]
    of_table = tuple((name, axes[name]) for name in sorted(names, key=lambda name: (order.get(name, len(order)), name)))
    return _key(of_table), of_table


def _cell(heading: SweepHeading, axes: Mapping[str, Any]) -> str:
    """What makes a trial's cell the same one in another arm."""
    return _key({name: value for name, value in axes.items() if name not in heading.derived_axes})


def _key(value: object) -> str:
    return json.dumps(value, sort_keys=True, default=str)


def _sort_key(value: object) -> tuple[int, float, str]:
    return (0, float(value), "") if isinstance(value, int | float) else (1, 0.0, _key(value))


def _counts(trials: Sequence[TrialResult]) -> dict[str, int]:
    return _in_order(Counter(map(_STATE, trials)))


def _in_order(counted: Mapping[str, int]) -> dict[str, int]:
    return {state: counted[state] for state in (*STATES, *sorted(set(counted) - set(STATES))) if counted.get(state)}


@dataclass(frozen=True)
class _Arm:
    """An arm's part of a table before it is judged."""

    name: str
    trials: tuple[TrialResult, ...]
    learning_rate: BestLearningRate
    best_lr: float | None
    at_best: tuple[TrialResult, ...]
    """The trials of the verdict, by ascending seed, as the losses are: at the best learning rate, or confirming it."""
    losses_nats: tuple[float, ...]
    num_missing: int
    num_confirming: int | None = None
    """Confirming trials that there should be; None: the seeds that choose the rate are those of the verdict."""
    gate: str = ""
    """Why it has no trials on this rung of a ladder, where a gate is the reason."""

    @property
    def is_whole(self) -> bool:
        holes = ("FAILED", *UNFINISHED)
        if self.num_confirming is not None and len(self.losses_nats) < self.num_confirming:
            return False
        return not self.num_missing and not any(trial.state in holes for trial in self.trials)


def _table(
    heading: SweepHeading,
    split: Split,
    axes: tuple[tuple[str, Any], ...],
    trials: Sequence[TrialResult],
    cell_of: Mapping[int, str],
    pruned: str,
) -> VerdictTable:
    others = dict.fromkeys([*heading.arms, *(trial.arm for trial in trials)])
    names = [heading.baseline, *(name for name in others if name != heading.baseline)]
    of_arm: dict[str, list[TrialResult]] = {name: [] for name in names}
    for trial in trials:
        of_arm[trial.arm].append(trial)
    for of_one in of_arm.values():
        of_one.sort(key=_LR_AND_SEED)
    trials = [trial for of_one in of_arm.values() for trial in of_one]
    fresh = heading.fresh_seeds
    cells = {cell_of[key] for key in {id(trial.axes) for trial in trials if trial.seed not in fresh}}
    arms = [_gated(_arm(name, heading, split, of_arm[name], cells, cell_of), heading, axes) for name in names]
    sequence = None if heading.look_seeds is None else _sequence(heading, split, arms)
    if sequence is None:
        comparison = compare(
            [_sample(arm) for arm in arms], heading.baseline, heading.margin_nats, heading.alpha, heading.design
        )
    else:
        comparison = sequence.comparison
        arms = [_at_look(arm, heading, split, sequence) for arm in arms]
    chosen = not heading.confirm_seeds and any(_was_chosen(arm.learning_rate) for arm in arms)
    reasons = (*((LR_REASON,) if chosen else ()), *heading.exploratory)
    noise = pooled_variance([arm.learning_rate for arm in arms])
    rows = _ranked(
        [
            (
                replace(
                    _row(arm, judged, split, bool(reasons)),
                    is_baseline=arm.name == heading.baseline,
                    optimum=fit_optimum(arm.learning_rate, *noise, heading.margin_nats),
                    look=None if sequence is None else sequence.look_of.get(arm.name),
                ),
                arm.is_whole,
            )
            for arm, judged in zip(arms, comparison.verdicts, strict=True)
        ]
    )
    states = _cell_states(trials)
    return VerdictTable(
        axes=axes,
        rows=rows,
        noise_floor=comparison.noise_floor,
        critical_value=comparison.critical_value,
        num_compared=comparison.num_compared,
        method=comparison.method,
        variances_p=comparison.variances_p,
        trials_compared=_compared(rows),
        states=states,
        footnotes=footnotes(heading, split, rows, trials, comparison, reasons, states, pruned, sequence),
    )


def _gated(arm: _Arm, heading: SweepHeading, axes: tuple[tuple[str, Any], ...]) -> _Arm:
    """The arm with what keeps it off the rung: nothing of it is missing then."""
    words = heading.gates.get(arm_key(arm.name, dict(axes)), "") if heading.gates and not arm.trials else ""
    return replace(arm, gate=words, num_missing=0) if words else arm


def _sequence(heading: SweepHeading, split: Split, arms: Sequence[_Arm]) -> LookSequence:
    """Of the arms that have trials: the family of the table."""
    there = [arm for arm in arms if arm.trials or arm.name == heading.baseline]
    seeds = heading.fresh_seeds
    fresh = {arm.name: [trial for trial in arm.trials if trial.seed in seeds] for arm in there}
    complete = [trial for trials in fresh.values() for trial in trials if trial.state == "COMPLETE"]
    losses = {trial.fingerprint: loss for trial in complete if (loss := _loss(trial, split)) is not None}
    rateless = [
        arm.name for arm in there if not fresh[arm.name] and arm.learning_rate.best is None and _all_over(arm.trials)
    ]
    return sequence_of(heading, fresh, losses, {arm.name: _problem(arm) for arm in there}, rateless)


def _all_over(trials: Sequence[TrialResult]) -> bool:
    return all(trial.state in FINISHED for trial in trials)


def _at_look(arm: _Arm, heading: SweepHeading, split: Split, sequence: LookSequence) -> _Arm:
    """The arm by the seeds of its look; before the first, as it is."""
    look = sequence.look_of.get(arm.name)
    if look is None or heading.look_seeds is None:
        return arm
    verdict = next(one for one in sequence.comparison.verdicts if one.arm == arm.name)
    seeds = heading.look_seeds.of(look, arm.name == heading.baseline) if verdict.mean_nats is not None else ()
    at_best = tuple(sorted((trial for trial in arm.trials if trial.seed in seeds), key=lambda trial: trial.seed))
    losses = tuple(loss for trial in at_best if (loss := _loss(trial, split)) is not None)
    return replace(arm, at_best=at_best, losses_nats=losses)


def _was_chosen(rates: BestLearningRate) -> bool:
    """Among several, also where all the others were stopped on the way."""
    return rates.num_finite + sum(point.num_pruned > 0 for point in rates.points) > 1


def _cell_states(trials: Sequence[TrialResult]) -> tuple[CellStates, ...]:
    cells: dict[tuple[str, float], dict[str, int]] = {}
    for (arm, lr, state), number in Counter(map(_CELL_STATE, trials)).items():
        cells.setdefault((arm, lr), {})[state] = number
    return tuple(CellStates(arm, lr, _in_order(counts)) for (arm, lr), counts in cells.items())


_LR, _SEED, _STATE, _FINGERPRINT = map(attrgetter, ("lr", "seed", "state", "fingerprint"))
_LR_AND_SEED, _CELL_STATE = attrgetter("lr", "seed"), attrgetter("arm", "lr", "state")
_ON_ALL, _ON_SLICE = attrgetter("full_loss_nats"), attrgetter("slice_loss_nats")

LR_REASON = (
    "the best learning rates were chosen on the seeds that the verdict uses, so losses look lower than they are "
    "(winner's bias) and the intervals are not exact; confirm with fresh seeds"
)


def _sample(arm: _Arm) -> Sample:
    if not arm.losses_nats:
        return Sample(arm.name, (), _problem(arm))
    return Sample(arm.name, arm.losses_nats, seeds=tuple(trial.seed for trial in arm.at_best))


def _arm(
    name: str,
    heading: SweepHeading,
    split: Split,
    trials: list[TrialResult],
    cells: set[str],
    cell_of: Mapping[int, str],
) -> _Arm:
    extra = heading.extra_baseline_seeds if name == heading.baseline else ()
    confirm = (*heading.confirm_seeds, *extra) if heading.confirm_seeds else ()
    fresh = heading.fresh_seeds
    choosing = [trial for trial in trials if trial.seed not in fresh] if fresh else trials
    losses_of = map(_ON_ALL if split == "full" else _ON_SLICE, choosing)
    facts = (repeat(name), map(_LR, choosing), map(_SEED, choosing), map(_STATE, choosing), losses_of)
    results = list(map(CellResult._make, zip(*facts, strict=False)))
    expected = heading.seeds
    if expected is not None and not confirm:
        expected = (*expected, *extra)
    learning_rate = best_learning_rate(name, results, expected)
    seeds = set(expected or ()).union(map(_SEED, choosing))
    present = {(cell_of[id(trial.axes)], trial.seed) for trial in choosing}
    best_lr = None if learning_rate.best is None else learning_rate.best.lr
    losses = () if learning_rate.best is None else learning_rate.best.losses_nats
    at_best = [trial for trial in choosing if trial.lr == best_lr]
    if confirm:
        # The stored choice, not one made anew: the confirming trials carry it.
        at_best = sorted((trial for trial in trials if trial.seed in confirm), key=lambda trial: trial.seed)
        best_lr = at_best[-1].lr if at_best else None
        known = [loss for trial in at_best if (loss := _loss(trial, split)) is not None and trial.state == "COMPLETE"]
        whole = len(known) == len(confirm) and len({trial.lr for trial in at_best}) == 1
        losses, at_best = (tuple(known), at_best) if whole else ((), [])
    return _Arm(
        name=name,
        trials=tuple(trials),
        learning_rate=learning_rate,
        best_lr=best_lr,
        at_best=tuple(at_best),
        losses_nats=losses,
        num_missing=_num_missing(heading, cells, seeds, present),
        num_confirming=len(confirm) if confirm else None,
    )


def _num_missing(heading: SweepHeading, cells: set[str], seeds: set[int], present: set[tuple[str, int]]) -> int:
    """Of a search, whose rates are each arm's own, by number."""
    if heading.searched_rates is not None:
        return max(0, heading.searched_rates * len(seeds) - len(present))
    return len(cells) * len(seeds) - sum([cell in cells and seed in seeds for cell, seed in present])


def _loss(trial: TrialResult, split: Split) -> float | None:
    return trial.full_loss_nats if split == "full" else trial.slice_loss_nats


def _problem(arm: _Arm) -> str:
    """Why an arm has no comparable cell."""
    counts = _counts(arm.trials)
    if not counts:
        return arm.gate or "no trial (refused or excluded)"
    if len(counts) == 1 and (state := next(iter(counts))) in ("DIVERGED", "FAILED", "PRUNED"):
        number = len(arm.trials)
        was = "was pruned" if number == 1 else "were pruned"
        ended = was if state == "PRUNED" else state.lower()
        return f"the only trial {ended}" if number == 1 else f"all {number} trials {ended}"
    yet = " yet" if any(state in UNFINISHED for state in counts) else ""
    if arm.num_confirming is not None and arm.best_lr is not None:
        of_rate = [trial for trial in arm.trials if trial.lr == arm.best_lr]
        diverged = any(trial.state == "DIVERGED" for trial in of_rate)
        return (
            "a confirming seed diverged" if diverged else f"not all {arm.num_confirming} confirming seeds are complete"
        )
    if arm.num_confirming is not None and arm.learning_rate.best is not None:
        return f"its learning rate is not chosen{yet}"
    return f"no learning rate has all its seeds complete{yet}"


def _row(arm: _Arm, judged: Verdict, split: Split, exploratory: bool) -> ArmRow:
    rate, complete = arm.learning_rate, [trial for trial in arm.trials if trial.state == "COMPLETE"]
    diverged, chance = rate.smallest_diverged, rate.diverged_interval
    shown = arm.at_best or arm.trials
    return ArmRow(
        arm=arm.name,
        is_baseline=False,
        rank=None,
        best_lr=arm.best_lr,
        edge=rate.edge,
        num_finite_lrs=rate.num_finite,
        optimum=None,
        losses_nats=arm.losses_nats,
        loss_nats=judged.mean_nats,
        loss_sd_nats=judged.sd_nats,
        bits_per_byte=_mean_bits(arm, split),
        perplexity=_perplexity(judged.mean_nats),
        delta_nats=judged.delta_nats,
        low_nats=judged.low_nats,
        high_nats=judged.high_nats,
        delta_sds=judged.delta_sds,
        decision=judged.decision,
        verdict=judged.words,
        more_seeds=judged.more_seeds,
        exploratory=exploratory and bool(arm.losses_nats),
        num_parameters=shown[0].num_parameters if shown else None,
        training_flops=shown[0].training_flops if shown else None,
        tokens_per_second=_median(trial.tokens_per_second for trial in complete),
        flops_per_second=_median(trial.flops_per_second for trial in complete),
        utilisation=_median(trial.utilisation for trial in complete),
        counts=_counts(arm.trials),
        num_missing=arm.num_missing,
        diverged_lr=None if diverged is None else diverged.lr,
        diverged_lr_num_diverged=0 if diverged is None else diverged.num_diverged,
        diverged_lr_num_seeds=0 if diverged is None else diverged.num_seeds,
        diverged_lr_low=None if chance is None else chance[0],
        diverged_lr_high=None if chance is None else chance[1],
        trials=tuple(map(_FINGERPRINT, arm.trials)),
        trials_best=tuple(trial.fingerprint for trial in arm.at_best),
        trials_complete=tuple(map(_FINGERPRINT, complete)),
        points=rate.points,
        gate=arm.gate,
    )


def _median(values: Iterable[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return median(known) if known else None


def _mean_bits(arm: _Arm, split: Split) -> float | None:
    bits = [trial.full_bits_per_byte if split == "full" else trial.slice_bits_per_byte for trial in arm.at_best]
    known = [value for value in bits if value is not None]
    return fmean(known) if known and len(known) == len(bits) else None


def _perplexity(mean_nats: float | None) -> float | None:
    """None also where the loss is so large that there is no such float."""
    try:
        return None if mean_nats is None else math.exp(mean_nats)
    except OverflowError:
        return None


def _ranked(rows: Sequence[tuple[ArmRow, bool]]) -> tuple[ArmRow, ...]:
    """Ranks by mean loss among the arms whose cells are all there; equal means share the better rank."""
    means = sorted(row.loss_nats for row, is_whole in rows if is_whole and row.loss_nats is not None)
    return tuple(
        replace(row, rank=means.index(row.loss_nats) + 1) if is_whole and row.loss_nats is not None else row
        for row, is_whole in rows
    )


def _compared(rows: Sequence[ArmRow]) -> tuple[str, ...]:
    """Every arm with two seeds gives to the pooled variance, and with it to each interval."""
    return tuple(fingerprint for row in rows if len(row.losses_nats) > 1 for fingerprint in row.trials_best)
