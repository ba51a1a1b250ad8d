"""Is an arm better than the baseline, and how sure are we? Simultaneous intervals, and the decision read from them.

Every arm against the baseline by Dunnett's procedure with pooled variance (Dunnett, JASA 50, 1955, pp. 1096-1121).
The surprise: the critical value is integrated here and not taken from ``scipy.stats.dunnett``, whose quasi-random
integration moves an interval by up to 0.5 % with its random state; the tests hold the two against each other.
Pure: no store, no I/O. Losses are in nats a token, and lower is better.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from statistics import fmean, stdev
from typing import Literal

FORMULA_VERSION = "dunnett-pooled-1"
"""Raised whenever a change alters an interval or a decision."""

MIN_SEEDS_EQUIVALENT = 3
"""Fewer seeds never claim equivalence: on two, an interval is narrow by luck far too often."""

MAX_SEEDS = 1_000
"""Where the search for "n more seeds" gives up."""

SD_LIMIT = 0.80
"""Confidence of the upper limit of the SD with which "n more seeds" is planned."""

_NODES = 96
_REACH = 8.5
"""Standard deviations after which a normal tail (2e-17) is nothing in double precision."""

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
class Sample:
    """An arm's final losses at its own best learning rate, one a seed. Without any, ``problem`` says why."""

    arm: str
    losses_nats: tuple[float, ...]
    problem: str = ""


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
    num_compared: int
    """Arms that share the error rate: those with an interval."""
    verdicts: tuple[Verdict, ...]
    """In the order of the samples, the baseline included."""


def compare(samples: Sequence[Sample], baseline: str, margin_nats: float | None, alpha: float = 0.05) -> Comparison:
    """Judge every sample against the one named ``baseline``, at family-wise level ``alpha``.

    Raises ValueError when the baseline is absent, a name occurs twice, or a parameter is out of range.
    """
    _check(samples, baseline, margin_nats, alpha)
    floor = noise_floor(samples)
    control = next(sample for sample in samples if sample.arm == baseline)
    family = [s for s in samples if s is not control and len(s.losses_nats) >= 2]
    usable = floor is not None and floor.sd_nats > 0.0 and len(control.losses_nats) >= 2 and bool(family)
    critical = None
    if usable and floor is not None:
        sizes = tuple(len(sample.losses_nats) for sample in family)
        critical = critical_value(len(control.losses_nats), sizes, floor.degrees_of_freedom, alpha)
    verdicts = tuple(_judge(sample, control, floor, critical, len(family), margin_nats, alpha) for sample in samples)
    return Comparison(
        baseline=baseline,
        alpha=alpha,
        margin_nats=margin_nats,
        noise_floor=floor,
        critical_value=critical,
        num_compared=len(family) if critical is not None else 0,
        verdicts=verdicts,
    )


def _check(samples: Sequence[Sample], baseline: str, margin_nats: float | None, alpha: float) -> None:
    names = [sample.arm for sample in samples]
    if baseline not in names:
        raise ValueError(f"baseline {baseline!r} is not among the arms {', '.join(names) or '(none)'}")
    if len(set(names)) != len(names):
        raise ValueError(f"arms must be named once each, got {', '.join(names)}")
    if not 0.0 < alpha < 1.0:
        raise ValueError(f"alpha must be between 0 and 1, got {alpha:g}")
    if margin_nats is not None and not 0.0 < margin_nats < math.inf:
        raise ValueError(f"margin must be a positive number of nats, got {margin_nats:g}")
    for sample in samples:
        if not all(math.isfinite(loss) for loss in sample.losses_nats):
            raise ValueError(f"arm {sample.arm!r}: every loss must be finite, got {sample.losses_nats}")


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
    sd = math.sqrt(variance)
    return NoiseFloor(sd if sd > 1e-12 * scale else 0.0, degrees, len(groups))


def _judge(
    sample: Sample,
    control: Sample,
    floor: NoiseFloor | None,
    critical: float | None,
    num_compared: int,
    margin_nats: float | None,
    alpha: float,
) -> Verdict:
    losses, num_seeds = sample.losses_nats, len(sample.losses_nats)
    mean = fmean(losses) if losses else None
    sd = stdev(losses) if num_seeds > 1 else None
    control_mean = fmean(control.losses_nats) if control.losses_nats else None
    delta = None if mean is None or control_mean is None or sample is control else mean - control_mean
    sds = delta / floor.sd_nats if delta is not None and floor is not None and floor.sd_nats > 0.0 else None

    def verdict(decision: Decision, words: str, half: float | None = None, more: int | None = None) -> Verdict:
        low, high = (None, None) if half is None or delta is None else (delta - half, delta + half)
        return Verdict(sample.arm, num_seeds, mean, sd, delta, low, high, sds, decision, words, more)

    if not losses:
        return verdict("no result", f"no result: {sample.problem or 'no complete trial'}")
    if sample is control:
        return verdict("baseline", "baseline")
    if delta is None:
        return verdict("no result", f"no result: the baseline has none ({control.problem or 'no complete trial'})")
    if num_seeds < 2:
        return verdict("no interval", "no interval: 1 seed")
    if len(control.losses_nats) < 2:
        return verdict("no interval", "no interval: the baseline has 1 seed")
    if critical is None or floor is None:
        return verdict("no interval", "no interval: the seeds show no spread")

    half = critical * floor.sd_nats * math.sqrt(1 / num_seeds + 1 / len(control.losses_nats))
    decision = decide(delta - half, delta + half, margin_nats, min(num_seeds, len(control.losses_nats)))
    if decision != "inconclusive" or margin_nats is None:
        return verdict(decision, decision, half)
    more = more_seeds(floor, num_compared, margin_nats, alpha, num_seeds)
    return verdict(decision, f"inconclusive: {_seeds_in_words(more)}", half, more)


