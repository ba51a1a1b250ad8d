"""A table whose seeds were given look by look: its verdicts out of the trials, and what is said of them.

Nothing of it is read from what the controller noted: the same trials give the same looks, and so the same verdicts.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from orchestrator.report.figures import plural
from orchestrator.report.tree import SweepHeading, TrialResult
from orchestrator.verdict import SEQUENCE_VERSION, LookSequence, SeededLosses, spent, take_looks


def sequence_of(
    heading: SweepHeading,
    fresh: Mapping[str, Sequence[TrialResult]],
    losses: Mapping[str, float],
    problems: Mapping[str, str],
    rateless: Sequence[str],
) -> LookSequence:
    """``fresh``: by arm, its confirming trials. ``losses``: of the complete ones, by fingerprint. ``rateless``: arms
    that will never have a learning rate."""
    assert heading.look_seeds is not None
    assert heading.design.method != "auto"
    arms = [
        SeededLosses(
            arm=name,
            by_seed={trial.seed: losses[trial.fingerprint] for trial in trials if trial.fingerprint in losses},
            lost=tuple(trial.seed for trial in trials if trial.state == "DIVERGED"),
            never=name in rateless,
            problem=problems[name],
        )
        for name, trials in fresh.items()
    ]
    return take_looks(
        arms, heading.baseline, heading.look_seeds, heading.margin_nats, heading.alpha, heading.design.method
    )


def looks_in_words(heading: SweepHeading, sequence: LookSequence) -> str:
    """The footnote; empty where the sweep gives all arms the same seeds."""
    seeds = heading.look_seeds
    if seeds is None:
        return ""
    step = len(seeds.new(2, False))
    how = f"at most {seeds.number} looks, {plural(step, 'more seed')} each for arms that are undecided"
    if not sequence.taken:
        return f"looks: {how} (O'Brien and Fleming); the first is not there yet, and what stands above is none"
    number = sequence.taken[-1].number
    so_far = f"look {number} taken, {spent(heading.alpha, number, seeds.number):.2g} of alpha {heading.alpha:g} spent"
    settled = [f"{', '.join(taken.settled)} at look {taken.number}" for taken in sequence.taken if taken.settled]
    parts = [f"settled: {'; '.join(settled)}"] if settled else []
    parts += [f"undecided: {', '.join(sequence.open)}"] if sequence.open else []
    if sequence.next_look is None:
        parts.append(_saved(heading, sequence))
    rest = (
        "an interval is that of the arm's look, beside the baseline's seeds of then, and all of them hold at once "
        "(repeated confidence intervals, Jennison and Turnbull). A difference that settled its arm early is on average "
        "larger than the true one"
    )
    return f"looks: {how} (O'Brien and Fleming); {so_far}; {'; '.join(parts)}; {rest} ({SEQUENCE_VERSION})"


def _saved(heading: SweepHeading, sequence: LookSequence) -> str:
    seeds = heading.look_seeds
    assert seeds is not None
    most = used = 0
    for arm, look in sequence.look_of.items():
        most += len(seeds.of(seeds.number, arm == heading.baseline))
        used += len(seeds.of(look, arm == heading.baseline))
    return f"{used} confirming trials of at most {most}"
