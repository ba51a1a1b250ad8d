"""The tables: crash-aware rows and honest footnotes."""

import csv
import io
import math
import random
import re
from dataclasses import replace

import pytest
from store_backends import postgres_server, store_url  # noqa: F401
from verdict_tables import failed, heading, note, quickstart, row_of, swap, table_of, trial

from orchestrator.report import (
    tabulate,
    to_csv,
    to_markdown,
    to_text,
)
from orchestrator.verdict import Design, Looks


def test_back_ends_are_named_when_they_are_mixed():
    local = [
        trial(arm, seed=seed, loss=2.4, backends=("local",)) for arm in ("baseline", "g1-headwise") for seed in (1, 2)
    ]
    assert note(table_of(local), "mixed") is None
    mixed = swap(local, "g1-headwise", 4e-3, 2, backends=("local", "transformer_engine"))
    assert note(table_of(mixed), "mixed") == (
        "mixed back ends, so arms differ by rounding and in speed besides: baseline 2 local, g1-headwise 1 local, "
        "g1-headwise 1 local then transformer_engine"
    )


# Rows


def test_rows_follow_the_sweeps_order_with_the_baseline_first():
    table = table_of(quickstart(), arms=("g2-elementwise", "g1-headwise", "baseline", "g1-elementwise"))
    assert [row.arm for row in table.rows] == ["baseline", "g2-elementwise", "g1-headwise", "g1-elementwise"]


def test_a_row_describes_the_arm_at_its_own_best_learning_rate():
    row = row_of([trial(lr=4e-3, seed=1, loss=2.4), trial(lr=4e-3, seed=2, loss=2.42), *others()], "baseline")
    assert row.best_lr == 4e-3
    assert row.losses_nats == (2.4, 2.42)
    assert row.loss_nats == pytest.approx(2.41)
    assert row.loss_sd_nats == pytest.approx(0.02 / math.sqrt(2))
    assert row.bits_per_byte == pytest.approx(2.41 / math.log(2))
    assert row.tokens_per_second == 5001.5
    assert row.counts == {"COMPLETE": 4, "DIVERGED": 2}
    assert (row.diverged_lr, row.diverged_lr_num_diverged, row.diverged_lr_num_seeds) == (1.0, 2, 2)


def others(arm="baseline"):
    return [trial(arm, 1e-3, seed, 2.6) for seed in (1, 2)] + [trial(arm, 1.0, seed) for seed in (1, 2)]


def test_the_quick_start_compares_three_arms_and_ranks_all_four():
    table = table_of(quickstart())
    assert table.num_compared == 3
    assert sorted(row.rank for row in table.rows) == [1, 2, 3, 4]
    assert min(table.rows, key=lambda row: row.loss_nats).rank == 1
    assert table.noise_floor.degrees_of_freedom == 4
    for row in table.rows[1:]:
        assert row.low_nats < row.delta_nats < row.high_nats


@pytest.mark.parametrize("shuffle", range(3))
def test_the_order_of_the_trials_changes_nothing(shuffle):
    expected = tabulate(heading(), quickstart()).tables
    assert tabulate(heading(), quickstart(shuffle=shuffle)).tables == expected


def test_two_seeds_that_do_not_decide_say_how_many_more():
    row = row_of(quickstart(), "g1-headwise")
    assert row.decision == "inconclusive"
    assert re.fullmatch(r"inconclusive: \d+ more seeds", row.verdict)


def test_enough_seeds_of_a_large_effect_are_a_verdict():
    seeds = tuple(range(1, 9))
    assert row_of(quickstart(seeds), "g1-elementwise", seeds=seeds).decision == "better"


def test_the_optimum_between_the_rates_and_the_chance_to_diverge_are_below_the_table():
    rng, trials = random.Random(1), []
    for arm in ("baseline", "g1"):
        for lr in (1e-3, 2e-3, 4e-3, 8e-3):
            loss = 2.0 + 0.1 * math.log(lr / 3e-3) ** 2
            trials += [trial(arm, lr, seed, loss + rng.gauss(0, 0.001)) for seed in (1, 2)]
        trials += [trial(arm, 1.0, 1), trial(arm, 1.0, 2)]
    table = table_of(trials, arms=("baseline", "g1"))
    assert [row.optimum.lr for row in table.rows] == pytest.approx([3e-3, 3e-3], rel=0.03)
    assert all(row.optimum.low < row.optimum.lr < row.optimum.high for row in table.rows)
    said = r"0\.01 nats of it in braces: baseline 3\S*e-3 \[\S*e-3, 3\S*e-3\] \{2.*e-3 to 4.*e-3\}; g1 3"
    assert re.search(said, note(table, "optimum"))
    assert note(table, "chance to diverge").endswith("baseline at 1 2 of 2 [0.16, 1.00], g1 at 1 2 of 2 [0.16, 1.00]")


