"""Scaling laws of a ladder's arms, how well they foretell its largest rung, and what lead in compute they mean. Pure.

loss = E + A * (size / reference)^-alpha, fitted as ``power_law`` says. Three parameters need five rungs; with fewer,
all arms share the floor E and the exponent alpha and differ in A alone. Intervals are 95 % and come from resampling
whole trials: their deviations from their rung's mean, widened by sqrt(n / (n - 1)) and pooled over the rungs of a fit,
with percentiles by Student's t instead of the normal's (Hesterberg, The American Statistician 69, 2015). Resampling
within each rung alone covered 85 % on two seeds.

The surprise: they tell of the noise of seeds, not of whether a power law holds. That is what the rung left out is for.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean, variance
from typing import TYPE_CHECKING, Literal

from orchestrator.scaling.trunks import TrunkPool

if TYPE_CHECKING:
    from orchestrator.scaling.power_law import Array

LAWS_VERSION = "power-law-2"
RUNGS_ALONE = 5
"""Needed for an arm's own floor, amplitude and exponent."""
RUNGS_SHARED = 3
EXTRAPOLATION = 2.0
"""How far beyond the baseline's rungs its law is believed, as a factor of the size."""
LARGE_MISS, NOTED_MISS = 0.001, 0.05
"""Chances, by Student's t, of a miss as large where the law holds: below the first there is no speed-up, below the
second a note."""
RESAMPLES = 399

Form = Literal["own", "shared"]


@dataclass(frozen=True)
class RungLosses:
    """An arm on one rung: its final losses, one a trial. ``size``: parameters, tokens or FLOPs."""

    arm: str
    size: float
    losses_nats: tuple[float, ...]
    trunks: tuple[str, ...] = ()
    """The run that each trial is or began in, where any two have one in common: losses of one go up and down together.
    Empty: each trial is a run of its own."""


@dataclass(frozen=True)
class Estimate:
    """An end of the interval is None where it is open, or where there are no trials to resample."""

    value: float
    low: float | None = None
    high: float | None = None


@dataclass(frozen=True)
class ScalingLaw:
    arm: str
    floor_nats: Estimate
    amplitude_nats: Estimate
    """Of the loss above the floor at ``reference``."""
    exponent: Estimate
    reference: float
    num_rungs: int
    num_trials: int

    def loss_nats(self, size: float) -> float:
        above: float = self.amplitude_nats.value * (size / self.reference) ** -self.exponent.value
        return self.floor_nats.value + above


@dataclass(frozen=True)
class LeftOut:
    """The arm's largest rung beside what a law of the others foretells.

    ``sds``: the miss as a multiple of the SD of the prediction and of the rung's mean together, the latter by the
    variance pooled over the rungs, of which ``degrees`` are the degrees of freedom.
    """

    arm: str
    size: float
    loss_nats: float
    predicted_nats: float
    sds: float | None
    degrees: int = 0

    def is_beyond(self, chance: float) -> bool:
        from scipy.stats import t

        return self.sds is not None and bool(2 * t.sf(abs(self.sds), self.degrees) < chance)

    @property
    def miss_nats(self) -> float:
        return self.loss_nats - self.predicted_nats


@dataclass(frozen=True)
class SpeedUp:
    """The size at which the baseline's law has the loss that the arm's has at ``size``, over ``size``."""

    arm: str
    size: float
    ratio: Estimate | None
    problem: str = ""


@dataclass(frozen=True)
class LadderLaws:
    form: Form | None
    """None where nothing could be fitted."""
    laws: tuple[ScalingLaw, ...]
    left_out: tuple[LeftOut, ...]
    speed_ups: tuple[SpeedUp, ...]
    problems: tuple[str, ...]


@dataclass(frozen=True)
class _Fit:
    """One fit of one arm or several: (1 + resamples, 2 + arms) parameters, and Student's degrees of freedom."""

    arms: tuple[str, ...]
    parameters: Array
    degrees: float
    """Infinite where the draws are widened already."""

    def of(self, arm: str) -> tuple[Array, Array, Array]:
        """E, A and alpha, each by data set."""
        import numpy as np

        values = np.exp(self.parameters)
        return values[:, 0], values[:, 2 + self.arms.index(arm)], values[:, 1]


