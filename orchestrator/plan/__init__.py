"""Sweep -> trials in the order they run, what each one costs, and which cells cannot run. Pure but for reading files.

The same file gives the same trials in the same order with the same fingerprints, on every machine. Mistakes that only
a whole config shows are UserErrors; what is right but beyond this version or this layout is a Refusal.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any

from models import accounting
from models.accounting import RankMemory
from models.config import DataConfig, Layout, TrialConfig, ValidationConfig
from orchestrator.plan.cells import (
    CellError,
    Leaves,
    arm_leaves,
    assignments,
    axis_values,
    compose,
    excluded_by,
    number_of_cells,
)
from orchestrator.plan.contrasts import Change, Contrast, contrasts, refuse_undeclared
from orchestrator.plan.controls import gates_add, sized
from orchestrator.plan.files import Files
from orchestrator.plan.fit import after_out_of_memory, memory_needed, memory_refusals, micro_batch_sizes, size_key
from orchestrator.plan.refusals import refusals
from orchestrator.plan.resolve import cell_config, match_residual, matched
from orchestrator.sweep import (
    Derived,
    DocumentPath,
    ExtendedRates,
    GrowingRates,
    Problems,
    ResourcesConfig,
    Sweep,
    UserError,
    seeds_of_looks,
)

MAX_TRIALS = 100_000

LR = "train.lr"

__all__ = [
    "LR",
    "MAX_TRIALS",
    "Change",
    "Confirmation",
    "Contrast",
    "GrownRate",
    "Plan",
    "PlannedTrial",
    "RateGroup",
    "Refusal",
    "after_out_of_memory",
    "expand",
    "match_residual",
    "micro_batch_sizes",
]


@dataclass(frozen=True)
class PlannedTrial:
    """A cell and a seed, resolved. ``axes`` holds every axis of the sweep by its dotted name."""

    position: int
    """0-based, in the order of execution."""
    arm: str
    axes: dict[str, Any]
    seed: int
    config: TrialConfig
    fingerprint: str
    resources: ResourcesConfig
    """The cell's own."""
    num_parameters: int
    training_flops: int
    """Of the whole trial, validation not counted."""
    num_active_parameters: int
    """Those that one token uses; all of them without experts."""
    micro_batch_sequences: int
    """Sequences that a rank takes at once."""
    memory: RankMemory
    """Of the rank that needs most."""

    @property
    def layout(self) -> Layout:
        return self.resources.layout


@dataclass(frozen=True)
class Refusal:
    """A cell that will not run, and all reasons why; it has no trials."""

    arm: str
    axes: dict[str, Any]
    reason: str


@dataclass(frozen=True)
class Confirmation:
    """What an arm runs on fresh seeds once its learning rate is chosen: the trials of that rate, of no other."""

    arm: str
    axes: dict[str, Any]
    """The axes but the learning rate and what is derived: one choice for each of their values."""
    selection: tuple[str, ...]
    """Fingerprints of the trials that choose, sorted; all of them have to end first."""
    by_lr: dict[float, tuple[PlannedTrial, ...]]
    later: dict[float, tuple[tuple[PlannedTrial, ...], ...]] = field(default_factory=dict)
    """More trials of a rate, by look from the second on, where ``verdict.allocate`` may ask for them."""

    @property
    def most_flops(self) -> int:
        return max(sum(trial.training_flops for trial in trials) for trials in self.by_lr.values())

    @property
    def may_come(self) -> tuple[PlannedTrial, ...]:
        """At any rate, at any look."""
        looks = [trials for of_rate in self.later.values() for trials in of_rate]
        return tuple(trial for trials in (*self.by_lr.values(), *looks) for trial in trials)


@dataclass(frozen=True)
class RateGroup:
    """What has learning rates of its own: an arm, at one value of every axis but the rate and what is derived."""

    arm: str
    axes: dict[str, Any]


@dataclass(frozen=True)
class GrownRate:
    """A learning rate that joined a group while the sweep ran."""

    arm: str
    axes: dict[str, Any]
    lr: float