def decide(low: float, high: float, margin: float | None, num_seeds: int) -> Decision:
    """The one interval, read. An end that only touches 0 or the margin has not passed it.

    ``num_seeds`` is the smaller of the arm's and the baseline's.
    """
    inside = margin is not None and -margin < low and high < margin
    if high < 0.0:
        return "better, within the margin" if inside else "better"
    if low > 0.0:
        return "worse, within the margin" if inside else "worse"
    return "equivalent" if inside and num_seeds >= MIN_SEEDS_EQUIVALENT else "inconclusive"


def _seeds_in_words(more: int | None) -> str:
    if more is None:
        return f"over {MAX_SEEDS:,} more seeds"
    return "1 more seed" if more == 1 else f"{more:,} more seeds"


def more_seeds(floor: NoiseFloor, num_compared: int, margin: float, alpha: float, present: int) -> int | None:
    """Seeds that an arm lacks until its interval resolves the declared margin; at least 1, None above MAX_SEEDS.

    The total is the smallest at which, with as many seeds in every arm and the baseline, the simultaneous
    half-width is at most ``margin`` when the SD is its upper 80 % limit (chi-square). It goes by the margin and
    never by the observed difference, which would promise few seeds whenever luck made the difference large.
    """
    from scipy.stats import chi2

    degrees = floor.degrees_of_freedom
    sd_limit = floor.sd_nats * math.sqrt(degrees / float(chi2.ppf(1.0 - SD_LIMIT, degrees)))

    def resolves(total: int) -> bool:
        equal = (total,) * num_compared
        critical = critical_value(total, equal, (num_compared + 1) * (total - 1), alpha)
        return critical * sd_limit * math.sqrt(2.0 / total) <= margin

    too_few, enough = MIN_SEEDS_EQUIVALENT - 1, MIN_SEEDS_EQUIVALENT
    while not resolves(enough):
        if enough >= MAX_SEEDS:
            return None
        too_few, enough = enough, min(2 * enough, MAX_SEEDS)
    while enough - too_few > 1:
        middle = (too_few + enough) // 2
        too_few, enough = (too_few, middle) if resolves(middle) else (middle, enough)
    return max(1, enough - present)


@lru_cache(maxsize=4096)
def critical_value(num_control: int, num_arms: tuple[int, ...], degrees_of_freedom: int, alpha: float) -> float:
    """Dunnett's two-sided critical value: all |t| of the arms stay below it with probability 1 - ``alpha``.

    ``num_arms`` are the arms' sample sizes. With one arm it is Student's t. Student's and Bonferroni's values bracket
    the root.
    """
    from scipy.optimize import brentq
    from scipy.stats import t

    low = float(t.isf(alpha / 2, degrees_of_freedom))
    if len(num_arms) == 1:
        return low
    high = float(t.isf(alpha / 2 / len(num_arms), degrees_of_freedom))
    loadings = tuple(math.sqrt(n / (n + num_control)) for n in num_arms)

    def excess(critical: float) -> float:
        return coverage(critical, loadings, degrees_of_freedom) - (1.0 - alpha)

    return float(brentq(excess, low * (1 - 1e-9), high * (1 + 1e-9), xtol=1e-10, rtol=1e-12))


def coverage(critical: float, loadings: tuple[float, ...], degrees_of_freedom: int) -> float:
    """Probability that every |t_i| <= ``critical`` under no effect (Dunnett 1955, the product form of the correlation).

    The numerators share the baseline's error z: given z and the SD's ratio s, they are independent normals, so the
    probability is a double integral over z and s, done by Gauss-Legendre. Where s is so large that all arms are
    inside for certain, the rest of the chi distribution is added in closed form.
    """
    import numpy as np
    from scipy.special import ndtr
    from scipy.stats import chi

    nodes, weights = np.polynomial.legendre.leggauss(_NODES)
    root = math.sqrt(degrees_of_freedom)
    lowest, highest = float(chi.ppf(1e-16, degrees_of_freedom)) / root, float(chi.isf(1e-16, degrees_of_freedom)) / root
    top = min(highest, max(lowest, 2 * _REACH / critical))
    z = _REACH * nodes
    z_weights = _REACH * weights * np.exp(-0.5 * z**2) / math.sqrt(2 * math.pi)
    s = lowest + (top - lowest) * (nodes + 1) / 2
    s_weights = (top - lowest) / 2 * weights * chi.pdf(s * root, degrees_of_freedom) * root
    inside = np.ones((_NODES, _NODES))
    for loading in loadings:
        residual = math.sqrt(1.0 - loading**2)
        shared, bound = loading * z[:, None], critical * s[None, :]
        inside *= ndtr((shared + bound) / residual) - ndtr((shared - bound) / residual)
    return float(z_weights @ inside @ s_weights) + float(chi.sf(top * root, degrees_of_freedom))
