"""Decay branches: which trials of a warm-up/stable/decay schedule may start from a checkpoint of a longer one. Pure.

Trials with one ``train.trunk_tokens`` that are equal but for ``tokens``, ``decay_fraction`` and ``min_lr_fraction`` are
the same run, to the bit, up to where each begins to decay. The longest of them is the trunk: it keeps a checkpoint
where each of the others, its branches, leaves it. (Hägele et al., Scaling Laws and Compute-Optimal Training Beyond
Fixed Training Durations, arXiv 2405.18392.)

The surprise: a branch leaves before its first validation of the verdict's tail, if that comes before its decay, so that
it measures all that its loss is the mean of.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

from models.config import Layout, TrialConfig
from orchestrator.plan.planned import PlannedTrial
from orchestrator.sweep import Sweep

_OWN = {"tokens", "decay_fraction", "min_lr_fraction", "trunk_tokens", "warmup_tokens", "warmup_fraction"}
"""Fields of ``train`` in which trials of one trunk may differ, or that are compared by what comes of them."""


class Candidate(Protocol):
    """A planned trial, or one in the store."""

    @property
    def fingerprint(self) -> str: ...
    @property
    def config(self) -> TrialConfig: ...
    @property
    def layout(self) -> Layout: ...


@dataclass(frozen=True)
class Branch:
    trunk: str
    """The fingerprint of the trial that it leaves."""
    step: int
    """The last step that both share."""


def decay_branches(trials: Iterable[Candidate], micro_batches: Mapping[str, int], tail: float) -> dict[str, Branch]:
    """By fingerprint, the trials that may start from a longer one of them. ``tail``: of the schedule, 0 to 1.

    Another layout or micro-batch (``micro_batches``: sequences, by fingerprint) rounds otherwise: no trunk of mine.
    """
    decaying = [trial for trial in trials if trial.config.train.schedule == "wsd"]
    if all(trial.config.train.trunk_tokens is None for trial in decaying):
        return {}
    groups: dict[str, list[Candidate]] = {}
    for trial in decaying:
        groups.setdefault(_shared(trial, micro_batches.get(trial.fingerprint)), []).append(trial)
    found = {}
    for group in groups.values():
        trunk = max(group, key=lambda one: (_decay_begins(one.config), one.config.train.num_steps, one.fingerprint))
        for trial in group:
            step = min(_own_begins(trial.config, tail), _decay_begins(trunk.config))
            if trial is not trunk and 0 < step < trunk.config.train.num_steps:
                found[trial.fingerprint] = Branch(trunk.fingerprint, step)
    return found


def planned_branches(trials: Sequence[PlannedTrial], sweep: Sweep) -> dict[str, Branch]:
    """The branches of a plan; none beside pruning by rank, whose rungs are read off a trial's own validations."""
    if sweep.prune.rank is not None:
        return {}
    sizes = {trial.fingerprint: trial.micro_batch_sequences for trial in trials}
    return decay_branches(trials, sizes, sweep.verdict.tail)


def trained_flops(trials: Sequence[PlannedTrial], sweep: Sweep) -> dict[str, float]:
    """By fingerprint, what is computed for a trial if all goes well: of a branch, what comes after it has left."""
    branches = planned_branches(trials, sweep)
    shares = {one: branch.step for one, branch in branches.items()}
    return {
        trial.fingerprint: trial.training_flops
        * (1.0 - shares.get(trial.fingerprint, 0) / trial.config.train.num_steps)
        for trial in trials
    }


def _shared(trial: Candidate, micro_batch: int | None) -> str:
    """What trials have in common with all that may leave the same trunk."""
    train = trial.config.train
    content = trial.config.model_dump(mode="json", exclude={"train": _OWN})
    # The trunk itself may have come without trunk_tokens, from another sweep.
    steps = train.warmup_steps, train.trunk_tokens or train.tokens
    return json.dumps([content, steps, trial.layout.model_dump(mode="json"), micro_batch], sort_keys=True)


def _decay_begins(config: TrialConfig) -> int:
    """The last step at the full rate."""
    return config.train.num_steps - config.train.decay_steps


def _own_begins(config: TrialConfig, tail: float) -> int:
    """The step up to which nothing is the trial's own."""
    num_steps = config.train.num_steps
    in_tail = [step for step in config.validation_steps() if step / num_steps > 1.0 - tail]
    return min([_decay_begins(config), *(step - 1 for step in in_tail)])