# Crashes


def test_a_failed_trial_costs_the_rank_but_not_the_verdict_at_another_learning_rate():
    table = table_of(failed(quickstart(), "g1-headwise", 1e-3, 2, cause="out_of_memory"))
    row = next(row for row in table.rows if row.arm == "g1-headwise")
    assert (row.rank, row.best_lr, row.counts["FAILED"]) == (None, 4e-3, 1)
    assert row.low_nats is not None
    assert sorted(other.rank for other in table.rows if other is not row) == [1, 2, 3]
    assert note(table, "no rank").endswith("g1-headwise 1 failed (out_of_memory)")


def test_a_failed_seed_at_the_best_learning_rate_takes_its_mean_away():
    row = row_of(failed(quickstart(), "g1-headwise", 4e-3, 2), "g1-headwise")
    assert row.best_lr == 1e-3
    assert row.edge == "lowest"


def test_a_diverged_seed_takes_the_mean_but_not_the_rank():
    row = row_of(failed(quickstart(), "g1-headwise", 4e-3, 2, state="DIVERGED"), "g1-headwise")
    assert row.rank == 4
    assert (row.best_lr, row.diverged_lr) == (1e-3, 4e-3)
    assert (row.diverged_lr_num_diverged, row.diverged_lr_num_seeds) == (1, 2)


def test_a_refused_cell_counts_as_missing():
    trials = [t for t in quickstart() if (t.arm, t.lr) != ("g1-headwise", 1.0)]
    table = table_of(trials)
    row = next(row for row in table.rows if row.arm == "g1-headwise")
    assert (row.rank, row.num_missing) == (None, 2)
    assert note(table, "no rank").endswith("g1-headwise 2 missing")


def test_a_seed_that_no_trial_has_yet_is_missing_everywhere():
    table = table_of(quickstart(), seeds=(1, 2, 3))
    assert [row.loss_nats for row in table.rows] == [None] * 4
    assert table.rows[0].verdict == "no result: no learning rate has all its seeds complete"


@pytest.mark.parametrize("state", ["WAITING", "RUNNING", "CANCELED"])
def test_an_unfinished_trial_costs_the_rank_and_is_said(state):
    table = table_of(failed(quickstart(), "baseline", 1e-3, 1, state=state))
    assert table.rows[0].rank is None
    assert note(table, "unfinished") == (
        f"unfinished: 1 {state.lower()}; no rank until they end, and the table may change: baseline"
    )


@pytest.mark.parametrize(
    ("states", "words"),
    [
        (("DIVERGED", "DIVERGED"), "no result: all 6 trials diverged"),
        (("FAILED", "FAILED"), "no result: all 6 trials failed"),
        (("PRUNED", "PRUNED"), "no result: all 6 trials were pruned"),
        (("DIVERGED", "FAILED"), "no result: no learning rate has all its seeds complete"),
        (("DIVERGED", "RUNNING"), "no result: no learning rate has all its seeds complete yet"),
    ],
)
def test_an_arm_without_a_comparable_cell_says_why(states, words):
    lost = [trial("g1-headwise", lr, seed, None, states[seed - 1]) for lr in (1e-3, 4e-3, 1.0) for seed in (1, 2)]
    table = table_of([t for t in quickstart() if t.arm != "g1-headwise"] + lost)
    row = next(row for row in table.rows if row.arm == "g1-headwise")
    assert (row.verdict, row.decision, row.rank) == (words, "no result", None)
    assert (row.loss_nats, row.delta_nats, row.tokens_per_second, row.exploratory) == (None, None, None, False)
    assert table.num_compared == 2


def test_an_arm_that_was_refused_altogether_still_has_a_row():
    row = row_of([t for t in quickstart() if t.arm != "g1-headwise"], "g1-headwise")
    assert row.verdict == "no result: no trial (refused or excluded)"
    assert (row.counts, row.num_missing, row.num_parameters) == ({}, 6, None)


def test_a_lost_baseline_leaves_no_verdicts():
    trials = [t for t in quickstart() if t.arm != "baseline"] + [trial(lr=lr, seed=s) for lr in (1.0,) for s in (1, 2)]
    words = [row.verdict for row in table_of(trials).rows]
    assert words[0] == "no result: all 2 trials diverged"
    assert set(words[1:]) == {"no result: the baseline has none (all 2 trials diverged)"}


