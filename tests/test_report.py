"""The tables: crash-aware rows, honest footnotes, every renderer's numbers, and the store's own columns behind them."""

import csv
import io
import json
import math
import random
import re
from dataclasses import replace

import pytest
from rich.console import Console
from store_backends import postgres_server, store_url  # noqa: F401

from models.run_dir import Summary, ValidationRecord
from orchestrator.plan import Plan, Refusal, expand
from orchestrator.report import (
    SweepHeading,
    TrialResult,
    plan_table,
    results,
    status_table,
    tabulate,
    to_csv,
    to_json,
    to_markdown,
    to_text,
)
from orchestrator.store import Store
from orchestrator.sweep import UserError, parse
from orchestrator.verdict import Design, Looks

ARMS = {"baseline": (2.41, 820_608), "g1-elementwise": (2.395, 821_632), "g1-headwise": (2.404, 819_584)}
ARMS |= {"g2-elementwise": (2.412, 819_584)}
QUESTION = "Does a gate on the attention output lower the loss at equal parameters?"


def heading(seeds=(1, 2), arms=tuple(ARMS), **changes):
    return SweepHeading("quickstart", QUESTION, "baseline", arms, seeds, 0.01, 0.05, ("train.lr",), **changes)


def trial(arm="baseline", lr=4e-3, seed=1, loss=None, state=None, **changes):
    axes = {"train.lr": lr, **changes.pop("axes", {})}
    given = TrialResult(
        fingerprint=f"{arm}/{'/'.join(map(str, axes.values()))}/{seed}",
        arm=arm,
        axes=axes,
        lr=lr,
        seed=seed,
        state=state or ("COMPLETE" if loss is not None else "DIVERGED"),
        num_parameters=820_608,
        training_flops=5.3e11,
        num_attempts=1,
        slice_loss_nats=loss,
        slice_bits_per_byte=None if loss is None else loss / math.log(2),
        tokens_per_second=None if loss is None else 5000.0 + seed,
    )
    return given._replace(**changes)


def quickstart(seeds=(1, 2), shuffle=0):
    """Four arms, three learning rates of which 1.0 diverges: what the quick start is like."""
    rng = random.Random(4)
    trials = []
    for arm, (mean, num_parameters) in ARMS.items():
        for seed in seeds:
            for lr, above in ((1e-3, 0.2), (4e-3, 0.0), (1.0, None)):
                loss = None if above is None else mean + above + rng.gauss(0, 0.01)
                trials.append(trial(arm, lr, seed, loss, num_parameters=num_parameters))
    return random.Random(shuffle).sample(trials, len(trials))


def swap(trials, arm, lr, seed, **changes):
    """The same trials, one of them changed."""
    hit = [(t.arm, t.lr, t.seed) == (arm, lr, seed) for t in trials]
    assert sum(hit) == 1
    return [t._replace(**changes) if is_it else t for t, is_it in zip(trials, hit, strict=True)]


def failed(trials, arm, lr, seed, state="FAILED", **changes):
    return swap(trials, arm, lr, seed, state=state, slice_loss_nats=None, slice_bits_per_byte=None, **changes)


def table_of(trials, **changes):
    (table,) = tabulate(heading(**changes), trials).tables
    return table


def row_of(trials, arm, **changes):
    return next(row for row in table_of(trials, **changes).rows if row.arm == arm)


def note(table, start):
    found = [text for text in table.footnotes if text.startswith(start)]
    return found[0] if found else None


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


# Renderers


def test_the_quick_starts_table_fits_120_columns_and_shows_every_number():
    answer = tabulate(heading(), quickstart())
    text = to_text(answer, 120)
    assert max(map(len, text.splitlines())) <= 120
    assert text.splitlines()[0] == f"quickstart: {QUESTION}"
    assert text.splitlines()[3].split() == [
        "#",
        "arm",
        "LR",
        "nats",
        "perplexity",
        "[interval]",
        "params",
        "/s",
        "trials",
        "at",
        "LR",
        "verdict",
    ]
    for row in answer.tables[0].rows:
        assert f"{row.loss_nats:.4f}" in text
        assert f"±{row.loss_sd_nats:.4f}" in text
        assert f"{row.num_parameters:,}" in text
    for row in answer.tables[0].rows[1:]:
        assert f"{row.delta_nats:+.4f}" in text
        assert f"[{row.low_nats:+.4f}, {row.high_nats:+.4f}]" in text


@pytest.mark.parametrize("width", [200, 120, 100, 80, 60, 40])
def test_no_width_cuts_a_number(width):
    answer = tabulate(heading(), quickstart())
    text = to_text(answer, width)
    assert max(map(len, text.splitlines())) <= width
    assert "…" not in text
    for row in answer.tables[0].rows:
        wanted = [f"{row.loss_nats:.4f}", f"{row.bits_per_byte:.4f}", f"{row.num_parameters:,}", row.arm]
        wanted += [] if row.is_baseline else [f"[{row.low_nats:+.4f},", f"{row.high_nats:+.4f}]"]
        assert [word for word in wanted if word not in text.replace("\n", " ").split() and word not in text] == []