def fit_ladder(points: Sequence[RungLosses], baseline: str, resamples: int = RESAMPLES) -> LadderLaws:
    """Laws of all arms that have enough rungs. The same points give the same numbers: the resampling is seeded.

    ValueError for a loss or a size that is not finite and above 0.
    """
    rungs: dict[str, list[RungLosses]] = {}
    for point in points:
        if not all(math.isfinite(value) and value > 0.0 for value in (point.size, *point.losses_nats)):
            raise ValueError(f"arm {point.arm}: got {point}; allowed: sizes and losses that are finite and above 0")
        if point.losses_nats:
            rungs.setdefault(point.arm, []).append(point)
    own = max(map(len, rungs.values()), default=0) >= RUNGS_ALONE
    needed = RUNGS_ALONE if own else RUNGS_SHARED
    enough = {arm: sorted(of_arm, key=lambda one: one.size) for arm, of_arm in rungs.items() if len(of_arm) >= needed}
    what = "for a floor, an amplitude and an exponent" if own else "even where arms share the floor and the exponent"
    problems = [
        f"{arm}: no law of {len(of_arm)} rung(s) with losses; {needed} are needed {what}"
        for arm, of_arm in rungs.items()
        if arm not in enough
    ]
    if not own and len(enough) == 1:
        problems.append(f"{next(iter(enough))}: no law; with fewer than {RUNGS_ALONE} rungs two arms have to share")
    if not enough or (not own and len(enough) == 1):
        return LadderLaws(None, (), (), (), tuple(problems))
    if any(len(one.losses_nats) < 2 for of_arm in enough.values() for one in of_arm):
        problems.append("a rung with a single trial leaves nothing to resample: its arm's numbers have no interval")
    reference = math.exp(fmean(math.log(one.size) for of_arm in enough.values() for one in of_arm))
    groups = [(arm,) for arm in enough] if own else [tuple(enough)]
    pool = TrunkPool.of(enough)
    if pool is not None:
        problems.append(
            "losses of one trunk are not independent: intervals come from resampling whole trunks of all arms"
        )
    fits = {arm: fit for group in groups for fit in [_fit(group, enough, reference, resamples, pool)] for arm in group}
    laws = tuple(_law(arm, fits[arm], enough[arm], reference) for arm in enough)
    problems += [f"{law.arm}: the exponent ran to the end of what is allowed" for law in laws if _at_an_end(law)]
    left_out: list[LeftOut] = []
    if min(map(len, enough.values())) > RUNGS_SHARED:
        left_out = [one for group in groups for one in _leave_largest_out(group, enough, reference, resamples, pool)]
    else:
        problems.append(f"no check against the largest rung: without it fewer than {RUNGS_SHARED} would be left")
    missed = {one.arm: one for one in left_out if one.is_beyond(NOTED_MISS)}
    problems += [f"{arm}: {_missed(one)}; its law and what follows from it may not hold" for arm, one in missed.items()]
    speed_ups: list[SpeedUp] = []
    if baseline in enough:
        for arm in (arm for arm in enough if arm != baseline):
            bad = next(
                (one for one in (missed.get(baseline), missed.get(arm)) if one and one.is_beyond(LARGE_MISS)), None
            )
            if bad is None:
                speed_ups.append(_speed_up(arm, baseline, fits, enough, reference))
            else:
                speed_ups.append(SpeedUp(arm, enough[arm][-1].size, None, f"of {bad.arm} {_missed(bad)}"))
    return LadderLaws("own" if own else "shared", laws, tuple(left_out), tuple(speed_ups), tuple(problems))


def _missed(one: LeftOut) -> str:
    return f"the largest rung lies {one.sds:+.1f} SD off what the others foretell"


def _at_an_end(law: ScalingLaw) -> bool:
    from orchestrator.scaling.power_law import EXPONENTS

    return not EXPONENTS[0] * 1.01 < law.exponent.value < EXPONENTS[1] * 0.99


def _fit(
    arms: tuple[str, ...],
    rungs: Mapping[str, Sequence[RungLosses]],
    reference: float,
    resamples: int,
    trunks: TrunkPool | None,
) -> _Fit:
    """Resampled unless some rung has one trial only."""
    import numpy as np

    from orchestrator.scaling.power_law import SMALLEST_DELTA, fit_many

    cells = [(index, one) for index, arm in enumerate(arms) for one in rungs[arm]]
    resamples *= all(len(one.losses_nats) > 1 for _, one in cells)
    if trunks is None:
        sets = _drawn_one_by_one([one for _, one in cells], resamples)
    else:
        sets = trunks.drawn(arms, rungs, resamples)
    sizes = np.array([math.log(one.size / reference) for _, one in cells for _ in one.losses_nats])
    index_of = np.array([index for index, one in cells for _ in one.losses_nats])
    degrees = sum(len(one.losses_nats) - 1 for _, one in cells)
    squares = sum((math.log(loss / fmean(one.losses_nats))) ** 2 for _, one in cells for loss in one.losses_nats)
    delta = max(SMALLEST_DELTA, 1.345 * math.sqrt(squares / degrees)) if degrees else SMALLEST_DELTA
    parameters = fit_many(sizes, index_of, sets, delta)
    return _Fit(arms, parameters, degrees if trunks is None else math.inf)


