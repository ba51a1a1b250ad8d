"""The trials of a plan out of its cells: those that are the sweep's now, and those that a gate holds back.

Without gates all cells are one rung, and nothing is held back.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Sequence
from dataclasses import dataclass

from orchestrator.plan.ladder_rungs import RungCells, rungs_of
from orchestrator.plan.ordering import Cell, confirmations_of, in_order
from orchestrator.plan.planned import Confirmation, HeldBack, PlannedRung, PlannedTrial
from orchestrator.sweep import Sweep, arm_key


@dataclass(frozen=True)
class Assembled:
    trials: tuple[PlannedTrial, ...]
    confirmations: tuple[Confirmation, ...]
    held: tuple[HeldBack, ...]
    """From the smallest rung to the largest, in the order of the file."""
    rungs: tuple[PlannedRung, ...]
    """None without gates."""


def assembled(sweep: Sweep, cells: Sequence[Cell], promoted: Collection[str], has_gates: bool) -> Assembled:
    """``promoted``: by ``arm_key``, the arms that were let through to a rung. The baseline needs no leave.

    Positions are those of the whole ladder, rung by rung, so that they are the same whoever is let through.
    """
    rungs = rungs_of(sweep, cells) if has_gates else (RungCells(1, {}, tuple(cells)),)
    trials: list[PlannedTrial] = []
    confirmations: list[Confirmation] = []
    held: list[HeldBack] = []
    told: list[PlannedRung] = []
    below: dict[str, RungCells] = {}
    position = 0
    for rung in rungs:
        of_rung = in_order(sweep, rung.cells, position)
        confirming = confirmations_of(sweep, rung.cells, of_rung)
        may_come = (trial for one in confirming for trial in one.may_come)
        position = 1 + max((one.position for one in (*of_rung, *may_come)), default=position - 1)
        counts = Counter(trial.arm for trial in of_rung)
        told.append(PlannedRung(rung.number, rung.axes, {arm: counts[arm] for arm in sweep.arms if counts[arm]}))
        for arm in sweep.arms:
            if not counts[arm]:
                continue
            smaller, below[arm] = below.get(arm), rung
            if smaller is None or arm == sweep.baseline or arm_key(arm, rung.axes) in promoted:
                continue
            held.append(
                HeldBack(
                    arm=arm,
                    rung=rung.number,
                    axes=rung.axes,
                    below=smaller.number,
                    axes_below=smaller.axes,
                    trials=tuple(trial for trial in of_rung if trial.arm == arm),
                    confirmations=tuple(one for one in confirming if one.arm == arm),
                )
            )
        out = {one.arm for one in held if one.rung == rung.number}
        trials += [trial for trial in of_rung if trial.arm not in out]
        confirmations += [one for one in confirming if one.arm not in out]
    return Assembled(tuple(trials), tuple(confirmations), tuple(held), tuple(told) if has_gates else ())
