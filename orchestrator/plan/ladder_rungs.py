"""The rungs of a ladder whose arms are let through gates: which cells each one has, from small to large.

A rung is all cells at one value of the axes besides the learning rate, as a table of verdicts is. Rungs are ordered by
the training FLOPs of their baseline, and with gates they run in that order: what decides comes before what is decided.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

from models.accounting import parameters, training_flops_per_token
from models.config import TrialConfig
from orchestrator.plan.ordering import Cell, other_axes
from orchestrator.sweep import Problems, Sweep, arm_key

_PLACE = ("verdict", "promote")


@dataclass(frozen=True)
class RungCells:
    """``number`` counts from 1, the smallest."""

    number: int
    axes: dict[str, Any]
    cells: tuple[Cell, ...]


def rungs_of(sweep: Sweep, cells: Sequence[Cell]) -> tuple[RungCells, ...]:
    """One of all cells in a sweep without gates; UserError where the cells are no ladder."""
    if sweep.verdict.promote is None or not cells:
        return (RungCells(1, {}, tuple(cells)),)
    tables: dict[str, list[Cell]] = {}
    for cell in cells:
        tables.setdefault(arm_key("", other_axes(sweep, cell.axes)), []).append(cell)
    _refuse_other_axes(sweep, cells)
    sizes = {key: _size(sweep, of) for key, of in tables.items()}
    ordered = sorted(tables, key=lambda key: sizes[key])
    _refuse_no_line(sweep, [(tables[key][0], sizes[key]) for key in ordered])
    return tuple(
        RungCells(number, other_axes(sweep, tables[key][0].axes), tuple(tables[key]))
        for number, key in enumerate(ordered, start=1)
    )


def _size(sweep: Sweep, cells: Sequence[Cell]) -> tuple[int, int, int]:
    """(FLOPs, parameters, tokens) of a trial of the baseline; UserError where it has no cell."""
    own = next((cell for cell in cells if cell.arm == sweep.baseline), None)
    if own is None:
        problems = Problems(sweep.places)
        said = f"{_at(sweep, cells[0])} the baseline has no cell, and every gate compares with it"
        problems.add(_PLACE, f"{said}; allowed: a baseline on every rung", on_key=True)
        problems.raise_if_any()
    assert own is not None
    return _amounts(own.config)


def _amounts(config: TrialConfig) -> tuple[int, int, int]:
    shape, train = (config.model, config.gates, config.data.vocab_size), config.train
    tokens = train.num_steps * train.batch_tokens
    flops = training_flops_per_token(*shape, config.data.sequence_length) * tokens
    return flops, parameters(*shape), tokens


def _refuse_other_axes(sweep: Sweep, cells: Sequence[Cell]) -> None:
    names = list(dict.fromkeys(name for cell in cells for name in other_axes(sweep, cell.axes)))
    others = [name for name in names if not name.startswith("model.") and name != "train.tokens"]
    if others or not names:
        got = f"axis {others[0]}, which is no size" if others else "no axis of sizes"
        problems = Problems(sweep.places)
        problems.add(_PLACE, f"gates stand between the rungs of a ladder, and there is {got}; allowed: axes of model.* "
                     "and train.tokens, beside train.lr", on_key=True)  # fmt: skip
        problems.raise_if_any()


def _refuse_no_line(sweep: Sweep, rungs: Sequence[tuple[Cell, tuple[int, int, int]]]) -> None:
    problems = Problems(sweep.places)
    if len(rungs) < 2:
        problems.add(_PLACE, "gates stand between rungs, and there is one; allowed: two sizes or more", on_key=True)
    for (below, less), (above, more) in pairwise(rungs):
        if less[0] == more[0] or any(b < a for a, b in zip(less, more, strict=True)):
            said = f"{_at(sweep, below)} and {_at(sweep, above)} neither is the larger: parameters and tokens must not"
            problems.add(_PLACE, f"{said} fall from rung to rung; allowed: one line of sizes (zip)", on_key=True)
    problems.raise_if_any()


def _at(sweep: Sweep, cell: Cell) -> str:
    return "at " + ", ".join(f"{name}={value}" for name, value in other_axes(sweep, cell.axes).items())
