"""Learning rates chosen on some seeds and confirmed on fresh ones: grammar, plan, run, recovery, table, error rates."""

# ruff: noqa: F811 (fixtures are imported by name)

import io
import math

import numpy as np
import pytest
from fake_gangs import FakeCluster, bench, fake_validation  # noqa: F401
from rich.console import Console
from scipy import stats
from sweep_runs import Watcher, plan_of

from orchestrator.controller import choose_rates
from orchestrator.report import plan_table, results
from orchestrator.sweep import UserError

RATES = (1e-3, 2e-3, 4e-3)
CHOOSING = ("axes.train.lr=[1e-3,2e-3,4e-3]", "seeds={select: [1, 2], confirm: [3, 4, 5]}")


@pytest.fixture
def planned(tmp_path):
    return plan_of(tmp_path, CHOOSING)


def best(plan, arm):
    """By the losses that the fake gangs write."""

    def mean(lr):
        losses = [
            fake_validation(t.config, 20).loss_nats for t in plan.trials if (t.arm, t.axes["train.lr"]) == (arm, lr)
        ]
        assert len(losses) == 2
        return sum(losses) / 2

    return min(RATES, key=mean)


def confirming(bench, plan):
    rows = bench.store.trials(bench.store.sweep(plan.sweep.name).id)
    return [row for row in rows if row.seed in plan.sweep.confirm_seeds]


# -- grammar and plan -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("overrides", "said"),
    [
        (["seeds={select: [1, 2]}"], "got the keys select; allowed: select and confirm, or a list"),
        (["seeds={select: [1, 2], confirm: [2, 3]}"], "seeds.confirm: got 2 also in select; allowed: fresh seeds"),
        (["seeds={select: [1], confirm: [2, 2]}"], "seeds.confirm"),
        (["seeds={select: [1], confirm: []}"], "seeds.confirm: got an empty list"),
    ],
)
def test_a_choice_that_is_none_is_refused_with_its_place(tmp_path, overrides, said):
    with pytest.raises(UserError) as caught:
        plan_of(tmp_path, [*CHOOSING, *overrides])
    assert said in str(caught.value)


def test_without_a_learning_rate_to_choose_there_is_nothing_to_confirm(tmp_path):
    with pytest.raises(UserError, match=r"train\.lr is on no axis; give a list"):
        plan_of(tmp_path, ["seeds={select: [1, 2], confirm: [3]}"])


def test_the_plan_holds_the_selection_and_what_may_follow(planned):
    assert {trial.seed for trial in planned.trials} == {1, 2}
    assert [one.arm for one in planned.confirmations] == ["baseline", "g1"]
    for one in planned.confirmations:
        assert list(one.by_lr) == list(RATES)
        assert len(one.selection) == 6
        for lr, trials in one.by_lr.items():
            assert sorted(trial.seed for trial in trials) == [3, 4, 5]
            assert {trial.config.train.lr for trial in trials} == {lr}
    positions = [t.position for one in planned.confirmations for of in one.by_lr.values() for t in of]
    assert sorted(positions) == list(range(12, 12 + 18))


def test_each_value_of_another_axis_has_a_choice_of_its_own(tmp_path):
    derived = "train.batch_tokens: {of: train.tokens, times: 0.05}"
    axes = f"axes={{train.lr: [1e-3, 2e-3], train.tokens: [5120, 10240], {derived}}}"
    plan = plan_of(tmp_path, [*CHOOSING[1:], axes])
    assert [(one.arm, one.axes["train.tokens"]) for one in plan.confirmations] == [
        (arm, tokens) for arm in ("baseline", "g1") for tokens in (5120, 10240)
    ]
    assert all(set(one.axes) == {"train.tokens"} for one in plan.confirmations)


def test_the_extra_seeds_of_the_baseline_confirm_it(tmp_path):
    plan = plan_of(tmp_path, [*CHOOSING, "baseline_seeds=5"])
    assert plan.sweep.extra_baseline_seeds == (6, 7)
    assert len(plan.trials) == 12
    numbers = {one.arm: len(one.by_lr[1e-3]) for one in plan.confirmations}
    assert numbers == {"baseline": 5, "g1": 3}


