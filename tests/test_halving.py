"""Ranking learning rates at rungs: what is stopped, what never is, who waits, and how often the best one is lost."""

import itertools
import math

import numpy as np
import pytest

from models.config import DataConfig, TrainConfig, TrialConfig
from models.presets import PRESETS
from orchestrator.scaling import EndedTrial, RankedTrial, RankPolicy, audit_pruning, loss_at, rung_point
from orchestrator.store import Curve, RankDecision
from orchestrator.store.rows import StepRow, ValidationRow
from orchestrator.sweep import RankConfig, arm_key

RATES = (1e-3, 2e-3, 4e-3, 8e-3)


def policy(seeds=(1, 2, 3), **options):
    return RankPolicy(RankConfig(**{"audit_share": 0.0, **options}), seeds)


def trials(losses, arm="a", seeds=(1, 2, 3), states=None, axes=None):
    """``losses``: {rate: per rung, of the first seed; or {seed: per rung}}; what is not said is not reached."""
    found = []
    for lr, of_rate in losses.items():
        by_seed = of_rate if isinstance(of_rate, dict) else {1: of_rate}
        for seed in seeds:
            reached = tuple(by_seed.get(seed, (None, None)))
            state = (states or {}).get((lr, seed), "WAITING")
            name = f"{arm}/{lr:g}/{seed}{axes or ''}"
            found.append(RankedTrial(name, arm, axes or {}, lr, seed, state, reached))
    return found


def decided(rates_policy, given):
    """All decisions, one after the other."""
    found = []
    while new := rates_policy.decide(given, found):
        found += new
    return found


def test_rungs_are_shares_of_the_schedule_below_its_end():
    assert RankConfig(first_fraction=0.25).rungs == (0.25, 0.5)
    assert RankConfig(first_fraction=0.1, reduction=3).rungs == pytest.approx((0.1, 0.3, 0.9))
    assert RankConfig(first_fraction=0.5).rungs == (0.5,)


def test_half_of_the_rates_go_at_each_rung_and_one_is_left():
    losses = {1e-3: (3.0, None), 2e-3: (2.8, 2.5), 4e-3: (2.9, 2.4), 8e-3: (3.1, None)}
    first, second = decided(policy(), trials(losses))
    assert (first.fraction, first.dropped, first.losses_nats) == (
        0.25, (1e-3, 8e-3), {1e-3: 3.0, 2e-3: 2.8, 4e-3: 2.9, 8e-3: 3.1},
    )  # fmt: skip
    assert (second.fraction, second.dropped, second.losses_nats) == (0.5, (2e-3,), {2e-3: 2.5, 4e-3: 2.4})


def test_nothing_is_decided_before_every_rate_is_there():
    missing = trials({1e-3: (3.0, None), 2e-3: (2.8, None), 4e-3: (2.9, None), 8e-3: (None, None)})
    assert policy().decide(missing) == []
    goals = policy().goals(missing)
    assert {goals[one.fingerprint] for one in missing if one.seed == 1} == {0.25}
    assert {goals[one.fingerprint] for one in missing if one.seed > 1} == {0.0}


def test_goals_follow_the_decisions():
    losses = {1e-3: (3.0, None), 2e-3: (2.8, 2.5), 4e-3: (2.9, 2.4), 8e-3: (3.1, None)}
    given = trials(losses)
    half = policy().decide(given)
    goals = policy().goals(given, half)
    assert [goals[f"a/{lr:g}/1"] for lr in RATES] == [None, 0.5, 0.5, None]
    assert [goals[f"a/{lr:g}/3"] for lr in RATES] == [None, 0.0, 0.0, None]
    goals = policy().goals(given, decided(policy(), given))
    assert [goals[f"a/{lr:g}/1"] for lr in RATES] == [None, None, 1.0, None]
    assert [goals[f"a/{lr:g}/3"] for lr in RATES] == [None, None, 1.0, None]


def test_arms_are_never_compared_and_neither_are_the_values_of_another_axis():
    good = trials({lr: (2.0 + lr, 1.9 + lr) for lr in RATES}, "good")
    bad = trials({lr: (9.0 + lr, 8.9 + lr) for lr in RATES}, "bad")
    large = trials({lr: (5.0 - lr, 4.9 - lr) for lr in RATES}, "good", axes={"train.tokens": 2})
    found = decided(policy(), [*good, *bad, *large])
    kept = {
        (arm, size): set(RATES) - {lr for one in found if (one.arm, one.axes) == (arm, size_of) for lr in one.dropped}
        for arm, size, size_of in (("good", 1, {}), ("bad", 1, {}), ("good", 2, {"train.tokens": 2}))
    }
    assert all(len(rates) == 1 for rates in kept.values())
    assert kept["good", 2] == {8e-3}


