"""Intervals against independent computations and simulations; the decision at every boundary; what must not crash."""

import math
from functools import lru_cache

import numpy as np
import pytest
from scipy import stats

from orchestrator.verdict import (
    MAX_SEEDS,
    NoiseFloor,
    Sample,
    compare,
    critical_value,
    decide,
    more_seeds,
    noise_floor,
)

MARGIN = 0.01


def samples(*groups, names=None):
    """The first group is the baseline's."""
    named = names or ["baseline", *(f"arm{index}" for index in range(1, len(groups)))]
    return [Sample(name, tuple(map(float, group))) for name, group in zip(named, groups, strict=True)]


def judged(*groups, margin=MARGIN, alpha=0.05):
    return compare(samples(*groups), "baseline", margin, alpha)


# The interval


@pytest.mark.parametrize(("num_baseline", "num_arm"), [(2, 2), (3, 2), (2, 5), (8, 8)])
@pytest.mark.parametrize("alpha", [0.05, 0.01, 0.2])
def test_one_arm_has_the_classical_pooled_t_interval(num_baseline, num_arm, alpha):
    rng = np.random.default_rng(num_baseline * 10 + num_arm)
    baseline, arm = rng.normal(2.4, 0.005, num_baseline), rng.normal(2.39, 0.005, num_arm)
    expected = stats.ttest_ind(arm, baseline).confidence_interval(1 - alpha)
    verdict = judged(baseline, arm, alpha=alpha).verdicts[1]
    assert verdict.low_nats == pytest.approx(expected.low, abs=1e-9)
    assert verdict.high_nats == pytest.approx(expected.high, abs=1e-9)


@pytest.mark.parametrize(
    ("num_arms", "degrees", "published"),
    [(2, 10, 2.57), (3, 20, 2.54), (9, 20, 2.95), (4, 15, 2.73), (2, 5, 3.03), (3, 60, 2.41)],
)
def test_critical_values_are_those_of_dunnetts_table(num_arms, degrees, published):
    """Dunnett, Biometrics 20, 1964: two-sided, 5 %, equal sizes, so a correlation of one half."""
    assert critical_value(4, (4,) * num_arms, degrees, 0.05) == pytest.approx(published, abs=0.0051)


@pytest.mark.parametrize("sizes", [(2, 2), (2, 2, 2, 2), (3, 3, 3, 3), (4, 2, 3), (6, 3, 3, 3, 3)])
def test_intervals_agree_with_scipys_dunnett_within_its_own_noise(sizes):
    rng = np.random.default_rng(sum(sizes))
    groups = [rng.normal(2.4, 0.005, size) for size in sizes]
    expected = stats.dunnett(*groups[1:], control=groups[0], rng=np.random.default_rng(0)).confidence_interval(0.95)
    verdicts = judged(*groups).verdicts[1:]
    widths = expected.high - expected.low
    assert [v.low_nats for v in verdicts] == pytest.approx(list(expected.low), abs=0.01 * max(widths))
    assert [v.high_nats for v in verdicts] == pytest.approx(list(expected.high), abs=0.01 * max(widths))


@pytest.mark.parametrize(("control", "arms"), [(2, (2, 2, 2)), (4, (2, 3)), (3, (3,) * 8)])
def test_the_critical_value_is_the_quantile_of_the_largest_t_in_a_simulation(control, arms):
    """200,000 draws: the share above the critical value has a standard error of 0.0005."""
    rng = np.random.default_rng(7)
    draws, degrees = 200_000, control + sum(arms) - len(arms) - 1
    spread = np.sqrt(rng.chisquare(degrees, draws) / degrees)
    baseline = rng.normal(size=draws) / math.sqrt(control)
    largest = np.zeros(draws)
    for size in arms:
        difference = rng.normal(size=draws) / math.sqrt(size) - baseline
        largest = np.maximum(largest, np.abs(difference) / (spread * math.sqrt(1 / size + 1 / control)))
    above = np.mean(largest > critical_value(control, arms, degrees, 0.05))
    assert above == pytest.approx(0.05, abs=0.002)