def test_names_are_never_read_as_markup():
    trials = [t._replace(arm="[red]gated[/red]") if t.arm == "g1-headwise" else t for t in quickstart()]
    names = tuple(dict.fromkeys(t.arm for t in trials))
    for width in (120, 60):
        assert "[red]gated[/red]" in to_text(tabulate(heading(arms=names), trials), width)


def test_csv_gives_back_every_number_unrounded():
    answer = tabulate(heading(), failed(quickstart(), "g1-headwise", 1e-3, 2))
    lines = list(csv.DictReader(io.StringIO(to_csv(answer))))
    assert len(lines) == 4
    for line, row in zip(lines, answer.tables[0].rows, strict=True):
        for name in (
            "best_lr",
            "loss_nats",
            "loss_sd_nats",
            "bits_per_byte",
            "delta_nats",
            "low_nats",
            "high_nats",
            "rank",
        ):
            value = getattr(row, name)
            assert line[name] == "" if value is None else float(line[name]) == value
        assert (line["verdict"], line["arm"], line["exploratory"]) == (row.verdict, row.arm, "true")
        assert int(line["num_failed"]) == row.counts.get("FAILED", 0)
        assert int(line["num_diverged"]) == 2


def test_json_gives_back_every_number_with_its_formula_and_its_trials():
    answer = tabulate(heading(), quickstart())
    content = json.loads(to_json(answer))
    table = content["tables"][0]
    known = {t["fingerprint"] for t in content["trials"]}
    assert len(known) == 24
    for line, row in zip(table["rows"], answer.tables[0].rows, strict=True):
        assert tuple(line["losses_nats"]) == row.losses_nats
        for name, cell in line.items():
            if isinstance(cell, dict) and "formula" in cell:
                assert cell["value"] == getattr(row, name)
                assert re.fullmatch(r"[a-z-]+-\d+", cell["formula"])
                assert set(cell["trials"]) <= known
        assert line["loss_nats"]["trials"] == [f"{row.arm}/0.004/{seed}" for seed in (1, 2)]
        assert len(line["best_lr"]["trials"]) == 6
        assert len(line["low_nats"]["trials"]) == 8
    assert table["rows"][1]["delta_nats"]["trials"] == [
        *table["rows"][0]["loss_nats"]["trials"],
        *table["rows"][1]["loss_nats"]["trials"],
    ]
    assert table["noise_floor"]["sd_nats"]["value"] == answer.tables[0].noise_floor.sd_nats


def test_json_and_csv_say_nothing_where_there_is_nothing():
    answer = tabulate(heading(), [t._replace(state="WAITING", slice_loss_nats=None) for t in quickstart()])
    content = json.loads(to_json(answer))
    assert content["tables"][0]["rows"][0]["loss_nats"]["value"] is None
    assert content["tables"][0]["noise_floor"] == {}
    assert next(csv.DictReader(io.StringIO(to_csv(answer))))["loss_nats"] == ""


def test_output_is_deterministic():
    first, second = (tabulate(heading(), quickstart()) for _ in range(2))
    for render in (to_text, to_csv, to_json, to_markdown):
        assert render(first) == render(second)


def test_markdown_is_one_table_whose_cells_cannot_break_out():
    trials = [t._replace(arm="a|b_*") if t.arm == "g1-headwise" else t for t in quickstart()]
    text = to_markdown(tabulate(heading(arms=tuple(dict.fromkeys(t.arm for t in trials))), trials))
    lines = [line for line in text.splitlines() if line.startswith("|")]
    assert len(lines) == 6
    assert {len(re.findall(r"(?<!\\)\|", line)) for line in lines} == {13}
    assert r"a\|b\_\*" in text


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


# Plan and status

SWEEP = """
name: small
question: Is it better?
base:
  model: {preset: cpu-tiny}
  data: {sequence_length: 64, validation: {slice_bytes: 1024, points: 1}}
  train: {tokens: 2560, batch_tokens: 256}
baseline: baseline
arms:
  baseline: {}
  gated: {gate: {position: sdpa}}
match: parameters
axes: {train.lr: [1e-3, 1.0]}
seeds: [1, 2]
verdict: {margin: 0.01}
controls: []
"""


@pytest.fixture(scope="module")
def plan():
    return expand(parse(SWEEP, "small.yaml"))


def printed(renderable, width=120):
    stream = io.StringIO()
    Console(file=stream, width=width, color_system=None).print(renderable)
    return "\n".join(line.rstrip() for line in stream.getvalue().splitlines())