def test_seeds_are_averaged_and_the_same_for_all_rates():
    losses = {
        lr: {1: (3.0 - 10 * lr, None), 2: (2.0 + 100 * lr, None), 3: (0.0 if lr == 8e-3 else 9.0, None)} for lr in RATES
    }
    (first,) = decided(policy(), trials(losses))
    assert first.dropped == (1e-3, 2e-3), "the first seed alone decides by default"
    (both,) = decided(RankPolicy(RankConfig(seeds=2, audit_share=0.0), (1, 2, 3)), trials(losses))
    assert (both.dropped, both.seeds) == ((4e-3, 8e-3), (1, 2))
    assert both.losses_nats[1e-3] == pytest.approx((2.99 + 2.1) / 2)


def test_more_seeds_may_decide_at_a_later_rung():
    two_rungs = RankPolicy(RankConfig(seeds=[1, 3], audit_share=0.0), (1, 2, 3))
    losses = {lr: (2.0 + lr, 1.9) for lr in RATES}
    given = trials(losses)
    (first,) = decided(two_rungs, given)
    goals = two_rungs.goals(given, [first])
    assert [goals[f"a/0.001/{seed}"] for seed in (1, 2, 3)] == [0.5, 0.5, 0.5]
    assert goals["a/0.008/2"] is None
    with pytest.raises(ValueError, match="numbers that do not fall from rung to rung"):
        RankConfig(seeds=[2, 1])


@pytest.mark.parametrize("state", ["FAILED", "CANCELED", "PRUNED"])
def test_a_rate_with_a_hole_is_not_judged_and_does_not_hold_up_the_others(state):
    losses = {1e-3: (9.0, None), 2e-3: (2.8, None), 4e-3: (2.9, None), 8e-3: (3.1, None)}
    given = trials(losses, states={(1e-3, 1): state})
    (first,) = policy().decide(given)
    assert first.dropped == (8e-3,)
    assert 1e-3 not in first.losses_nats
    goals = policy().goals(given, [first])
    assert goals["a/0.001/2"] == 1.0
    missing_seed = [one for one in trials(losses) if (one.lr, one.seed) != (1e-3, 1)]
    assert policy().decide(missing_seed)[0].dropped == (8e-3,)


def test_what_diverged_goes_first_with_all_its_seeds_and_is_never_audited():
    losses = {1e-3: (3.0, None), 2e-3: (2.8, None), 4e-3: (2.9, None), 8e-3: (2.0, None)}
    given = trials(losses, states={(8e-3, 1): "DIVERGED"})
    (first,) = policy(audit_share=1.0).decide(given)
    assert (first.dropped, first.audited, first.losses_nats[8e-3]) == ((1e-3, 8e-3), (1e-3,), None)
    infinite = trials({**losses, 8e-3: (math.inf, None)})
    assert policy().decide(infinite)[0].dropped == (1e-3, 8e-3)


def test_an_arm_of_which_everything_diverged_runs_on_to_show_how_often():
    given = trials(dict.fromkeys(RATES, (None, None)), states={(lr, 1): "DIVERGED" for lr in RATES})
    assert policy().decide(given) == []
    goals = policy().goals(given)
    assert {goals[one.fingerprint] for one in given} == {1.0}


def test_an_arm_with_one_rate_waits_for_nothing():
    given = trials({1e-3: (None, None)})
    assert policy().decide(given) == []
    assert set(policy().goals(given).values()) == {1.0}


def test_a_rate_within_the_margin_of_the_last_kept_one_is_kept():
    losses = {1e-3: (3.0, None), 2e-3: (2.8, None), 4e-3: (2.9, None), 8e-3: (2.905, None)}
    (first,) = policy(margin=0.01).decide(trials(losses))
    assert first.dropped == (1e-3,)


