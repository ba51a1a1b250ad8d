"""What a plan is made of: trials with their price, cells that are refused, and what may join while the sweep runs."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from models.accounting import RankMemory
from models.config import Layout, TrialConfig
from orchestrator.sweep import ResourcesConfig


@dataclass(frozen=True)
class PlannedTrial:
    """A cell and a seed, resolved. ``axes`` holds every axis of the sweep by its dotted name."""

    position: int
    """0-based, in the order of execution."""
    arm: str
    axes: dict[str, Any]
    seed: int
    config: TrialConfig
    fingerprint: str
    resources: ResourcesConfig
    """The cell's own."""
    num_parameters: int
    training_flops: int
    """Of the whole trial, validation not counted."""
    num_active_parameters: int
    """Those that one token uses; all of them without experts."""
    micro_batch_sequences: int
    """Sequences that a rank takes at once."""
    memory: RankMemory
    """Of the rank that needs most."""

    @property
    def layout(self) -> Layout:
        return self.resources.layout


@dataclass(frozen=True)
class Refusal:
    """A cell that will not run, and all reasons why; it has no trials."""

    arm: str
    axes: dict[str, Any]
    reason: str


@dataclass(frozen=True)
class Confirmation:
    """What an arm runs on fresh seeds once its learning rate is chosen: the trials of that rate, of no other."""

    arm: str
    axes: dict[str, Any]
    """The axes but the learning rate and what is derived: one choice for each of their values."""
    selection: tuple[str, ...]
    """Fingerprints of the trials that choose, sorted; all of them have to end first."""
    by_lr: dict[float, tuple[PlannedTrial, ...]]
    later: dict[float, tuple[tuple[PlannedTrial, ...], ...]] = field(default_factory=dict)
    """More trials of a rate, by look from the second on, where ``verdict.allocate`` may ask for them."""

    @property
    def most_flops(self) -> int:
        return max(sum(trial.training_flops for trial in trials) for trials in self.by_lr.values())

    @property
    def may_come(self) -> tuple[PlannedTrial, ...]:
        """At any rate, at any look."""
        looks = [trials for of_rate in self.later.values() for trials in of_rate]
        return tuple(trial for trials in (*self.by_lr.values(), *looks) for trial in trials)


@dataclass(frozen=True)
class HeldBack:
    """An arm on a rung that ``verdict.promote`` holds back: it joins the sweep once the rung below lets it through."""

    arm: str
    rung: int
    """From 1, the smallest."""
    axes: dict[str, Any]
    """Of the rung, but for the learning rate and what is derived."""
    below: int
    """The arm's next smaller rung, whose verdict is read ..."""
    axes_below: dict[str, Any]
    """... and its axes."""
    trials: tuple[PlannedTrial, ...]
    confirmations: tuple[Confirmation, ...]

    @property
    def most_flops(self) -> int:
        """With the dearest learning rate confirmed."""
        choosing = sum(trial.training_flops for trial in self.trials)
        return choosing + sum(one.most_flops for one in self.confirmations)


@dataclass(frozen=True)
class PlannedRung:
    """One size of a ladder with gates, as it is planned whole."""

    number: int
    axes: dict[str, Any]
    num_trials: dict[str, int]
    """By arm, in the order of the file: those that choose, or, without ``confirm`` seeds, all."""


@dataclass(frozen=True)
class RateGroup:
    """What has learning rates of its own: an arm, at one value of every axis but the rate and what is derived."""

    arm: str
    axes: dict[str, Any]


@dataclass(frozen=True)
class GrownRate:
    """A learning rate that joined a group while the sweep ran."""

    arm: str
    axes: dict[str, Any]
    lr: float
