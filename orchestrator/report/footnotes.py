"""What must be said below a verdict table, so that no number is read as more than it is."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from operator import attrgetter

from orchestrator.report.branching import branched_note
from orchestrator.report.contrasts import several_things
from orchestrator.report.figures import lr_text, plural, states_text
from orchestrator.report.look_words import looks_in_words
from orchestrator.report.tree import STATES, UNFINISHED, ArmRow, CellStates, Split, SweepHeading, TrialResult
from orchestrator.scaling import Optimum
from orchestrator.verdict import GATE_VERSION, Comparison, LookSequence, spent

EXPLORATORY_MARK = "*"
_CELL, _LAYOUTS, _BACKENDS = attrgetter("lr", "arm"), attrgetter("layouts"), attrgetter("backends")


def footnotes(
    heading: SweepHeading,
    split: Split,
    rows: Sequence[ArmRow],
    trials: Sequence[TrialResult],
    comparison: Comparison,
    exploratory: Sequence[str],
    states: Sequence[CellStates],
    pruned: str = "",
    sequence: LookSequence | None = None,
) -> tuple[str, ...]:
    """In the order of their weight. ``trials`` are those of the table, by arm, and ``states`` theirs by cell;
    ``exploratory`` are the reasons for the mark, ``pruned`` is about the whole sweep."""
    notes = [
        _interval(heading, comparison),
        _look(heading, comparison) if sequence is None else looks_in_words(heading, sequence),
        _changes(heading),
        several_things({row.arm: heading.declared.get(row.arm, ()) for row in rows}),
        _noise_floor(rows, comparison),
        heading.rates_note,
        _confirmed(heading, rows),
        _exploratory(rows, exploratory),
        *_edges(rows),
        _optima(heading, rows),
        _diverged(states),
        _chance(rows),
        _pruned(rows, pruned),
        _gated(rows),
        _incomplete(rows, trials),
        _holes(states),
        _unfinished(states),
        branched_note(trials),
        _reused(trials),
        _shared_baseline(heading),
        _reproduced(trials),
        _layouts(trials),
        _backends(trials),
        _measure(heading, split, rows, trials),
    ]
    return tuple(note for note in notes if note)


def _interval(heading: SweepHeading, comparison: Comparison) -> str:
    margin = (
        "no margin declared, so nothing is called equivalent"
        if heading.margin_nats is None
        else f"margin {heading.margin_nats:g} nats"
    )
    if comparison.critical_value is None:
        return f"interval: none, as it takes two seeds of an arm and of the baseline that differ; {margin}"
    return (
        f"interval: {100 * (1 - heading.alpha):g} % for all {plural(comparison.num_compared, 'difference')} to "
        f"{heading.baseline} at once ({_method(heading, comparison)}); {margin}"
    )


def _method(heading: SweepHeading, comparison: Comparison) -> str:
    degrees = comparison.degrees_of_freedom or 0.0
    paired = ", paired by seed" if heading.design.paired else ""
    if comparison.method == "dunnett":
        words = f"Dunnett, pooled variance{paired}, {degrees:.0f} degrees of freedom"
    else:
        words = f"Welch{paired}, Bonferroni, {degrees:.3g} degrees of freedom at least"
    if comparison.variances_p is not None:
        words += f", as Bartlett's test of equal variances gave p = {comparison.variances_p:.2g}"
    return words


def _look(heading: SweepHeading, comparison: Comparison) -> str:
    """Nothing for the only look of a sweep that declares one."""
    looks = heading.design.looks
    if comparison.critical_value is None or (looks.declared == 1 and looks.number == 1):
        return ""
    if looks.too_many:
        return f"look {looks.number}, {looks.declared} declared: this one's intervals count no looks"
    so_far = spent(heading.alpha, looks.number, looks.declared)
    return (
        f"look {looks.number} of {looks.declared}: O'Brien and Fleming's spending, {so_far:.2g} of alpha "
        f"{heading.alpha:g} up to here; the intervals are this look's"
    )


def _changes(heading: SweepHeading) -> str:
    if not heading.changes:
        return ""
    return (
        f"verdict settings are those of the first submission, and were declared otherwise later: "
        f"{'; '.join(heading.changes)}. A sweep of another name shares the trials and starts anew"
    )


def _noise_floor(rows: Sequence[ArmRow], comparison: Comparison) -> str:
    floor = comparison.noise_floor
    if floor is None:
        return ""
    multiples = ", ".join(f"{row.arm} {row.delta_sds:+.1f}" for row in rows if row.delta_sds is not None)
    pooled = f"noise floor: a seed SD of {floor.sd_nats:.4f} nats, pooled over {plural(floor.num_arms, 'arm')}"
    return f"{pooled}; differences in SDs: {multiples}" if multiples else pooled


def _confirmed(heading: SweepHeading, rows: Sequence[ArmRow]) -> str:
    if not heading.confirm_seeds or not heading.seeds:
        return ""
    choosing, fresh = (", ".join(map(str, seeds)) for seeds in (heading.seeds, heading.confirm_seeds))
    more = ", ".join(map(str, heading.extra_baseline_seeds))
    ours = f", of the baseline also {more}" if more else ""
    open_ones = ", ".join(row.arm for row in rows if row.best_lr is None)
    left = f"; not chosen: {open_ones}" if open_ones else ""
    said = f"learning rates were chosen on seeds {choosing}; losses and verdicts are those of fresh seeds {fresh}"
    return said + ours + left


def _exploratory(rows: Sequence[ArmRow], reasons: Sequence[str]) -> str:
    if not any(row.exploratory for row in rows):
        return ""
    return f"{EXPLORATORY_MARK} exploratory: {'; '.join(reasons)}"


def _edges(rows: Sequence[ArmRow]) -> Iterable[str]:
    for edge, beyond in (("lowest", "lower"), ("highest", "higher")):
        named = ", ".join(f"{row.arm} {lr_text(row.best_lr)}" for row in rows if row.edge == edge)
        if named:
            yield f"edge of the grid: the best learning rate is the {edge} tried, the optimum may be {beyond}: {named}"


def _optima(heading: SweepHeading, rows: Sequence[ArmRow]) -> str:
    named = [f"{row.arm} {_optimum(row.optimum)}" for row in rows if row.optimum is not None]
    if not named:
        return ""
    width = "" if heading.margin_nats is None else f"; within {heading.margin_nats:g} nats of it in braces"
    return f"optimum of a parabola in log LR [95 % by Fieller]{width}: {'; '.join(named)}"


def _optimum(found: Optimum) -> str:
    ends = [lr_text(float(f"{end:.3g}")) for end in (found.low, found.high) if end is not None]
    said = ", ".join(ends) or "unbounded"
    text = f"{lr_text(float(f'{found.lr:.3g}'))} [{said}]"
    if found.tolerance is None:
        return text
    low, high = (lr_text(float(f"{end:.3g}")) for end in found.tolerance)
    below, above = ("or less" if found.tolerance_open[0] else ""), ("or more" if found.tolerance_open[1] else "")
    return f"{text} {{{f'{low} {below}'.strip()} to {f'{high} {above}'.strip()}}}"


def _chance(rows: Sequence[ArmRow]) -> str:
    named = [
        f"{row.arm} at {lr_text(row.diverged_lr)} {row.diverged_lr_num_diverged} of {row.diverged_lr_num_seeds} "
        f"[{row.diverged_lr_low:.2f}, {row.diverged_lr_high:.2f}]"
        for row in rows
        if row.diverged_lr_low is not None
    ]
    return (
        f"chance to diverge at the smallest rate that did [95 %, Clopper and Pearson]: {', '.join(named)}"
        if named
        else ""
    )


def _diverged(states: Sequence[CellStates]) -> str:
    diverged = [cell for cell in states if "DIVERGED" in cell.counts]
    named = [
        f"at LR {lr_text(lr)} "
        + ", ".join(f"{c.arm} {c.counts['DIVERGED']} of {sum(c.counts.values())}" for c in diverged if c.lr == lr)
        for lr in sorted({cell.lr for cell in diverged})
    ]
    return f"diverged (a cell with a diverged seed has no mean): {'; '.join(named)}" if named else ""


def _pruned(rows: Sequence[ArmRow], audited: str) -> str:
    named = ", ".join(f"{row.arm} {row.counts['PRUNED']}" for row in rows if "PRUNED" in row.counts)
    if not named:
        return audited
    return f"{audited or 'pruned by rank before their end'}; trials stopped: {named}"


def _gated(rows: Sequence[ArmRow]) -> str:
    named = "; ".join(f"{row.arm} {row.gate}" for row in rows if row.gate)
    if not named:
        return ""
    rest = "the intervals hold for the arms that are here, and of the others nothing is known at this size"
    return f"gates: {named}. No rank of theirs, and no point on a law; {rest} ({GATE_VERSION})"


def _incomplete(rows: Sequence[ArmRow], trials: Sequence[TrialResult]) -> str:
    named, failed = [], [trial for trial in trials if trial.state == "FAILED"]
    for row in rows:
        causes = dict.fromkeys(_cause(trial) for trial in failed if trial.arm == row.arm)
        holes = [f"{row.counts['FAILED']} failed ({', '.join(causes)})"] if causes else []
        holes += [f"{row.num_missing} missing"] if row.num_missing else []
        named += [f"{row.arm} {', '.join(holes)}"] if holes else []
    return f"no rank, as cells are missing and perhaps not by chance: {'; '.join(named)}" if named else ""


def _holes(states: Sequence[CellStates]) -> str:
    """Cells in which something failed or was canceled, with all their states: which axis it hangs on shows here."""
    holes = [cell for cell in states if "FAILED" in cell.counts or "CANCELED" in cell.counts]
    named = [f"{cell.arm} at LR {lr_text(cell.lr)} {states_text(cell.counts)}" for cell in sorted(holes, key=_CELL)]
    return f"cells with holes: {'; '.join(named)}" if named else ""


def _cause(trial: TrialResult) -> str:
    return trial.cause or "cause unknown"


def _unfinished(states: Sequence[CellStates]) -> str:
    left: Counter[str] = Counter()
    arms: dict[str, None] = {}
    for cell in states:
        of_cell = {state: number for state, number in cell.counts.items() if state in UNFINISHED}
        left.update(of_cell)
        arms |= dict.fromkeys([cell.arm] if of_cell else [])
    if not left:
        return ""
    counted = states_text({state: left[state] for state in STATES if left[state]})
    return f"unfinished: {counted}; no rank until they end, and the table may change: {', '.join(arms)}"


def _reused(trials: Sequence[TrialResult]) -> str:
    origins = Counter([trial.trained_in for trial in trials if trial.trained_in is not None])
    named = ", ".join(f"{count} from {sweep}" for sweep, count in sorted(origins.items()))
    drifts = Counter([change for trial in trials if trial.drift for change in trial.drift])
    since = ", ".join(f"{change} ({count})" for change, count in drifts.items())
    # Without drift nothing is claimed: a sweep that trained none itself has nothing to compare with.
    drift = f"; not as they were (trials): {since}" if since else ""
    return f"reused trials: {named}{drift}" if named else ""


def _shared_baseline(heading: SweepHeading) -> str:
    """One noisy baseline moves all verdicts that lean on it, together; no table corrects for the others'."""
    others = {name: count for name, count in heading.comparisons.items() if name != heading.name}
    if not others:
        return ""
    total = sum(heading.comparisons.values())
    named = ", ".join(f"{count} in {name}" for name, count in sorted(others.items()))
    here = heading.comparisons.get(heading.name, 0)
    said = f"{plural(total, 'comparison')} lean on this baseline's trials, {here} here and {named}"
    return f"{said}; each sweep's intervals hold over its own"


