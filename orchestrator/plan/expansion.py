"""Sweep -> trials in the order they run, what each one costs, and which cells cannot run. Pure but for reading files.

The same file gives the same trials in the same order with the same fingerprints, on every machine. Mistakes that only
a whole config shows are UserErrors; what is right but beyond this version or this layout is a Refusal.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from models.config import TrialConfig
from orchestrator.plan.assembly import assembled
from orchestrator.plan.cells import (
    CellError,
    arm_leaves,
    assignments,
    axis_values,
    compose,
    excluded_by,
    number_of_cells,
)
from orchestrator.plan.contrasts import Contrast, contrasts, refuse_undeclared
from orchestrator.plan.controls import gates_add, sized
from orchestrator.plan.files import Files
from orchestrator.plan.fit import memory_refusals
from orchestrator.plan.mistakes import (
    cell_key,
    refuse_empty,
    refuse_identical,
    refuse_other_measures,
    refuse_overrides_in_vain,
)
from orchestrator.plan.ordering import LR, Cell, group_of, other_axes
from orchestrator.plan.planned import Confirmation, GrownRate, HeldBack, PlannedRung, PlannedTrial, RateGroup, Refusal
from orchestrator.plan.refusals import refusals
from orchestrator.plan.resolve import cell_config, matched
from orchestrator.sweep import (
    DocumentPath,
    ExtendedRates,
    GrowingRates,
    Problems,
    Sweep,
    UserError,
    arm_key,
    seeds_of_looks,
)

MAX_TRIALS = 100_000


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

    cells: tuple[Cell, ...] = field(default=(), repr=False)
    """Those that run, one a set of trials."""
    held: tuple[HeldBack, ...] = ()
    """What waits for a verdict on a smaller rung, and may never be the sweep's: neither ``trials`` nor
    ``confirmations`` have it."""
    rungs: tuple[PlannedRung, ...] = ()
    """From small to large, where gates stand between them."""
    let_through: frozenset[str] = field(default=frozenset(), repr=False)
    """Arms on rungs, by ``arm_key``, that no gate holds back any more."""

    @property
    def all_trials(self) -> tuple[PlannedTrial, ...]:
        """Those that are held back, too, in the order in which they would run."""
        held = (trial for one in self.held for trial in one.trials)
        return tuple(sorted((*self.trials, *held), key=lambda trial: trial.position)) if self.held else self.trials

    @property
    def training_flops(self) -> int:
        return sum(trial.training_flops for trial in self.trials)

    @property
    def contrasts(self) -> tuple[Contrast, ...]:
        """In what each arm differs from the baseline of its cells; of several learning rates one is looked at."""
        return contrasts(self.sweep, self.all_trials)

    @property
    def confirming(self) -> tuple[PlannedTrial, ...]:
        """All that may come once learning rates are chosen, and arms let through."""
        held = (each for one in self.held for each in one.confirmations)
        return tuple(one for each in (*self.confirmations, *held) for one in each.may_come)

    @property
    def groups(self) -> tuple[RateGroup, ...]:
        """In the order of the file: what has learning rates of its own, and is not held back."""
        found = {cell.group(self.sweep): cell for cell in reversed(self.cells)}
        held = {arm_key(one.arm, one.axes) for one in self.held}
        groups = (
            RateGroup(cell.arm, other_axes(self.sweep, cell.axes))
            for cell in self.cells
            if found[cell.group(self.sweep)] is cell
        )
        return tuple(group for group in groups if arm_key(group.arm, group.axes) not in held)

    def grown(self, rates: Iterable[GrownRate]) -> Plan:
        """The plan with further learning rates. Those that it has, whose group it lacks or which lie outside of what
        is searched now are left out."""
        if self.sweep.growing_rates is None:
            return self
        cells = {(cell.group(self.sweep), cell.axes[LR]): cell for cell in self.cells}
        first = {group: cell for (group, _), cell in reversed(cells.items())}
        for one in rates:
            group = group_of(self.sweep, one.arm, one.axes)
            if group in first and (group, one.lr) not in cells and _is_allowed(self.sweep.growing_rates, one.lr):
                cells[group, one.lr] = _at_rate(first[group], one.lr)
        if len(cells) == len(self.cells):
            return self
        return self._of(tuple(cells.values()), self.let_through)

    @property
    def whole(self) -> Plan:
        """With nothing held back: the most that it may come to."""
        return self.promoted(arm_key(one.arm, one.axes) for one in self.held)

    def without(self, closed: Iterable[str]) -> Plan:
        """Without what these gates, by ``arm_key``, keep back for good, and the arm's rungs above."""
        keys = set(closed)
        shut = {one.arm: one.rung for one in reversed(self.held) if arm_key(one.arm, one.axes) in keys}
        cells = {arm_key(one.arm, one.axes) for one in self.held if one.rung >= shut.get(one.arm, one.rung + 1)}
        kept = [cell for cell in self.cells if arm_key(cell.arm, other_axes(self.sweep, cell.axes)) not in cells]
        return self._of(tuple(kept), self.let_through) if cells else self

    def promoted(self, let_through: Iterable[str]) -> Plan:
        """The plan in which these arms, by ``arm_key``, are held back no more. Those that it does not hold count for
        nothing."""
        known = {arm_key(one.arm, one.axes) for one in self.held}
        new = known & set(let_through)
        return self._of(self.cells, self.let_through | new) if new else self

    def _of(self, cells: tuple[Cell, ...], let_through: frozenset[str]) -> Plan:
        made = assembled(self.sweep, cells, let_through, has_gates=bool(self.rungs))
        return replace(
            self,
            trials=made.trials,
            confirmations=made.confirmations,
            held=made.held,
            rungs=made.rungs,
            cells=cells,
            let_through=let_through,
        )


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
    runnable: list[Cell] = []
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
    refuse_identical(sweep, runnable)
    refuse_other_measures(sweep, runnable)
    # With a cell that is refused nothing runs, and a ladder may lack a rung.
    made = assembled(sweep, runnable, (), has_gates=sweep.verdict.promote is not None and not refused)
    plan = Plan(
        sweep,
        made.trials,
        tuple(refused),
        tuple(files.absent.values()),
        made.confirmations,
        files.named,
        tuple(runnable),
        made.held,
        made.rungs,
    )
    refuse_undeclared(sweep, plan.contrasts)
    return plan


