"""Learning rates that join while a sweep runs: searched ones, and a grid that grows at its edge."""

# ruff: noqa: F811 (fixtures are imported by name)

import io
import math
from collections import Counter
from statistics import fmean

import numpy as np
import pytest
from fake_gangs import FakeCluster, bench, fake_validation  # noqa: F401
from rich.console import Console
from sweep_runs import Watcher, plan_of

from orchestrator.controller import grow_rates
from orchestrator.plan import GrownRate
from orchestrator.report import plan_table, results
from orchestrator.scaling import CellResult, best_learning_rate, extension
from orchestrator.search import suggest_rate
from orchestrator.sweep import ExtendedRates, SearchedRates, UserError

SEARCH = ("axes.train.lr={search: [1e-4, 1e-1], trials: 6}", "seeds=[1,2]", "baseline_seeds=2", "diagnostics=null")
EXTEND = (
    "axes.train.lr={values: [1e-3, 2e-3, 4e-3], extend: 2}", "seeds=[1,2]", "baseline_seeds=2", "diagnostics=null",
)  # fmt: skip


@pytest.fixture
def searched(tmp_path):
    return plan_of(tmp_path, SEARCH)


def rows_of(bench, plan):
    return bench.store.trials(bench.store.sweep(plan.sweep.name).id)


def rates_of(rows, arm):
    return {row.config.train.lr for row in rows if row.arm == arm}


# -- suggestions ------------------------------------------------------------------------------------------------


def curve(lr, best=3e-3, curvature=0.1):
    return 2.0 + curvature * math.log(lr / best) ** 2


def search(rates, loss):
    told = [(lr, loss(lr)) for lr in rates.first]
    while len(told) < rates.trials:
        lr = suggest_rate(rates, told)
        told.append((lr, loss(lr)))
    return told


def test_the_first_half_is_spread_evenly_and_the_same_for_all_arms():
    assert SearchedRates(search=(1e-4, 1e-1), trials=6).first == (3.16e-4, 3.16e-3, 3.16e-2)
    assert len(SearchedRates(search=(1e-4, 1e-1), trials=7).first) == 4


def test_a_suggestion_follows_from_what_is_told_in_whatever_order():
    rates = SearchedRates(search=(1e-4, 1e-1), trials=6)
    told = [(lr, curve(lr, 6e-3)) for lr in rates.first]
    assert {suggest_rate(rates, told), suggest_rate(rates, told[::-1])} == {6e-3}, "three points give a parabola away"


def test_suggestions_are_new_in_range_and_of_three_digits():
    for best in (1e-4, 1e-3, 1e-1):
        rates = SearchedRates(search=(1e-4, 1e-1), trials=12)
        told = search(rates, lambda lr, best=best: curve(lr, best))
        tried = [lr for lr, _ in told]
        assert len(set(tried)) == 12
        assert all(1e-4 <= lr <= 1e-1 and lr == float(f"{lr:.3g}") for lr in tried)
    narrow = SearchedRates(search=(1e-3, 1.5e-3), trials=40)
    assert len({lr for lr, _ in search(narrow, curve)}) == 40
    flat = SearchedRates(search=(1e-4, 1e-1), trials=10)
    assert len({lr for lr, _ in search(flat, lambda lr: 2.0)}) == 10


def test_an_optimum_at_the_end_of_the_range_is_gone_after():
    rates = SearchedRates(search=(1e-4, 1e-1), trials=6)
    for best in (1e-4, 1e-1):
        found = min(search(rates, lambda lr, best=best: curve(lr, best)), key=lambda one: one[1])[0]
        assert abs(math.log(found / best)) < 0.3


OPTIMA = np.exp(np.random.default_rng(3).uniform(math.log(2e-4), math.log(5e-2), 150))
"""Spread over nearly all of three decades."""