def _reproduced(trials: Sequence[TrialResult]) -> str:
    named = [
        f"{trial.arm} at LR {lr_text(trial.lr)}, seed {trial.seed}, {trial.reproduced}"
        for trial in trials
        if trial.reproduced is not None
    ]
    return f"trained once more and compared: {'; '.join(named)}" if named else ""


def _layouts(trials: Sequence[TrialResult]) -> str:
    """Layouts agree to rounding, which training may amplify; a trial that changed its layout is named as such."""
    if len({" then ".join(layouts) for layouts in set(map(_LAYOUTS, trials)) if layouts}) < 2:
        return ""
    taken = Counter((trial.arm, " then ".join(trial.layouts)) for trial in trials if trial.layouts)
    resumed = sum(len(trial.layouts) > 1 for trial in trials)
    also = f" ({plural(resumed, 'trial')} resumed on another layout)" if resumed else ""
    named = "; ".join(f"{arm} {count} on {layout}" for (arm, layout), count in taken.items())
    return f"mixed layouts, so losses differ by rounding besides{also}: {named}"


def _backends(trials: Sequence[TrialResult]) -> str:
    """Different back ends agree to rounding, not to the last digit, and differ in speed."""
    if len({" then ".join(backends) for backends in set(map(_BACKENDS, trials)) if backends}) < 2:
        return ""
    taken = Counter((trial.arm, " then ".join(trial.backends)) for trial in trials if trial.backends)
    named = ", ".join(f"{arm} {count} {backend}" for (arm, backend), count in taken.items())
    return f"mixed back ends, so arms differ by rounding and in speed besides: {named}"


def _measure(heading: SweepHeading, split: Split, rows: Sequence[ArmRow], trials: Sequence[TrialResult]) -> str:
    numbers = [len(row.losses_nats) for row in rows if row.losses_nats]
    if not numbers:
        return ""
    seeds = plural(max(numbers), "seed") if len(set(numbers)) == 1 else f"{min(numbers)} to {max(numbers)} seeds"
    where = "whole validation split" if split == "full" else "validation slice"
    partly = split == "slice" and any(trial.full_loss_nats is not None for trial in trials)
    reason = ", as some complete trials were not measured on the whole split" if partly else ""
    points = max([trial.num_tail_points for trial in trials])
    averaged = (
        f", {points} validations in the last {100 * heading.tail:g} % of the schedule a trial" if points > 1 else ""
    )
    tail = averaged if split == "slice" else ""
    return f"loss: mean and SD over {seeds}{tail}, on the {where}{reason}"
