"""The next learning rate of an arm: an Optuna study an arm, and a sampler that follows a parabola in log LR.

The loss over log LR is nearly a parabola around its minimum, so three rates around the best one say where to look next
(successive parabolic interpolation, as in Brent, Algorithms for Minimization without Derivatives, 1973, ch. 5).
Optuna's own TPE knows no shape, and half a dozen trials are too few to learn one: over three decades it ended more than
twice as far above the minimum as a plain grid of six, which the parabola beats. Its GP sampler needs torch, which the
driver does not load.

A suggestion is a function of what is told and draws nothing: the study is made anew for every question, from the losses
that the store holds, so a restarted controller suggests the same. The surprise: a rate at which a seed diverged is told
as worse than all others by a nat, not left out; it says how far not to go.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from typing import Any

import optuna
from optuna.distributions import BaseDistribution, FloatDistribution
from optuna.trial import FrozenTrial, TrialState

from orchestrator.sweep import SearchedRates, rounded_rate

SEARCH_VERSION = "parabola-1"
"""Raised whenever a change alters a suggestion."""

DIVERGED_ABOVE_NATS = 1.0
NEAREST = 0.15
"""A step shorter than this share of the way to the nearer neighbour tells nothing new: the wider side is halved."""
MARGIN = 0.05
"""Neighbours are kept at a distance of this share of the way to them."""


def suggest_rate(rates: SearchedRates, told: Sequence[tuple[float, float | None]]) -> float:
    """``told``: every rate so far with its mean loss in nats, None where it diverged; at least one.

    Of three digits, within the range, and none of those told.
    """
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    low, high = rates.search
    space: dict[str, BaseDistribution] = {"lr": FloatDistribution(low, high, log=True)}
    finite = [loss for _, loss in told if loss is not None and math.isfinite(loss)]
    worst = max(finite, default=0.0) + DIVERGED_ABOVE_NATS
    study = optuna.create_study(sampler=ParabolaSampler(), storage=optuna.storages.InMemoryStorage())
    for lr, loss in told:
        value = loss if loss is not None and math.isfinite(loss) else worst
        study.add_trial(optuna.trial.create_trial(params={"lr": lr}, distributions=space, value=value))
    lr = min(max(rounded_rate(study.ask(space).params["lr"]), low), high)
    known = [rate for rate, _ in told]
    return lr if lr not in known else _widest_gap(low, high, known)


class ParabolaSampler(optuna.samplers.BaseSampler):
    """Of one logarithmic float: the vertex of the parabola through the best trial and its neighbours; beyond the
    outermost trial, when that is the best, the middle between it and the end of the range."""

    def infer_relative_search_space(self, study: optuna.study.Study, trial: FrozenTrial) -> dict[str, BaseDistribution]:
        return {}

    def sample_relative(
        self, study: optuna.study.Study, trial: FrozenTrial, search_space: dict[str, BaseDistribution]
    ) -> dict[str, Any]:
        return {}

    def sample_independent(
        self, study: optuna.study.Study, trial: FrozenTrial, param_name: str, param_distribution: BaseDistribution
    ) -> float:
        if not (isinstance(param_distribution, FloatDistribution) and param_distribution.log):
            raise ValueError(f"{param_name} has the distribution {param_distribution}; allowed: a logarithmic float")
        told = study.get_trials(deepcopy=False, states=(TrialState.COMPLETE,))
        points = sorted((math.log(one.params[param_name]), one.value) for one in told if one.value is not None)
        if not points:
            return math.sqrt(param_distribution.low * param_distribution.high)
        return math.exp(_next(points, math.log(param_distribution.low), math.log(param_distribution.high)))


def _next(points: Sequence[tuple[float, float]], low: float, high: float) -> float:
    """In log LR; ``points`` ascend."""
    best = min(range(len(points)), key=lambda index: points[index][1])
    x = points[best][0]
    is_inside = 0 < best < len(points) - 1
    below = points[best - 1][0] if best else low
    above = points[best + 1][0] if best + 1 < len(points) else high
    if is_inside:
        at = _vertex(points[best - 1], points[best], points[best + 1])
    else:
        at = (below + x) / 2 if best == 0 else (x + above) / 2
    if is_inside and abs(at - x) < NEAREST * min(x - below, above - x):
        at = (x + below) / 2 if x - below > above - x else (x + above) / 2
    return min(max(at, below + MARGIN * (x - below)), above - MARGIN * (above - x))


def _vertex(a: tuple[float, float], b: tuple[float, float], c: tuple[float, float]) -> float:
    """Of the parabola through three points, of which ``b`` is the lowest; ``b`` itself where all are as low."""
    left, right = (b[0] - a[0]) * (b[1] - c[1]), (b[0] - c[0]) * (b[1] - a[1])
    if left == right:
        return b[0]
    return b[0] - 0.5 * ((b[0] - a[0]) * left - (b[0] - c[0]) * right) / (left - right)


def _widest_gap(low: float, high: float, known: Sequence[float]) -> float:
    """Where rounding gives a known rate again: the middle of the widest gap in log LR."""
    places = sorted({low, high, *known})
    below, above = max(itertools.pairwise(places), key=lambda pair: pair[1] / pair[0])
    return rounded_rate(math.sqrt(below * above))
