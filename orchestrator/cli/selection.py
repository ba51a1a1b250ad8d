"""Which trials of a sweep a verb is about: by fingerprint, or by what they have in common."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from orchestrator.store import SweepRow, TrialRow, standing_passages
from orchestrator.sweep import UserError

_OF_A_TRIAL = ("arm", "state", "cause", "seed")


def select_trials(
    trials: Sequence[TrialRow], where: Sequence[str] = (), fingerprints: Sequence[str] = ()
) -> list[TrialRow]:
    """Those that match every ``KEY=VALUE`` of ``where`` and, if any are given, one of the fingerprints' beginnings.

    Keys are arm, state, cause, seed and the axes by their dotted names; ``lr=1e-3`` is short for ``train.lr=1e-3``.
    UserError for a key or a fingerprint that no trial has.
    """
    chosen = list(trials)
    for condition in where:
        key, equals, wanted = condition.partition("=")
        if not equals:
            raise UserError(f"--where {condition}: allowed: KEY=VALUE, such as arm=g1 or train.lr=1e-3")
        name = _known_key(key.strip(), trials)
        arms = sorted({trial.arm for trial in trials})
        if name == "arm" and wanted.strip() not in arms:
            raise UserError(f"--where {condition}: no such arm; allowed: {', '.join(arms)}")
        chosen = [trial for trial in chosen if _is(_value(trial, name), wanted.strip())]
    for beginning in fingerprints:
        if not any(trial.fingerprint.startswith(beginning) for trial in trials):
            raise UserError(f"--trial {beginning}: no trial of this sweep has such a fingerprint")
    if fingerprints:
        chosen = [trial for trial in chosen if trial.fingerprint.startswith(tuple(fingerprints))]
    return chosen


def closed_gates(sweep: SweepRow, trials: Sequence[TrialRow], where: Sequence[str]) -> list[str]:
    """Gates between rungs that keep back what matches every ``KEY=VALUE``, by the keys of passages. None unless an arm
    is named, and beside it nothing but axes of the rung: what asks for states or learning rates is about trials."""
    conditions = {_known_key(one.partition("=")[0].strip(), trials): one.partition("=")[2].strip() for one in where}
    arm = conditions.pop("arm", None)
    shut = [one for one in standing_passages(sweep.verdict, sweep.settings).values() if not one.is_through]
    return [
        one.key
        for one in shut
        if one.arm == arm and all(n in one.axes and _is(one.axes[n], wanted) for n, wanted in conditions.items())
    ]


def one_trial(trials: Sequence[TrialRow], beginning: str) -> TrialRow:
    """The one trial whose fingerprint begins so; UserError for none or several."""
    found = {trial.fingerprint: trial for trial in trials if trial.fingerprint.startswith(beginning)}
    if len(found) == 1:
        return next(iter(found.values()))
    if not found:
        listing = "gatesweep query 'SELECT fingerprint, arm FROM results'"
        raise UserError(f"no trial has the fingerprint {beginning}; {listing} lists them")
    raise UserError(f"{beginning} is the beginning of {len(found)} fingerprints: {', '.join(sorted(found)[:5])}")


def _known_key(key: str, trials: Sequence[TrialRow]) -> str:
    axes = list(dict.fromkeys(name for trial in trials for name in trial.axes))
    names = [*_OF_A_TRIAL, *axes]
    short = [name for name in axes if name.rpartition(".")[2] == key]
    if key in names:
        return key
    if len(short) == 1:
        return short[0]
    raise UserError(f"--where {key}: no such key; allowed: {', '.join(names)}")


def _value(trial: TrialRow, name: str) -> Any:
    return getattr(trial, name) if name in _OF_A_TRIAL else trial.axes.get(name)


def _is(value: Any, wanted: str) -> bool:
    """Numbers by value (1e-3 is 0.001), words as they stand, without case."""
    if isinstance(value, int | float) and not isinstance(value, bool):
        try:
            return float(wanted) == float(value)
        except ValueError:
            return False
    return str(value).lower() == wanted.lower()
