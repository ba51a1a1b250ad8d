"""What must be new: confirming trials always, all of a sweep's when the user says so."""

from __future__ import annotations

import itertools
import json
from collections import Counter
from collections.abc import Iterable, Mapping
from typing import Any

from orchestrator.plan import Plan, PlannedTrial
from orchestrator.store import Store, find_choice
from orchestrator.sweep import PromoteConfig, UserError


def refuse_stale(plan: Plan, store: Store) -> None:
    """UserError when a confirming trial, at any rate that may be chosen, was trained by another sweep.

    Its loss may have been seen, and then its seed confirms nothing. The sweep's own are its own: it goes on with them.
    """
    confirming = plan.confirming
    seen = store.trained_elsewhere(plan.sweep.name, [trial.fingerprint for trial in confirming])
    if seen:
        stale = [trial for trial in confirming if trial.fingerprint in seen]
        seeds = sorted({trial.seed for trial in stale})
        raise UserError(
            f"{plan.sweep.path}: seeds.confirm: {_named(seen.values())} trained {len(stale)} of the trials that are to "
            f"confirm, on the seed(s) {', '.join(map(str, seeds))}; allowed: fresh seeds, such as "
            f"{_unused(plan, confirming)}"
        )


def refuse_other_looks(plan: Plan, store: Store) -> None:
    """UserError when looks were declared otherwise at first, or seeds were given by looks that are no longer these.

    What a look gave hangs on the arms, the seeds and the rates that it saw; over others its error rate means nothing.
    """
    known = [row for row in store.sweeps() if row.name == plan.sweep.name]
    if not known:
        return
    row, sweep, instead = known[0], plan.sweep, "a sweep of another name shares the trials and starts anew"
    rules = sweep.verdict.model_dump(mode="json")
    before, now = ({key: one.get(key) for key in ("looks", "allocate")} for one in (row.verdict, rules))
    if before != now and (before["allocate"] or now["allocate"]):
        said = " -> ".join(f"looks {one['looks']}, allocate {one['allocate'] or 'none'}" for one in (before, now))
        raise UserError(f"{sweep.path}: verdict: {said}: looks hold as they were first declared; {instead}")
    gates = row.verdict.get("promote"), rules["promote"]
    if gates[0] != gates[1]:
        said = " -> ".join("none" if one is None else str(PromoteConfig.model_validate(one)) for one in gates)
        raise UserError(f"{sweep.path}: verdict: promote {said}: gates hold as they were first declared; {instead}")
    if not row.verdict.get("allocated"):
        return
    as_now = sweep.model_dump(mode="json", include={"seeds", "confirm_seeds", "extra_baseline_seeds"})
    changed = [name for name, value in as_now.items() if row.settings.get(name) != value]
    changed += [] if row.arms == tuple(sweep.arms) else ["arms"]
    changed += ["the trials that chose a rate"] if _choices_changed(plan, row.verdict) else []
    if changed:
        raise UserError(f"{sweep.path}: {', '.join(changed)} changed after a look was taken; {instead}")


def _choices_changed(plan: Plan, verdict: Mapping[str, Any]) -> bool:
    chosen = {(one["arm"], json.dumps(one["axes"], default=str)) for one in verdict.get("chosen", ())}
    mine = [one for one in plan.confirmations if (one.arm, json.dumps(one.axes, default=str)) in chosen]
    return any(find_choice(verdict, one) is None for one in mine)


def refuse_reuse(plan: Plan, store: Store) -> None:
    """UserError when any trial of the plan was trained by another sweep and by none of this name."""
    seen = store.trained_elsewhere(plan.sweep.name, [trial.fingerprint for trial in plan.all_trials])
    if seen:
        raise UserError(
            f"{plan.sweep.path}: --no-reuse: {len(seen)} of {len(plan.all_trials)} trials would be taken from "
            f"{_named(seen.values())}; a trial is what is learnt, so other seeds make new ones, such as "
            f"{_unused(plan, plan.all_trials)}"
        )


def _named(sweeps: Iterable[str]) -> str:
    return ", ".join(f"{name} ({count})" for name, count in sorted(Counter(sweeps).items()))


def _unused(plan: Plan, trials: Iterable[PlannedTrial]) -> str:
    """As many seeds as the trials have, beyond all that the sweep names."""
    sweep = plan.sweep
    named = {*sweep.seeds, *sweep.confirm_seeds, *sweep.extra_baseline_seeds}
    wanted = len({trial.seed for trial in trials} - set(sweep.extra_baseline_seeds))
    return ", ".join(map(str, itertools.islice(itertools.count(max(named) + 1), wanted)))
