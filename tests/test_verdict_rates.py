"""Error rates, coverage and power by simulation of normal noise. Each test states its Monte-Carlo error.

Dunnett's critical value hangs on the design alone, so the simulations take it from one ``compare`` and are vectorised;
Welch's hangs on the data, so there ``compare`` itself is repeated.
"""

import math

import numpy as np
import pytest
from scipy import stats

from orchestrator.verdict import Design, Looks, Sample, compare, level_of_look, more_seeds, noise_floor, spent

MARGIN = 0.01


def critical(num_arms, num_seeds, num_control, looks=None, alpha=0.05):
    """What ``compare`` multiplies the standard error with, in this design."""
    rng = np.random.default_rng(0)
    given = [Sample("baseline", tuple(rng.normal(size=num_control)))]
    given += [Sample(f"arm{i}", tuple(rng.normal(size=num_seeds))) for i in range(num_arms)]
    comparison = compare(given, "baseline", None, alpha, Design(looks=looks or Looks()))
    verdict = comparison.verdicts[1]
    error = comparison.noise_floor.sd_nats * math.sqrt(1 / num_seeds + 1 / num_control)
    assert verdict.high_nats - verdict.low_nats == pytest.approx(2 * comparison.critical_value * error)
    return comparison.critical_value


def simulated(rng, repetitions, num_arms, num_seeds, num_control, arms=None, baseline=None):
    """Differences and standard errors of ``repetitions`` families: [R, K] and [R, 1]."""
    arms = rng.normal(size=(repetitions, num_arms, num_seeds)) if arms is None else arms
    baseline = rng.normal(size=(repetitions, num_control)) if baseline is None else baseline
    squares = ((arms - arms.mean(2, keepdims=True)) ** 2).sum((1, 2))
    squares += ((baseline - baseline.mean(1, keepdims=True)) ** 2).sum(1)
    degrees = num_arms * (num_seeds - 1) + num_control - 1
    error = np.sqrt(squares / degrees * (1 / num_seeds + 1 / num_control))
    return arms.mean(2) - baseline.mean(1, keepdims=True), error[:, None]


@pytest.mark.parametrize("num_arms", [1, 3, 8])
@pytest.mark.parametrize("num_seeds", [2, 3, 5, 8])
def test_the_intervals_of_a_family_cover_at_the_declared_rate(num_arms, num_seeds):
    """40,000 families, with the baseline's default share of seeds: 95 % with a standard error of 0.11 points. Five of
    those about 95 lie well within the 94 to 99 that are asked for."""
    num_control = round(math.sqrt(num_arms) * num_seeds)
    delta, error = simulated(np.random.default_rng(1), 40_000, num_arms, num_seeds, num_control)
    covered = np.mean((np.abs(delta) <= critical(num_arms, num_seeds, num_control) * error).all(1))
    assert covered == pytest.approx(0.95, abs=0.0055)


@pytest.mark.parametrize(
    ("sizes", "num_arms"),
    [
        ((3, 6), 3),
        ((2, 3), 1),
        ((2, 4), 10),
        ((2, 3, 4, 5), 3),
        ((2, 3, 4), 1),
        (tuple(range(3, 11)), 1),
        ((3, 5, 8), 5),
    ],
)
def test_over_all_declared_looks_and_arms_the_error_is_at_most_alpha(sizes, num_arms):
    """60,000 families, each looked at with more and more seeds: a standard error of 0.09 points, of which two are
    allowed above 5 %. Looking as often with no spending errs far more."""
    rng = np.random.default_rng(2)
    repetitions, last = 60_000, sizes[-1]
    share = math.sqrt(num_arms)
    arms = rng.normal(size=(repetitions, num_arms, last))
    baseline = rng.normal(size=(repetitions, round(share * last)))
    wrong, careless = np.zeros(repetitions, bool), np.zeros(repetitions, bool)
    looks = Looks(declared=len(sizes))
    for size in sizes:
        control = round(share * size)
        delta, error = simulated(rng, repetitions, num_arms, size, control, arms[:, :, :size], baseline[:, :control])
        largest = (np.abs(delta) / error).max(1)
        wrong |= largest > critical(num_arms, size, control, looks)
        careless |= largest > critical(num_arms, size, control)
        looks = looks.after(size, control)
    assert 0.042 < np.mean(wrong) <= 0.0518
    assert np.mean(careless) > 0.065