def test_the_plan_is_printed_with_the_most_that_confirming_may_cost(planned):
    console = Console(width=200, record=True, file=io.StringIO())
    console.print(plan_table(planned))
    shown = console.export_text()
    assert planned.confirmations[0].most_flops == 3 * planned.confirmations[0].by_lr[1e-3][0].training_flops
    assert "fresh seeds 3, 4, 5 for the verdict: at most 6 trials" in shown


# -- running ----------------------------------------------------------------------------------------------------


def test_a_run_chooses_and_confirms_each_arm_at_its_own_best_rate(bench, planned):
    watcher = run(bench, planned)
    rows = confirming(bench, planned)
    assert {(row.arm, row.config.train.lr) for row in rows} == {(arm, best(planned, arm)) for arm in ("baseline", "g1")}
    assert len(rows) == 6
    assert {row.state for row in rows} == {"COMPLETE"}
    assert sum(line.startswith("chosen") for line in watcher.lines) == 2
    (table,) = results(bench.store, "tiny").tables
    for row in table.rows:
        assert row.best_lr == best(planned, row.arm)
        losses = [fake_validation(one.config, 20).loss_nats for one in rows if one.arm == row.arm]
        assert sorted(row.losses_nats) == pytest.approx(sorted(losses))
        assert not row.exploratory
        assert row.rank is not None
    assert any("chosen on seeds 1, 2" in note for note in table.footnotes)


def run(bench, plan, cluster=None, on_line=None):
    watcher = Watcher()
    if on_line:
        watcher.on_line = on_line
    controller = bench.controller(plan, cluster or FakeCluster(2), watcher)
    with controller:
        controller.run()
    return watcher


def test_a_second_run_makes_the_same_choice_and_nothing_twice(bench, planned):
    run(bench, planned)
    before = bench.store.trials(1)
    chosen = bench.store.sweep("tiny").verdict["chosen"]
    watcher = run(bench, planned)
    assert bench.store.trials(1) == before
    assert bench.store.sweep("tiny").verdict["chosen"] == chosen
    assert not [line for line in watcher.lines if line.startswith(("started", "chosen"))]


def test_a_run_that_stops_after_a_choice_goes_on_from_it(bench, planned):
    class Killed(Exception):
        pass

    def kill(line):
        if line.startswith("chosen"):
            raise Killed

    with pytest.raises(Killed):
        run(bench, planned, on_line=kill)
    chosen = bench.store.sweep("tiny").verdict["chosen"]
    assert len(chosen) == 1
    assert bench.store.add(planned).num_new == 0
    rows = confirming(bench, planned)
    assert {row.fingerprint for row in rows} == set(chosen[0]["confirming"])


def test_an_arm_with_a_failed_cell_waits_and_the_others_do_not(bench, planned):
    def fate(spec, config, step):
        return (
            "raise" if config.gate is not None and config.train.lr == 1e-3 and config.seed == 1 and step == 8 else None
        )

    run(bench, planned, FakeCluster(2, fate))
    assert {row.arm for row in confirming(bench, planned)} == {"baseline"}
    (table,) = results(bench.store, "tiny").tables
    row = next(row for row in table.rows if row.arm == "g1")
    assert (row.verdict, row.rank) == ("no result: its learning rate is not chosen", None)


def test_a_diverged_confirming_seed_leaves_no_mean(bench, planned):
    def fate(spec, config, step):
        return "not finite" if config.gate is not None and config.seed == 4 and step == 8 else None

    run(bench, planned, FakeCluster(2, fate))
    (table,) = results(bench.store, "tiny").tables
    row = next(row for row in table.rows if row.arm == "g1")
    assert (row.loss_nats, row.verdict) == (None, "no result: a confirming seed diverged")


def test_more_confirming_seeds_join_the_choice_and_are_a_second_look(bench, planned, tmp_path):
    run(bench, planned)
    more = plan_of(tmp_path, [CHOOSING[0], "seeds={select: [1, 2], confirm: [3, 4, 5, 6]}"])
    run(bench, more)
    assert len(confirming(bench, more)) == 8
    (table,) = results(bench.store, "tiny").tables
    assert {len(row.losses_nats) for row in table.rows} == {4}
    assert any("verdicts were read 2 times, 1 declared" in note for note in table.footnotes)
    assert len(bench.store.sweep("tiny").verdict["chosen"]) == 2


