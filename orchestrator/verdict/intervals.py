"""The interval of each arm's difference to the baseline, by the declared method.

- Dunnett: one variance pooled over all arms; paired, the seeds are the blocks of a randomised block design, and the
  variance is that of the residual after the means of arms and seeds.
- Welch (Biometrika 34, 1947): each pair's own two variances, Satterthwaite's degrees of freedom; paired, Student's t of
  the pair's differences. Bonferroni over the arms.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean, stdev

from orchestrator.verdict.dunnett import critical_value
from orchestrator.verdict.looks import Looks, level_of_look
from orchestrator.verdict.samples import Design, Method, NoiseFloor, Sample, noise_floor, rounded_away

VARIANCES_LEVEL = 0.2
"""Below this p of Bartlett's test, ``auto`` takes Welch. So high as the test sees little on a few seeds, and still not
enough: with one arm of three times the noise, ``auto`` errs in 7 to 9 % for a nominal 5 % on 3 seeds and in about 6 %
on 5 (8.4 % when the baseline has its sqrt(arms) times the seeds, where Welch alone has 5.6 %)."""


@dataclass(frozen=True)
class Spread:
    """The SD of one seed that an interval is made of: the difference of two means has sd * sqrt(1/n + 1/n0)."""

    sd_nats: float
    degrees_of_freedom: float


@dataclass(frozen=True)
class Difference:
    """An arm minus the baseline, with the half-width of its interval; None when the seeds show no spread."""

    delta_nats: float
    half_nats: float | None
    spread: Spread
    critical: float | None


def equal_variances(samples: Sequence[Sample]) -> float | None:
    """p of Bartlett's test over the samples with two seeds or more; 0 when one has no spread; None without two."""
    groups = [sample.losses_nats for sample in samples if len(sample.losses_nats) >= 2]
    if len(groups) < 2:
        return None
    flat = [rounded_away(stdev(group), max(map(abs, group))) == 0.0 for group in groups]
    if any(flat):
        return 1.0 if all(flat) else 0.0
    from scipy.stats import bartlett

    return float(bartlett(*groups).pvalue)


def chosen_method(design: Design, samples: Sequence[Sample]) -> tuple[Method, float | None]:
    """The method to use, and the p of the test of variances if it chose."""
    if design.method != "auto":
        return design.method, None
    p = equal_variances(samples)
    return ("welch" if p is not None and p < VARIANCES_LEVEL else "dunnett"), p


def differences(
    samples: Sequence[Sample], control: Sample, family: Sequence[Sample], method: Method, design: Design, alpha: float
) -> Mapping[str, Difference]:
    """The difference of every arm of ``family`` by its name. Each has two seeds or more, and so has ``control``.

    ``samples`` are all of the table: those outside the family add to a pooled variance.
    """
    floor = noise_floor(samples) if method == "dunnett" and not design.paired else None
    found: dict[str, Difference] = {}
    sizes = tuple(len(sample.losses_nats) for sample in family)
    for sample in family:
        if design.paired:
            delta, spread, num_arm, num_control = _paired(sample, control, family, method)
        else:
            delta, spread, num_arm, num_control = _unpaired(sample, control, floor)
        critical = half = None
        if spread.sd_nats > 0.0:
            arms = (num_arm,) * len(family) if design.paired else sizes
            shape = (num_control, arms, spread.degrees_of_freedom)
            critical = critical_at_look(method, *shape, alpha, design.looks, num_arm)
            half = critical * spread.sd_nats * math.sqrt(1 / num_arm + 1 / num_control)
        found[sample.arm] = Difference(delta, half, spread, critical)
    return found


def critical_at_look(
    method: Method,
    num_control: int,
    num_arms: tuple[int, ...],
    degrees: float,
    alpha: float,
    looks: Looks,
    num_arm: int,
) -> float:
    """Of |t|, for every arm at once and over the declared looks; ``num_arm`` is the size of the arm it is for."""
    from scipy.special import stdtr, stdtrit

    critical = critical_value(num_control, num_arms, int(degrees), alpha) if method == "dunnett" else None
    one = 2.0 * float(stdtr(degrees, -critical)) if critical is not None else alpha / len(num_arms)
    level = level_of_look(one, looks, num_arm, num_control, len(num_arms))
    return critical if critical is not None and level == one else -float(stdtrit(degrees, level / 2.0))


def _unpaired(sample: Sample, control: Sample, floor: NoiseFloor | None) -> tuple[float, Spread, int, int]:
    """By the pooled variance, if there is one, else by the pair's own two."""
    ours, theirs = sample.losses_nats, control.losses_nats
    delta = fmean(ours) - fmean(theirs)
    if floor is not None:
        return delta, Spread(floor.sd_nats, floor.degrees_of_freedom), len(ours), len(theirs)
    parts = [stdev(group) ** 2 / len(group) for group in (ours, theirs)]
    variance = sum(parts)
    scale = max(map(abs, (*ours, *theirs)))
    sd = rounded_away(math.sqrt(variance / (1 / len(ours) + 1 / len(theirs))), scale)
    if sd == 0.0:
        return delta, Spread(0.0, len(ours) + len(theirs) - 2), len(ours), len(theirs)
    degrees = variance**2 / sum(part**2 / (len(group) - 1) for part, group in zip(parts, (ours, theirs), strict=True))
    return delta, Spread(sd, degrees), len(ours), len(theirs)


def common_seeds(samples: Sequence[Sample]) -> list[int]:
    """Those that every sample has, ascending."""
    return sorted(set.intersection(*(set(sample.seeds) for sample in samples)))


def _paired(
    sample: Sample, control: Sample, family: Sequence[Sample], method: Method
) -> tuple[float, Spread, int, int]:
    """Over the seeds that the baseline and every arm of the family have."""
    seeds = common_seeds([control, *family])
    rows = {one.arm: _at(one, seeds) for one in (control, *family)}
    pairs = [ours - theirs for ours, theirs in zip(rows[sample.arm], rows[control.arm], strict=True)]
    delta, count, scale = fmean(pairs), len(seeds), max(abs(loss) for row in rows.values() for loss in row)
    if method == "welch":
        return delta, Spread(rounded_away(stdev(pairs) / math.sqrt(2.0), scale), count - 1), count, count
    of_seed = [fmean(column) for column in zip(*rows.values(), strict=True)]
    grand = fmean(of_seed)
    squares = sum(
        (loss - fmean(row) - mean + grand) ** 2
        for row in rows.values()
        for loss, mean in zip(row, of_seed, strict=True)
    )
    degrees = (len(rows) - 1) * (count - 1)
    return delta, Spread(rounded_away(math.sqrt(squares / degrees), scale), degrees), count, count


def _at(sample: Sample, seeds: Sequence[int]) -> list[float]:
    by_seed = dict(zip(sample.seeds, sample.losses_nats, strict=True))
    return [by_seed[seed] for seed in seeds]