def test_the_spending_function_and_its_boundary_are_the_published_ones():
    """Lan and DeMets 1983; boundaries at five equal looks as tabulated (Jennison and Turnbull 2000, table 7.6, in
    which alpha is two one-sided halves, spent apart: at these levels the same to two digits from the second look on).
    """
    assert [spent(0.05, k, 5) for k in (1, 3, 5)] == pytest.approx([1.17e-5, 0.0114, 0.05], rel=0.01)
    assert spent(0.05, 3, 3) == pytest.approx(0.05)
    looks, found = Looks(declared=5), []
    for size in (100_000, 200_000, 300_000, 400_000, 500_000):  # no small-sample correction to speak of
        found.append(stats.norm.isf(level_of_look(0.05 / 0.98, looks, size, size, 1) / 2))
        looks = looks.after(size, size)
    assert found == pytest.approx([4.38, 3.10, 2.55, 2.25, 2.06], abs=0.011)


def test_one_look_costs_nothing_and_a_look_too_many_gets_no_more_alpha():
    assert level_of_look(0.05, Looks(), 3, 3, 1) == 0.05
    late = Looks(declared=2, earlier=((2, 2), (3, 3)))
    assert late.too_many
    assert level_of_look(0.05, late, 4, 4, 1) == 0.05
    assert level_of_look(0.05, Looks(declared=2, earlier=((4, 4),)), 3, 3, 1) < 0.05  # fewer seeds than before


def test_the_power_is_the_one_that_the_noncentral_t_computes():
    """40,000 repetitions: a standard error of at most 0.25 points."""
    for num_seeds, effect in ((3, 2.0), (5, 1.5), (8, 1.5)):
        degrees, distance = 2 * (num_seeds - 1), effect / math.sqrt(2 / num_seeds)
        value = critical(1, num_seeds, num_seeds)
        computed = stats.nct.sf(value, degrees, distance)
        delta, error = simulated(np.random.default_rng(3), 40_000, 1, num_seeds, num_seeds)
        assert np.mean(delta - effect < -value * error) == pytest.approx(computed, abs=0.01)


@pytest.mark.parametrize(("num_arms", "num_seeds"), [(1, 3), (3, 3), (3, 5)])
def test_at_a_true_effect_of_the_margin_equivalence_is_claimed_in_at_most_one_of_twenty(num_arms, num_seeds):
    """20,000 families at the margin on which a claim is likeliest, as the noise is small: a standard error of 0.15."""
    value = critical(num_arms, num_seeds, num_seeds)
    delta, error = simulated(np.random.default_rng(4), 20_000, num_arms, num_seeds, num_seeds)
    for sd in (0.1, 0.3, 1.0):  # of the margin
        inside = (np.abs(sd * delta + 1.0) + value * sd * error < 1.0).any(1)
        assert np.mean(inside) <= 0.05


def test_with_the_seeds_that_were_asked_for_equal_arms_are_mostly_resolved():
    """As often as the SD is under its limit, which is at 80 % (and rounding up to whole seeds adds to it).

    2,000 pilots of 3 seeds: a standard error of 0.9 points.
    """
    rng, resolved = np.random.default_rng(5), []
    for _ in range(2_000):
        pilot = [Sample("baseline", tuple(rng.normal(size=3))), Sample("arm", tuple(rng.normal(size=3)))]
        total = 3 + more_seeds(noise_floor(pilot), 1, 1.0, 0.05, 3)
        half = stats.t.isf(0.025, 2 * (total - 1)) * math.sqrt(2 / total)  # at the true SD of 1
        resolved.append(half <= 1.0)
    assert 0.78 <= np.mean(resolved) <= 0.90


def rate(method, sds, num_seeds, repetitions, seed=6, paired=False, shared=0.0):
    """Share of families in which an arm is called better or worse without being so."""
    rng, wrong = np.random.default_rng(seed), 0
    seeds = tuple(range(num_seeds))
    for _ in range(repetitions):
        of_seed = rng.normal(size=num_seeds) * shared
        groups = [of_seed + rng.normal(size=num_seeds) * sd for sd in sds]
        given = [Sample(f"arm{i}", tuple(map(float, group)), seeds=seeds) for i, group in enumerate(groups)]
        verdicts = compare(given, "arm0", None, 0.05, Design(method, paired)).verdicts
        wrong += any(verdict.decision in ("better", "worse") for verdict in verdicts)
    return wrong / repetitions


def test_welch_holds_where_one_arm_is_noisier_and_pooling_does_not():
    """800 families, of which the standard error at 5 % is 0.8 points: three of them are allowed."""
    unequal = (1.0, 4.0, 1.0)
    assert rate("welch", unequal, 4, 800) <= 0.073
    assert rate("dunnett", unequal, 4, 800) > 0.075
    assert rate("auto", unequal, 8, 800) <= 0.073
    assert rate("auto", (1.0, 1.0, 1.0), 4, 800) <= 0.073


