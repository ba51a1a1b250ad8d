"""The choice of a learning rate: what may be the best, what bounds it, and what never has a mean."""

import random

import pytest

from orchestrator.scaling import CellResult, best_learning_rate


def cells(losses, arm="a"):
    """{lr: {seed: loss or state}} as results."""
    return [
        CellResult(arm, lr, seed, value, None)
        if isinstance(value, str)
        else CellResult(arm, lr, seed, "COMPLETE", value)
        for lr, by_seed in losses.items()
        for seed, value in by_seed.items()
    ]


def best(losses, **options):
    return best_learning_rate("a", cells(losses), **options)


def test_the_lowest_mean_over_seeds_wins_and_not_the_lowest_single_loss():
    found = best({1e-3: {1: 2.0, 2: 2.0}, 2e-3: {1: 1.9, 2: 2.3}, 4e-3: {1: 2.5, 2: 2.5}})
    assert found.best.lr == 1e-3
    assert found.best.mean_loss_nats == 2.0
    assert found.best.losses_nats == (2.0, 2.0)


def test_mean_and_sd_are_the_samples_and_losses_follow_the_seeds():
    found = best({1e-3: {3: 2.3, 1: 2.1, 2: 2.2}})
    assert found.best.losses_nats == (2.1, 2.2, 2.3)
    assert found.best.mean_loss_nats == pytest.approx(2.2)
    assert found.best.sd_loss_nats == pytest.approx(0.1)


@pytest.mark.parametrize("state", ["DIVERGED", "FAILED", "PRUNED", "RUNNING", "WAITING", "CANCELED"])
def test_a_cell_with_one_seed_not_complete_has_no_mean_and_never_wins(state):
    found = best({1e-3: {1: 2.5, 2: 2.5}, 2e-3: {1: 1.0, 2: state}})
    assert found.best.lr == 1e-3
    assert found.points[1].mean_loss_nats is None
    assert found.points[1].losses_nats == (1.0,)
    assert found.num_finite == 1


def test_a_cell_that_lacks_a_seed_altogether_has_no_mean():
    losses = {1e-3: {1: 2.5, 2: 2.5}, 2e-3: {1: 1.0}}
    assert best(losses).best.lr == 1e-3
    assert best(losses).points[1].num_seeds == 2
    assert best({1e-3: {1: 2.5}}, seeds=(1, 2)).best is None


def test_a_complete_trial_without_a_finite_loss_gives_no_mean():
    nothing = [CellResult("a", 1e-3, 1, "COMPLETE", None), CellResult("a", 2e-3, 1, "COMPLETE", float("nan"))]
    assert best_learning_rate("a", nothing).best is None


def test_of_equal_means_the_lower_rate_wins():
    assert best({4e-3: {1: 2.0}, 1e-3: {1: 2.0}, 2e-3: {1: 2.0}}).best.lr == 1e-3


def test_the_smallest_diverged_rate_says_how_many_of_how_many():
    found = best({1e-3: {1: 2.0, 2: 2.0}, 1e-2: {1: "DIVERGED", 2: 2.1}, 1.0: {1: "DIVERGED", 2: "DIVERGED"}})
    assert found.smallest_diverged.lr == 1e-2
    assert (found.smallest_diverged.num_diverged, found.smallest_diverged.num_seeds) == (1, 2)
    assert best({1e-3: {1: 2.0}}).smallest_diverged is None


@pytest.mark.parametrize(
    ("losses", "edge"),
    [
        ({1e-3: 2.0, 2e-3: 2.1, 4e-3: 2.2}, "lowest"),
        ({1e-3: 2.2, 2e-3: 2.1, 4e-3: 2.0}, "highest"),
        ({1e-3: 2.2, 2e-3: 2.0, 4e-3: 2.1}, None),
        ({1e-3: 2.2, 2e-3: 2.0, 4e-3: "DIVERGED"}, None),  # bounded above by divergence
        ({1e-3: 2.0, 2e-3: 2.1, 4e-3: "DIVERGED"}, "lowest"),
        ({1e-3: 2.2, 2e-3: 2.0, 4e-3: "FAILED"}, "highest"),  # a failure bounds nothing
        ({1e-3: "CANCELED", 2e-3: 2.0, 4e-3: 2.1}, "lowest"),
        ({1e-3: "WAITING", 2e-3: 2.0, 4e-3: 2.1}, None),  # too early to say
        ({1e-3: 2.1, 2e-3: 2.0, 4e-3: "RUNNING"}, None),
        ({1e-3: 2.0}, None),  # one rate is no grid
        ({1e-3: "DIVERGED", 2e-3: "DIVERGED"}, None),
    ],
)
def test_the_edge_alarm(losses, edge):
    assert best({lr: {1: value} for lr, value in losses.items()}).edge == edge


def test_the_answer_does_not_depend_on_the_order_of_the_results():
    results = cells({1e-3: {1: 2.0, 2: 2.1}, 2e-3: {1: 1.9, 2: "DIVERGED"}, 4e-3: {1: 2.0, 2: 2.2}})
    answer = best_learning_rate("a", results)
    for seed in range(5):
        shuffled = random.Random(seed).sample(results, len(results))
        assert best_learning_rate("a", shuffled) == answer


def test_no_results_give_no_best_and_no_alarm():
    found = best_learning_rate("a", [])
    assert (found.best, found.edge, found.points, found.num_finite) == (None, None, (), 0)


def test_a_trial_given_twice_and_a_foreign_arm_are_refused():
    with pytest.raises(ValueError, match=r"arm 'a': learning rate 0.001, seed 1 was given 2 times"):
        best_learning_rate("a", cells({1e-3: {1: 2.0}}) * 2)
    with pytest.raises(ValueError, match="results of arm 'a' expected, got also b"):
        best_learning_rate("a", cells({1e-3: {1: 2.0}}, "b"))


def test_the_chance_to_diverge_has_the_exact_interval() -> None:
    from scipy.stats import binomtest

    from orchestrator.scaling.proportion import clopper_pearson

    for count, number in ((0, 3), (1, 3), (3, 3), (7, 40), (2, 1000)):
        low, high = binomtest(count, number).proportion_ci(0.95, method="exact")
        assert clopper_pearson(count, number) == pytest.approx((low, high), abs=1e-11)