@pytest.mark.parametrize(("noise", "limit"), [(0.0, 0.001), (0.005, 0.002), (0.02, 0.009)])
def test_six_searched_rates_find_the_optimum_better_than_a_grid_of_ten(noise, limit):
    """150 arms, each with an optimum of its own. What the curve at the chosen rate lies above its minimum, in nats, in
    the mean, with so much noise on the losses that choose. Over 2,000 arms it was 0.0001, 0.0005 and 0.005; by a grid
    of ten over the range 0.005, 0.005 and 0.008."""
    rng = np.random.default_rng(4)
    rates = SearchedRates(search=(1e-4, 1e-1), trials=6)
    grid = np.exp(np.linspace(math.log(1e-4), math.log(1e-1), 10))
    found = {"search": [], "grid": []}
    for best in OPTIMA:

        def loss(lr, best=best):
            return curve(lr, best) + rng.normal(scale=noise)

        found["search"].append(min(search(rates, loss), key=lambda one: one[1])[0])
        found["grid"].append(min((loss(lr), lr) for lr in grid)[1])
    excess = {way: fmean(curve(*both) - 2.0 for both in zip(lrs, OPTIMA, strict=True)) for way, lrs in found.items()}
    assert excess["search"] < limit
    assert excess["search"] < excess["grid"]


def test_what_diverged_is_told_as_bad_and_the_search_turns_back():
    """Everything above twice the optimum diverges, as in practice; going on up there would end far off."""
    rates = SearchedRates(search=(1e-4, 1e-1), trials=6)
    excess = []
    for best in OPTIMA:
        told = search(rates, lambda lr, best=best: None if lr > 2 * best else curve(lr, best))
        finite = [(loss, lr) for lr, loss in told if loss is not None]
        excess.append(min(finite)[0] - 2.0 if finite else math.inf)
    assert np.mean(np.isfinite(excess)) > 0.95
    assert np.median(excess) < 0.02
    assert suggest_rate(rates, [(3.16e-4, 2.5), (3.16e-3, 2.4), (3.16e-2, None)]) < 3.16e-3


# -- a search that runs -----------------------------------------------------------------------------------------


def test_every_arm_has_as_many_rates_each_on_all_seeds(bench, searched):
    watcher = bench.run(searched)
    rows = rows_of(bench, searched)
    for arm in ("baseline", "g1"):
        assert len(rates_of(rows, arm)) == 6
        assert rates_of(rows, arm) >= {3.16e-4, 3.16e-3, 3.16e-2}
    assert Counter((row.arm, row.config.train.lr) for row in rows).most_common()[-1][1] == 2
    assert {row.state for row in rows} == {"COMPLETE"}
    assert sum(line.startswith("added") for line in watcher.lines) == 6
    (table,) = results(bench.store, "tiny").tables
    assert [(row.num_missing, row.rank is None) for row in table.rows] == [(0, False), (0, False)]
    for row in table.rows:
        losses = {
            lr: fmean(fake_validation(one.config, 20).loss_nats for one in rows if lr_is(one, row.arm, lr))
            for lr in rates_of(rows, row.arm)
        }
        assert row.best_lr == min(losses, key=losses.get)
    assert any(note.startswith("learning rates searched between 1e-4 and 0.1: 6 an arm") for note in table.footnotes)


def lr_is(row, arm, lr):
    return (row.arm, row.config.train.lr) == (arm, lr)


def test_a_killed_controller_is_followed_by_one_that_suggests_the_same(bench, searched, tmp_path):
    class Killed(Exception):
        pass

    watcher = Watcher()

    def kill(line):
        if sum(one.startswith("added") for one in watcher.lines) == 3:
            raise Killed

    watcher.on_line = kill
    with pytest.raises(Killed), bench.controller(searched, FakeCluster(2), watcher) as controller:
        controller.run()
    bench.store.release_lease(controller.lease)
    assert len(bench.store.grown_rates(1)) == 3
    bench.run(searched)
    found = {arm: rates_of(rows_of(bench, searched), arm) for arm in ("baseline", "g1")}
    again = bench.run(plan_of(tmp_path, [*SEARCH, "name=again"]))
    assert not again.started(), "another sweep asks for the same rates, and finds all trials done"
    rows = bench.store.trials(bench.store.sweep("again").id)
    assert {arm: rates_of(rows, arm) for arm in found} == found
    assert bench.run(searched).lines == []


