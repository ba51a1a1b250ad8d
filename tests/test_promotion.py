"""Gates between the rungs of a ladder: grammar, order, decisions, restarts, holes, and what a user may do about it."""

# ruff: noqa: F811 (fixtures are imported by name)

import io
import json
from collections import Counter
from dataclasses import replace

import fake_gangs
import pytest
from fake_gangs import FakeCluster, bench  # noqa: F401
from rich.console import Console
from sweep_runs import Watcher, plan_of
from typer.testing import CliRunner

from orchestrator.cli.app import app
from orchestrator.cli.fresh import refuse_other_looks
from orchestrator.controller import bring_up_to_date
from orchestrator.report import ExplanationView, explain, plan_table, price_lines, results, status_table, to_json
from orchestrator.report.ladder import ladder_behind
from orchestrator.report.ladder_formats import ladder_notes
from orchestrator.report.watching import watch_frame
from orchestrator.store import passages, standing_passages
from orchestrator.sweep import UserError, arm_key
from orchestrator.tracking.run_content import gate_tags

SIZES = ("cpu-tiny", "cpu-350k", "cpu-1m")
GATED = (
    f"axes.model.preset=[{', '.join(SIZES)}]",
    "seeds=[1,2]",
    "baseline_seeds=2",
    "base.train.tokens=768",
    "arms={baseline: {}, good: {gate: {position: sdpa}}}",
    "arms.bad={gate: {position: value}}",
    "arms.late={gate: {position: key}}",
    "verdict={margin: 0.05, promote: {unless: worse}}",
    "diagnostics=null",
    "checkpoint={every_steps: 20, final: false}",
)
WORSE = {("bad", 1), ("late", 2)}
"""Arms and the rungs on which they are worse by 0.5 nats. Seeds scatter by 0.02 around 3, 2.9 and 2.8."""


def arm_of(config):
    return {None: "baseline", "sdpa": "good", "value": "bad", "key": "late"}[config.gate and config.gate.position]


def rung_of(config):
    return {64: 1, 96: 2, 128: 3}[config.model.hidden_size]


@pytest.fixture(autouse=True)
def known_losses(monkeypatch):
    honest = fake_gangs.fake_validation

    def known(config, step, fate=None):
        shift = 0.5 if (arm_of(config), rung_of(config)) in WORSE else 0.0
        scatter = 0.01 * ((config.seed * 7 + len(arm_of(config))) % 3)
        record = honest(config, step, fate)
        return record.model_copy(update={"loss_nats": 3.1 - 0.1 * rung_of(config) + shift + scatter})

    monkeypatch.setattr(fake_gangs, "fake_validation", known)


@pytest.fixture
def ladder(tmp_path):
    return plan_of(tmp_path, GATED)


def run(bench, plan, fate=fake_gangs.all_goes_well, kill=None, capacity=3):
    watcher = Watcher()
    if kill is not None:
        watcher.on_line = kill
    bench.store.add(plan)
    plan = bring_up_to_date(bench.store, plan, watcher.lines.append)
    controller = bench.controller(plan, FakeCluster(capacity, fate), watcher)
    try:
        with controller:
            controller.run()
    except Killed:
        bench.store.release_lease(controller.lease)  # its time is over
    return watcher


class Killed(Exception):
    pass


def trained(bench):
    """Seeds that are there, by arm, a number a rung."""
    rows = bench.store.trials(1)
    counts = Counter((row.arm, rung_of(row.config)) for row in rows)
    return {arm: [counts[arm, rung] for rung in (1, 2, 3)] for arm in ("baseline", "good", "bad", "late")}


def decided(bench):
    row = bench.store.sweep("tiny")
    return {(one.arm, one.rung): one.is_through for one in standing_passages(row.verdict, row.settings).values()}


WHOLE = {"baseline": [2, 2, 2], "good": [2, 2, 2], "bad": [2, 0, 0], "late": [2, 2, 0]}
FIRST_ONLY = {"baseline": [2, 2, 2], "good": [2, 0, 0], "bad": [2, 0, 0], "late": [2, 0, 0]}
DECIDED = {("good", 2): True, ("bad", 2): False, ("late", 2): True, ("good", 3): True, ("late", 3): False}


