"""The optimum between the rates of a grid: exact on a parabola, honest about flat curves, covering as stated."""

import math

import numpy as np
import pytest

from orchestrator.scaling import CellResult, best_learning_rate, fit_optimum, pooled_variance


def arm(rates, losses, state="COMPLETE"):
    """``losses``: for every rate the losses of its seeds; None diverged."""
    results = [
        CellResult("g1", rate, seed, "DIVERGED" if loss is None else state, loss)
        for rate, of_rate in zip(rates, losses, strict=True)
        for seed, loss in enumerate(of_rate)
    ]
    return best_learning_rate("g1", results)


def parabola(rates, optimum, curvature=0.05, noise=0.0, seeds=2):
    return [[2.0 + curvature * math.log(lr / optimum) ** 2 + noise * (-1) ** s for s in range(seeds)] for lr in rates]


RATES = (1e-3, 2e-3, 4e-3, 8e-3, 16e-3)


def test_a_parabola_gives_its_own_minimum_and_width():
    found = fit_optimum(arm(RATES, parabola(RATES, 3e-3)), 1e-6, 5, margin=0.01)
    assert found.lr == pytest.approx(3e-3, rel=1e-6)
    reach = math.exp(math.sqrt(0.01 / 0.05))
    assert found.tolerance == pytest.approx((3e-3 / reach, 3e-3 * reach))
    assert found.tolerance_open == (False, False)
    assert found.low < 3e-3 < found.high


def test_the_width_stops_at_the_rates_that_were_fitted():
    found = fit_optimum(arm(RATES, parabola(RATES, 12e-3)), 1e-6, 5, margin=0.1)
    assert found.tolerance[1] == pytest.approx(16e-3)
    assert found.tolerance_open == (False, True)


@pytest.mark.parametrize("losses", [parabola(RATES[:3], 2e-3), [*parabola(RATES[:3], 2e-3), [None, 3.0]]])
def test_three_finite_rates_make_no_curve(losses):
    assert fit_optimum(arm(RATES[: len(losses)], losses), 1e-6, 5) is None


def test_a_curve_that_falls_to_both_sides_has_no_optimum():
    assert fit_optimum(arm(RATES, parabola(RATES, 4e-3, curvature=-0.05)), 1e-6, 5) is None


@pytest.mark.parametrize(("variance", "degrees"), [(1.0, 5), (1e-6, 0)])
def test_noise_above_the_curve_and_unknown_noise_bound_nothing(variance, degrees):
    found = fit_optimum(arm(RATES, parabola(RATES, 4e-3)), variance, degrees)
    assert (found.low, found.high) == (None, None)


def test_only_rates_near_the_best_are_fitted():
    rates = [1e-3 * 2**i for i in range(8)]
    losses = parabola(rates, 2e-3)
    losses[-1] = [50.0, 50.0]
    found = fit_optimum(arm(rates, losses), 1e-6, 5)
    assert found.lr == pytest.approx(2e-3, rel=1e-6)
    assert found.num_rates == 5


def test_the_noise_is_pooled_over_the_whole_cells_of_all_arms():
    noisy = arm(RATES, parabola(RATES, 4e-3, noise=0.01))
    holed = arm(RATES[:2], [[2.0, None], [2.0, 2.2]])
    variance, degrees = pooled_variance([noisy, holed])
    assert degrees == 6
    assert variance == pytest.approx((5 * 2 * 0.01**2 + 0.02) / 6)


def test_the_chance_to_diverge_has_the_interval_of_clopper_and_pearson():
    one = arm((1e-3, 1.0), [[2.0, 2.0, 2.0], [None, None, 2.0]])
    assert one.diverged_interval == pytest.approx((0.0943, 0.9916), abs=1e-4)
    assert arm((1e-3,), [[2.0, 2.0]]).diverged_interval is None


@pytest.mark.parametrize(
    ("seeds", "num_rates", "curvature", "place"),
    [(2, 4, 0.02, 0.2), (3, 5, 0.02, 0.2), (3, 8, 0.02, 0.9), (2, 5, 0.005, 0.2), (3, 8, 0.005, -1.5)],
)
def test_the_interval_holds_the_optimum_as_often_as_stated(seeds, num_rates, curvature, place):
    """1,000 arms with two others beside them: 95 % with a standard error of 0.7 points; an unbounded one, or none,
    holds it. Curves from steep ones, nearly always bounded, to ones as flat as the noise (SD 0.01 nats)."""
    rng = np.random.default_rng(5)
    x = np.arange(num_rates) * math.log(2)
    x -= x.mean()
    rates = np.exp(x)
    held = 0
    for _ in range(1000):
        means = 3.0 + curvature * (x - place) ** 2
        arms = [arm(rates, means[:, None] + rng.normal(scale=0.01, size=(num_rates, seeds))) for _ in range(3)]
        found = fit_optimum(arms[0], *pooled_variance(arms))
        below = found is None or found.low is None or math.log(found.low) <= place
        held += below and (found is None or found.high is None or place <= math.log(found.high))
    assert held / 1000 >= 0.928
