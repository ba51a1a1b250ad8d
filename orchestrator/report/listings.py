"""What is about to run (``gatesweep plan``) and what stands where (``gatesweep status``), for a terminal."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from rich.box import SIMPLE_HEAD
from rich.console import Console, ConsoleOptions, Group, RenderableType, RenderResult
from rich.table import Table
from rich.text import Text

from orchestrator.report.branching import branch_lines
from orchestrator.report.contrasts import contrast_lines
from orchestrator.report.figures import (
    NOTHING,
    axes_text,
    axis_text,
    count_text,
    flops_text,
    lr_text,
    memory_text,
    plural,
    states_text,
    wrapped,
)
from orchestrator.report.gated import gate_lines
from orchestrator.report.spending import budget_lines
from orchestrator.report.tree import STATES
from orchestrator.sweep import SearchedRates

if TYPE_CHECKING:
    from orchestrator.plan import HeldBack, Plan, PlannedTrial, Refusal
    from orchestrator.store import Store, SweepRow
    from orchestrator.sweep import ResourcesConfig

NUM_EVENTS = 3
NUM_FAILED = 5
NUM_LOG_LINES = 5

_OVER = ("COMPLETE", "DIVERGED", "PRUNED")
"""States in which a run leaves a trial alone."""

NEW = "new"
HELD = "held back"

_LEFT = ("arm", "state", "sweep", "run by")
_GAP = 2


@dataclass(frozen=True)
class _Listing:
    """A table where it fits, else a line a row, wrapped between words: a number is never broken."""

    headings: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        widths = [max(map(len, column)) for column in zip(self.headings, *self.rows, strict=True)]
        if sum(widths) + _GAP * (len(widths) - 1) > options.max_width:
            for row in self.rows:
                facts = [f"{name} {cell}" for name, cell in zip(self.headings, row, strict=True) if cell != NOTHING]
                yield Text("\n".join(wrapped(", ".join(facts), options.max_width)))
            return
        table = Table(box=SIMPLE_HEAD, show_edge=False, pad_edge=False, padding=(0, _GAP - 1, 0, 0))
        for heading in self.headings:
            table.add_column(Text(heading, style="bold"), justify="left" if heading in _LEFT else "right", no_wrap=True)
        for row in self.rows:
            table.add_row(*map(Text, row))
        yield table


@dataclass(frozen=True)
class _Hanging:
    """A line whose continuation is indented, and that breaks between words only."""

    line: str

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        own = len(self.line) - len(self.line.lstrip())
        lines = wrapped(self.line.lstrip(), options.max_width - own)
        yield Text("\n".join(" " * own + line for line in lines))


def plan_table(
    plan: Plan,
    states: Mapping[str, str] | None = None,
    elsewhere: Mapping[str, str] | None = None,
    closed: Collection[str] = (),
) -> RenderableType:
    """Every trial of a plan, the refusals first and the totals last. ``states``: of the fingerprints in the store;
    ``elsewhere``: the other sweep that trained them, if no run of this one did. ``closed``: gates that keep an arm off
    a rung, by ``arm_key``; its trials are not listed."""
    plan = plan.without(closed)
    known = {**(states or {}), **{trial.fingerprint: HELD for one in plan.held for trial in one.trials}}
    others, held, plan = elsewhere or {}, plan.held, plan.whole
    names = list(dict.fromkeys(name for trial in plan.trials for name in trial.axes))
    has_experts = any(trial.num_active_parameters != trial.num_parameters for trial in plan.trials)
    is_matched = plan.sweep.match.by != "none"
    rows: list[tuple[str, ...]] = []
    for number, trial in enumerate(plan.trials, start=1):
        axes = [axis_text(trial.axes[name]) if name in trial.axes else NOTHING for name in names]
        active = [count_text(trial.num_active_parameters)] if has_experts else []
        price = flops_text(trial.training_flops), str(trial.micro_batch_sequences), memory_text(trial.memory.total)
        other = others.get(trial.fingerprint)
        state = known.get(trial.fingerprint, NEW) + (f", by {other}" if other else "")
        width = [f"{trial.config.model.ffn_size:,}"] if is_matched else []
        size = (*width, f"{trial.num_parameters:,}", *active)
        rows.append((str(number), trial.arm, *axes, str(trial.seed), *size, *price, state))
    active = ["active"] if has_experts else []
    width = ["FFN"] if is_matched else []
    headings = ("#", "arm", *names, "seed", *width, "parameters", *active, "FLOPs", "micro-batch", "memory", "state")
    table = _Listing(headings, tuple(rows))
    parts: list[RenderableType] = [Text.assemble((plan.sweep.name, "bold"), f": {plan.sweep.question}"), Text("")]
    parts += _absent_lines(plan)
    parts += _refusal_lines(plan.refusals)
    parts += [table, Text("")] if plan.trials else []
    parts += [*map(_Hanging, told), Text("")] if (told := contrast_lines(plan)) else []
    return Group(
        *parts, *map(Text, [*_plan_totals(plan, known), *_held_lines(plan, held), *_reuse_lines(plan, others)])
    )


def _absent_lines(plan: Plan) -> list[Text]:
    if not plan.absent_files:
        return []
    lines = [Text(f"not on this machine: {path}", style="bold yellow") for path in plan.absent_files]
    return [*lines, Text("  fingerprints are provisional, and run refuses until it is there", style="yellow"), Text("")]


def _refusal_lines(refusals: Sequence[Refusal]) -> list[Text]:
    """Cells under their reason, which many of them tend to share."""
    if not refusals:
        return []
    lines = [Text(f"refused: {plural(len(refusals), 'cell')}", style="bold red")]
    for reason in dict.fromkeys(refusal.reason for refusal in refusals):
        lines.append(Text(f"  {reason}", style="red"))
        same = [refusal for refusal in refusals if refusal.reason == reason]
        lines += [Text(f"    {', '.join(filter(None, (cell.arm, axes_text(cell.axes))))}") for cell in same]
    return [*lines, Text("")]


def _plan_totals(plan: Plan, known: Mapping[str, str]) -> list[str]:
    left = [trial for trial in plan.trials if known.get(trial.fingerprint, NEW) not in _OVER]
    states = Counter(known.get(trial.fingerprint, NEW) for trial in plan.trials)
    counts = {state: states[state] for state in (NEW, HELD, *STATES) if states[state]}
    lines = [
        f"{plural(len(plan.trials), 'trial')}: {states_text(counts)}; {plural(len(plan.refusals), 'cell')} refused",
    ]
    if plan.trials:
        sizes = sorted({trial.num_parameters for trial in plan.trials})
        span = " to ".join(count_text(size) for size in dict.fromkeys((sizes[0], sizes[-1])))
        flops, flops_left = (sum(trial.training_flops for trial in trials) for trials in (plan.trials, left))
        work = f"{flops_text(flops)} training FLOPs in all, {flops_text(flops_left)} still to do"
        lines.append(f"{span} parameters a trial; {work}")
        lines += branch_lines(plan)
        lines += _gang_lines(plan)
        lines += _memory_lines(plan)
    return [*lines, *_growth_lines(plan), *_confirmation_lines(plan, known)]


def _held_lines(plan: Plan, held: Sequence[HeldBack]) -> list[str]:
    """What gates may save. ``plan``: with nothing held back."""
    if not plan.rungs:
        return []
    number, flops = sum(len(one.trials) for one in held), sum(one.most_flops for one in held)
    most = plan.training_flops + sum(one.most_flops for one in plan.confirmations)
    said = f"{len(plan.rungs)} rungs with gates between them, promote {plan.sweep.verdict.promote}"
    if not held:
        return [f"{said}: all are decided"]
    return [
        f"{said}: {plural(number, 'trial')} held back, and with what follows from them they may save up to "
        f"{flops_text(flops)} of {flops_text(most)} training FLOPs"
    ]


def _reuse_lines(plan: Plan, elsewhere: Mapping[str, str]) -> list[str]:
    counts = Counter(elsewhere[trial.fingerprint] for trial in plan.trials if trial.fingerprint in elsewhere)
    if not counts:
        return []
    named = ", ".join(f"{number} from {sweep}" for sweep, number in sorted(counts.items()))
    return [f"taken from other sweeps, unless run --no-reuse: {named}"]


def _growth_lines(plan: Plan) -> list[str]:
    """Rates that are not known yet, and at most what their trials cost: no rate changes the price of a trial."""
    rates = plan.sweep.growing_rates
    if rates is None or not plan.trials:
        return []
    number_of_cells = {(trial.arm, axes_text(trial.axes)) for trial in plan.trials}
    missing = rates.most * len(plan.groups) - len(number_of_cells)
    if missing <= 0:
        return []
    flops = plan.training_flops / len(number_of_cells) * missing
    if isinstance(rates, SearchedRates):
        low, high = map(lr_text, rates.search)
        said = f"then {rates.trials} learning rates an arm in all, searched between {low} and {high}"
    else:
        said = f"then at most {plural(rates.extend, 'rate')} beyond the grid's edge, in all arms"
    return [f"{said}: {plural(missing, 'cell')} more, about {flops_text(flops)} training FLOPs"]


def _confirmation_lines(plan: Plan, known: Mapping[str, str]) -> list[str]:
    """What will be added once learning rates are chosen. Only which rate is open; the dearest one is the price."""
    if not plan.confirmations:
        return []
    may_come = {one.fingerprint for one in plan.confirming}
    there = Counter(known[fingerprint] for fingerprint in may_come if fingerprint in known)
    number = sum(max(map(len, each.by_lr.values())) for each in plan.confirmations)
    flops = sum(each.most_flops for each in plan.confirmations)
    seeds = ", ".join(map(str, plan.sweep.confirm_seeds))
    more = ", ".join(map(str, plan.sweep.extra_baseline_seeds))
    ours = f" ({plan.sweep.baseline} also {more})" if more else ""
    states = {state: there[state] for state in STATES if there[state]}
    already = f"; there already: {states_text(states)}" if states else ""
    return [
        f"then, at each arm's best learning rate, fresh seeds {seeds}{ours} for the verdict: at most "
        f"{plural(number, 'trial')}, {flops_text(flops)} training FLOPs{already}",
        *_look_lines(plan),
    ]


def _look_lines(plan: Plan) -> list[str]:
    """At most what looks after the first add, if no arm is ever settled."""
    rules = plan.sweep.verdict
    if rules.allocate is None:
        return []
    dearest = [
        max(([t for trials in of_rate for t in trials] for of_rate in one.later.values()), key=_flops)
        for one in plan.confirmations
    ]
    number, flops = sum(map(len, dearest)), sum(map(_flops, dearest))
    return [
        f"then {plural(rules.allocate.seeds_per_look, 'more seed')} a look for the arms that are undecided, at most "
        f"{rules.looks} looks: at most {plural(number, 'trial')}, {flops_text(flops)} training FLOPs"
    ]


def _flops(trials: Sequence[PlannedTrial]) -> int:
    return sum(trial.training_flops for trial in trials)


def _gang_lines(plan: Plan) -> list[str]:
    """The shapes of gangs, where there are several."""
    if not plan.sweep.resources.by:
        return []
    shapes = Counter(_gang_text(trial.resources) for trial in plan.trials)
    counted = [f"{plural(number, 'trial')} on {shape}" for shape, number in shapes.items()]
    return [f"gangs: {', '.join(counted)}"]


def _gang_text(resources: ResourcesConfig) -> str:
    amounts = ((resources.cpus, "CPU"), (resources.gpus, "GPU"))
    layout = resources.layout.model_dump(exclude_defaults=True)
    cut = f" ({', '.join(f'{name} {str(value).lower()}' for name, value in layout.items())})" if layout else ""
    rank = " + ".join(f"{amount:g} {name}" for amount, name in amounts if amount)
    return f"{plural(resources.layout.world_size, 'rank')}{cut} x {rank}"


def _memory_lines(plan: Plan) -> list[str]:
    """The parts of the largest memory, what there is, and what a micro-batch means where it matters."""
    fullest = max(plan.trials, key=_fill)
    memory, layout, resources = fullest.memory, fullest.layout, fullest.resources
    names = ("weights", "gradients", "optimizer", "activations", "working")
    parts = ", ".join(f"{name} {memory_text(getattr(memory, name))}" for name in names)
    where = f" (stage {memory.stage} of {layout.pipeline})" if layout.pipeline > 1 else ""
    room = resources.rank_memory_gib
    has = "" if room is None else f" of {room:g} GiB"
    if room is not None and resources.memory_gib is None and resources.accelerator is None:
        has += " (assumed: resources.accelerator or memory_gib says it)"
    lines = [f"memory of a rank{where}, {fullest.arm}: {memory_text(memory.total)}{has}: {parts}"]
    split = [trial for trial in plan.trials if trial.config.model.moe is not None and _num_micro_batches(trial) > 1]
    if split:
        sizes = sorted({trial.micro_batch_sequences for trial in split})
        lines.append(
            f"experts are balanced over the micro-batches so far: their numbers hang on micro-batches of "
            f"{', '.join(map(str, sizes))} sequence(s), the same for all arms of a batch size"
        )
    return lines


def _fill(trial: PlannedTrial) -> tuple[float, int]:
    """How full a rank is where its memory has a limit; then what it needs."""
    return trial.memory.total / (trial.resources.rank_memory_gib or math.inf), trial.memory.total


def _num_micro_batches(trial: PlannedTrial) -> int:
    return trial.config.batch_sequences // (trial.micro_batch_sequences * trial.layout.data)


def status_table(store: Store) -> RenderableType:
    """A row a sweep with its trials by state and last event; below, what happened lately and why trials failed."""
    sweeps = store.sweeps()
    if not sweeps:
        return Text("the store holds no sweep yet; start one with: gatesweep run FILE")
    states = store.num_by_state()
    shown = [state for state in STATES if any(state in counts for counts in states.values())]
    rows: list[tuple[str, ...]] = []
    parts: list[RenderableType] = []
    for sweep in sweeps:
        holder, of_sweep = store.lease_holder(sweep.id), states.get(sweep.id, {})
        counts = (f"{of_sweep.get(state, 0):,}" for state in shown)
        rows.append((sweep.name, *counts, f"{sum(of_sweep.values()):,}", NOTHING if holder is None else holder[0]))
        parts += [
            *_budget(store, sweep),
            *_excluded_hosts(store, sweep),
            *_pruned_cells(store, sweep),
            *_looks(sweep),
            *_gates(sweep),
            *_last_events(store, sweep),
            *_failed_trials(store, sweep, of_sweep.get("FAILED", 0)),
        ]
    headings = ("sweep", *(state.lower() for state in shown), "all", "run by")
    return Group(_Listing(headings, tuple(rows)), *parts)


def _budget(store: Store, sweep: SweepRow) -> list[Text]:
    lines = store.budget(sweep.id)
    style = "bold red" if any(line.is_used_up for line in lines) else ""
    return [Text(""), *(Text(line, style=style) for line in budget_lines(lines, sweep.name))] if lines else []


def _last_events(store: Store, sweep: SweepRow) -> list[Text]:
    events = store.events(sweep.id, last=NUM_EVENTS)
    lines = [f"  {event.at:%Y-%m-%d %H:%M:%S} UTC  {event.kind}: {event.message}" for event in events]
    return [Text(""), Text(f"{sweep.name}: last events", style="bold"), *map(Text, lines)] if lines else []


def _excluded_hosts(store: Store, sweep: SweepRow) -> list[Text]:
    from orchestrator.store import HOST_EXCLUDED

    hosts = [event.message for event in store.events(sweep.id, kind=HOST_EXCLUDED)]
    title = Text(f"{sweep.name}: {plural(len(hosts), 'excluded host')}", style="bold red")
    return [Text(""), title, *(Text(f"  {host}") for host in hosts)] if hosts else []


def _pruned_cells(store: Store, sweep: SweepRow) -> list[Text]:
    decisions = store.rank_decisions(sweep.id)
    if not decisions:
        return []
    choosing = set(sweep.settings.get("seeds") or ())
    cells = {(one.arm, axes_text(one.axes)) for one in store.trials(sweep.id) if one.seed in choosing}
    dropped, audited = (
        sum(len(one) for one in of) for of in zip(*((d.dropped, d.audited) for d in decisions), strict=True)
    )
    said = f"{dropped} of {plural(len(cells), 'cell')} pruned by rank, {audited} of them audited"
    return [Text(""), Text(f"{sweep.name}: {said}; gatesweep results {sweep.name} tells the false-prune rate")]


def _looks(sweep: SweepRow) -> list[Text]:
    """Of each table the last look, with what it decided for every arm."""
    from orchestrator.store import allotments

    last = {axes_text(one.axes): one for one in allotments(sweep.verdict)}
    lines = []
    for axes, one in last.items():
        lines.append(Text(f"{sweep.name}{f', {axes}' if axes else ''}: look {one.look}", style="bold"))
        lines += [Text(f"  {arm}: {reason}") for arm, reason in one.reasons.items()]
    return [Text(""), *lines] if lines else []


def _gates(sweep: SweepRow) -> list[Text]:
    lines = gate_lines(sweep)
    title = [Text(f"{sweep.name}: {line}", style="bold") for line in lines[:1]]
    return [Text(""), *title, *map(Text, lines[1:])] if lines else []


def _failed_trials(store: Store, sweep: SweepRow, number: int) -> list[Text]:
    if not number:
        return []
    parts = [Text(""), Text(f"{sweep.name}: {plural(number, 'failed trial')}", style="bold red")]
    for trial in store.failed(sweep.id, NUM_FAILED):
        axes = f", {axes_text(trial.axes)}" if trial.axes else ""
        parts.append(Text(f"  {trial.fingerprint}  {trial.arm}{axes}, seed {trial.seed}"))
        parts.append(Text(f"    {trial.cause or 'cause unknown'}: {trial.reason or 'no reason recorded'}"))
        log = (trial.log_tail or "").splitlines()[-NUM_LOG_LINES:]
        parts += [Text(f"    | {line}", style="dim") for line in log]
    if number > NUM_FAILED:
        parts.append(Text(f"  and {number - NUM_FAILED:,} more"))
    parts.append(Text(f"  once mended: gatesweep rerun {sweep.name} --failed"))
    return parts