def test_what_is_no_gate_or_no_ladder_is_refused_with_its_reason(tmp_path):
    for overrides, said in (
        (["verdict={promote: {}}"], "promote: got neither unless nor when; allowed: one of them"),
        (["verdict={promote: {unless: worse, when: better}}"], "got both unless and when"),
        (["verdict={promote: {unless: bad}}"], "better, equivalent, inconclusive or worse, or a list of them"),
        (["verdict={promote: {when: [better, equivalent]}}"], "without a margin nothing is called so"),
        (["seeds=[1]", "baseline_seeds=1"], "a gate reads an interval, and there is none on 1 seed"),
        (["axes.model.preset=[cpu-tiny]"], "gates stand between rungs, and there is one"),
        (["axes={train.lr: [1e-3, 2e-3]}"], "there is no axis of sizes; allowed: axes of model"),
        (["axes={data.sequence_length: [32, 64]}"], "axis data.sequence_length, which is no size"),
        (["axes.model.rope_base=[1e4, 1e5]"], "parameters and tokens must not fall from rung to rung"),
        (["exclude=[{arm: baseline, model.preset: cpu-1m}]"], "at model.preset=cpu-1m the baseline has no cell"),
        (["axes.train.lr={values: [1e-3, 2e-3, 4e-3], extend: 1}"], "an extended grid is one for all arms of a rung"),
        (["verdict={looks: 2, promote: {unless: worse}, allocate: {}}"], "promote with allocate"),
    ):
        with pytest.raises(UserError) as caught:
            plan_of(tmp_path, [*GATED, *overrides])
        assert said in str(caught.value)


def test_the_smallest_rung_and_the_baseline_are_planned_and_smaller_rungs_come_first(ladder):
    assert Counter((trial.arm, rung_of(trial.config)) for trial in ladder.trials) == {
        **{(arm, 1): 2 for arm in ("baseline", "good", "bad", "late")}, ("baseline", 2): 2, ("baseline", 3): 2,
    }  # fmt: skip
    assert [(one.arm, one.rung, one.below, len(one.trials)) for one in ladder.held if one.arm == "good"] == [
        ("good", 2, 1, 2), ("good", 3, 2, 2),
    ]  # fmt: skip
    assert [trial.position for trial in ladder.all_trials] == list(range(24))
    rungs = [rung_of(trial.config) for trial in ladder.all_trials]
    assert rungs == sorted(rungs)
    whole = ladder.promoted(arm_key(one.arm, one.axes) for one in ladder.held)
    assert (whole.trials, whole.held) == (ladder.all_trials, ())


def test_an_arm_that_is_worse_goes_no_further_and_the_others_do(bench, ladder):
    watcher = run(bench, ladder)
    assert trained(bench) == WHOLE
    assert decided(bench) == DECIDED
    assert {row.state for row in bench.store.trials(1)} == {"COMPLETE"}
    (bad,) = (one for one in passages(bench.store.sweep("tiny").verdict) if one.arm == "bad")
    assert bad.decision == "worse"
    assert bad.low_nats > 0
    assert len(bad.read) == 4
    (line,) = (line for line in watcher.lines if line.startswith("held off  bad"))
    assert line.startswith("held off  bad model.preset=cpu-350k, rung 2: worse: +0.5")
    assert line.endswith("nats on rung 1 (promote unless worse)")
    positions = [row.position for row in bench.store.trials(1)]
    assert len(set(positions)) == len(positions)
    assert trained(bench) == WHOLE
    plan = bring_up_to_date(bench.store, ladder, print)
    assert [(one.arm, one.rung) for one in plan.held] == [("bad", 2), ("bad", 3), ("late", 3)]


@pytest.mark.parametrize("at", [1, 2, 4])
def test_a_controller_that_dies_at_a_gate_is_followed_by_one_that_decides_the_same(bench, ladder, at):
    """Before the first line of a gate, all of it is in the store; so a kill there is one between decision and start."""
    seen = []

    def kill(line):
        if line.startswith(("promoted", "held off")):
            seen.append(line)
            if len(seen) == at:
                raise Killed

    run(bench, ladder, kill=kill)
    assert trained(bench) != WHOLE or at == 4
    refuse_other_looks(ladder, bench.store)
    before = passages(bench.store.sweep("tiny").verdict)
    run(bench, ladder)
    assert trained(bench) == WHOLE
    assert decided(bench) == DECIDED
    assert passages(bench.store.sweep("tiny").verdict)[: len(before)] == before
    assert len(passages(bench.store.sweep("tiny").verdict)) == 5


def shown(*parts):
    console = Console(width=240, record=True, file=io.StringIO())
    console.print(*parts)
    return console.export_text()