def _drawn_one_by_one(cells: Sequence[RungLosses], resamples: int) -> Array:
    """(1 + resamples, losses), in the order of rungs and trials; the first row is what was measured. The deviations
    from each rung's mean, widened by sqrt(n / (n - 1)), are one pool for all."""
    import numpy as np

    sets = np.tile([loss for one in cells for loss in one.losses_nats], (1 + resamples, 1))
    if not resamples:
        return sets
    random = np.random.default_rng(0)
    pool = np.array(
        [
            (loss - fmean(one.losses_nats)) * math.sqrt(len(one.losses_nats) / (len(one.losses_nats) - 1))
            for one in cells
            for loss in one.losses_nats
        ]
    )
    first = 0
    for one in cells:
        number = len(one.losses_nats)
        drawn = random.choice(pool, size=(resamples, number))
        sets[1:, first : first + number] = np.mean(one.losses_nats) + drawn
        first += number
    return sets


def _estimate(values: Array, degrees: float) -> Estimate:
    import numpy as np
    from scipy.stats import norm, t

    if len(values) == 1:
        return Estimate(float(values[0]))
    tail = float(norm.cdf(-t.ppf(0.975, degrees)))
    low, high = np.quantile(values[1:], [tail, 1.0 - tail], method="closest_observation")
    return Estimate(float(values[0]), float(low), float(high) if math.isfinite(high) else None)


def _law(arm: str, fit: _Fit, rungs: Sequence[RungLosses], reference: float) -> ScalingLaw:
    floor, amplitude, exponent = (_estimate(values, fit.degrees) for values in fit.of(arm))
    return ScalingLaw(
        arm, floor, amplitude, exponent, reference, len(rungs), sum(len(one.losses_nats) for one in rungs)
    )


def _leave_largest_out(
    arms: tuple[str, ...],
    rungs: Mapping[str, Sequence[RungLosses]],
    reference: float,
    resamples: int,
    trunks: TrunkPool | None,
) -> list[LeftOut]:
    """All the arms lose their largest rung at once: a shared floor that saw another arm's would know too much."""
    fit = _fit(arms, {arm: rungs[arm][:-1] for arm in arms}, reference, resamples, trunks)
    several = [one.losses_nats for arm in arms for one in rungs[arm] if len(one.losses_nats) > 1]
    degrees = sum(len(losses) - 1 for losses in several)
    pooled = sum((len(losses) - 1) * variance(losses) for losses in several) / degrees if degrees else 0.0
    found = []
    for arm in arms:
        last = rungs[arm][-1]
        floor, amplitude, exponent = fit.of(arm)
        predicted = floor + amplitude * (last.size / reference) ** -exponent
        mean, sds = fmean(last.losses_nats), None
        if len(predicted) > 1 and len(last.losses_nats) > 1:
            spread = predicted[1:].var() + pooled / len(last.losses_nats)
            sds = float((mean - predicted[0]) / math.sqrt(spread)) if spread > 0.0 else None
        found.append(LeftOut(arm, last.size, mean, float(predicted[0]), sds, degrees))
    return found


def _speed_up(
    arm: str, baseline: str, fits: Mapping[str, _Fit], rungs: Mapping[str, Sequence[RungLosses]], reference: float
) -> SpeedUp:
    """At the arm's largest rung. Ends of the interval beyond what the baseline's law is believed for are open."""
    import numpy as np

    size = rungs[arm][-1].size
    floor, amplitude, exponent = fits[arm].of(arm)
    base_floor, base_amplitude, base_exponent = fits[baseline].of(baseline)
    number = min(len(floor), len(base_floor))
    above = (floor + amplitude * (size / reference) ** -exponent)[:number] - base_floor[:number]
    with np.errstate(divide="ignore", invalid="ignore", over="ignore"):
        log_needed = -np.log(np.where(above > 0.0, above, 0.0) / base_amplitude[:number]) / base_exponent[:number]
        ratios = np.exp(log_needed) * reference / size
    smallest = rungs[baseline][0].size / EXTRAPOLATION / size
    largest = rungs[baseline][-1].size * EXTRAPOLATION / size
    if not smallest <= ratios[0] <= largest:
        where = "below the baseline's floor" if not math.isfinite(ratios[0]) else f"{ratios[0]:.3g} times the size"
        return SpeedUp(arm, size, None, f"{where}: more than {EXTRAPOLATION:g} times beyond the baseline's rungs")
    whole = _estimate(ratios, min(fits[arm].degrees, fits[baseline].degrees))
    low = whole.low if whole.low is not None and whole.low >= smallest else None
    high = whole.high if whole.high is not None and whole.high <= largest else None
    return SpeedUp(arm, size, Estimate(whole.value, low, high))