@dataclass(frozen=True)
class Plan:
    sweep: Sweep
    trials: tuple[PlannedTrial, ...]
    refusals: tuple[Refusal, ...]
    absent_files: tuple[Path, ...] = ()
    """What the trials need and this machine lacks: fingerprints will be others where it is."""
    confirmations: tuple[Confirmation, ...] = ()
    named_files: dict[str, Path] = field(default_factory=dict)
    """Corpora and tokenizers that are not built in, by their names in the sweep."""

    cells: tuple[_Cell, ...] = field(default=(), repr=False)
    """Those that run, one a set of trials."""

    @property
    def training_flops(self) -> int:
        return sum(trial.training_flops for trial in self.trials)

    @property
    def contrasts(self) -> tuple[Contrast, ...]:
        """In what each arm differs from the baseline of its cells; of several learning rates one is looked at."""
        return contrasts(self.sweep, self.trials)

    @property
    def confirming(self) -> tuple[PlannedTrial, ...]:
        """All that may come once learning rates are chosen."""
        return tuple(one for each in self.confirmations for one in each.may_come)

    @property
    def groups(self) -> tuple[RateGroup, ...]:
        """In the order of the file: what has learning rates of its own."""
        found = {cell.group(self.sweep): cell for cell in reversed(self.cells)}
        return tuple(
            RateGroup(cell.arm, _other_axes(self.sweep, cell.axes))
            for cell in self.cells
            if found[cell.group(self.sweep)] is cell
        )

    def grown(self, rates: Iterable[GrownRate]) -> Plan:
        """The plan with further learning rates. Those that it has, whose group it lacks or which lie outside of what
        is searched now are left out."""
        if self.sweep.growing_rates is None:
            return self
        cells = {(cell.group(self.sweep), cell.axes[LR]): cell for cell in self.cells}
        first = {group: cell for (group, _), cell in reversed(cells.items())}
        for one in rates:
            group = _group(self.sweep, one.arm, one.axes)
            if group in first and (group, one.lr) not in cells and _is_allowed(self.sweep.growing_rates, one.lr):
                cells[group, one.lr] = _at_rate(first[group], one.lr)
        if len(cells) == len(self.cells):
            return self
        trials = _in_order(self.sweep, list(cells.values()))
        confirmations = _confirmations(self.sweep, list(cells.values()), trials)
        return replace(self, trials=trials, confirmations=confirmations, cells=tuple(cells.values()))


@dataclass(frozen=True)
class _Cell:
    arm: str
    axes: dict[str, Any]
    leaves: Leaves
    config: TrialConfig
    resources: ResourcesConfig
    """Its own."""

    @property
    def name(self) -> str:
        values = ", ".join(f"{name}={value}" for name, value in self.axes.items())
        return f"{self.arm} ({values})" if values else self.arm

    def group(self, sweep: Sweep) -> str:
        return _group(sweep, self.arm, self.axes)

    def fingerprint(self, seed: int) -> str:
        """Of the cell's trial with ``seed``."""
        return self._fingerprint_by_seed(seed)

    @cached_property
    def size(self) -> str:
        return size_key(self.config, self.resources)

    @cached_property
    def _fingerprint_by_seed(self) -> Callable[[int], str]:
        return self.config.fingerprint_by_seed()


def expand(sweep: Sweep, *, files_may_be_absent: bool = False) -> Plan:
    """All trials of a sweep; UserError when a cell makes no config or two cells are the same trial.

    ``files_may_be_absent``: a corpus or tokenizer with an absolute path may be on another machine only. Such a plan
    is for looking at: its fingerprints stand for paths and not for content.
    """
    num_cells = number_of_cells(sweep)
    num_trials = num_cells * (len(sweep.seeds) + len(sweep.confirm_seeds))
    num_trials += num_cells // len(sweep.arms) * len(sweep.extra_baseline_seeds)
    if (looks := seeds_of_looks(sweep)) is not None:
        num_trials += num_cells * (len(looks.arms[-1]) - len(looks.arms[0]))
    if num_trials > MAX_TRIALS:
        raise UserError(f"{sweep.places.file}: {num_trials:,} trials; allowed: at most {MAX_TRIALS:,}")
    files = Files(Path(sweep.path).parent, may_be_absent=files_may_be_absent)
    runnable: list[_Cell] = []
    refused: list[Refusal] = []
    too_large: dict[str, list[str]] = {}
    for cell, reasons in _with_sizes(sweep, _cells(sweep, files)):
        reasons += refusals(cell.config, cell.resources)
        if not reasons:
            if cell.size not in too_large:
                too_large[cell.size] = memory_refusals(cell.config, cell.resources, refusals)
            reasons = too_large[cell.size]
        if reasons:
            refused.append(Refusal(cell.arm, cell.axes, "; ".join(reasons)))
        else:
            runnable.append(cell)
    _refuse_identical(sweep, runnable)
    _refuse_other_measures(sweep, runnable)
    trials = _in_order(sweep, runnable)
    refuse_undeclared(sweep, contrasts(sweep, trials))
    confirmations = _confirmations(sweep, runnable, trials)
    absent = tuple(files.absent.values())
    return Plan(sweep, trials, tuple(refused), absent, confirmations, files.named, tuple(runnable))