def test_pairing_errs_at_the_declared_rate_and_sees_what_the_seeds_share():
    """500 families: a standard error of 1 point."""
    for method in ("dunnett", "welch"):
        assert rate(method, (1.0, 1.0, 1.0), 4, 500, paired=True, shared=3.0) <= 0.079
    rng = np.random.default_rng(7)
    of_seed, noise = rng.normal(size=5), rng.normal(size=(2, 5)) * 0.01
    given = [Sample(name, tuple(of_seed + noise[i] + i), seeds=(1, 2, 3, 4, 5)) for i, name in enumerate("ab")]
    assert compare(given, "a", None, design=Design(paired=True)).verdicts[1].decision == "worse"
    paired, unpaired = (compare(given, "a", None, design=Design(paired=p)).verdicts[1] for p in (True, False))
    assert paired.high_nats - paired.low_nats < (unpaired.high_nats - unpaired.low_nats) / 10


def test_paired_intervals_are_those_of_students_paired_t_and_of_the_block_design():
    rng = np.random.default_rng(8)
    first, second = rng.normal(size=6), rng.normal(size=6)
    given = [Sample("a", tuple(first), seeds=tuple(range(6))), Sample("b", tuple(second), seeds=tuple(range(6)))]
    expected = stats.ttest_rel(second, first).confidence_interval(0.95)
    for method in ("dunnett", "welch"):  # of one arm the two are the same
        verdict = compare(given, "a", None, design=Design(method, True)).verdicts[1]
        assert (verdict.low_nats, verdict.high_nats) == pytest.approx((expected.low, expected.high))


def test_welch_intervals_are_scipys_with_bonferroni():
    rng = np.random.default_rng(9)
    groups = [rng.normal(size=size) * sd for size, sd in ((4, 1.0), (3, 2.0), (5, 0.5))]
    given = [Sample(name, tuple(map(float, group))) for name, group in zip("abc", groups, strict=True)]
    comparison = compare(given, "a", None, design=Design("welch"))
    for verdict, group in zip(comparison.verdicts[1:], groups[1:], strict=True):
        expected = stats.ttest_ind(group, groups[0], equal_var=False).confidence_interval(1 - 0.05 / 2)
        assert (verdict.low_nats, verdict.high_nats) == pytest.approx((expected.low, expected.high))
    assert comparison.method == "welch"


def test_a_test_of_variances_chooses_the_method_and_says_its_p():
    rng = np.random.default_rng(10)
    equal = [rng.normal(size=6) for _ in range(3)]
    for groups, method in ((equal, "dunnett"), ([equal[0], equal[1] * 30, equal[2]], "welch")):
        given = [Sample(name, tuple(map(float, group))) for name, group in zip("abc", groups, strict=True)]
        comparison = compare(given, "a", MARGIN, design=Design("auto"))
        assert (comparison.method, comparison.variances_p) == (method, pytest.approx(stats.bartlett(*groups).pvalue))
    flat = [Sample("a", (1.0, 1.0, 1.0)), Sample("b", (1.0, 2.0, 4.0))]
    assert compare(flat, "a", MARGIN, design=Design("auto")).variances_p == 0.0


def test_pairing_without_common_seeds_gives_no_interval_and_says_why():
    given = [Sample("a", (1.0, 1.1), seeds=(1, 2)), Sample("b", (1.0, 1.2), seeds=(2, 3))]
    verdict = compare(given, "a", MARGIN, design=Design(paired=True)).verdicts[1]
    assert verdict.words == "no interval: the arms have fewer than 2 seeds in common"
    with pytest.raises(ValueError, match="pairing needs the seed of every loss"):
        compare([Sample("a", (1.0, 2.0))], "a", None, design=Design(paired=True))


def test_more_seeds_asks_for_more_when_looks_are_declared_and_less_of_a_larger_baseline():
    floor = noise_floor([Sample("a", (1.0, 1.01, 1.005)), Sample("b", (1.0, 1.012, 1.004))])
    plain = more_seeds(floor, 4, MARGIN / 2, 0.05, 3)
    early = more_seeds(floor, 4, MARGIN / 2, 0.05, 3, design=Design(looks=Looks(declared=4)))
    last = more_seeds(floor, 4, MARGIN / 2, 0.05, 3, design=Design(looks=Looks(2)))
    assert plain <= last < early
    assert more_seeds(floor, 4, MARGIN / 2, 0.05, 3, num_control=6) < plain
