"""Learning rates that join the grid while a sweep runs: what a search suggests next, or what lies beyond a grid's edge.

A rate is added once all trials of its arm (for a grid: of all arms) have ended, so that it hangs on losses alone and
not on who was faster. A trial that failed or was canceled may run again: it is waited for. What was added is in the
store, with its trials; the next one follows from there, whoever asks.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from orchestrator.controller.selection import cell_results
from orchestrator.plan import Confirmation, GrownRate, Plan, PlannedTrial, RateGroup
from orchestrator.scaling import BestLearningRate, best_learning_rate, extension
from orchestrator.store import FINISHED, Store, SweepRow
from orchestrator.sweep import ExtendedRates, SearchedRates


@dataclass(frozen=True)
class Grown:
    """A plan with all rates so far, and which of its groups may still get more."""

    plan: Plan
    open_groups: tuple[RateGroup, ...]

    @property
    def confirmations(self) -> tuple[Confirmation, ...]:
        """Of arms that have all their rates: the others choose later."""
        still = {_key(group.arm, group.axes) for group in self.open_groups}
        return tuple(one for one in self.plan.confirmations if _key(one.arm, one.axes) not in still)


def grow_rates(store: Store, plan: Plan, tell: Callable[[str], None]) -> Grown:
    """Add the rates that can be added now. Idempotent, as a rate is stored with its trials."""
    if plan.sweep.growing_rates is None:
        return Grown(plan, ())
    while True:
        sweep = store.sweep(plan.sweep.name)
        plan = plan.grown(store.grown_rates(sweep.id))
        new, still = _Growth(store, plan, sweep).next()
        if not new:
            return Grown(plan, still)
        for one in new:
            store.grow(sweep.id, one, _trials_of(plan.grown([one]), one))
            tell(f"added     {one.arm}{_values(one.axes)}: learning rate {one.lr:g}")


class _Growth:
    def __init__(self, store: Store, plan: Plan, sweep: SweepRow) -> None:
        self._store, self._plan, self._sweep = store, plan, sweep
        self._rows = {trial.fingerprint: trial for trial in store.trials(sweep.id)}
        self._tail = sweep.verdict.get("tail", 0.1)

    def next(self) -> tuple[list[GrownRate], tuple[RateGroup, ...]]:
        rates = self._plan.sweep.growing_rates
        if isinstance(rates, SearchedRates):
            return self._suggested(rates)
        assert isinstance(rates, ExtendedRates)
        return self._beyond_the_edge(rates)

    def _suggested(self, rates: SearchedRates) -> tuple[list[GrownRate], tuple[RateGroup, ...]]:
        from orchestrator.search import suggest_rate

        new, still = [], []
        for group in self._plan.groups:
            planned = self._planned(group)
            if len({trial.config.train.lr for trial in planned}) >= rates.trials:
                continue
            still.append(group)
            found = self._best(group)
            if found is not None:
                losses = {point.lr: point.mean_loss_nats for point in found.points}
                # The order of the plan: the first rates, then the others as they were added.
                told = [(lr, losses[lr]) for lr in dict.fromkeys(cell.axes["train.lr"] for cell in self._cells(group))]
                lr = suggest_rate(rates, told)
                new.append(GrownRate(group.arm, group.axes, lr))
        return new, tuple(still)

    def _beyond_the_edge(self, rates: ExtendedRates) -> tuple[list[GrownRate], tuple[RateGroup, ...]]:
        tables: dict[str, list[RateGroup]] = {}
        for group in self._plan.groups:
            tables.setdefault(_key("", group.axes), []).append(group)
        new, still = [], []
        for groups in tables.values():
            found = [best for group in groups if (best := self._best(group)) is not None]
            if len(found) < len(groups):
                still += groups
                continue
            lr = extension(rates, found)
            if lr is not None:
                still += groups
                new += [GrownRate(group.arm, group.axes, lr) for group in groups]
        return new, tuple(still)

    def _best(self, group: RateGroup) -> BestLearningRate | None:
        """Of a group all of whose trials have ended."""
        trials = [self._rows.get(trial.fingerprint) for trial in self._planned(group)]
        known = [trial for trial in trials if trial is not None]
        if len(known) < len(trials) or any(trial.state not in FINISHED for trial in known):
            return None
        return best_learning_rate(group.arm, cell_results(self._store, self._sweep.id, self._tail, group.arm, known))

    def _cells(self, group: RateGroup) -> list[Any]:
        return [cell for cell in self._plan.cells if cell.group(self._plan.sweep) == _key(group.arm, group.axes)]

    def _planned(self, group: RateGroup) -> list[PlannedTrial]:
        return _of_group(self._plan, group.arm, group.axes)


def _of_group(plan: Plan, arm: str, axes: dict[str, Any]) -> list[PlannedTrial]:
    return [one for one in plan.trials if one.arm == arm and all(one.axes[name] == axes[name] for name in axes)]


def _trials_of(plan: Plan, rate: GrownRate) -> list[PlannedTrial]:
    return [one for one in _of_group(plan, rate.arm, rate.axes) if one.config.train.lr == rate.lr]


def _key(arm: str, axes: dict[str, Any]) -> str:
    return json.dumps([arm, axes], default=str)


def _values(axes: dict[str, Any]) -> str:
    return "".join(f" {name}={value}" for name, value in axes.items())
