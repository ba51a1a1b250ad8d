"""Confirming seeds for the arms that a look left undecided. ``verdict.take_looks`` decides; here it is carried out.

A look is taken when all trials that it needs have ended, so that it hangs on losses alone and not on who was faster. A
trial that failed or was canceled may run again: it is waited for. What a look decided is in the store together with
the trials that it gave; who asks again, after a kill as well, finds it there.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from orchestrator.controller.selection import choose_rates, loss_of, no_rate_ever
from orchestrator.plan import Confirmation, PlannedTrial
from orchestrator.store import FINISHED, Store, SweepRow, TrialRow, find_allotment, find_choice
from orchestrator.sweep import LookSeeds, Sweep, VerdictConfig, seeds_of_looks
from orchestrator.verdict import SEQUENCE_VERSION, LookSequence, LookTaken, SeededLosses, Verdict, spent, take_looks


def confirm(
    store: Store,
    sweep: Sweep,
    confirmations: Sequence[Confirmation],
    tell: Callable[[str], None],
    known: Mapping[str, TrialRow] | None = None,
) -> int:
    """Choose the learning rates that can be chosen, then take the looks that can be taken; returns what was done."""
    chosen = choose_rates(store, sweep.name, confirmations, tell, known)
    return chosen or allocate_seeds(store, sweep, confirmations, tell, known)


def allocate_seeds(
    store: Store,
    sweep: Sweep,
    confirmations: Sequence[Confirmation],
    tell: Callable[[str], None],
    known: Mapping[str, TrialRow] | None = None,
) -> int:
    """Take the looks that can be taken now, and add the trials that they give; returns how many looks that were.

    ``known``: the trials by fingerprint, where they have been read.
    """
    seeds = seeds_of_looks(sweep)
    if seeds is None or not confirmations:
        return 0
    trials = known or {trial.fingerprint: trial for trial in store.trials(store.sweep(sweep.name).id)}
    tables: dict[str, list[Confirmation]] = {}
    for one in confirmations:
        tables.setdefault(json.dumps(one.axes, sort_keys=True, default=str), []).append(one)
    return sum(_Table(store, store.sweep(sweep.name), of, seeds, trials).allocate(tell) for of in tables.values())


@dataclass
class _Table:
    """The arms at one value of the other axes."""

    store: Store
    row: SweepRow
    confirmations: Sequence[Confirmation]
    seeds: LookSeeds
    trials: Mapping[str, TrialRow]

    def allocate(self, tell: Callable[[str], None]) -> int:
        axes = self.confirmations[0].axes
        found = [find_allotment(self.row.verdict, axes, look) for look in range(1, self.seeds.number + 1)]
        noted = [one for one in found if one is not None]
        if (noted and not noted[-1].trials) or not self._have_all_ended():
            return 0
        sequence = self._sequence()
        count = 0
        for taken in sequence.taken[len(noted) :]:
            given = self._next_trials(taken, sequence)
            reasons = self._reasons(taken, {trial.arm for trial in given}, given)
            if self.store.allot(self.row.id, axes, taken.number, given, reasons, SEQUENCE_VERSION):
                count += 1
                for arm, reason in reasons.items():
                    tell(f"look      {arm}{_values(axes)}: {reason}")
        return count

    def _have_all_ended(self) -> bool:
        """The trials that confirm so far; and every arm has its rate, or will never have one."""
        for one in self.confirmations:
            choice = find_choice(self.row.verdict, one)
            if choice is None and not no_rate_ever(self.store, self.row, one, self.trials):
                return False
            may_be_there = () if choice is None else self._confirming(one, choice["lr"])
            if any(self.trials[trial.fingerprint].state not in FINISHED for trial in may_be_there):
                return False
        return True

    def _confirming(self, one: Confirmation, lr: float) -> list[PlannedTrial]:
        """At the chosen rate, those that the sweep has by now."""
        planned = [*one.by_lr[lr], *(trial for trials in one.later.get(lr, ()) for trial in trials)]
        return [trial for trial in planned if trial.fingerprint in self.trials]

    def _sequence(self) -> LookSequence:
        rules = VerdictConfig.model_validate(
            {name: value for name, value in self.row.verdict.items() if name in VerdictConfig.model_fields}
        )
        loss = loss_of(self.store, self.row.id, rules.tail, self.trials)
        arms = []
        for one in self.confirmations:
            choice = find_choice(self.row.verdict, one)
            rows = [] if choice is None else [self.trials[t.fingerprint] for t in self._confirming(one, choice["lr"])]
            losses = {row.seed: found for row in rows if (found := loss(row.fingerprint)) is not None}
            lost = tuple(row.seed for row in rows if row.state == "DIVERGED")
            problem = "a confirming seed diverged" if lost else "no learning rate has all its seeds complete"
            arms.append(SeededLosses(one.arm, losses, lost, never=choice is None, problem=problem))
        assert rules.method != "auto"
        return take_looks(arms, self.row.baseline, self.seeds, rules.margin, rules.alpha, rules.method)

    def _next_trials(self, taken: LookTaken, sequence: LookSequence) -> list[PlannedTrial]:
        """In the order in which they run."""
        if not taken.open or taken.number == self.seeds.number:
            return []
        found: list[PlannedTrial] = []
        for one in self.confirmations:
            choice = find_choice(self.row.verdict, one)
            if choice is not None and one.arm in (self.row.baseline, *taken.open):
                found += one.later[choice["lr"]][taken.number - 1]
        return sorted(found, key=lambda trial: trial.position)

    def _reasons(self, taken: LookTaken, given: set[str], trials: Sequence[PlannedTrial]) -> dict[str, str]:
        reasons = {}
        share = spent(taken.comparison.alpha, taken.number, self.seeds.number)
        place = f"at look {taken.number} of {self.seeds.number}"
        for verdict in taken.judged:
            seen = f"{verdict.decision} {place}{_interval(verdict)}, {share:.2g} of alpha spent"
            if verdict.arm in taken.settled:
                reasons[verdict.arm] = f"{seen}: settled, no more seeds"
            elif verdict.arm in given:
                seeds = sorted(trial.seed for trial in trials if trial.arm == verdict.arm)
                reasons[verdict.arm] = f"{seen}: seeds {', '.join(map(str, seeds))} join"
            else:
                reasons[verdict.arm] = f"{seen}: the last look, no more seeds"
        ours = sorted(trial.seed for trial in trials if trial.arm == self.row.baseline)
        if ours:
            reasons[self.row.baseline] = f"every undecided arm leans on it: seeds {', '.join(map(str, ours))} join"
        return reasons


def _interval(verdict: Verdict) -> str:
    if verdict.low_nats is None or verdict.high_nats is None:
        return ""
    return f", {verdict.delta_nats:+.4f} [{verdict.low_nats:+.4f}, {verdict.high_nats:+.4f}] nats"


def _values(axes: Mapping[str, Any]) -> str:
    return "".join(f" {name}={value}" for name, value in axes.items())