@pytest.mark.parametrize("width", [120, 45])
def test_the_plan_shows_every_trial_and_what_exists_already(plan, width):
    states = {plan.trials[0].fingerprint: "COMPLETE", plan.trials[1].fingerprint: "FAILED"}
    text = printed(plan_table(plan, states), width)
    for planned in plan.trials:
        assert f"{planned.num_parameters:,}" in text
    assert text.count("new") == 6 + 1
    assert "8 trials: 6 new, 1 complete, 1 failed; 0 cells refused" in text.replace("\n", " ")
    flops = f"{plan.training_flops:.2e}".replace("e+", "e").replace("e0", "e")
    assert f"{flops} training FLOPs in all" in text.replace("\n", " ")


def test_refusals_come_first_under_their_reason(plan):
    refusals = (Refusal("gated", {"train.lr": 1.0}, "too wide"), Refusal("wide", {}, "too wide"))
    lines = printed(plan_table(Plan(plan.sweep, plan.trials, refusals))).splitlines()
    assert lines[2:6] == ["refused: 2 cells", "  too wide", "    gated, train.lr = 1", "    wide"]
    assert lines.index("    wide") < next(i for i, line in enumerate(lines) if "parameters" in line)
    nothing = printed(plan_table(Plan(plan.sweep, (), refusals)))
    assert nothing.endswith("0 trials: none; 2 cells refused")


def end(store, lease, planned, state, loss=None, log_tail=None):
    attempt = store.start_attempt(lease, planned.fingerprint, layout=planned.layout, provenance={})
    if loss is not None:
        measured = ValidationRecord(
            step=10, tokens=2560, fraction=1.0, split="slice", loss_nats=loss, bits_per_byte=loss / math.log(2),
            num_tokens=1024, num_bytes=1024,
        )  # fmt: skip
        store.record(lease, attempt, [measured])
    summary = Summary(outcome="complete", step=10, resume_step=0, seconds=1.0, tokens_per_second=500.0)
    cause = {"COMPLETE": "complete", "DIVERGED": "nonfinite", "FAILED": "error"}[state]
    store.end_attempt(
        lease, attempt, state=state, cause=cause, reason=f"it was {cause}", end_step=10,
        summary=summary if state == "COMPLETE" else None, log_tail=log_tail,
    )  # fmt: skip


def fill(store, plan, lease):
    for planned in plan.trials:
        if planned.config.train.lr == 1.0:
            end(store, lease, planned, "DIVERGED")
        else:
            end(store, lease, planned, "COMPLETE", 2.4 + planned.seed / 100 - (planned.arm == "gated") / 10)


def test_a_stored_sweep_becomes_the_same_table_on_every_back_end(plan, store_url):  # noqa: F811
    with Store(store_url) as store:
        lease = store.acquire_lease(store.add(plan).sweep_id, "host:1", 60)
        assert {row.decision for row in results(store, "small").tables[0].rows} == {"no result"}
        fill(store, plan, lease)
        answer = results(store, "small")
    (table,) = answer.tables
    baseline, gated = table.rows
    assert (answer.margin_nats, answer.alpha, answer.counts) == (0.01, 0.05, {"COMPLETE": 4, "DIVERGED": 4})
    assert (baseline.arm, baseline.best_lr, baseline.tokens_per_second) == ("baseline", 1e-3, 500.0)
    assert gated.losses_nats == pytest.approx((2.31, 2.32))
    assert gated.delta_nats == pytest.approx(-0.1)
    assert gated.bits_per_byte == pytest.approx(2.315 / math.log(2))
    assert (gated.decision, gated.rank, gated.exploratory) == ("better", 1, False)
    assert (gated.diverged_lr, gated.diverged_lr_num_diverged) == (1.0, 2)
    assert gated.num_parameters == next(t.num_parameters for t in plan.trials if t.arm == "gated")
    assert note(table, "reused") is None
    json.loads(to_json(answer))


def test_more_seeds_than_looks_mark_the_stored_sweep_and_changed_settings_are_shown(plan, tmp_path):
    with Store(f"sqlite:///{tmp_path / 'store.db'}") as store:
        lease = store.acquire_lease(store.add(plan).sweep_id, "host:1", 60)
        fill(store, plan, lease)
        longer = expand(parse(SWEEP, "small.yaml", ["seeds=[1, 2, 3]", "verdict.margin=0.2", "verdict.looks=2"]))
        store.add(longer)
        fill(store, Plan(longer.sweep, tuple(t for t in longer.trials if t.seed == 3), ()), lease)
        answer = results(store, "small")
        (table,) = answer.tables
        assert (answer.margin_nats, answer.design.looks) == (0.01, Looks(1, ((2, 2),)))
        assert note(table, "* exploratory").endswith("verdicts were read 2 times, 1 declared (verdict.looks)")
        assert all(row.exploratory for row in table.rows)
        assert "margin 0.01 holds, not 0.2; looks 1 holds, not 2." in note(table, "verdict settings")
        store.add(expand(parse(SWEEP, "small.yaml", ["seeds=[4, 5]"])))
        assert [row.losses_nats for row in results(store, "small").tables[0].rows] == [(), ()]
        assert results(store, "small").design.looks.number == 3
        store.add(expand(parse(SWEEP, "small.yaml", ["seeds=[1, 2]"])))
        again = results(store, "small")
        assert again.design.looks.number == 1
        assert "read 2 times, 1 declared" in note(again.tables[0], "* exploratory")