@pytest.mark.parametrize("alpha", [0.2, 0.05, 1e-3, 1e-6])
@pytest.mark.parametrize("degrees", [2, 10, 400])
def test_critical_values_lie_between_students_and_bonferronis(alpha, degrees):
    values = [critical_value(3, (3,) * k, degrees, alpha) for k in (1, 2, 5, 15)]
    assert values == sorted(set(values))
    assert values[0] == pytest.approx(stats.t.isf(alpha / 2, degrees))
    assert values[-1] < stats.t.isf(alpha / 2 / 15, degrees)


def test_the_variance_is_pooled_over_all_arms_and_the_baseline():
    floor = noise_floor(samples([1.0, 1.2], [2.0, 2.1, 2.2], [5.0]))
    assert floor.degrees_of_freedom == 3
    assert floor.num_arms == 2
    assert floor.sd_nats == pytest.approx(math.sqrt((0.02 + 0.02) / 3))
    assert floor.sd_nats == pytest.approx(math.sqrt((1 * 0.02 + 2 * 0.01) / 3))


def test_differences_are_arm_minus_baseline_and_also_in_multiples_of_the_noise_floor():
    comparison = judged([2.0, 2.2], [1.9, 2.1])
    verdict = comparison.verdicts[1]
    assert verdict.delta_nats == pytest.approx(-0.1)
    assert verdict.delta_sds == pytest.approx(-0.1 / comparison.noise_floor.sd_nats)
    assert (verdict.low_nats + verdict.high_nats) / 2 == pytest.approx(-0.1)


# Error rates


def family_errors(num_seeds, repetitions, shift=0.0, margin=None):
    rng = np.random.default_rng(2024)
    decisions = []
    for _ in range(repetitions):
        groups = rng.normal(2.4, 0.005, (4, num_seeds))
        groups[1:] += shift
        decisions.append([verdict.decision for verdict in judged(*groups, margin=margin).verdicts[1:]])
    return decisions


@pytest.mark.parametrize("num_seeds", [2, 3, 5])
def test_with_no_effect_a_family_errs_at_the_declared_rate(num_seeds):
    """800 repetitions: at 5 % the standard error is 0.8 points, so 2.7 to 7.3 % is within three."""
    families = family_errors(num_seeds, 800)
    wrong = np.mean([any(decision != "inconclusive" for decision in family) for family in families])
    assert 0.027 <= wrong <= 0.073


@pytest.mark.parametrize("num_seeds", [3, 5])
def test_at_a_true_effect_of_the_margin_equivalence_is_rarely_claimed(num_seeds):
    families = family_errors(num_seeds, 400, shift=MARGIN, margin=MARGIN)
    claimed = np.mean([decision == "equivalent" for family in families for decision in family])
    assert claimed <= 0.05


def test_a_large_effect_is_found():
    families = family_errors(5, 100, shift=-0.03)
    assert np.mean([decision == "better" for family in families for decision in family]) > 0.98


# The decision


@pytest.mark.parametrize(
    ("low", "high", "decision"),
    [
        (-0.03, -0.02, "better"),
        (-0.03, -0.001, "better"),
        (-0.009, -0.001, "better, within the margin"),
        (-0.01, -0.001, "better"),  # touches the margin: not inside
        (-0.02, 0.0, "inconclusive"),  # touches 0: not below
        (-0.009, 0.0, "equivalent"),
        (-0.009, 0.009, "equivalent"),
        (0.0, 0.009, "equivalent"),
        (-0.01, 0.009, "inconclusive"),
        (-0.009, 0.01, "inconclusive"),
        (-0.02, 0.02, "inconclusive"),
        (0.0, 0.02, "inconclusive"),
        (0.001, 0.009, "worse, within the margin"),
        (0.001, 0.01, "worse"),
        (0.001, 0.03, "worse"),
        (0.02, 0.03, "worse"),
    ],
)
def test_the_decision_at_every_boundary(low, high, decision):
    assert decide(low, high, MARGIN, 3) == decision


def test_equivalence_needs_three_seeds_but_better_and_worse_do_not():
    assert decide(-0.009, 0.009, MARGIN, 2) == "inconclusive"
    assert decide(-0.009, -0.001, MARGIN, 2) == "better, within the margin"


