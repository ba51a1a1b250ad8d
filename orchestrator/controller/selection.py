"""Each arm at its own best learning rate: chosen on the selection seeds, confirmed on fresh ones.

An arm's rate is chosen as soon as its own selection trials have ended, whatever the other arms do: nothing but its own
losses goes into it, so waiting would only leave gangs idle. A trial that failed or was canceled may be run again, and a
choice over its hole would favour the rate that was lucky: it waits.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

from orchestrator.plan import Confirmation
from orchestrator.scaling import CellResult, best_learning_rate
from orchestrator.store import FINISHED, Store, SweepRow, TrialRow, find_choice


def choose_rates(
    store: Store,
    sweep_name: str,
    confirmations: Sequence[Confirmation],
    tell: Callable[[str], None],
    known: Mapping[str, TrialRow] | None = None,
) -> int:
    """Choose what can be chosen now and add its confirming trials; returns how many arms that were.

    Idempotent: a choice is stored with the trials that made it, and the same trials choose once. ``known``: the trials
    by fingerprint, where they have been read.
    """
    if not confirmations:
        return 0
    sweep = store.sweep(sweep_name)
    open_ones = [one for one in confirmations if find_choice(sweep.verdict, one) is None]
    if not open_ones:
        return 0
    trials = known or {trial.fingerprint: trial for trial in store.trials(sweep.id)}
    count = 0
    for one in open_ones:
        selecting = [trials[fingerprint] for fingerprint in one.selection]
        if not all(trial.state in FINISHED for trial in selecting):
            continue
        lr = _best(store, sweep.id, sweep.verdict.get("tail", 0.1), one.arm, selecting)
        if lr is None:
            continue
        store.choose(sweep.id, one, lr)
        values = "".join(f" {name}={value}" for name, value in one.axes.items())
        tell(f"chosen    {one.arm}{values}: learning rate {lr:g}; {len(one.by_lr[lr])} trials confirm it")
        count += 1
    return count


def _best(store: Store, sweep_id: int, tail: float, arm: str, trials: Sequence[TrialRow]) -> float | None:
    """None when no rate has all its seeds complete."""
    best = best_learning_rate(arm, cell_results(store, sweep_id, tail, arm, trials)).best
    return None if best is None else best.lr


def no_rate_ever(store: Store, sweep: SweepRow, one: Confirmation, trials: Mapping[str, TrialRow]) -> bool:
    """Whether all that could choose has ended, and no rate has all its seeds complete."""
    selecting = [trials[fingerprint] for fingerprint in one.selection]
    if not all(trial.state in FINISHED for trial in selecting):
        return False
    return _best(store, sweep.id, sweep.verdict.get("tail", 0.1), one.arm, selecting) is None


def loss_of(store: Store, sweep_id: int, tail: float, trials: Mapping[str, TrialRow]) -> Callable[[str], float | None]:
    """A complete trial's loss by fingerprint, by the measure of the verdicts: on the whole split if all have it."""
    tails = {(row.fingerprint, row.split): row.loss_nats for row in store.tails(sweep_id, tail)}
    complete = [trial.fingerprint for trial in trials.values() if trial.state == "COMPLETE"]
    split = "full" if all(tails.get((one, "full")) is not None for one in complete) else "slice"
    return {one: tails.get((one, split)) for one in complete}.get


def cell_results(store: Store, sweep_id: int, tail: float, arm: str, trials: Sequence[TrialRow]) -> list[CellResult]:
    """Trials of one arm, by the measure of the verdicts."""
    tails = {(row.fingerprint, row.split): row.loss_nats for row in store.tails(sweep_id, tail)}
    complete = [trial.fingerprint for trial in trials if trial.state == "COMPLETE"]
    split = "full" if all(tails.get((one, "full")) is not None for one in complete) else "slice"
    return [
        CellResult(arm, trial.config.train.lr, trial.seed, trial.state, tails.get((trial.fingerprint, split)))
        for trial in trials
    ]
