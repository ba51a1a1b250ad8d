"""From cells to trials in the order in which they run, each with its price.

Blocks hold every cell of one seed, so that hosts and time do not favour an arm; what is confirmed comes after what
chooses.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from models import accounting
from models.config import TrialConfig
from orchestrator.plan.cells import Leaves
from orchestrator.plan.fit import memory_needed, micro_batch_sizes, size_key
from orchestrator.plan.planned import Confirmation, PlannedTrial
from orchestrator.sweep import Derived, ResourcesConfig, Sweep, seeds_of_looks

LR = "train.lr"


@dataclass(frozen=True)
class Cell:
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
        return group_of(sweep, self.arm, self.axes)

    def fingerprint(self, seed: int) -> str:
        """Of the cell's trial with ``seed``."""
        return self._fingerprint_by_seed(seed)

    @cached_property
    def size(self) -> str:
        return size_key(self.config, self.resources)

    @cached_property
    def _fingerprint_by_seed(self) -> Callable[[int], str]:
        return self.config.fingerprint_by_seed()


def other_axes(sweep: Sweep, axes: dict[str, Any]) -> dict[str, Any]:
    hidden = {LR, *(name for name, axis in sweep.axes.items() if isinstance(axis, Derived))}
    return {name: value for name, value in axes.items() if name not in hidden}


def group_of(sweep: Sweep, arm: str, axes: dict[str, Any]) -> str:
    return json.dumps([arm, other_axes(sweep, axes)], default=str)


def in_order(sweep: Sweep, cells: Sequence[Cell], first_position: int = 0) -> tuple[PlannedTrial, ...]:
    """Blocks that hold every cell of one seed; within a block an order drawn from ``order_seed``.

    The baseline's extra seeds are dealt out over the blocks: a block of their own would give the baseline alone the
    hosts and the hours of the sweep's end. Drawn by hash and not by a generator: a cell that is added or dropped
    leaves the order of the others as it is.
    """
    extra = () if sweep.confirm_seeds else sweep.extra_baseline_seeds
    return _blocks(sweep, cells, sweep.seeds, extra, first_position)


def _blocks(
    sweep: Sweep, cells: Sequence[Cell], seeds: tuple[int, ...], extra_seeds: tuple[int, ...], first_position: int
) -> tuple[PlannedTrial, ...]:
    ordered: list[tuple[str, Cell, int, dict[str, Any]]] = []
    priced = list(zip(cells, _prices(cells), strict=True))
    for number, seed in enumerate(seeds):
        block = [(cell.fingerprint(seed), cell, seed, price) for cell, price in priced]
        for extra in extra_seeds[number :: len(seeds)]:
            of_baseline = [(cell, price) for cell, price in priced if cell.arm == sweep.baseline]
            block += [(cell.fingerprint(extra), cell, extra, price) for cell, price in of_baseline]
        block.sort(key=lambda one: _draw(sweep, one[0]))
        ordered += block
    return tuple(_trial(position, *one) for position, one in enumerate(ordered, first_position))


def confirmations_of(
    sweep: Sweep, cells: Sequence[Cell], selection: Sequence[PlannedTrial]
) -> tuple[Confirmation, ...]:
    """One for each arm and value of the other axes, in the order of the file; their trials come after all others.
    ``selection``: the trials of the same cells that choose."""
    if not sweep.confirm_seeds:
        return ()

    def group(one: Cell | PlannedTrial) -> str:
        return group_of(sweep, one.arm, one.axes)

    first = {group(cell): cell for cell in reversed(cells)}
    choosing: dict[str, list[str]] = {}
    by_lr: dict[str, dict[float, list[PlannedTrial]]] = {}
    for trial in selection:
        choosing.setdefault(group(trial), []).append(trial.fingerprint)
    position = 1 + max((trial.position for trial in selection), default=-1)
    for trial in _blocks(sweep, cells, sweep.confirm_seeds, sweep.extra_baseline_seeds, position):
        by_lr.setdefault(group(trial), {}).setdefault(trial.config.train.lr, []).append(trial)
    later = _later(sweep, cells, position + sum(len(of) for one in by_lr.values() for of in one.values()))
    return tuple(
        Confirmation(
            arm=cell.arm,
            axes=other_axes(sweep, cell.axes),
            selection=tuple(sorted(choosing[key])),
            by_lr={lr: tuple(trials) for lr, trials in sorted(by_lr[key].items())},
            later=later.get(key, {}),
        )
        for key, cell in ((group(cell), cell) for cell in cells if first[group(cell)] is cell)
    )


def _later(
    sweep: Sweep, cells: Sequence[Cell], first_position: int
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
            of_rate.setdefault((group_of(sweep, trial.arm, trial.axes), trial.config.train.lr), []).append(trial)
        for (key, lr), trials in of_rate.items():
            found.setdefault(key, {}).setdefault(lr, []).append(tuple(trials))
    return {key: {lr: tuple(by_look) for lr, by_look in rates.items()} for key, rates in found.items()}


def _draw(sweep: Sweep, fingerprint: str) -> bytes:
    return hashlib.sha256(f"{sweep.order_seed}:{fingerprint}".encode()).digest()


def _prices(cells: Sequence[Cell]) -> list[dict[str, Any]]:
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


def _trial(position: int, fingerprint: str, cell: Cell, seed: int, price: dict[str, Any]) -> PlannedTrial:
    return PlannedTrial(
        position=position,
        arm=cell.arm,
        axes=cell.axes,
        seed=seed,
        config=cell.config.model_copy(update={"seed": seed}),
        fingerprint=fingerprint,
        **price,
    )
