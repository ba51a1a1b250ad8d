"""What must be said below a verdict table, so that no number is read as more than it is."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence

from orchestrator.report.figures import lr_text, plural, states_text
from orchestrator.report.tree import STATES, UNFINISHED, ArmRow, Split, SweepHeading, TrialResult
from orchestrator.verdict import Comparison

EXPLORATORY_MARK = "*"


def footnotes(
    heading: SweepHeading,
    split: Split,
    rows: Sequence[ArmRow],
    trials: Sequence[TrialResult],
    comparison: Comparison,
) -> tuple[str, ...]:
    """In the order of their weight. ``trials`` are those of the table."""
    notes = [
        _interval(heading, comparison),
        _noise_floor(rows, comparison),
        _exploratory(rows),
        *_edges(rows),
        _diverged(trials),
        _pruned(rows),
        _incomplete(rows, trials),
        _unfinished(trials),
        _reused(trials),
        _measure(split, rows, trials),
    ]
    return tuple(note for note in notes if note)


def _interval(heading: SweepHeading, comparison: Comparison) -> str:
    margin = (
        "no margin declared, so nothing is called equivalent"
        if heading.margin_nats is None
        else f"margin {heading.margin_nats:g} nats"
    )
    if comparison.noise_floor is None or comparison.critical_value is None:
        return f"interval: none, as it takes two seeds of an arm and of the baseline that differ; {margin}"
    return (
        f"interval: {100 * (1 - heading.alpha):g} % for all {plural(comparison.num_compared, 'difference')} to "
        f"{heading.baseline} at once (Dunnett, pooled variance, {comparison.noise_floor.degrees_of_freedom} degrees of "
        f"freedom); {margin}"
    )


def _noise_floor(rows: Sequence[ArmRow], comparison: Comparison) -> str:
    floor = comparison.noise_floor
    if floor is None:
        return ""
    multiples = ", ".join(f"{row.arm} {row.delta_sds:+.1f}" for row in rows if row.delta_sds is not None)
    pooled = f"noise floor: a seed SD of {floor.sd_nats:.4f} nats, pooled over {plural(floor.num_arms, 'arm')}"
    return f"{pooled}; differences in SDs: {multiples}" if multiples else pooled


def _exploratory(rows: Sequence[ArmRow]) -> str:
    if not any(row.exploratory for row in rows):
        return ""
    return (
        f"{EXPLORATORY_MARK} exploratory: the best learning rates were chosen on the seeds that the verdict uses, so "
        "losses look lower than they are (winner's bias) and the intervals are not exact; confirm with fresh seeds"
    )


def _edges(rows: Sequence[ArmRow]) -> Iterable[str]:
    for edge, beyond in (("lowest", "lower"), ("highest", "higher")):
        named = ", ".join(f"{row.arm} {lr_text(row.best_lr)}" for row in rows if row.edge == edge)
        if named:
            yield f"edge of the grid: the best learning rate is the {edge} tried, the optimum may be {beyond}: {named}"


def _diverged(trials: Sequence[TrialResult]) -> str:
    diverged = Counter((trial.lr, trial.arm) for trial in trials if trial.state == "DIVERGED")
    tried = Counter((trial.lr, trial.arm) for trial in trials)
    rates = sorted({lr for lr, _ in diverged})
    named = [
        f"at LR {lr_text(lr)} "
        + ", ".join(f"{arm} {n} of {tried[rate, arm]}" for (rate, arm), n in diverged.items() if rate == lr)
        for lr in rates
    ]
    return f"diverged (a cell with a diverged seed has no mean): {'; '.join(named)}" if named else ""


def _pruned(rows: Sequence[ArmRow]) -> str:
    named = ", ".join(f"{row.arm} {row.counts['PRUNED']}" for row in rows if "PRUNED" in row.counts)
    return f"pruned by rank before their end: {named}" if named else ""


def _incomplete(rows: Sequence[ArmRow], trials: Sequence[TrialResult]) -> str:
    named = []
    for row in rows:
        causes = dict.fromkeys(_cause(trial) for trial in trials if trial.arm == row.arm and trial.state == "FAILED")
        holes = [f"{row.counts['FAILED']} failed ({', '.join(causes)})"] if causes else []
        holes += [f"{row.num_missing} missing"] if row.num_missing else []
        named += [f"{row.arm} {', '.join(holes)}"] if holes else []
    return f"no rank, as cells are missing and perhaps not by chance: {'; '.join(named)}" if named else ""


def _cause(trial: TrialResult) -> str:
    return trial.cause or "cause unknown"


def _unfinished(trials: Sequence[TrialResult]) -> str:
    counts = Counter(trial.state for trial in trials)
    left = {state: counts[state] for state in STATES if state in UNFINISHED and counts[state]}
    if not left:
        return ""
    arms = ", ".join(dict.fromkeys(trial.arm for trial in trials if trial.state in UNFINISHED))
    return f"unfinished: {states_text(left)}; no rank until they end, and the table may change: {arms}"


def _reused(trials: Sequence[TrialResult]) -> str:
    origins = Counter(trial.trained_in for trial in trials if trial.trained_in is not None)
    named = ", ".join(f"{count} from {sweep}" for sweep, count in sorted(origins.items()))
    return f"reused trials: {named}" if named else ""


def _measure(split: Split, rows: Sequence[ArmRow], trials: Sequence[TrialResult]) -> str:
    numbers = [len(row.losses_nats) for row in rows if row.losses_nats]
    if not numbers:
        return ""
    seeds = plural(max(numbers), "seed") if len(set(numbers)) == 1 else f"{min(numbers)} to {max(numbers)} seeds"
    where = "whole validation split" if split == "full" else "validation slice"
    partly = split == "slice" and any(trial.full_loss_nats is not None for trial in trials)
    reason = ", as some complete trials were not measured on the whole split" if partly else ""
    return f"loss: mean and SD over {seeds}, on the {where}{reason}"