def test_a_sweep_that_has_not_started_has_a_table_of_nothing():
    waiting = [t._replace(state="WAITING", slice_loss_nats=None, tokens_per_second=None) for t in quickstart()]
    table = table_of(waiting)
    assert {row.decision for row in table.rows} == {"no result"}
    assert (table.noise_floor, note(table, "loss")) == (None, None)
    assert tabulate(heading(), []).tables == ()
    assert "no trials yet" in to_text(tabulate(heading(), []))


# Footnotes


def test_a_choice_among_learning_rates_marks_every_row_exploratory():
    table = table_of(quickstart())
    assert all(row.exploratory for row in table.rows)
    assert "winner's bias" in note(table, "* exploratory")


def test_one_finite_learning_rate_is_no_choice():
    table = table_of([t for t in quickstart() if t.lr != 1e-3])
    assert not any(row.exploratory for row in table.rows)
    assert note(table, "* exploratory") is None
    assert note(table, "edge") == (
        "edge of the grid: the best learning rate is the lowest tried, the optimum may be lower: "
        "baseline 4e-3, g1-elementwise 4e-3, g1-headwise 4e-3, g2-elementwise 4e-3"
    )


def test_the_edge_alarm_names_arms_and_is_silent_below_a_diverged_rate():
    assert note(table_of(quickstart()), "edge") is None
    above = [t for t in quickstart() if t.lr != 1.0]
    assert note(table_of(above), "edge").startswith("edge of the grid: the best learning rate is the highest tried")


def test_the_footnotes_name_noise_divergence_reuse_and_the_measure():
    trials = swap(quickstart(), "baseline", 4e-3, 1, trained_in="older")
    table = table_of(trials)
    assert re.search(
        r"a seed SD of 0\.0\d\d\d nats, pooled over 4 arms; differences in SDs: g1-ele", note(table, "noise")
    )
    assert note(table, "diverged").endswith(
        "at LR 1 baseline 2 of 2, g1-elementwise 2 of 2, g1-headwise 2 of 2, g2-elementwise 2 of 2"
    )
    assert note(table, "reused") == "reused trials: 1 from older"
    assert note(table, "mixed") is None
    assert note(table, "loss") == "loss: mean and SD over 2 seeds, on the validation slice"
    assert note(table, "interval").startswith("interval: 95 % for all 3 differences to baseline at once (Dunnett")


def test_the_whole_split_counts_only_when_every_complete_trial_has_it():
    whole = [t._replace(full_loss_nats=t.slice_loss_nats and t.slice_loss_nats + 1) for t in quickstart()]
    assert tabulate(heading(), whole).split == "full"
    assert row_of(whole, "baseline").loss_nats == pytest.approx(row_of(quickstart(), "baseline").loss_nats + 1)
    mixed = swap(whole, "baseline", 1e-3, 1, full_loss_nats=None)
    assert row_of(mixed, "baseline") == row_of(quickstart(), "baseline")
    assert note(table_of(mixed), "loss").endswith("some complete trials were not measured on the whole split")


def test_the_baselines_extra_seeds_are_part_of_its_cells_only():
    trials = [*quickstart(), *(trial("baseline", lr, 3, 2.42) for lr in (1e-3, 4e-3)), trial("baseline", 1.0, 3)]
    table = table_of(trials, extra_baseline_seeds=(3,))
    assert [len(row.losses_nats) for row in table.rows] == [3, 2, 2, 2]
    assert [row.num_missing for row in table.rows] == [0] * 4
    assert note(table, "loss").startswith("loss: mean and SD over 2 to 3 seeds")
    without = table_of(quickstart(), extra_baseline_seeds=(3,)).rows[0]
    assert (without.loss_nats, without.num_missing) == (None, 3)


def test_the_method_the_pairing_and_the_test_of_variances_are_said():
    welch = table_of(quickstart(), design=Design("welch"))
    assert "(Welch, Bonferroni, " in note(welch, "interval")
    paired = table_of(quickstart(), design=Design(paired=True))
    assert "(Dunnett, pooled variance, paired by seed, 3 degrees of freedom)" in note(paired, "interval")
    auto = table_of(quickstart(), design=Design("auto"))
    assert f"equal variances gave p = {auto.variances_p:.2g}" in note(auto, "interval")


def test_a_loss_is_paired_with_that_of_its_own_seed_in_whatever_order_the_trials_ran():
    seeds, design = (3, 1, 4, 2), Design(paired=True)
    intervals = {
        tuple((row.low_nats, row.high_nats) for row in table.rows[1:])
        for shuffle in range(8)
        for table in [table_of(quickstart(seeds, shuffle), seeds=seeds, design=design)]
    }
    assert len(intervals) == 1