def test_without_a_margin_nothing_is_equivalent_and_no_seeds_are_asked_for():
    assert decide(-1e-9, 1e-9, None, 50) == "inconclusive"
    assert decide(-0.002, -0.001, None, 50) == "better"
    verdict = judged([2.0, 2.2, 2.1], [2.05, 2.15, 2.1], margin=None).verdicts[1]
    assert (verdict.words, verdict.more_seeds) == ("inconclusive", None)


def test_equivalence_counts_the_seeds_of_the_smaller_side():
    many = [2.0, 2.0001, 1.9999, 2.0, 2.0001, 1.9999]
    assert judged(many, many).verdicts[1].decision == "equivalent"
    assert judged(many, many[:2]).verdicts[1].decision == "inconclusive"
    assert judged(many[:2], many).verdicts[1].decision == "inconclusive"


# More seeds


@lru_cache
def total_by_trying(sd, degrees, num_compared, margin, alpha):
    """The definition, read aloud."""
    limit = sd * math.sqrt(degrees / stats.chi2.ppf(0.2, degrees))
    for total in range(3, 2_000):
        critical = critical_value(total, (total,) * num_compared, (num_compared + 1) * (total - 1), alpha)
        if critical * limit * math.sqrt(2 / total) <= margin:
            return total
    raise AssertionError("not within 2,000")


@pytest.mark.parametrize(("sd", "margin"), [(0.005, 0.01), (0.005, 0.004), (0.002, 0.1), (0.01, 0.01)])
def test_more_seeds_is_the_smallest_number_that_resolves_the_margin(sd, margin):
    floor = NoiseFloor(sd, 4, 4)
    expected = total_by_trying(sd, 4, 3, margin, 0.05)
    assert more_seeds(floor, 3, margin, 0.05, present=2) == max(1, expected - 2)
    assert more_seeds(floor, 3, margin, 0.05, present=expected + 5) == 1


def test_more_seeds_falls_with_the_margin_and_rises_with_noise_arms_and_strictness():
    floor = NoiseFloor(0.005, 8, 4)
    by_margin = [more_seeds(floor, 3, margin, 0.05, 2) for margin in (0.003, 0.004, 0.006, 0.01, 0.02, 1.0)]
    assert by_margin == sorted(by_margin, reverse=True)
    assert by_margin[0] > by_margin[-1] == 1
    assert more_seeds(NoiseFloor(0.01, 8, 4), 3, MARGIN, 0.05, 2) > more_seeds(floor, 3, MARGIN, 0.05, 2)
    assert more_seeds(floor, 14, MARGIN, 0.05, 2) > more_seeds(floor, 1, MARGIN, 0.05, 2)
    assert more_seeds(floor, 3, MARGIN, 0.001, 2) > more_seeds(floor, 3, MARGIN, 0.2, 2)
    assert more_seeds(NoiseFloor(0.005, 2, 2), 3, MARGIN, 0.05, 2) > more_seeds(floor, 3, MARGIN, 0.05, 2)


def test_a_hopeless_margin_says_so_instead_of_searching_for_ever():
    assert more_seeds(NoiseFloor(1.0, 4, 4), 3, 1e-3, 0.05, 2) is None
    verdict = judged([2.0, 3.0], [2.1, 3.1], margin=1e-6).verdicts[1]
    assert verdict.words == f"inconclusive: over {MAX_SEEDS:,} more seeds"


def test_more_seeds_goes_by_the_margin_and_not_by_the_observed_difference():
    """The same spread with another difference: the same answer."""
    near = judged([2.0, 2.02], [2.0, 2.02]).verdicts[1]
    far = judged([2.0, 2.02], [2.01, 2.03]).verdicts[1]
    assert near.decision == far.decision == "inconclusive"
    assert near.more_seeds == far.more_seeds
    assert near.words == f"inconclusive: {near.more_seeds} more seeds"


def test_one_more_seed_is_said_in_the_singular():
    verdict = judged([2.0, 2.0001], [2.0, 2.0001]).verdicts[1]
    assert verdict.words == "inconclusive: 1 more seed"


# What is not there


