"""What must be new: confirming trials always, all of a sweep's when the user says so."""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Iterable

from orchestrator.plan import Plan, PlannedTrial
from orchestrator.store import Store
from orchestrator.sweep import UserError


def refuse_stale(plan: Plan, store: Store) -> None:
    """UserError when a confirming trial, at any rate that may be chosen, was trained by another sweep.

    Its loss may have been seen, and then its seed confirms nothing. The sweep's own are its own: it goes on with them.
    """
    confirming = [trial for one in plan.confirmations for of_rate in one.by_lr.values() for trial in of_rate]
    seen = store.trained_elsewhere(plan.sweep.name, [trial.fingerprint for trial in confirming])
    if seen:
        stale = [trial for trial in confirming if trial.fingerprint in seen]
        seeds = sorted({trial.seed for trial in stale})
        raise UserError(
            f"{plan.sweep.path}: seeds.confirm: {_named(seen.values())} trained {len(stale)} of the trials that are to "
            f"confirm, on the seed(s) {', '.join(map(str, seeds))}; allowed: fresh seeds, such as "
            f"{_unused(plan, confirming)}"
        )


def refuse_reuse(plan: Plan, store: Store) -> None:
    """UserError when any trial of the plan was trained by another sweep and by none of this name."""
    seen = store.trained_elsewhere(plan.sweep.name, [trial.fingerprint for trial in plan.trials])
    if seen:
        raise UserError(
            f"{plan.sweep.path}: --no-reuse: {len(seen)} of {len(plan.trials)} trials would be taken from "
            f"{_named(seen.values())}; a trial is what is learnt, so other seeds make new ones, such as "
            f"{_unused(plan, plan.trials)}"
        )


def _named(sweeps: Iterable[str]) -> str:
    return ", ".join(f"{name} ({count})" for name, count in sorted(Counter(sweeps).items()))


def _unused(plan: Plan, trials: Iterable[PlannedTrial]) -> str:
    """As many seeds as the trials have, beyond all that the sweep names."""
    sweep = plan.sweep
    named = {*sweep.seeds, *sweep.confirm_seeds, *sweep.extra_baseline_seeds}
    wanted = len({trial.seed for trial in trials} - set(sweep.extra_baseline_seeds))
    return ", ".join(map(str, itertools.islice(itertools.count(max(named) + 1), wanted)))