def test_what_is_held_back_and_why_is_told_wherever_the_sweep_is(bench, ladder, tmp_path, monkeypatch):
    told = shown(plan_table(ladder))
    assert "24 trials: 12 new, 12 held back" in told
    assert "3 rungs with gates between them, promote unless worse: 12 trials held back" in told
    priced = plan_of(tmp_path, [*GATED, "resources.expected_flops=1e9"])
    (line,) = price_lines(priced, {}, None)
    assert "still to do, of which gates may save up to" in line

    bench.store.add(ladder)
    waits = results(bench.store, "tiny").tables[1]
    assert waits.rows[1].gate == "held back until rung 1 is decided"
    assert "  good, rungs 2 to 3, 4 trials: held back until rung 1 is decided" in shown(status_table(bench.store))

    run(bench, ladder)
    found = results(bench.store, "tiny")
    of_bad = {dict(table.axes)["model.preset"]: row for table in found.tables for row in table.rows if row.arm == "bad"}
    for preset in SIZES[1:]:
        row = of_bad[preset]
        assert (row.decision, row.rank, row.num_missing, row.trials) == ("no result", None, 0, ())
        assert row.verdict.startswith("no result: not promoted from rung 1: worse: +0.5")
    assert of_bad["cpu-tiny"].gate == ""
    notes = [note for table in found.tables for note in table.footnotes if note.startswith("gates: ")]
    assert len(notes) == 2
    assert "late not promoted from rung 2: worse: " in " ".join(notes)
    assert not any(note.startswith("no rank") for table in found.tables for note in table.footnotes)
    content = json.loads(to_json(found))
    assert [(one["arm"], one["is_through"]) for one in content["gates"] if one["rung"] == 2] == [
        ("good", True), ("bad", False), ("late", True),
    ]  # fmt: skip
    line = "  bad, rungs 2 to 3, 4 trials: not promoted from rung 1: worse: "
    row = bench.store.sweep("tiny")
    for told in (shown(status_table(bench.store)), shown(watch_frame(bench.store, row))):
        assert line in told
        assert "  late goes on to rung 2 (model.preset = cpu-350k): inconclusive: " in told
    assert "does not go on to this rung: worse: " in shown(ExplanationView(explain(found, "bad")))
    assert any("bad not promoted from rung 1" in note for note in ladder_notes(ladder_behind(bench.store, found)))
    assert gate_tags(row)["gatesweep.gate.late.rung_3"].startswith("does not go on: worse: ")
    closed = [key for key, one in standing_passages(row.verdict, row.settings).items() if not one.is_through]
    told = shown(plan_table(bring_up_to_date(bench.store, ladder, print), {}, {}, closed))
    assert "18 trials: 18 new" in told
    assert "promote unless worse: all are decided" in told


# -- holes, divergence, and what users do -----------------------------------------------------------------------


def at(arm, rung, fate):
    return lambda spec, config, step: fate if (arm_of(config), rung_of(config), step) == (arm, rung, 2) else None


def test_an_arm_with_failed_trials_is_undecided_until_they_have_run_and_the_others_go_on(bench, ladder):
    run(bench, ladder, at("good", 1, "raise"))
    assert trained(bench) == {**WHOLE, "good": [2, 0, 0]}
    assert decided(bench) == {key: through for key, through in DECIDED.items() if key[0] != "good"}
    failed = [row.fingerprint for row in bench.store.trials(1) if row.state == "FAILED"]
    assert bench.store.reopen(1, failed) == 2
    run(bench, ladder)
    assert trained(bench) == WHOLE
    assert decided(bench) == DECIDED


def test_a_canceled_arm_goes_no_further_and_holds_up_nobody(bench, ladder):
    bench.store.add(ladder)
    mine = [row.fingerprint for row in bench.store.trials(1) if (row.arm, row.seed) == ("good", 2)]
    bench.store.cancel(1, mine)
    run(bench, ladder)
    assert trained(bench) == {**WHOLE, "good": [2, 0, 0]}


def test_no_gate_is_read_while_the_baseline_has_a_hole(bench, ladder):
    run(bench, ladder, at("baseline", 1, "raise"))
    assert trained(bench) == FIRST_ONLY
    assert decided(bench) == {}


def test_an_arm_that_diverged_has_earned_nothing(bench, ladder):
    run(bench, ladder, at("good", 2, "not finite"))
    assert trained(bench) == {**WHOLE, "good": [2, 2, 0]}
    (last,) = (one for one in passages(bench.store.sweep("tiny").verdict) if (one.arm, one.rung) == ("good", 3))
    assert (last.decision, last.is_through) == ("no result", False)
    assert last.reason.startswith("no result: all 2 trials diverged on rung 2")


def test_only_what_is_better_goes_on_if_so_declared(bench, tmp_path):
    ladder = plan_of(tmp_path, [*GATED, "verdict={margin: 0.05, promote: {when: better}}"])
    run(bench, ladder)
    assert trained(bench) == FIRST_ONLY


def test_a_user_lets_an_arm_through_and_the_next_gate_reads_it_again(bench, ladder, monkeypatch):
    run(bench, ladder)
    monkeypatch.setenv("GATESWEEP_HOME", str(bench.home))

    def rerun(*words):
        return " ".join(CliRunner().invoke(app, ["rerun", "tiny", *words]).output.split())

    for other in (["--where", "arm=bad", "--where", "seed=1"], ["--where", "arm=good"], ["--where", "state=FAILED"]):
        assert rerun(*other) == "nothing to rerun"
    assert rerun("--where", "arm=bad", "--where", "preset=cpu-1m") == "nothing to rerun", "its gate is before cpu-350k"
    assert "bad goes on to rung 2: by the user, against the gate: worse" in rerun("--where", "arm=bad")
    assert rerun("--where", "arm=bad") == "nothing to rerun"
    run(bench, ladder)
    assert trained(bench) == {**WHOLE, "bad": [2, 2, 2]}
    assert decided(bench) == {**DECIDED, ("bad", 2): True, ("bad", 3): True}