def test_an_arm_with_one_seed_has_a_difference_but_no_interval():
    comparison = judged([2.0, 2.1], [1.9], [2.0, 2.2])
    single, other = comparison.verdicts[1:]
    assert (single.decision, single.words) == ("no interval", "no interval: 1 seed")
    assert (single.low_nats, single.high_nats, single.sd_nats) == (None, None, None)
    assert single.delta_nats == pytest.approx(-0.15)
    assert comparison.num_compared == 1
    assert other.low_nats is not None


def test_a_single_baseline_seed_gives_no_intervals():
    verdict = judged([2.0], [1.9, 2.1]).verdicts[1]
    assert verdict.words == "no interval: the baseline has 1 seed"
    assert verdict.delta_sds == pytest.approx(0.0)


def test_arms_without_a_result_say_why_and_do_not_widen_the_others():
    diverged = Sample("broken", (), "all 6 trials diverged")
    with_it = compare([*samples([2.0, 2.1], [1.9, 2.0]), diverged], "baseline", MARGIN)
    assert with_it.verdicts[2].words == "no result: all 6 trials diverged"
    assert with_it.verdicts[2].delta_nats is None
    assert with_it.verdicts[1] == judged([2.0, 2.1], [1.9, 2.0]).verdicts[1]


def test_without_a_baseline_result_no_arm_has_one():
    given = [Sample("baseline", (), "all 2 trials failed"), Sample("arm1", (2.0, 2.1))]
    baseline, arm = compare(given, "baseline", MARGIN).verdicts
    assert baseline.words == "no result: all 2 trials failed"
    assert arm.words == "no result: the baseline has none (all 2 trials failed)"
    assert arm.mean_nats == pytest.approx(2.05)


@pytest.mark.parametrize("losses", [[2.0, 2.0], [0.1 + 0.2, 0.3], [0.0, 0.0]])
def test_seeds_without_spread_give_no_interval_and_no_crash(losses):
    comparison = judged(losses, losses, margin=MARGIN)
    verdict = comparison.verdicts[1]
    assert verdict.words == "no interval: the seeds show no spread"
    assert (verdict.low_nats, verdict.delta_sds) == (None, None)
    assert comparison.noise_floor.sd_nats == 0.0


def test_one_arm_without_spread_is_judged_by_the_others_spread():
    verdict = judged([2.0, 2.1], [2.05, 2.05]).verdicts[1]
    assert verdict.decision == "inconclusive"
    assert verdict.sd_nats == 0.0


def test_a_baseline_alone_is_just_described():
    comparison = judged([2.0, 2.1])
    assert comparison.critical_value is None
    assert comparison.verdicts[0].words == "baseline"
    assert compare([Sample("baseline", ())], "baseline", None).noise_floor is None


def test_the_same_input_gives_the_same_bits_and_order_decides_nothing():
    groups = [[2.0, 2.1], [1.9, 2.0], [2.2, 2.1]]
    once, again = judged(*groups), judged(*groups)
    assert once == again
    swapped = compare(samples(*groups)[::-1], "baseline", MARGIN)
    assert {v.arm: v.words for v in swapped.verdicts} == {v.arm: v.words for v in once.verdicts}
    assert [v.low_nats for v in swapped.verdicts[:2]] == pytest.approx([v.low_nats for v in once.verdicts[:0:-1]])


def test_mistakes_of_a_caller_are_named():
    with pytest.raises(ValueError, match="baseline 'baseline' is not among the arms x"):
        compare([Sample("x", (1.0,))], "baseline", None)
    with pytest.raises(ValueError, match="named once each"):
        compare([Sample("baseline", (1.0,))] * 2, "baseline", None)
    with pytest.raises(ValueError, match="alpha must be between 0 and 1, got 1"):
        compare([Sample("baseline", (1.0,))], "baseline", None, alpha=1.0)
    with pytest.raises(ValueError, match="margin must be a positive number of nats, got 0"):
        compare([Sample("baseline", (1.0,))], "baseline", 0.0)
    with pytest.raises(ValueError, match="arm 'baseline': every loss must be finite"):
        compare([Sample("baseline", (float("nan"),))], "baseline", None)