def test_declared_looks_are_counted_and_leave_no_mark(plan, tmp_path):
    text = SWEEP.replace("{margin: 0.01}", "{margin: 0.01, looks: 2}")
    with Store(f"sqlite:///{tmp_path / 'store.db'}") as store:
        first, second = (expand(parse(text, "small.yaml", [f"seeds={seeds}"])) for seeds in ([1, 2], [1, 2, 3]))
        lease = store.acquire_lease(store.add(first).sweep_id, "host:1", 60)
        fill(store, first, lease)
        assert note(results(store, "small").tables[0], "look").startswith("look 1 of 2")
        store.add(second)
        fill(store, Plan(second.sweep, tuple(t for t in second.trials if t.seed == 3), ()), lease)
        (table,) = results(store, "small").tables
        assert note(table, "look").startswith("look 2 of 2: O'Brien and Fleming's spending, 0.05 of alpha 0.05")
        assert not any(row.exploratory for row in table.rows)


def test_utilisation_is_shown_where_the_peak_is_known(plan, tmp_path):
    """500 tokens/s at 2,560 tokens a trial, by a declared peak; without one the figure is absent, not zero."""
    flops_per_second = 500.0 * plan.trials[0].training_flops / 2560
    declared = expand(parse(SWEEP + f"resources: {{peak_flops: {4 * flops_per_second}}}\n", "small.yaml"))
    twin = expand(parse(SWEEP.replace("small", "twin") + "resources: {peak_flops: 1e12}\n", "twin.yaml"))
    for number, (known, shown) in enumerate(((plan, None), (declared, 0.25))):
        with Store(f"sqlite:///{tmp_path / f'{number}.db'}") as store:
            lease = store.acquire_lease(store.add(known).sweep_id, "host:1", 60)
            fill(store, known, lease)
            answer = results(store, "small")
            baseline, gated = answer.tables[0].rows
            assert baseline.flops_per_second == pytest.approx(flops_per_second)
            assert gated.flops_per_second != baseline.flops_per_second
            assert baseline.utilisation == (shown and pytest.approx(shown))
            for text in (to_text(answer), to_text(answer, 40), to_markdown(answer)):
                assert ("25.0% MFU" in text) == (shown is not None)
            store.add(twin)
            assert all(row.utilisation is None for row in results(store, "twin").tables[0].rows)


def test_a_trial_that_another_sweep_trained_is_marked_reused(plan, tmp_path):
    twin = expand(parse(SWEEP.replace("name: small", "name: twin"), "twin.yaml"))
    with Store(f"sqlite:///{tmp_path / 'store.db'}") as store:
        lease = store.acquire_lease(store.add(plan).sweep_id, "host:1", 60)
        fill(store, plan, lease)
        store.add(twin)
        assert note(results(store, "twin").tables[0], "reused") == "reused trials: 8 from small"
        with pytest.raises(UserError, match=r"no sweep 'smal' in the store \(did you mean 'small'\?"):
            results(store, "smal")


def test_status_has_a_row_a_sweep_and_the_reasons_of_failure(plan, tmp_path):
    with Store(f"sqlite:///{tmp_path / 'store.db'}") as store:
        assert "no sweep yet" in printed(status_table(store))
        sweep_id = store.add(plan).sweep_id
        lease = store.acquire_lease(sweep_id, "host:1", 60)
        end(store, lease, plan.trials[0], "FAILED", log_tail="\n".join(f"line {n} [of the log]" for n in range(30)))
        store.add_event(sweep_id, "budget", "80 % of the wall hours are used")
        for width in (120, 60):
            text = " ".join(printed(status_table(store), width).split())
            assert "budget: 80 % of the wall hours are used" in text
            assert f"{plan.trials[0].fingerprint} {plan.trials[0].arm}, train.lr = " in text
            assert "error: it was error" in text
            assert "| line 29 [of the log]" in text
            assert "line 20" not in text
            assert "gatesweep rerun small --failed" in text
        header, _, counts = printed(status_table(store)).splitlines()[:3]
        assert header.split() == ["sweep", "failed", "waiting", "all", "run", "by"]
        assert counts.split() == ["small", "1", "7", "8", "host:1"]
