"""The gates of a ladder: an arm's trials on a rung join the sweep once its verdict on the rung below has passed.

What is held back is no trial of the sweep yet, so nobody else who shares it is touched. A rung is read when nothing of
it waits or runs any more, for all its arms at once, out of the table that ``results`` prints. An arm with a failed or
canceled trial there, which may run again, is left undecided, and the others are not kept for it. What was decided is in
the store together with the trials that it gave; who asks again, after a kill as well, finds it there.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any

from orchestrator.controller.allocation import confirm
from orchestrator.controller.growing import Grown, grow_rates
from orchestrator.controller.selection import no_rate_ever
from orchestrator.plan import Confirmation, HeldBack, Plan, PlannedTrial
from orchestrator.store import GatePassage, Store, SweepRow, TrialRow, find_choice, standing_passages, verdict_seeds
from orchestrator.sweep import arm_key
from orchestrator.verdict import GATE_VERSION, gate_word

Tell = Callable[[str], None]
_MAY_RUN_AGAIN = ("FAILED", "CANCELED")


def bring_up_to_date(store: Store, plan: Plan, tell: Tell) -> Plan:
    """All that follows from what has ended: rates that join, rates that are chosen, looks, arms that are let through.
    Idempotent. The plan of what there is then; ``plan`` is in the store."""
    while True:
        grown = grow_rates(store, plan, tell)
        if confirm(store, plan.sweep, grown.confirmations, tell):
            continue
        plan = promote_arms(store, grown, tell)
        if plan is grown.plan:
            return plan


def promote_arms(store: Store, grown: Grown, tell: Tell, known: Mapping[str, TrialRow] | None = None) -> Plan:
    """Read the gates that can be read now, and add what they let through, or what a user did; the same plan when
    nothing joined. ``known``: the trials by fingerprint, where they have been read."""
    plan = grown.plan
    if not plan.held:
        return plan
    row = store.sweep(plan.sweep.name)
    opened = plan.promoted(one.key for one in standing_passages(row.verdict, row.settings).values() if one.is_through)
    if opened is not plan:
        store.join(row.id, _joining(plan, opened))
        return opened
    trials = known or {trial.fingerprint: trial for trial in store.trials(row.id)}
    gates = _Gates(store, row, grown, trials)
    for number in dict.fromkeys(one.below for one in plan.held):
        through = gates.read(number, tell)
        if through:
            return plan.promoted(through)
    return plan


def _joining(before: Plan, after: Plan) -> list[PlannedTrial]:
    there = {trial.fingerprint for trial in before.trials}
    return [trial for trial in after.trials if trial.fingerprint not in there]


@dataclass
class _Gates:
    store: Store
    row: SweepRow
    grown: Grown
    trials: Mapping[str, TrialRow]

    def read(self, number: int, tell: Tell) -> list[str]:
        """Decide who goes on from rung ``number``; keys of those that do, whose trials have joined by then."""
        plan = self.grown.plan
        decided = standing_passages(self.row.verdict, self.row.settings)
        out = {arm_key(one.arm, one.axes) for one in plan.held}
        candidates = [
            one
            for one in plan.held
            if one.below == number
            and arm_key(one.arm, one.axes_below) not in out
            and arm_key(one.arm, one.axes) not in decided
        ]
        axes = candidates[0].axes_below if candidates else {}
        here = self._here(axes) if candidates else []
        if not here or not self._is_over(axes, here):
            return []
        holes = {trial.arm for trial in here if trial.state in _MAY_RUN_AGAIN}
        if self.row.baseline in holes:
            return []
        whole = [one for one in candidates if one.arm not in holes]
        found = self._passages(axes, whole) if whole else []
        through = [one.key for one in found if one.is_through]
        joining = _joining(plan, plan.promoted(through))
        if not found or not self.store.promote(self.row.id, found, joining):
            return []
        for one in found:
            said = "promoted" if one.is_through else "held off"
            tell(f"{said}  {one.arm}{_values(one.axes)}, rung {one.rung}: {one.reason}")
        return through

    def _here(self, axes: Mapping[str, Any]) -> list[TrialRow]:
        """The rung's trials."""
        return [one for one in self.trials.values() if all(one.axes.get(name) == axes[name] for name in axes)]

    def _is_over(self, axes: Mapping[str, Any], here: Sequence[TrialRow]) -> bool:
        """Nothing waits, runs, or is still to join; arms with holes have nothing to join."""
        if any(trial.state in ("WAITING", "RUNNING") for trial in here):
            return False
        holes = {trial.arm for trial in here if trial.state in _MAY_RUN_AGAIN}
        groups = [group for group in self.grown.open_groups if group.axes == axes]
        if any(group.arm not in holes for group in groups):
            return False
        confirmations = [one for one in self.grown.plan.confirmations if one.axes == axes]
        return all(one.arm in holes or self._has_chosen(one) for one in confirmations)

    def _has_chosen(self, one: Confirmation) -> bool:
        """Also that there is nothing to choose."""
        chosen = find_choice(self.row.verdict, one) is not None
        return chosen or no_rate_ever(self.store, self.row, one, self.trials)

    def _passages(self, axes: Mapping[str, Any], arms: Sequence[HeldBack]) -> list[GatePassage]:
        from orchestrator.report import results

        rule = self.grown.plan.sweep.verdict.promote
        assert rule is not None
        tables = results(self.store, self.row.name).tables
        table = next(one for one in tables if dict(one.axes) == dict(axes))
        by_arm = {one.arm: one for one in table.rows}
        now = datetime.now(UTC)
        found = []
        for held in arms:
            verdict = by_arm[held.arm]
            found.append(
                GatePassage(
                    arm=held.arm,
                    rung=held.rung,
                    axes=held.axes,
                    below=held.below,
                    axes_below=held.axes_below,
                    is_through=rule.passes(gate_word(verdict.decision)),
                    reason=f"{_in_words(verdict)} on rung {held.below} (promote {rule})",
                    decision=verdict.decision,
                    delta_nats=verdict.delta_nats,
                    low_nats=verdict.low_nats,
                    high_nats=verdict.high_nats,
                    read=tuple(dict.fromkeys((*by_arm[self.row.baseline].trials_best, *verdict.trials_best))),
                    formula=GATE_VERSION,
                    seeds=verdict_seeds(self.row.settings),
                    at=now,
                )
            )
        return found


def _in_words(verdict: Any) -> str:
    """``worse by 0.0523 [0.0311, 0.0735] nats``."""
    if verdict.decision == "no result":
        return str(verdict.verdict)
    if verdict.low_nats is None or verdict.high_nats is None:
        return str(verdict.decision)
    return f"{verdict.decision}: {verdict.delta_nats:+.4f} [{verdict.low_nats:+.4f}, {verdict.high_nats:+.4f}] nats"


def _values(axes: Mapping[str, Any]) -> str:
    return "".join(f" {name}={value}" for name, value in axes.items())
