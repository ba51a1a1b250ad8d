"""In what each arm differs from the baseline, a line an arm: what it sets, what follows, and what is left over."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from orchestrator.report.figures import axes_text, axis_text

if TYPE_CHECKING:
    from orchestrator.plan import Change, Contrast, Plan, PlannedTrial

NUM_IMPLIED = 6
"""How many implied keys a line names; a preset brings a dozen."""


def contrast_lines(plan: Plan) -> list[str]:
    """A line for each arm but the baseline, or one for each set of cells in which it differs otherwise."""
    told = plan.contrasts
    if not told:
        return []
    lines = [f"beside {plan.sweep.baseline}, each arm in its own cells:"]
    for arm in dict.fromkeys(contrast.arm for contrast in told):
        by_text: dict[str, list[Contrast]] = {}
        of_arm = [contrast for contrast in told if contrast.arm == arm]
        for contrast in of_arm:
            by_text.setdefault(contrast_text(contrast), []).append(contrast)
        for text, same in by_text.items():
            where = f" ({_where(same, of_arm)})" if len(by_text) > 1 else ""
            lines.append(f"  {arm}{where} {text}")
    return lines


def contrast_text(contrast: Contrast) -> str:
    """``changes gate {position: sdpa}; so parameters +32,768 (+3.62%), FLOPs +2.9%``."""
    keys = [_change_text(change) for change in contrast.declared]
    many = f"changes {len(keys)} things at once: " if len(keys) > 1 else "changes "
    said = many + (", ".join(keys) or "nothing")
    follows = [*_implied(contrast.implied), *_costs(contrast.trial, contrast.baseline)]
    return f"{said}; so {', '.join(follows)}" if follows else f"{said}; parameters, FLOPs and memory are the same"


def _implied(changes: Sequence[Change]) -> list[str]:
    said = [f"{_change_text(change)} ({change.why})" for change in changes[:NUM_IMPLIED]]
    return [*said, f"{len(changes) - NUM_IMPLIED} more keys"] if len(changes) > NUM_IMPLIED else said


def _costs(trial: PlannedTrial, baseline: PlannedTrial) -> list[str]:
    """What is not the same of the two trials' prices. A match leaves what its steps could not take off."""
    costs = []
    more = trial.num_parameters - baseline.num_parameters
    if more:
        costs.append(f"parameters {more:+,} ({_share(more, baseline.num_parameters)})")
    active = trial.num_active_parameters - baseline.num_active_parameters
    if active != more:
        costs.append(f"active parameters {active:+,} ({_share(active, baseline.num_active_parameters)})")
    if flops := trial.training_flops - baseline.training_flops:
        costs.append(f"FLOPs {_share(flops, baseline.training_flops)}")
    if memory := trial.memory.total - baseline.memory.total:
        costs.append(f"memory {_share(memory, baseline.memory.total)}")
    if trial.micro_batch_sequences != baseline.micro_batch_sequences:
        costs.append(f"micro-batch {baseline.micro_batch_sequences} -> {trial.micro_batch_sequences}")
    return costs


def _share(more: int, of: int) -> str:
    return f"{100 * more / of:+.3g}%"


def _change_text(change: Change) -> str:
    if change.baseline is None:
        return f"{change.key} {_value(change.arm)}"
    if change.arm is None:
        return f"no {change.key}"
    return f"{change.key} {_value(change.baseline)} -> {_value(change.arm)}"


def _value(value: Any) -> str:
    if isinstance(value, Mapping):
        return "{" + ", ".join(f"{name}: {_value(inner)}" for name, inner in value.items()) + "}"
    if isinstance(value, list):
        return "[" + ", ".join(map(_value, value)) + "]"
    if isinstance(value, int) and not isinstance(value, bool):
        return f"{value:,}" if abs(value) >= 10_000 else str(value)
    return axis_text(value)


def _where(same: Sequence[Contrast], all_of_arm: Sequence[Contrast]) -> str:
    """By the values of one axis that tell these cells from the arm's others, else by all of the first cell's."""
    others = [contrast for contrast in all_of_arm if contrast not in same]
    for name in _without_lr(same[0].trial.axes):
        ours, theirs = ({_text(one.trial.axes.get(name)) for one in cells} for cells in (same, others))
        if not ours & theirs:
            return f"{name} = {' or '.join(sorted(ours))}"
    return axes_text(_without_lr(same[0].trial.axes)) + (" and others" if len(same) > 1 else "")


def _without_lr(axes: Mapping[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in axes.items() if name != "train.lr"}


def _text(value: Any) -> str:
    return json.dumps(value) if isinstance(value, list | dict) else axis_text(value)


def several_things(declared: Mapping[str, Iterable[str]]) -> str:
    """A footnote about arms that set more than one thing, by what the plan found them to set; "" for none."""
    several = {arm: list(keys) for arm, keys in declared.items()}
    named = [f"{arm} ({', '.join(keys)})" for arm, keys in several.items() if len(keys) > 1]
    return (
        f"more than one thing changed at once, and the verdict is about all of it: {'; '.join(named)}" if named else ""
    )