def test_a_user_lets_an_arm_through_while_the_sweep_runs(bench, ladder):
    def open_it(line):
        if line.startswith("held off  bad"):
            bench.store.promote_anyway(1, [arm_key("bad", {"model.preset": "cpu-350k"})])

    run(bench, ladder, kill=open_it)
    assert trained(bench) == {**WHOLE, "bad": [2, 2, 2]}


def test_with_more_seeds_a_closed_gate_is_read_anew_and_an_open_one_stays_open(bench, ladder, tmp_path, monkeypatch):
    run(bench, ladder)
    monkeypatch.setattr("test_promotion.WORSE", set())
    more = plan_of(tmp_path, [*GATED, "seeds=[1,2,3]", "baseline_seeds=3"])
    refuse_other_looks(more, bench.store)
    run(bench, more)
    assert trained(bench) == {arm: [3, 3, 3] for arm in WHOLE}
    assert decided(bench) == dict.fromkeys(DECIDED | {("bad", 3): True}, True)
    (again,) = (one for one in passages(bench.store.sweep("tiny").verdict)[5:] if (one.arm, one.rung) == ("bad", 2))
    assert again.decision == "inconclusive", "one seed of three is as good as the baseline's"
    assert len(again.read) == 6


def test_what_another_process_has_decided_is_not_decided_again(bench, ladder):
    run(bench, ladder)
    row = bench.store.sweep("tiny")
    for one in standing_passages(row.verdict, row.settings).values():
        other = replace(one, is_through=not one.is_through)
        assert not bench.store.promote(row.id, [other], [])
    assert bench.store.sweep("tiny").verdict == row.verdict
    assert trained(bench) == WHOLE


def test_gates_hold_as_they_were_first_declared(bench, ladder, tmp_path):
    bench.store.add(ladder)
    for other, said in (
        ("verdict={margin: 0.05}", "none"),
        ("verdict.promote={unless: [worse, inconclusive]}", "unless worse or"),
    ):
        with pytest.raises(UserError, match=f"promote unless worse -> {said}.*hold as they were first declared"):
            refuse_other_looks(plan_of(tmp_path, [*GATED, other]), bench.store)


# -- beside the rest --------------------------------------------------------------------------------------------


def test_gates_read_the_confirming_seeds_at_each_arms_own_rate(bench, tmp_path):
    chosen = (*GATED, "axes.train.lr=[1e-3,2e-3]", "seeds={select: [1], confirm: [2,3]}")
    ladder = plan_of(tmp_path, chosen)
    run(bench, ladder)
    assert trained(bench) == {arm: [4 if number else 0 for number in of] for arm, of in WHOLE.items()}
    (bad,) = (one for one in passages(bench.store.sweep("tiny").verdict) if one.arm == "bad")
    seeds = {row.fingerprint: row.seed for row in bench.store.trials(1)}
    assert {seeds[one] for one in bad.read} == {2, 3}
    for table in results(bench.store, "tiny").tables:
        assert not any(row.exploratory for row in table.rows)


def test_gates_wait_for_searched_rates_and_confirming_seeds(bench, tmp_path):
    search = (*GATED, "axes.train.lr={search: [1e-4, 1e-1], trials: 3}", "seeds={select: [1], confirm: [2,3]}",
              "axes.model.preset=[cpu-tiny, cpu-350k]")  # fmt: skip
    run(bench, plan_of(tmp_path, search))
    assert trained(bench) == {"baseline": [5, 5, 0], "good": [5, 5, 0], "bad": [5, 0, 0], "late": [5, 5, 0]}


def test_a_gate_touches_no_trial_that_another_sweep_shares(bench, ladder, tmp_path):
    run(bench, ladder)
    free = plan_of(tmp_path, [*GATED, "name=other", "verdict={margin: 0.05}"])
    bench.run(free)
    rows = bench.store.trials(2)
    assert (len(rows), {row.state for row in rows}) == (24, {"COMPLETE"})
    assert trained(bench) == WHOLE
    # And a gate is read at once where all that it reads has been trained elsewhere.
    third = plan_of(tmp_path, [*GATED, "name=third"])
    bench.store.add(third)
    lines = []
    bring_up_to_date(bench.store, third, lines.append)
    rows = bench.store.trials(3)
    assert (len(rows), {row.state for row in rows}) == (18, {"COMPLETE"})
    assert len(lines) == 5