def test_looks_are_said_and_one_too_many_marks_every_row():
    assert note(table_of(quickstart()), "look") is None
    first = table_of(quickstart(), design=Design(looks=Looks(2)))
    assert note(first, "look") == (
        "look 1 of 2: O'Brien and Fleming's spending, 0.0056 of alpha 0.05 up to here; the intervals are this look's"
    )
    assert first.critical_value > table_of(quickstart()).critical_value
    late = table_of(quickstart(), design=Design(looks=Looks(1, ((2, 2),))), exploratory=("verdicts were read 2 times",))
    assert note(late, "look") == "look 2, 1 declared: this one's intervals count no looks"
    assert note(late, "* exploratory").endswith("verdicts were read 2 times")


def test_the_tail_of_the_schedule_is_said_when_it_holds_more_than_one_validation():
    averaged = [one._replace(num_tail_points=4) for one in quickstart()]
    assert note(table_of(averaged), "loss") == (
        "loss: mean and SD over 2 seeds, 4 validations in the last 10 % of the schedule a trial, "
        "on the validation slice"
    )


def test_perplexity_stands_beside_nats_and_bits():
    answer = tabulate(heading(), quickstart())
    for row, line in zip(answer.tables[0].rows, csv.DictReader(io.StringIO(to_csv(answer))), strict=True):
        assert row.perplexity == math.exp(row.loss_nats) == float(line["perplexity"])
        assert f"{row.perplexity:.5g}" in to_text(answer, 120)
        assert f"{row.perplexity:.5g}" in to_text(answer, 60)
        assert f"| {row.perplexity:.5g} |" in to_markdown(answer)


# Axes


def test_other_axes_split_the_sweep_into_tables_in_the_order_of_their_values():
    trials = [
        trial(arm, 4e-3, seed, 2.4 + seed / 1000 + size / 1e6, axes={"train.tokens": size, "model.preset": preset})
        for arm in ("baseline", "gated")
        for seed in (1, 2)
        for size in (90_000, 1_000_000)
        for preset in ("cpu-4m", "cpu-1m")
    ]
    answer = tabulate(replace(heading(arms=("baseline", "gated")), axis_names=("model.preset", "train.tokens")), trials)
    assert [dict(table.axes) for table in answer.tables] == [
        {"model.preset": preset, "train.tokens": size}
        for preset in ("cpu-1m", "cpu-4m")
        for size in (90_000, 1_000_000)
    ]
    assert all(row.counts == {"COMPLETE": 2} and not row.num_missing for t in answer.tables for row in t.rows)
    assert "model.preset = cpu-1m, train.tokens = 90000" in to_text(answer)
    assert [line["train.tokens"] for line in csv.DictReader(io.StringIO(to_csv(answer)))][:3] == ["90000"] * 2 + [
        "1000000"
    ]


def test_a_derived_axis_follows_its_source_and_splits_nothing():
    trials = [
        trial(arm, lr, seed, 2.4 + lr + seed / 1000, axes={"train.epsilon": lr * scale})
        for arm, scale in (("baseline", 1e-5), ("gated", 2e-5))
        for lr in (1e-3, 4e-3)
        for seed in (1, 2)
    ]
    table = table_of(trials, arms=("baseline", "gated"), derived_axes=frozenset({"train.epsilon"}))
    assert [(row.rank, row.num_missing, row.num_finite_lrs) for row in table.rows] == [(1, 0, 2), (1, 0, 2)]


def test_mixed_layouts_and_trials_that_changed_theirs_are_named():
    trials = [one._replace(layouts=("data 2",)) for one in quickstart()]
    assert note(table_of(trials), "mixed layouts") is None
    trials = swap(trials, "g1-headwise", 4e-3, 1, layouts=("data 2", "one rank"))
    said = note(table_of(trials), "mixed layouts")
    assert "(1 trial resumed on another layout)" in said
    assert "g1-headwise 1 on data 2 then one rank" in said


def test_cells_with_holes_are_listed_with_all_their_states_by_arm_and_rate():
    table = table_of(failed(quickstart(), "g1-headwise", 4e-3, 2, cause="error"))
    assert note(table, "cells with holes") == "cells with holes: g1-headwise at LR 4e-3 1 complete, 1 failed"
    states = {(cell.arm, cell.lr): dict(cell.counts) for cell in table.states}
    assert len(states) == 12
    assert states["g1-headwise", 4e-3] == {"COMPLETE": 1, "FAILED": 1}
    assert states["baseline", 1.0] == {"DIVERGED": 2}
    assert note(table_of(quickstart()), "cells with holes") is None