def test_confirming_after_a_plain_grid_is_the_first_look(bench, planned, tmp_path):
    plain = plan_of(tmp_path, [CHOOSING[0], "seeds=[1,2]"])
    run(bench, plain)
    (table,) = results(bench.store, "tiny").tables
    assert all(row.exploratory for row in table.rows)
    run(bench, planned)
    (table,) = results(bench.store, "tiny").tables
    assert not any(row.exploratory for row in table.rows)


def test_seeds_that_were_seen_before_the_choice_confirm_nothing(bench, planned, tmp_path):
    run(bench, plan_of(tmp_path, [CHOOSING[0], "seeds=[1,2,3]"]))
    run(bench, planned)
    (table,) = results(bench.store, "tiny").tables
    assert all(row.exploratory for row in table.rows)
    assert any("2 confirming trials had run before the learning rate was chosen" in note for note in table.footnotes)


def test_a_longer_grid_chooses_anew_and_says_so(bench, planned, tmp_path):
    run(bench, planned)
    first = {row.arm: row.config.train.lr for row in confirming(bench, planned)}
    grid = ",".join(f"{1e-4 * 1.5**i:.6g}" for i in range(12))
    longer = plan_of(tmp_path, [f"axes.train.lr=[1e-3,2e-3,4e-3,{grid}]", *CHOOSING[1:]])
    run(bench, longer)
    second = {row.arm: row.config.train.lr for row in confirming(bench, longer)}
    changed = sorted(arm for arm in first if first[arm] != second[arm])
    assert changed, "the grid is to be so long that a better rate is found"
    (table,) = results(bench.store, "tiny").tables
    assert any(f"chosen anew for {', '.join(changed)}" in note for note in table.footnotes)


def test_choosing_is_idempotent_and_needs_no_gangs(bench, planned):
    run(bench, planned)
    assert choose_rates(bench.store, "tiny", planned.confirmations, print) == 0


# -- error rates ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("num_arms", "num_rates"), [(1, 4), (3, 4), (8, 6)])
def test_confirmed_verdicts_err_at_the_declared_rate_and_unconfirmed_ones_more(num_arms, num_rates):
    """Flat learning-rate curves, no arm differs from the baseline, whose one rate is fixed: what tuning the arms alone
    does. 40,000 families, standard error 0.11 points. Chosen and judged on the same 3 seeds, the choice of the lowest
    mean errs in 6.2 to 7.5 %, nearly all of it "better"; on 3 fresh ones, at 5 %."""
    rng = np.random.default_rng(3)
    repetitions, seeds = 40_000, 3
    tuned = rng.normal(size=(repetitions, num_arms, num_rates, seeds))
    baseline = rng.normal(size=(repetitions, 1, seeds))
    which = tuned.mean(3).argmin(2)[:, :, None, None]
    chosen = np.take_along_axis(tuned, which, axis=2)[:, :, 0]
    fresh = rng.normal(size=(repetitions, num_arms, seeds))
    assert errs(fresh, baseline) == pytest.approx(0.05, abs=0.0055)
    assert errs(chosen, baseline) > 0.058
    assert chosen.mean() == pytest.approx(BIAS[num_rates] / math.sqrt(seeds), abs=0.01)


BIAS = {4: -1.0294, 6: -1.2672}
"""Of the smallest of so many standard normals; over 3 seeds, the winner's bias is 0.59 SD with four rates."""


def errs(arms, baseline):
    """Share of families with any interval that leaves out 0. Dunnett's value from SciPy's own test is too slow to
    repeat: it is the same for all, as the design is."""
    from orchestrator.verdict import critical_value

    _, num_arms, seeds = arms.shape
    degrees = (num_arms + 1) * (seeds - 1)
    both = np.concatenate([baseline, arms], axis=1)
    variance = both.var(axis=2, ddof=1).mean(axis=1)[:, None]
    t = (arms.mean(2) - baseline.mean(2)) / np.sqrt(2 * variance / seeds)
    critical = critical_value(seeds, (seeds,) * num_arms, degrees, 0.05)
    assert critical >= stats.t.isf(0.025, degrees) - 1e-9
    return (np.abs(t) > critical).any(1).mean()