def test_a_failed_seed_stops_the_search_of_its_arm_until_it_runs_again(bench, searched):
    def fate(spec, config, step):
        is_it = config.gate is not None and config.train.lr == 3.16e-3 and config.seed == 2
        return "raise" if is_it and spec.number == 1 and step == 8 else None

    bench.run(searched, fate)
    rows = rows_of(bench, searched)
    assert {arm: len(rates_of(rows, arm)) for arm in ("baseline", "g1")} == {"baseline": 6, "g1": 3}
    (table,) = results(bench.store, "tiny").tables
    gated = next(row for row in table.rows if row.arm == "g1")
    assert (gated.num_missing, gated.rank) == (6, None)
    bench.store.reopen(1, [row.fingerprint for row in rows if row.state == "FAILED"])
    bench.run(searched)
    assert len(rates_of(rows_of(bench, searched), "g1")) == 6


def test_a_diverged_rate_is_no_candidate_and_the_search_goes_on(bench, searched):
    def fate(spec, config, step):
        return "not finite" if config.train.lr > 1e-2 and step == 8 else None

    bench.run(searched, fate)
    rows = rows_of(bench, searched)
    assert {len(rates_of(rows, arm)) for arm in ("baseline", "g1")} == {6}
    (table,) = results(bench.store, "tiny").tables
    assert all(row.best_lr < 1e-2 and row.diverged_lr > 1e-2 for row in table.rows)


def test_confirming_seeds_run_at_the_best_rate_of_the_whole_search(bench, tmp_path):
    plan = plan_of(tmp_path, [SEARCH[0], "seeds={select: [1], confirm: [3, 4]}", *SEARCH[2:]])
    bench.run(plan)
    rows = rows_of(bench, plan)
    for arm in ("baseline", "g1"):
        losses = {
            row.config.train.lr: fake_validation(row.config, 20).loss_nats
            for row in rows
            if row.arm == arm and row.seed == 1
        }
        assert len(losses) == 6
        confirming = [row for row in rows if row.arm == arm and row.seed in (3, 4)]
        assert {row.config.train.lr for row in confirming} == {min(losses, key=losses.get)}
        assert {row.state for row in confirming} == {"COMPLETE"}
    (table,) = results(bench.store, "tiny").tables
    assert not any(row.exploratory for row in table.rows)


def test_submitting_again_keeps_what_was_added_and_a_longer_search_goes_on(bench, searched, tmp_path):
    bench.run(searched)
    before = {row.fingerprint: row.state for row in rows_of(bench, searched)}
    assert len(before) == 24
    assert bench.store.add(searched).num_new == 0
    assert {row.fingerprint: row.state for row in rows_of(bench, searched)} == before
    longer = plan_of(tmp_path, ["axes.train.lr={search: [1e-4, 1e-1], trials: 7}", *SEARCH[1:]])
    bench.run(longer)
    assert {len(rates_of(rows_of(bench, longer), arm)) for arm in ("baseline", "g1")} >= {7}


def test_each_value_of_another_axis_is_searched_by_itself(bench, tmp_path):
    axes = "axes={train.lr: {search: [1e-4, 1e-1], trials: 3}, train.tokens: [2560, 5120]}"
    plan = plan_of(tmp_path, [axes, "seeds=[1]", "diagnostics=null"])
    bench.run(plan)
    cells = Counter((row.arm, row.axes["train.tokens"]) for row in rows_of(bench, plan))
    assert cells == {(arm, tokens): 3 for arm in ("baseline", "g1") for tokens in (2560, 5120)}


def test_the_plan_names_the_first_rates_and_the_price_of_the_others(searched):
    assert {trial.axes["train.lr"] for trial in searched.trials} == {3.16e-4, 3.16e-3, 3.16e-2}
    console = Console(width=200, record=True, file=io.StringIO())
    console.print(plan_table(searched))
    shown = console.export_text()
    assert "then 6 learning rates an arm in all, searched between 1e-4 and 0.1: 6 cells more, about " in shown


def test_a_grown_plan_is_a_plan_with_more_rates(searched):
    more = searched.grown([GrownRate("g1", {}, 2e-3), GrownRate("g1", {}, 1.0), GrownRate("nobody", {}, 2e-3)])
    new = [trial for trial in more.trials if trial not in searched.trials and trial.axes["train.lr"] == 2e-3]
    assert sorted((trial.arm, trial.seed) for trial in new) == [("g1", 1), ("g1", 2)]
    assert len(more.trials) == len(searched.trials) + 2, "outside of the range, and of no arm, nothing is added"
    assert new[0].config.fingerprint() == new[0].fingerprint
    assert more.grown([GrownRate("g1", {}, 2e-3)]) is more