def _other_axes(sweep: Sweep, axes: dict[str, Any]) -> dict[str, Any]:
    hidden = {LR, *(name for name, axis in sweep.axes.items() if isinstance(axis, Derived))}
    return {name: value for name, value in axes.items() if name not in hidden}


def _group(sweep: Sweep, arm: str, axes: dict[str, Any]) -> str:
    return json.dumps([arm, _other_axes(sweep, axes)], default=str)


def _is_allowed(rates: GrowingRates, lr: float) -> bool:
    return isinstance(rates, ExtendedRates) or rates.search[0] <= lr <= rates.search[1]


def _at_rate(cell: _Cell, lr: float) -> _Cell:
    """Nothing else of a cell hangs on its rate: values that are a multiple of it are refused beside growing rates."""
    train = cell.config.train.model_copy(update={"lr": lr})
    config = cell.config.model_copy(update={"train": train})
    return replace(cell, axes={**cell.axes, LR: lr}, config=config)


def _cells(sweep: Sweep, files: Files) -> list[_Cell]:
    """Every cell that is not excluded, with its config unmatched."""
    cells: list[_Cell] = []
    errors: dict[tuple[DocumentPath, str, bool], set[str]] = {}
    used_entries: set[int] = set()
    used_rules: set[int] = set()
    combinations, common = assignments(sweep), sweep.resources.model_copy(update={"by": ()})
    for arm in sweep.arms:
        of_arm = arm_leaves(sweep, arm)
        for assignment in combinations:
            try:
                leaves = compose(sweep, of_arm, assignment)
                axes = axis_values(sweep, leaves)
                matching = [index for index, entry in enumerate(sweep.exclude) if excluded_by(entry, arm, axes)]
                used_entries.update(matching)
                if not matching:
                    own = sweep.resources.of(arm, axes) if sweep.resources.by else common
                    used_rules.update(i for i, rule in enumerate(sweep.resources.by) if rule.matches(arm, axes))
                    cells.append(_Cell(arm, axes, leaves, cell_config(arm, leaves, files), own))
            except CellError as error:
                errors.setdefault((error.source, error.message, error.on_key), set()).add(arm)
    problems = Problems(sweep.places)
    for (source, message, on_key), arms in errors.items():
        of_arms = "" if len(arms) == len(sweep.arms) or source[0] == "arms" else f" (arm {', '.join(sorted(arms))})"
        problems.add(source, message + of_arms, on_key=on_key)
    for index in range(len(sweep.exclude)):
        if index not in used_entries and not errors:
            problems.add(("exclude", index), "matches no cell; allowed: an entry that drops at least one")
    for index in range(len(sweep.resources.by)):
        if index not in used_rules and not errors:
            place = ("resources", "by", index, "where")
            problems.add(place, "matches no cell; allowed: a rule that at least one takes")
    problems.raise_if_any()
    _refuse_empty(sweep, cells)
    _refuse_overrides_in_vain(sweep, cells)
    return cells


def _with_sizes(sweep: Sweep, cells: list[_Cell]) -> Iterator[tuple[_Cell, list[str]]]:
    """The cells with their final widths: gated ones matched, controls sized; and why that is impossible, if it is."""
    gated: dict[tuple[tuple[str, Any], ...], list[TrialConfig]] = {}
    for cell in cells if sweep.sized_controls else ():
        gated.setdefault(_key(cell.axes), []).append(cell.config)
    for cell in cells:
        said = f"match {sweep.match.by}"
        try:
            config = matched(cell.config, sweep, cell.arm, cell.resources)
            if cell.arm in sweep.sized_controls:
                said = f"control {cell.arm}"
                config = sized(config, cell.arm, gates_add(gated[_key(cell.axes)]), cell.resources)
        except ValueError as error:
            yield cell, [f"{said} is impossible: {error}"]
        else:
            yield (cell if config is cell.config else replace(cell, config=config)), []


def _refuse_empty(sweep: Sweep, cells: list[_Cell]) -> None:
    problems = Problems(sweep.places)
    for arm in sweep.arms:
        if all(cell.arm != arm for cell in cells):
            problems.add(("arms", arm), "exclude drops every cell of this arm; allowed: at least one", on_key=True)
    problems.raise_if_any()