def _is_allowed(rates: GrowingRates, lr: float) -> bool:
    return isinstance(rates, ExtendedRates) or rates.search[0] <= lr <= rates.search[1]


def _at_rate(cell: Cell, lr: float) -> Cell:
    """Nothing else of a cell hangs on its rate: values that are a multiple of it are refused beside growing rates."""
    train = cell.config.train.model_copy(update={"lr": lr})
    config = cell.config.model_copy(update={"train": train})
    return replace(cell, axes={**cell.axes, LR: lr}, config=config)


def _cells(sweep: Sweep, files: Files) -> list[Cell]:
    """Every cell that is not excluded, with its config unmatched."""
    cells: list[Cell] = []
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
                    cells.append(Cell(arm, axes, leaves, cell_config(arm, leaves, files), own))
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
    refuse_empty(sweep, cells)
    refuse_overrides_in_vain(sweep, cells)
    return cells


def _with_sizes(sweep: Sweep, cells: list[Cell]) -> Iterator[tuple[Cell, list[str]]]:
    """The cells with their final widths: gated ones matched, controls sized; and why that is impossible, if it is."""
    gated: dict[tuple[tuple[str, Any], ...], list[TrialConfig]] = {}
    for cell in cells if sweep.sized_controls else ():
        gated.setdefault(cell_key(cell.axes), []).append(cell.config)
    for cell in cells:
        said = f"match {sweep.match.by}"
        try:
            config = matched(cell.config, sweep, cell.arm, cell.resources)
            if cell.arm in sweep.sized_controls:
                said = f"control {cell.arm}"
                config = sized(config, cell.arm, gates_add(gated[cell_key(cell.axes)]), cell.resources)
        except ValueError as error:
            yield cell, [f"{said} is impossible: {error}"]
        else:
            yield (cell if config is cell.config else replace(cell, config=config)), []