def test_the_audit_is_drawn_by_the_seed_alone():
    losses = {lr: (2.0 + lr, 1.9 + lr) for lr in RATES}
    marks = [policy(audit_share=0.5, audit_seed=seed).decide(trials(losses))[0].audited for seed in range(40)]
    assert marks == [policy(audit_share=0.5, audit_seed=seed).decide(trials(losses))[0].audited for seed in range(40)]
    assert {(), (4e-3,), (8e-3,), (4e-3, 8e-3)} == set(marks)
    (all_of_them,) = policy(audit_share=1.0).decide(trials(losses))
    goals = policy(audit_share=1.0).goals(trials(losses), [all_of_them])
    assert {goals[f"a/0.008/{seed}"] for seed in (1, 2, 3)} == {1.0}, "an audited rate is finished on all its seeds"


def test_the_share_of_audited_rates_is_the_declared_one():
    """2,000 arms, two of four rates stopped at the first rung: standard error 0.5 points."""
    given = [one for arm in range(2000) for one in trials({lr: (lr, None) for lr in RATES}, f"arm{arm}", seeds=(1,))]
    found = policy(seeds=(1,), audit_share=0.1).decide(given)
    assert len(found) == 2000
    assert sum(len(one.audited) for one in found) / 4000 == pytest.approx(0.1, abs=0.015)


def test_rates_that_join_later_are_ranked_among_those_that_are_left():
    losses = {lr: (2.0 + lr, 1.9 + lr) for lr in RATES}
    before = decided(policy(), trials(losses))
    longer = {**losses, 5e-4: (1.9, 1.8), 1.6e-2: (4.0, None)}
    after = policy().decide(trials(longer), before)
    assert [one.dropped for one in after] == [], "two of the three left are kept, and three of six may stay"
    goals = policy().goals(trials(longer), before)
    assert goals["a/0.0005/1"] == 0.5
    assert goals["a/0.008/1"] is None


def test_hyperband_spares_a_part_of_the_rates_the_early_rungs():
    rates = tuple(1e-4 * 2**i for i in range(10))
    losses = {lr: (2.0 + lr, 1.9 + lr) for lr in rates}
    given = trials(losses)
    found = decided(policy(method="hyperband"), given)
    at_first = {lr for one in found if one.fraction == 0.25 for lr in one.losses_nats}
    at_second = {lr for one in found if one.fraction == 0.5 for lr in one.losses_nats}
    assert (len(at_first), len(found)) == (4, 3)
    assert len(at_second - at_first) == 3, "the second bracket is judged at the second rung only"
    goals = policy(method="hyperband").goals(given, found)
    unjudged = [lr for lr in rates if lr not in at_first | at_second]
    assert len(unjudged) == 3
    assert all(goals[f"a/{lr:g}/1"] == 1.0 for lr in unjudged)


def test_the_order_in_which_rates_arrive_changes_nothing():
    """Every order in which four rates come to two rungs ends in the same decisions."""
    losses = {1e-3: (3.0, 2.6), 2e-3: (2.8, 2.5), 4e-3: (2.9, 2.4), 8e-3: (3.1, 2.9)}
    outcomes = set()
    for order in itertools.permutations(RATES):
        reached = dict.fromkeys(RATES, (None, None))
        found = []
        for rung, lr in itertools.product((0, 1), order):
            goal = policy().goals(trials(reached), found)[f"a/{lr:g}/1"]
            if goal is not None and goal > (0.0, 0.25)[rung]:
                reached[lr] = losses[lr][: rung + 1] + (None,) * (1 - rung)
            while new := policy().decide(trials(reached), found):
                found += new
        outcomes.add(tuple((one.fraction, one.dropped) for one in found))
    assert outcomes == {((0.25, (1e-3, 8e-3)), (0.5, (2e-3,)))}


def test_the_best_rate_is_lost_as_rarely_as_the_noise_says():
    """1,000 arms of four rates 0.03 nats apart, seed SD 0.01 at every place, curves that do not cross. At the first
    rung the best is lost when two of three others look better by luck: 1e-4 of arms; at the second when the next does,
    whose difference is 0.03 against an SD of 0.0141: 1.7 %. Standard error 0.4 points."""
    rng = np.random.default_rng(5)
    level = np.array([0.03, 0.0, 0.06, 0.09])
    noise = rng.normal(scale=0.01, size=(1000, 4, 2))
    given = [
        RankedTrial(f"{arm}/{lr}", f"arm{arm}", {}, lr, 1, "RUNNING", tuple(level[i] + noise[arm, i]))
        for arm in range(1000)
        for i, lr in enumerate(RATES)
    ]
    found = decided(policy(seeds=(1,)), given)
    lost = {one.arm for one in found if 2e-3 in one.dropped}
    assert len(lost) / 1000 == pytest.approx(0.017, abs=0.012)


