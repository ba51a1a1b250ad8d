"""What a sweep has used up of its budgets, and what the rest of its plan will take, as far as that can be known."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from models.accounting import checkpoint_bytes
from orchestrator.report.branching import work_of
from orchestrator.report.figures import memory_text
from orchestrator.sweep import limits

if TYPE_CHECKING:
    from orchestrator.plan import Plan, PlannedTrial
    from orchestrator.store import BudgetLine, Spent, Store

_OVER = ("COMPLETE", "DIVERGED", "PRUNED")


def hours_text(hours: float) -> str:
    """``0.00123``, ``12.3``, ``1,235``: three digits, and no exponent."""
    return f"{hours:,.0f}" if hours >= 1000 else f"{hours:.3g}" if hours >= 1e-4 else "0"


def budget_lines(lines: Sequence[BudgetLine], sweep: str) -> list[str]:
    """A line a budget: what is used, of what, and how to go on once it is used up."""
    said = []
    for line in lines:
        share = f"{line.spent / line.limit:.0%} used"
        mend = f"used up: nothing starts; gatesweep run FILE --extend {line.name}=+HOURS goes on"
        standing = f"{hours_text(line.spent)} of {hours_text(line.limit)}"
        said.append(f"{sweep}: {line.name} {standing}, {mend if line.is_used_up else share}")
    return said


@dataclass(frozen=True)
class Standing:
    """What the store knows of a sweep that is planned: nothing, when it was never submitted."""

    spent: Spent
    extensions: tuple[str, ...]
    flops: float
    """Of its complete trials."""
    gpu_hours: float
    """What these took, with all their attempts."""
    cpu_hours: float
    num_complete: int

    @classmethod
    def of(cls, store: Store, sweep_id: int) -> Standing:
        from orchestrator.store import BUDGET_EXTENDED

        extensions = tuple(event.message for event in store.events(sweep_id, kind=BUDGET_EXTENDED))
        return cls(store.spent(sweep_id), extensions, *store.pace(sweep_id))


def budget_forecast(plan: Plan, states: Mapping[str, str], standing: Standing | None) -> list[str]:
    """A line for each declared budget: what is used, and what the trials that are not over yet will take, those too
    that a gate holds back."""
    is_gated, plan = bool(plan.held), plan.whole
    left = [trial for trial in plan.trials if states.get(trial.fingerprint) not in _OVER]
    said = []
    added = standing.extensions if standing else ()
    for name, limit in limits(plan.sweep.budget.model_dump(), added).items():
        used = getattr(standing.spent, name) if standing else 0.0
        line = f"{name}: {hours_text(used)} of {hours_text(limit)} used"
        if name != "wall_hours" and left:
            line += _what_is_left(plan, left, name, limit - used, standing)
            line += ", and less where gates hold an arm back" if is_gated else ""
        said.append(line)
    return said


def price_lines(plan: Plan, states: Mapping[str, str], standing: Standing | None) -> list[str]:
    """Hours of devices for the sweep and hours of a trial, and at which throughput; or that none is known.

    At the pace of the sweep's own complete trials, which counts all their attempts with all that these held; before
    there are any, at the throughput that the sweep names, or at least what GPUs would take at their peak.
    """
    if not plan.trials:
        return []
    held_back = {trial.fingerprint for one in plan.held for trial in one.trials}
    plan, gpus = plan.whole, _on_gpus(plan)
    device, measured = ("GPU", "gpu_hours") if gpus else ("CPU", "cpu_hours")
    taken = getattr(standing, measured) if standing else 0.0
    if standing is not None and taken and standing.flops:
        work = work_of(plan)
        hours = [work[trial.fingerprint] * taken / standing.flops for trial in plan.trials]
        rate = standing.flops / taken / 3600
        about, how = "about", f"{_complete_text(standing)} ({rate:.3g} FLOP/s a {device})"
        how = f"at the pace of {how}"
    elif (given := plan.sweep.resources.expected_flops) is not None:
        hours, about = _hours_at(given, plan, plan.trials), "about"
        how = f"at resources.expected_flops ({given:.3g} FLOP/s a rank)"
    elif gpus and (at_peak := _hours_at_peak(plan, plan.trials)) is not None:
        hours, about, how = at_peak, "at least", "the GPUs at their peak all the time"
    else:
        known = "once a trial of this sweep is complete" + ", or by resources.expected_flops"
        known += " or resources.accelerator" if gpus else ""
        return [f"price: unknown; a throughput is known {known}"]
    left = sum(one for trial, one in zip(plan.trials, hours, strict=True) if states.get(trial.fingerprint) not in _OVER)
    walls = sorted(one / _devices(trial, gpus) for trial, one in zip(plan.trials, hours, strict=True))
    span = " to ".join(dict.fromkeys(hours_text(one) for one in (walls[0], walls[-1])))
    total = f"{about} {hours_text(sum(hours))} {device}-hours, {hours_text(left)} of them still to do"
    if held_back:
        held = sum(one for trial, one in zip(plan.trials, hours, strict=True) if trial.fingerprint in held_back)
        total += f", of which gates may save up to {hours_text(held)}"
    return [f"price: {total}; {span} hours a trial; {how}"]


def _devices(trial: PlannedTrial, gpus: bool) -> float:
    """That a trial holds while it runs."""
    return trial.layout.world_size * (trial.resources.gpus if gpus else trial.resources.cpus)


def _complete_text(standing: Standing) -> str:
    return "the complete trial" if standing.num_complete == 1 else f"{standing.num_complete:,} complete trials"


def _what_is_left(plan: Plan, left: Sequence[PlannedTrial], name: str, room: float, standing: Standing | None) -> str:
    work = work_of(plan)
    flops = sum(work[trial.fingerprint] for trial in left)
    measured = getattr(standing, name) if standing else 0.0
    if standing is not None and measured and standing.flops:
        takes = flops * measured / standing.flops
        words = f"the rest takes about {hours_text(takes)}, at the pace of {_complete_text(standing)}"
    elif (given := plan.sweep.resources.expected_flops) is not None and (name == "gpu_hours") == _on_gpus(plan):
        takes = sum(_hours_at(given, plan, left))
        words = f"the rest takes about {hours_text(takes)}, at resources.expected_flops"
    else:
        at_peak = _hours_at_peak(plan, left) if name == "gpu_hours" else None
        least = None if at_peak is None else sum(at_peak)
        if least is None:
            return "; what the rest takes is known once a trial is complete"
        takes = least
        words = f"the rest takes at least {hours_text(takes)}, the GPUs at their peak all the time"
    return f"; {words}" + (f": {hours_text(takes - room)} more than there is" if takes > room else "")


def _on_gpus(plan: Plan) -> bool:
    return plan.sweep.resources.gpus > 0


def _hours_at(rank_flops: float, plan: Plan, trials: Sequence[PlannedTrial]) -> list[float]:
    """Device-hours of each, at so many FLOPs a second of a rank."""
    devices = [one.resources.gpus if _on_gpus(plan) else one.resources.cpus for one in trials]
    work = work_of(plan)
    return [work[one.fingerprint] / rank_flops * held / 3600 for one, held in zip(trials, devices, strict=True)]


def disk_lines(plan: Plan) -> list[str]:
    """What the checkpoints that stay will take, when every trial has ended. Nothing without trials."""
    if not plan.trials:
        return []
    plan = plan.whole
    sizes = [checkpoint_bytes(trial.config) for trial in plan.trials]
    kept = [plan.sweep.checkpoint.num_kept(trial.config.train.num_steps) for trial in plan.trials]
    total = sum(size * number for size, number in zip(sizes, kept, strict=True))
    span = " to ".join(dict.fromkeys(memory_text(size) for size in (min(sizes), max(sizes))))
    each = f"{max(kept)} a trial" if len(set(kept)) == 1 else f"{min(kept)} to {max(kept)} a trial"
    return [f"disk: {memory_text(total)} of checkpoints at the end: {each}, {span} each; one more while a trial writes"]


def _hours_at_peak(plan: Plan, trials: Sequence[PlannedTrial]) -> list[float] | None:
    """GPU-hours of each; None when a peak is not known."""
    resources = plan.sweep.resources
    peaks = [resources.rank_peak_flops(trial.config.precision) for trial in trials]
    work = work_of(plan)
    seconds = [work[trial.fingerprint] / peak for trial, peak in zip(trials, peaks, strict=True) if peak is not None]
    return [one * resources.gpus / 3600 for one in seconds] if len(seconds) == len(trials) else None
