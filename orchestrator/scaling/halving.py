"""Which learning rates of an arm are stopped for their rank, and how far each trial may train until that is known.

Pure: curves in (rates x seeds x rungs), decisions out. A *rung* is a share of the schedule. At each one the rates of
one arm are ranked by their mean loss over the deciding seeds, the same for all of them, and one in ``reduction`` is
kept (successive halving: Jamieson and Talwalkar, AISTATS 2016). What goes is a whole rate with all its seeds; arms are
never compared, a seed never stopped alone.

The surprise: it waits. A rung is decided when every rate of the arm has come to it or has ended, and who is there first
is paused. Deciding among those who happen to be there (ASHA) serves pools of hundreds; an arm has four to eight rates,
of which the first to arrive would always be promoted. And waiting costs nothing here, as gangs turn to other arms. The
seeds that do not decide begin when the last rung is past: so most of the grid is never begun.

``hyperband`` (Li et al., JMLR 18, 2018) deals the rates of an arm out to brackets, of which each skips one rung more;
the last one is not judged at all. Halving runs within a bracket.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from enum import Enum
from functools import cached_property
from statistics import fmean
from typing import Literal

from orchestrator.store import RankDecision
from orchestrator.sweep import RankConfig, arm_key

HALVING_VERSION = "halving-1"
"""Raised whenever a change alters a decision."""

_HOLES = ("FAILED", "CANCELED", "PRUNED")


@dataclass(frozen=True)
class RankedTrial:
    """A trial of the selection. ``losses_nats``: one a rung; None before it is reached, inf where it is not finite."""

    fingerprint: str
    arm: str
    axes: Mapping[str, object]
    """But the learning rate: rates are compared within an arm and one value of each."""
    lr: float
    seed: int
    state: str
    losses_nats: tuple[float | None, ...]

    @cached_property
    def group(self) -> str:
        return arm_key(self.arm, self.axes)


class _No(Enum):
    YET = "a deciding seed has not come there"
    MEAN = "a deciding seed failed, was canceled or is not there"


Standing = float | _No
"""A rate at a rung: its mean loss in nats, inf when a deciding seed diverged, or why there is none."""


class RankPolicy:
    """``decide`` and ``goals`` are functions of what they are given: the same curves give the same answers."""

    def __init__(self, config: RankConfig, seeds: Sequence[int]) -> None:
        """``seeds`` are those of the selection, in the order of the sweep: the first ones decide."""
        self.config, self.rungs = config, config.rungs
        self._deciding = [tuple(seeds[: config.seeds_at(rung)]) for rung in range(len(self.rungs))]

    def decide(self, trials: Sequence[RankedTrial], decided: Sequence[RankDecision] = ()) -> list[RankDecision]:
        """What is to be stopped now and was not before; at most one rung an arm, so call again until there is none.

        ``decided`` are the earlier answers. A decision holds whatever comes later; rates that join the grid are ranked
        among those that are left.
        """
        found = []
        dropped = _by_group(decided, "dropped")
        for group, of_arm in self._arms(trials).items():
            gone = dropped.get(group, set())
            for bracket in self._brackets(of_arm):
                decision = self._decide(of_arm, bracket, gone)
                if decision is not None:
                    found.append(decision)
        return found

    def goals(self, trials: Sequence[RankedTrial], decided: Sequence[RankDecision] = ()) -> dict[str, float | None]:
        """By fingerprint, the share of the schedule that a trial may train to now: 0 it waits, 1 to its end, None: it
        is stopped. ``decided`` holds all that ``decide`` answers."""
        goals: dict[str, float | None] = {}
        dropped, finished = _by_group(decided, "dropped"), _by_group(decided, "audited")
        for group, of_arm in self._arms(trials).items():
            gone, audited = dropped.get(group, set()), finished.get(group, set())
            for bracket in self._brackets(of_arm):
                for lr in bracket.rates:
                    of_rate = [trial for trial in of_arm if trial.lr == lr]
                    if lr in gone:
                        goals |= dict.fromkeys((one.fingerprint for one in of_rate), 1.0 if lr in audited else None)
                        continue
                    rung = self._next_rung(of_arm, bracket, lr, gone)
                    for trial in of_rate:
                        decides = rung is not None and trial.seed in self._deciding[rung]
                        goals[trial.fingerprint] = 1.0 if rung is None else self.rungs[rung] if decides else 0.0
        return goals

    def _arms(self, trials: Sequence[RankedTrial]) -> dict[str, list[RankedTrial]]:
        arms: dict[str, list[RankedTrial]] = {}
        for trial in trials:
            arms.setdefault(trial.group, []).append(trial)
        return arms

    def _brackets(self, of_arm: Sequence[RankedTrial]) -> list[_Bracket]:
        rates = sorted({trial.lr for trial in of_arm})
        if self.config.method == "halving":
            return [_Bracket(0, tuple(rates))]
        drawn = sorted(rates, key=lambda lr: _drawn(f"bracket:{of_arm[0].group}:{lr!r}"))
        sizes = _bracket_sizes(len(self.rungs), self.config.reduction, len(rates))
        brackets = []
        for first, size in enumerate(sizes):
            brackets.append(_Bracket(first, tuple(sorted(drawn[:size]))))
            drawn = drawn[size:]
        return brackets

    def _keep(self, bracket: _Bracket, rung: int) -> int:
        divisor: int = self.config.reduction ** (rung - bracket.first + 1)
        return max(1, math.ceil(len(bracket.rates) / divisor))

    def _standings(
        self, of_arm: Sequence[RankedTrial], bracket: _Bracket, rung: int, gone: set[float]
    ) -> dict[float, Standing]:
        """Of the rates that are still there, but those with a hole, which are not judged."""
        found = {lr: self._standing(of_arm, lr, rung) for lr in bracket.rates if lr not in gone}
        return {lr: standing for lr, standing in found.items() if standing is not _No.MEAN}

    def _standing(self, of_arm: Sequence[RankedTrial], lr: float, rung: int) -> Standing:
        cell = {trial.seed: trial for trial in of_arm if trial.lr == lr}
        deciding = [cell.get(seed) for seed in self._deciding[rung]]
        trials = [trial for trial in deciding if trial is not None]
        losses = [trial.losses_nats[rung] for trial in trials]
        if len(trials) < len(deciding) or any(trial.state in _HOLES for trial in trials):
            return _No.MEAN
        if any(trial.state == "COMPLETE" and loss is None for trial, loss in zip(trials, losses, strict=True)):
            return _No.MEAN
        if any(trial.state == "DIVERGED" or loss == math.inf for trial, loss in zip(trials, losses, strict=True)):
            return math.inf
        known = [loss for loss in losses if loss is not None]
        return fmean(known) if len(known) == len(losses) else _No.YET

    def _next_rung(self, of_arm: Sequence[RankedTrial], bracket: _Bracket, lr: float, gone: set[float]) -> int | None:
        """The first rung that may still stop this rate."""
        for rung in range(bracket.first, len(self.rungs)):
            standings = self._standings(of_arm, bracket, rung, gone)
            if lr not in standings:
                return None
            if self._may_drop(standings, bracket, rung) and (
                _No.YET in standings.values() or self._losers(standings, bracket, rung)
            ):
                return rung
        return None

    def _may_drop(self, standings: Mapping[float, Standing], bracket: _Bracket, rung: int) -> bool:
        return len(standings) > self._keep(bracket, rung) or math.inf in standings.values()

    def _losers(self, standings: Mapping[float, Standing], bracket: _Bracket, rung: int) -> list[float]:
        """Of rates that are all there: those that rank too low, and what diverged unless all did."""
        losses = {lr: loss for lr, loss in standings.items() if isinstance(loss, float)}
        finite = sorted((loss, lr) for lr, loss in losses.items() if math.isfinite(loss))
        if not finite:
            return []
        keep = min(self._keep(bracket, rung), len(finite))
        limit = finite[keep - 1][0] + self.config.margin
        return sorted(lr for lr, loss in losses.items() if (loss, lr) not in finite[:keep] and loss > limit)

    def _decide(self, of_arm: Sequence[RankedTrial], bracket: _Bracket, gone: set[float]) -> RankDecision | None:
        for rung in range(bracket.first, len(self.rungs)):
            standings = self._standings(of_arm, bracket, rung, gone)
            if not self._may_drop(standings, bracket, rung):
                continue
            if _No.YET in standings.values():
                return None
            losers = self._losers(standings, bracket, rung)
            if losers:
                losses = {lr: loss for lr, loss in standings.items() if isinstance(loss, float)}
                return RankDecision(
                    arm=of_arm[0].arm,
                    axes=dict(of_arm[0].axes),
                    fraction=self.rungs[rung],
                    seeds=self._deciding[rung],
                    losses_nats={lr: loss if math.isfinite(loss) else None for lr, loss in losses.items()},
                    dropped=tuple(losers),
                    audited=tuple(lr for lr in losers if math.isfinite(losses[lr]) and self._audits(of_arm[0], lr)),
                    formula=HALVING_VERSION,
                )
        return None

    def _audits(self, trial: RankedTrial, lr: float) -> bool:
        """Drawn for the rate before its curve is known, by the seed alone. What diverged has nothing to audit."""
        return _drawn(f"audit:{self.config.audit_seed}:{trial.group}:{lr!r}") < self.config.audit_share


@dataclass(frozen=True)
class _Bracket:
    first: int
    """The first rung that judges it; as many as there are rungs: none does."""
    rates: tuple[float, ...]


def _bracket_sizes(num_rungs: int, reduction: int, num_rates: int) -> list[int]:
    """Rates dealt out in Hyperband's shares (its line 3: n = ceil((smax + 1) / (s + 1) x eta^s)), largest remainders
    first; of equal ones the earlier bracket's."""
    weights = [math.ceil((num_rungs + 1) / (s + 1) * reduction**s) for s in range(num_rungs, -1, -1)]
    exact = [num_rates * weight / sum(weights) for weight in weights]
    sizes = [math.floor(share) for share in exact]
    by_remainder = sorted(range(len(sizes)), key=lambda index: (sizes[index] - exact[index], index))
    for index in by_remainder[: num_rates - sum(sizes)]:
        sizes[index] += 1
    return sizes


def _by_group(decided: Iterable[RankDecision], which: Literal["dropped", "audited"]) -> dict[str, set[float]]:
    rates: dict[str, set[float]] = {}
    for one in decided:
        rates.setdefault(arm_key(one.arm, one.axes), set()).update(getattr(one, which))
    return rates


def _drawn(text: str) -> float:
    """Even in [0, 1), by hash: what joins a grid leaves the draws of the others as they are."""
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8]) / 2.0**64
