"""Resampling whole trunks: what losses of one trunk have in common is drawn together. Pure.

A trunk's trials on several rungs (decay branches) share all of their training but their decays, so what the seed did to
one it did to the others. Drawn one by one their deviations would average out along the ladder, and the intervals would
be too narrow. So whole trunks are drawn: each gets a sum of the deviations of all, with factors from a normal
distribution (the wild cluster bootstrap: Cameron, Gelbach and Miller, Review of Economics and Statistics 90, 2008).

The surprise: no trunk is drawn as it is. An arm has two or three, all arms a handful: means of so few different
draws are few, and their percentiles covered 75 % on two seeds.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean
from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    from orchestrator.scaling.power_law import Array


class Rung(Protocol):
    @property
    def losses_nats(self) -> tuple[float, ...]: ...
    @property
    def trunks(self) -> tuple[str, ...]: ...


@dataclass(frozen=True)
class _Trunk:
    deviations: dict[int, float]
    """By rung, from 0: of its loss from the rung's mean, widened by sqrt(n / (n - 1))."""


@dataclass(frozen=True)
class TrunkPool:
    """The trunks of all arms. ``degrees``: of freedom, one for each trunk beyond the first of its arm and rungs."""

    by_arm: dict[str, dict[str, _Trunk]]
    degrees: int

    @classmethod
    def of(cls, rungs: Mapping[str, Sequence[Rung]]) -> TrunkPool | None:
        """None where no two losses of an arm share a trunk. ``rungs``: by arm, from small to large."""
        found: dict[str, dict[str, _Trunk]] = {}
        for arm, of_arm in rungs.items():
            trunks = found.setdefault(arm, {})
            for number, rung in enumerate(of_arm):
                count, mean = len(rung.losses_nats), fmean(rung.losses_nats)
                wider = math.sqrt(count / (count - 1)) if count > 1 else 0.0
                for name, loss in zip(_names(number, rung), rung.losses_nats, strict=True):
                    trunks.setdefault(name, _Trunk({})).deviations[number] = (loss - mean) * wider
        every = [(arm, tuple(one.deviations)) for arm, trunks in found.items() for one in trunks.values()]
        if all(len(rungs_of) < 2 for _, rungs_of in every):
            return None
        return cls(found, len(every) - len(set(every)))

    def drawn(self, arms: Sequence[str], rungs: Mapping[str, Sequence[Rung]], resamples: int) -> Array:
        """(1 + resamples, losses), in the order of arms, rungs and trials; the first row is what was measured.

        Wider than the noise by Student's t over the normal, so that plain percentiles are the interval.
        """
        import numpy as np
        from scipy.stats import norm, t

        # Arms that are fitted one by one draw from one pool: by the same numbers their noise would be the same.
        random = np.random.default_rng([*self.by_arm].index(arms[0]))
        wider = float(t.ppf(0.975, max(1, self.degrees)) / norm.ppf(0.975))
        keys = [
            (arm, number, name)
            for arm in arms
            for number, rung in enumerate(rungs[arm])
            for name in _names(number, rung)
        ]
        places = {key: at for at, key in enumerate(keys)}
        cells = [rung for arm in arms for rung in rungs[arm]]
        means = np.array([fmean(rung.losses_nats) for rung in cells for _ in rung.losses_nats])
        sets = np.repeat(means[None], 1 + resamples, axis=0)
        sets[0] = [loss for rung in cells for loss in rung.losses_nats]
        for arm in arms:
            for name, trunk in self.by_arm[arm].items():
                numbers = [number for number in trunk.deviations if number < len(rungs[arm])]
                pool = self._having(numbers)
                at = [places[arm, number, name] for number in numbers]
                factors = random.standard_normal((resamples, len(pool))) * wider / math.sqrt(len(pool))
                sets[1:, at] += factors @ pool
        return sets

    def _having(self, numbers: Sequence[int]) -> Array:
        """(trunks, rungs): the deviations of those that have all these rungs, the trunk that asks among them."""
        import numpy as np

        every = [one for trunks in self.by_arm.values() for one in trunks.values()]
        having = [[one.deviations[n] for n in numbers] for one in every if one.deviations.keys() >= set(numbers)]
        return np.array(having)


def _names(number: int, rung: Rung) -> tuple[str, ...]:
    """Of each trial's trunk; where none are named, each is its own."""
    return rung.trunks or tuple(f"{number}/{trial}" for trial in range(len(rung.losses_nats)))