def _refuse_overrides_in_vain(sweep: Sweep, cells: Iterable[_Cell]) -> None:
    """An override of a config value that no cell takes, since an arm or an axis sets it again."""
    sources = {leaf.source for cell in cells for leaf in cell.leaves.values()}
    for path, override in sweep.places.overrides.items():
        if path[0] != "base" or any(source[: len(path)] == path for source in sources):
            continue
        name = ".".join(str(part) for part in path[1:])
        if name in sweep.axis_names:
            mend = f"it is an axis here; override axes.{name}=[...] instead"
            mend = mend if name in sweep.axes else "zip or rows set it; override those as a whole"
        else:
            mend = f"every arm sets it; override arms.NAME.{name} instead"
        raise UserError(f"override {override}: no cell takes this value: {mend}")


def _refuse_identical(sweep: Sweep, cells: list[_Cell]) -> None:
    """Two cells with one fingerprint would be one trial under two names."""
    problems = Problems(sweep.places)
    first_with: dict[str, _Cell] = {}
    for cell in cells:
        twin = first_with.setdefault(cell.fingerprint(sweep.seeds[0]), cell)
        if twin is cell:
            continue
        row = next((leaf.source[:2] for leaf in cell.leaves.values() if leaf.source[0] == "rows"), None)
        place = row if row is not None and twin.arm == cell.arm else ("arms", cell.arm)
        problems.add(place, f"{cell.name} is the same trial as {twin.name}; allowed: cells that differ", on_key=True)
    problems.raise_if_any()


def _refuse_other_measures(sweep: Sweep, cells: list[_Cell]) -> None:
    """An arm measured on other text, or in other tokens, than the baseline can't be compared with it."""
    problems = Problems(sweep.places)
    baselines = {_key(cell.axes): cell for cell in cells if cell.arm == sweep.baseline}
    for cell in cells:
        baseline = baselines.get(_key(cell.axes))
        if baseline is None:
            continue
        differing = _otherwise_measured(cell.config.data, baseline.config.data)
        if _tail_points(sweep, cell) != _tail_points(sweep, baseline):
            differing.append(f"validations in the last {sweep.verdict.tail:g} of the schedule")
        if differing:
            said = f"{cell.name} is measured otherwise than {baseline.name} ({', '.join(differing)}), so their losses"
            problems.add(("arms", cell.arm), f"{said} can't be compared; make it an axis: a table a value", on_key=True)
    problems.raise_if_any()


def _otherwise_measured(data: DataConfig, baseline: DataConfig) -> list[str]:
    """Settings of what is measured that differ; how often is not among them."""
    if data is baseline:
        return []
    pairs: list[tuple[str, object, object]] = [
        (name, data, baseline) for name in ("corpus_sha256", "tokenizer_sha256", "validation_every")
    ]
    pairs += [(name, data.validation, baseline.validation) for name in ValidationConfig.model_fields]
    return [name for name, ours, theirs in pairs if name != "points" and getattr(ours, name) != getattr(theirs, name)]


def _tail_points(sweep: Sweep, cell: _Cell) -> int:
    """Validations whose mean is the trial's loss."""
    config = cell.config
    return sum(step / config.train.num_steps > 1.0 - sweep.verdict.tail for step in config.validation_steps())


def _key(axes: dict[str, Any]) -> tuple[tuple[str, Any], ...]:
    return tuple(axes.items())


def _in_order(sweep: Sweep, cells: list[_Cell]) -> tuple[PlannedTrial, ...]:
    """Blocks that hold every cell of one seed; within a block an order drawn from ``order_seed``.

    The baseline's extra seeds are dealt out over the blocks: a block of their own would give the baseline alone the
    hosts and the hours of the sweep's end. Drawn by hash and not by a generator: a cell that is added or dropped
    leaves the order of the others as it is.
    """
    extra = () if sweep.confirm_seeds else sweep.extra_baseline_seeds
    return _blocks(sweep, cells, sweep.seeds, extra, 0)


def _blocks(
    sweep: Sweep, cells: list[_Cell], seeds: tuple[int, ...], extra_seeds: tuple[int, ...], first_position: int
) -> tuple[PlannedTrial, ...]:
    ordered: list[tuple[str, _Cell, int, dict[str, Any]]] = []
    priced = list(zip(cells, _prices(cells), strict=True))
    for number, seed in enumerate(seeds):
        block = [(cell.fingerprint(seed), cell, seed, price) for cell, price in priced]
        for extra in extra_seeds[number :: len(seeds)]:
            of_baseline = [(cell, price) for cell, price in priced if cell.arm == sweep.baseline]
            block += [(cell.fingerprint(extra), cell, extra, price) for cell, price in of_baseline]
        block.sort(key=lambda one: _draw(sweep, one[0]))
        ordered += block
    return tuple(_trial(position, *one) for position, one in enumerate(ordered, first_position))