# -- where a curve is read --------------------------------------------------------------------------------------


def config(num_steps=200, **validation):
    data = DataConfig.model_validate({"validation": validation}) if validation else DataConfig()
    train = TrainConfig(tokens=num_steps * 256, batch_tokens=256, lr=1e-3)
    return TrialConfig(model=PRESETS["cpu-tiny"], data=data, train=train, seed=1)


def curve(last, num_steps=200, validations=()):
    steps = tuple(
        StepRow(1, s, s * 256, s / num_steps, 1e-3, 3.0 - s / 100, 1.0, 1.0, False) for s in range(1, last + 1)
    )
    rows = tuple(ValidationRow(1, s, "slice", s * 256, s / num_steps, x, x, 1, 1, x is None) for s, x in validations)
    return Curve(steps, rows)


def test_a_rung_is_the_validation_that_falls_on_it():
    point = rung_point(config(points=4), 0.25)
    assert (point.step, point.window) == (50, 0)
    assert rung_point(config(points=8), 0.26).step == 50
    assert loss_at(point, curve(60)) is None
    assert loss_at(point, curve(60, validations=[(50, 2.5)])) == 2.5
    assert loss_at(point, curve(60, validations=[(50, None)])) == math.inf


def test_without_a_validation_there_it_is_a_window_of_the_training_loss():
    point = rung_point(config(points=1), 0.25)
    assert (point.step, point.window) == (50, 10)
    assert loss_at(point, curve(49)) is None
    assert loss_at(point, curve(50)) == pytest.approx(np.mean([3.0 - s / 100 for s in range(41, 51)]))
    assert loss_at(point, curve(80)) == loss_at(point, curve(50))
    assert rung_point(config(num_steps=3, points=1), 0.25).step == 1


# -- the audit --------------------------------------------------------------------------------------------------


def end(lr, loss, state="COMPLETE", share=1.0, arm="a"):
    return EndedTrial(arm_key(arm, {}), lr, state, loss, 100.0, share)


def decision(dropped, audited=(), losses=None, arm="a"):
    known = losses or dict.fromkeys(RATES, 3.0)
    return RankDecision(arm, {}, 0.25, (1,), known, tuple(dropped), tuple(audited), "halving-1")


def test_the_audit_counts_what_ended_better_than_the_best_that_was_kept():
    ends = [end(1e-3, 2.5), end(2e-3, 2.4), end(4e-3, 2.3), end(8e-3, None, "PRUNED", 0.25)]
    found = audit_pruning([decision((4e-3, 8e-3), (4e-3,))], ends)
    assert (found.num_cells, found.num_dropped, found.num_drawn, found.num_audited, found.num_false) == (4, 2, 1, 1, 1)
    assert found.false_rate == 1.0
    assert (found.low, found.high) == pytest.approx((0.025, 1.0))
    assert found.share_saved == pytest.approx(75 / 400)
    right = [end(1e-3, 2.5), end(2e-3, 2.4), end(4e-3, 2.45), end(8e-3, None, "PRUNED", 0.0)]
    found = audit_pruning([decision((4e-3, 8e-3), (4e-3,))], right)
    assert (found.num_false, found.low, found.high) == (0, 0.0, pytest.approx(0.975))
    assert found.share_saved == pytest.approx(100 / 400)


def test_an_audit_that_is_not_at_its_end_says_nothing_yet():
    ends = [end(1e-3, 2.5), end(4e-3, None, "RUNNING", 0.5)]
    found = audit_pruning([decision((4e-3,), (4e-3,))], ends)
    assert (found.num_drawn, found.num_audited, found.false_rate, found.low) == (1, 0, None, None)
    no_best = [end(1e-3, None, "WAITING", 0.0), end(4e-3, 2.3)]
    assert audit_pruning([decision((4e-3,), (4e-3,))], no_best).num_audited == 0
    assert audit_pruning([], ends) is None


def test_a_rate_that_was_finished_elsewhere_is_no_draw_of_the_audit():
    ends = [end(1e-3, 2.5), end(4e-3, 2.3)]
    found = audit_pruning([decision((4e-3,), ())], ends)
    assert (found.num_dropped, found.num_drawn, found.num_audited) == (1, 0, 0)
