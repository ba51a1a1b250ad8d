"""What is compared and what comes out: samples, the declared design, verdicts. And the noise that all are held against.

A number that cannot be had is None, never 0.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from statistics import stdev
from typing import Literal

from orchestrator.verdict.looks import Looks

Method = Literal["dunnett", "welch"]
"""``dunnett``: one variance, pooled over all arms, simultaneous by Dunnett. ``welch``: each pair by its own two
variances, simultaneous by Bonferroni."""

Decision = Literal[
    "baseline",
    "better",
    "better, within the margin",
    "worse",
    "worse, within the margin",
    "equivalent",
    "inconclusive",
    "no interval",
    "no result",
]


@dataclass(frozen=True)
class Design:
    """What the sweep declared about its comparisons before it ran."""

    method: Literal["dunnett", "welch", "auto"] = "dunnett"
    """``auto``: Welch when a test of equal variances rejects them, else Dunnett."""
    paired: bool = False
    """Seeds are blocks: the same seed's noise in an arm and in the baseline is taken off."""
    looks: Looks = field(default_factory=Looks)


@dataclass(frozen=True)
class Sample:
    """An arm's losses at its own best learning rate, one a seed. Without any, ``problem`` says why."""

    arm: str
    losses_nats: tuple[float, ...]
    problem: str = ""
    seeds: tuple[int, ...] = ()
    """Of the losses, in their order; only pairing needs them."""


@dataclass(frozen=True)
class NoiseFloor:
    """The seed noise pooled over the arms with two seeds or more: what a difference has to be measured against."""

    sd_nats: float
    degrees_of_freedom: int
    num_arms: int


@dataclass(frozen=True)
class Verdict:
    """One arm against the baseline. A number that cannot be had is None."""

    arm: str
    num_seeds: int
    mean_nats: float | None
    sd_nats: float | None
    delta_nats: float | None
    """Arm minus baseline."""
    low_nats: float | None
    high_nats: float | None
    delta_sds: float | None
    """The difference as a multiple of the noise floor."""
    decision: Decision
    words: str
    """The decision for readers, with its reason or with the seeds it lacks."""
    more_seeds: int | None = None


@dataclass(frozen=True)
class Comparison:
    """All arms of one table against its baseline."""

    baseline: str
    alpha: float
    margin_nats: float | None
    noise_floor: NoiseFloor | None
    critical_value: float | None
    """The largest of the arms'; under Dunnett all have the same one."""
    num_compared: int
    """Arms that share the error rate: those with an interval."""
    verdicts: tuple[Verdict, ...]
    """In the order of the samples, the baseline included."""
    method: Method = "dunnett"
    """The one that was used, also where the design leaves it to a test."""
    variances_p: float | None = None
    """Of the test of equal variances, when the design asked for it."""
    degrees_of_freedom: float | None = None
    """Of the intervals; the smallest where they differ."""


def noise_floor(samples: Sequence[Sample]) -> NoiseFloor | None:
    """Pooled standard deviation over the seeds of each arm; None when no arm has two seeds.

    A spread at the level of rounding counts as none: it is an artefact of summing equal numbers.
    """
    groups = [sample.losses_nats for sample in samples if len(sample.losses_nats) >= 2]
    if not groups:
        return None
    degrees = sum(len(group) - 1 for group in groups)
    variance = sum((len(group) - 1) * stdev(group) ** 2 for group in groups) / degrees
    scale = max(abs(loss) for group in groups for loss in group)
    return NoiseFloor(rounded_away(math.sqrt(variance), scale), degrees, len(groups))


def rounded_away(sd: float, scale: float) -> float:
    """0 for an SD that is only the rounding of numbers as large as ``scale``."""
    return sd if sd > 1e-12 * scale else 0.0