def _confirmations(sweep: Sweep, cells: list[_Cell], selection: tuple[PlannedTrial, ...]) -> tuple[Confirmation, ...]:
    """One for each arm and value of the other axes, in the order of the file; their trials come after all others."""
    if not sweep.confirm_seeds:
        return ()

    def group(one: _Cell | PlannedTrial) -> str:
        return _group(sweep, one.arm, one.axes)

    first = {group(cell): cell for cell in reversed(cells)}
    choosing: dict[str, list[str]] = {}
    by_lr: dict[str, dict[float, list[PlannedTrial]]] = {}
    for trial in selection:
        choosing.setdefault(group(trial), []).append(trial.fingerprint)
    for trial in _blocks(sweep, cells, sweep.confirm_seeds, sweep.extra_baseline_seeds, len(selection)):
        by_lr.setdefault(group(trial), {}).setdefault(trial.config.train.lr, []).append(trial)
    later = _later(sweep, cells, len(selection) + sum(map(len, (of for one in by_lr.values() for of in one.values()))))
    return tuple(
        Confirmation(
            arm=cell.arm,
            axes=_other_axes(sweep, cell.axes),
            selection=tuple(sorted(choosing[key])),
            by_lr={lr: tuple(trials) for lr, trials in sorted(by_lr[key].items())},
            later=later.get(key, {}),
        )
        for key, cell in ((group(cell), cell) for cell in cells if first[group(cell)] is cell)
    )


def _later(
    sweep: Sweep, cells: list[_Cell], first_position: int
) -> dict[str, dict[float, tuple[tuple[PlannedTrial, ...], ...]]]:
    """By group and rate, what each look after the first may add. A look is a block: all that it adds is drawn into
    one order, so that no arm has the end of the sweep for itself."""
    looks = seeds_of_looks(sweep)
    if looks is None:
        return {}
    priced = list(zip(cells, _prices(cells), strict=True))
    found: dict[str, dict[float, list[tuple[PlannedTrial, ...]]]] = {}
    for look in range(2, looks.number + 1):
        block = [
            (cell.fingerprint(seed), cell, seed, price)
            for cell, price in priced
            for seed in looks.new(look, is_baseline=cell.arm == sweep.baseline)
        ]
        block.sort(key=lambda one: _draw(sweep, one[0]))
        placed = [_trial(position, *one) for position, one in enumerate(block, first_position)]
        first_position += len(placed)
        of_rate: dict[tuple[str, float], list[PlannedTrial]] = {}
        for trial in placed:
            of_rate.setdefault((_group(sweep, trial.arm, trial.axes), trial.config.train.lr), []).append(trial)
        for (key, lr), trials in of_rate.items():
            found.setdefault(key, {}).setdefault(lr, []).append(tuple(trials))
    return {key: {lr: tuple(by_look) for lr, by_look in rates.items()} for key, rates in found.items()}


def _draw(sweep: Sweep, fingerprint: str) -> bytes:
    return hashlib.sha256(f"{sweep.order_seed}:{fingerprint}".encode()).digest()


def _prices(cells: list[_Cell]) -> list[dict[str, Any]]:
    """What a trial of each cell costs: the fields of PlannedTrial that no seed changes."""
    sizes = micro_batch_sizes([(cell.config, cell.resources) for cell in cells])
    known: dict[tuple[str, int], dict[str, Any]] = {}
    prices = []
    for cell, micro_batch in zip(cells, sizes, strict=True):
        key = cell.size, micro_batch
        if key not in known:
            known[key] = _price(cell.config, cell.resources, micro_batch)
        prices.append({**known[key], "resources": cell.resources})
    return prices


def _price(config: TrialConfig, resources: ResourcesConfig, micro_batch: int) -> dict[str, Any]:
    shape = config.model, config.gates, config.data.vocab_size
    flops_per_token = accounting.training_flops_per_token(*shape, config.data.sequence_length)
    return {
        "num_parameters": accounting.parameters(*shape),
        "num_active_parameters": accounting.active_parameters(*shape),
        "training_flops": flops_per_token * config.train.num_steps * config.train.batch_tokens,
        "micro_batch_sequences": micro_batch,
        "memory": memory_needed(config, resources, micro_batch),
    }


def _trial(position: int, fingerprint: str, cell: _Cell, seed: int, price: dict[str, Any]) -> PlannedTrial:
    return PlannedTrial(
        position=position,
        arm=cell.arm,
        axes=cell.axes,
        seed=seed,
        config=cell.config.model_copy(update={"seed": seed}),
        fingerprint=fingerprint,
        **price,
    )