# -- a grid that grows ------------------------------------------------------------------------------------------


def arm_of(losses, name="a"):
    return best_learning_rate(name, [CellResult(name, lr, 1, "COMPLETE", loss) for lr, loss in losses.items()])


GRID = ExtendedRates(values=(1e-3, 2e-3, 4e-3), extend=2)
UP, DOWN = {1e-3: 3.0, 2e-3: 2.9, 4e-3: 2.8}, {1e-3: 2.8, 2e-3: 2.9, 4e-3: 3.0}
INSIDE = {1e-3: 3.0, 2e-3: 2.8, 4e-3: 2.9}


@pytest.mark.parametrize(
    ("arms", "lr"),
    [
        ([INSIDE, INSIDE], None),
        ([INSIDE, UP], 8e-3),
        ([INSIDE, DOWN], 5e-4),
        ([UP, UP, DOWN], 8e-3),
        ([UP, DOWN], 5e-4),
        ([{**INSIDE, 8e-3: 2.7}], 1.6e-2),
        ([{**INSIDE, 8e-3: 2.7, 1.6e-2: 2.6}], None),
    ],
)
def test_the_grid_grows_by_its_ratio_where_more_arms_are_at_the_edge_and_not_for_ever(arms, lr):
    found = extension(GRID, [arm_of(losses, f"a{i}") for i, losses in enumerate(arms)])
    assert found == (None if lr is None else pytest.approx(lr))


def test_all_arms_get_the_new_rates_and_stop_at_the_declared_number(bench, tmp_path):
    plan = plan_of(tmp_path, EXTEND)
    watcher = bench.run(plan)
    rows = rows_of(bench, plan)
    grid = rates_of(rows, "g1")
    assert rates_of(rows, "baseline") == grid
    assert {row.state for row in rows} == {"COMPLETE"}
    number = len(grid) - 3
    assert sum(line.startswith("added") for line in watcher.lines) == 2 * number
    (table,) = results(bench.store, "tiny").tables
    assert number == 2 or not any(row.edge for row in table.rows)
    assert any(f"the grid was extended at its edge by {number} of at most 2 rates" in note for note in table.footnotes)
    assert number > 0, "the losses of the fake gangs are such that some arm is at an edge"
    assert grow_rates(bench.store, plan, print).open_groups == ()


def test_confirming_waits_for_the_grid_to_be_whole(bench, tmp_path):
    plan = plan_of(tmp_path, [EXTEND[0], "seeds={select: [1, 2], confirm: [3]}", *EXTEND[2:]])
    watcher = bench.run(plan)
    kinds = [line.split()[0] for line in watcher.lines if line.startswith(("added", "chosen"))]
    assert kinds == sorted(kinds), "rates are added first, and chosen then"
    assert kinds.count("chosen") == 2


# -- grammar ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("overrides", "said"),
    [
        (["axes.train.lr={search: [1e-1, 1e-4], trials: 6}"], "two rates, the second at least 1.5 times the first"),
        (["axes.train.lr={search: [1e-4], trials: 6}"], "search"),
        (["axes.train.lr={search: [1e-4, 1e-1]}"], "trials: Field required"),
        (["axes.train.lr={search: [1e-4, 1e-1], trials: 2}"], "trials: "),
        (["axes.train.lr={search: [1e-4, 1e-1], trails: 6}"], "trails: "),
        (["axes.train.lr={values: [1e-3, 1e-4], extend: 1}"], "rates in ascending order"),
        (["axes.train.lr={values: [1e-3, 2e-3]}"], "extend: Field required"),
        (["axes={train.tokens: {search: [1000, 2000], trials: 6}}"], "only train.lr is searched or extended"),
        ([SEARCH[0], "prune.rank={method: halving}"], "prune.rank: learning rates are searched or extended"),
        ([SEARCH[0], "exclude=[{train.lr: 1e-3}]"], "allowed: the other axes"),
        ([SEARCH[0], "rows=[{train.lr: 1e-3}]"], "rows without them"),
        ([SEARCH[0], "train.min_lr_fraction={of: train.lr, times: 1}"], "another value is a multiple of it"),
    ],
)
def test_what_can_not_grow_is_refused(tmp_path, overrides, said):
    with pytest.raises(UserError) as caught:
        plan_of(tmp_path, overrides)
    assert said in str(caught.value)
