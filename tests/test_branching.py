"""Decay branches over fake gangs: what a plan finds, who waits for whom, and the same curves whatever goes wrong."""

# ruff: noqa: F811 (fixtures are imported by name)

from __future__ import annotations

import io
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from fake_gangs import Bench, FakeCluster, FateAt, all_goes_well, bench, bench_in  # noqa: F401
from rich.console import Console
from sweep_runs import Watcher, plan_of

from models import run_dir
from models.config import TrialConfig
from models.run_dir import AttemptSpec
from orchestrator.plan import Plan, decay_branches, trained_flops
from orchestrator.report import ladder, plan_table, results
from orchestrator.report.figures import flops_text
from orchestrator.store import TrialRow

SWEEP = """\
name: budgets
question: how does the lead grow with the budget?
base:
  model: {preset: cpu-tiny}
  data: {corpus: corpus.jsonl, sequence_length: 64, validation: {slice_bytes: 1024, points: 2}}
  train: {batch_tokens: 256, lr: 3e-3, schedule: wsd, warmup_tokens: 512, trunk_tokens: 10240, decay_fraction: 0.2}
baseline: baseline
arms:
  baseline: {}
  g1: {gate: {position: sdpa}}
axes:
  train.tokens: [2560, 5120, 10240]
seeds: [1]
checkpoint: {every_steps: 3, keep: 1}
controls: []
baseline_seeds: 1
"""
"""10, 20 and 40 steps, which decay after steps 8, 16 and 32; validations at 5, 10, 20 and 40."""

Numbers = dict[str, tuple[list[tuple[Any, ...]], list[tuple[Any, ...]]]]


@pytest.fixture
def plan(tmp_path: Path) -> Plan:
    return plan_of(tmp_path, text=SWEEP)


def rows_of(bench: Bench, plan: Plan) -> dict[str, TrialRow]:
    """By arm and budget in steps: ``g1/10``."""
    rows = bench.store.trials(bench.store.sweep(plan.sweep.name).id)
    return {f"{row.arm}/{row.config.train.num_steps}": row for row in rows}


def numbers(bench: Bench, plan: Plan) -> Numbers:
    """By arm and budget, the curve's steps and its validations, without speed and attempt."""
    found: Numbers = {}
    for name, row in rows_of(bench, plan).items():
        curve = bench.store.curve(row.fingerprint)
        steps = [(one.step, one.tokens, one.fraction, one.loss_nats, one.gradient_norm) for one in curve.steps]
        validations = [(one.step, one.split, one.fraction, one.loss_nats) for one in curve.validations]
        found[name] = steps, validations
    return found


@pytest.fixture(scope="module")
def from_the_beginning(tmp_path_factory: pytest.TempPathFactory) -> Numbers:
    """All six trials, none of which knows of another."""
    folder = tmp_path_factory.mktemp("whole")
    plan = plan_of(folder, text=SWEEP)
    with pytest.MonkeyPatch.context() as patch, bench_in(folder) as calm:
        patch.setattr("orchestrator.controller.loop.POLL_SECONDS", 0.0)
        patch.setattr("orchestrator.controller.branching.decay_branches", lambda *_: {})
        calm.run(plan)
        assert all(attempts_of(calm, row)[0][:2] == (0, None) for row in rows_of(calm, plan).values())
        return numbers(calm, plan)


def assert_as_from_the_beginning(found: Numbers, whole: Numbers) -> None:
    """Of a branch's validations those before it left are only there where its trunk had them, too."""
    assert found.keys() == whole.keys()
    for name, (steps, validations) in found.items():
        assert steps == whole[name][0], name
        assert set(validations) <= set(whole[name][1]), name
        assert validations[-1] == whole[name][1][-1], name


def attempts_of(bench: Bench, row: TrialRow) -> list[tuple[int, str | None, int | None]]:
    """(step it began after, the trial that it left, the attempt whose checkpoint it took) of each attempt."""
    return [(one.resume_step, one.branched_from, one.resumed_from) for one in bench.store.attempts(row.fingerprint)]


# -- the plan -------------------------------------------------------------------------------------------------


def branches_of(plan: Plan, tail: float = 0.1) -> dict[str, tuple[str, int]]:
    """By arm and budget in steps, the arm and budget of the trunk, and the step."""
    names = {one.fingerprint: f"{one.arm}/{one.config.train.num_steps}" for one in plan.trials}
    sizes = {one.fingerprint: one.micro_batch_sequences for one in plan.trials}
    found = decay_branches(plan.trials, sizes, tail)
    return {names[one]: (names[branch.trunk], branch.step) for one, branch in found.items()}


def test_a_plan_finds_the_longest_run_of_each_arm_and_where_the_others_leave_it(plan: Plan):
    assert branches_of(plan) == {
        "baseline/10": ("baseline/40", 8),
        "baseline/20": ("baseline/40", 16),
        "g1/10": ("g1/40", 8),
        "g1/20": ("g1/40", 16),
    }


def test_a_branch_leaves_before_it_measures_what_its_loss_is_the_mean_of(plan: Plan):
    assert branches_of(plan, tail=0.6)["g1/20"] == ("g1/40", 9)  # its validation at step 10 is within the tail
    assert branches_of(plan, tail=0.5)["g1/20"] == ("g1/40", 16)


@pytest.mark.parametrize(
    ("override", "branches"),
    [
        ("train.trunk_tokens=20480", ["baseline/10", "baseline/20", "g1/10", "g1/20"]),
        ("axes={train.tokens: [2560, 5120]}", ["baseline/10", "g1/10"]),
        ("resources.by=[{where: {train.tokens: 10240}, micro_batch_sequences: 2}]", ["baseline/10", "g1/10"]),
        ("base.train={batch_tokens: 256, lr: 3e-3, schedule: wsd, warmup_tokens: 512}", []),
        ("base.train={batch_tokens: 256, lr: 3e-3, schedule: wsd, trunk_tokens: 10240}", []),
    ],
    ids=["a trunk that is not run", "another trunk", "another micro-batch", "no trunk", "warm-up by the budget"],
)
def test_only_what_is_one_run_up_to_there_has_a_trunk(tmp_path: Path, override: str, branches: list[str]):
    assert sorted(branches_of(plan_of(tmp_path, [override], SWEEP))) == branches


def printed(plan: Plan) -> str:
    console = Console(file=io.StringIO(), width=200, record=True)
    console.print(plan_table(plan))
    return console.export_text()


def test_the_plan_says_what_the_branches_save(tmp_path: Path, plan: Plan):
    shares = {10: 0.2, 20: 0.2, 40: 1.0}
    whole = sum(one.training_flops for one in plan.trials)
    left = sum(one.training_flops * shares[one.config.train.num_steps] for one in plan.trials)
    said = f"{flops_text(left)} training FLOPs instead of {flops_text(whole)}"
    assert f"4 branches of 2 trunks start from their trunk's checkpoints: {said}" in printed(plan)
    assert left < 0.7 * whole
    ranked = plan_of(tmp_path / "ranked", ["prune.rank={method: halving}", "axes.train.lr=[1e-3, 3e-3]"], SWEEP)
    assert "branch" not in printed(ranked)
    assert sum(trained_flops(ranked.trials, ranked.sweep).values()) == 2 * whole


# -- the run --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("capacity", [1, 2, 6])
def test_branches_are_the_trials_from_their_beginning_and_train_their_decay_alone(
    bench: Bench, plan: Plan, from_the_beginning: Numbers, capacity: int
):
    watcher = bench.run(plan, capacity=capacity)
    assert_as_from_the_beginning(numbers(bench, plan), from_the_beginning)
    rows = rows_of(bench, plan)
    for arm in ("baseline", "g1"):
        trunk = rows[f"{arm}/40"].fingerprint
        begun = {steps: attempts_of(bench, rows[f"{arm}/{steps}"]) for steps in (10, 20, 40)}
        assert begun == {10: [(8, trunk, None)], 20: [(16, trunk, None)], 40: [(0, None, None)]}
        assert f"started   {arm} tokens=2560 seed=1, branched from {trunk} at step 8" in watcher.lines
    frame = bench.store.frame("results", "budgets")
    of_g1 = frame[frame.arm == "g1"].set_index("num_steps")
    assert of_g1.branched_from.fillna("").to_dict() == {
        10: rows["g1/40"].fingerprint,
        20: rows["g1/40"].fingerprint,
        40: "",
    }
    assert of_g1.branch_step.fillna(0).to_dict() == {10: 8, 20: 16, 40: 0}
    sweep_id = bench.store.sweep("budgets").id
    trained = sum(
        row.training_flops * (1 - attempts_of(bench, row)[0][0] / row.config.train.num_steps) for row in rows.values()
    )
    assert bench.store.pace(sweep_id)[0] == pytest.approx(trained)


def test_a_branch_begins_while_its_trunk_goes_on_and_not_before_it_is_there(bench: Bench, plan: Plan):
    lines = bench.run(plan, capacity=6).lines
    started = [line for line in lines if line.startswith("started")]
    assert all("tokens=10240" in line for line in started[:2])
    trunk_ends = next(number for number, line in enumerate(lines) if line.startswith("complete  g1 tokens=10240"))
    branch_ends = next(number for number, line in enumerate(lines) if line.startswith("complete  g1 tokens=2560"))
    assert branch_ends < trunk_ends


def test_what_a_trunk_kept_for_branches_goes_when_all_have_ended(bench: Bench, plan: Plan):
    seen: set[int] = set()

    def look(_: Any) -> None:
        for row in rows_of(bench, plan).values():
            seen.update(step for step, _ in run_dir.visible_checkpoints(run_dir.trial_dir(bench.home, row.fingerprint)))

    watcher = Watcher()
    watcher.on_tick = look
    with bench.controller(plan, FakeCluster(1), watcher) as controller:
        controller.run()
    trunk = run_dir.trial_dir(bench.home, rows_of(bench, plan)["g1/40"].fingerprint)
    assert {8, 16} <= seen
    assert not {8, 16} & {step for step, _ in run_dir.visible_checkpoints(trunk)}


def at(budget: int, step: int, fate: str, times: int = 1) -> FateAt:
    """That befalls g1's trial of a budget in steps, so many times."""
    left = [times]

    def fate_of(_spec: AttemptSpec, config: TrialConfig, now: int) -> Any:
        is_meant = config.gate is not None and config.train.num_steps == budget and now == step
        if not is_meant or not left[0]:
            return None
        left[0] -= 1
        return fate

    return fate_of


@pytest.mark.parametrize(("fate", "state"), [("raise", "FAILED"), ("not finite", "DIVERGED")])
def test_of_a_trunk_that_ends_early_those_that_left_it_before_are_branches_and_the_others_are_not(
    bench: Bench, plan: Plan, from_the_beginning: Numbers, fate: str, state: str
):
    watcher = bench.run(plan, at(40, 12, fate, times=2), capacity=6)
    rows, found = rows_of(bench, plan), numbers(bench, plan)
    assert rows["g1/40"].state == state
    assert {rows[name].state for name in rows if name != "g1/40"} == {"COMPLETE"}
    del found["g1/40"]
    assert_as_from_the_beginning(found, {name: of for name, of in from_the_beginning.items() if name in found})
    assert attempts_of(bench, rows["g1/10"]) == [(8, rows["g1/40"].fingerprint, None)]
    assert attempts_of(bench, rows["g1/20"]) == [(0, None, None)]
    assert "no branch g1 tokens=5120 seed=1 at step 16: its trunk kept no checkpoint there" in watcher.lines


def test_a_trunk_that_is_retried_is_waited_for(bench: Bench, plan: Plan, from_the_beginning: Numbers):
    bench.run(plan, at(40, 14, "die"), capacity=6)
    assert_as_from_the_beginning(numbers(bench, plan), from_the_beginning)
    rows = rows_of(bench, plan)
    assert attempts_of(bench, rows["g1/20"]) == [(16, rows["g1/40"].fingerprint, None)]
    assert [resume for resume, *_ in attempts_of(bench, rows["g1/40"])] == [0, 12]


@pytest.mark.parametrize(("step", "again"), [(17, (16, True, None)), (19, (18, False, 1))])
def test_a_branch_that_fails_goes_on_from_its_own_checkpoint_or_leaves_the_trunk_again(
    bench: Bench, plan: Plan, from_the_beginning: Numbers, step: int, again: tuple[int, bool, int | None]
):
    bench.run(plan, at(20, step, "die"))
    assert_as_from_the_beginning(numbers(bench, plan), from_the_beginning)
    rows = rows_of(bench, plan)
    first, second = attempts_of(bench, rows["g1/20"])
    assert first == (16, rows["g1/40"].fingerprint, None)
    assert (second[0], second[1] is not None, second[2]) == again
    frame = bench.store.frame("results", "budgets").set_index("fingerprint")
    assert frame.loc[rows["g1/20"].fingerprint, "branch_step"] == 16


def before_the_branch(bench: Bench, plan: Plan, act: Callable[[Path], None]) -> Watcher:
    """Acts on the trunk's checkpoint of g1's shortest budget as soon as it stands, before anybody else can."""
    done: list[bool] = []

    def look(_: Any) -> None:
        trunk = run_dir.trial_dir(bench.home, rows_of(bench, plan)["g1/40"].fingerprint)
        for step, path in list(run_dir.visible_checkpoints(trunk)):
            if step == 8 and not done:
                done.append(True)
                act(path)

    watcher = Watcher()
    watcher.on_tick = look
    with bench.controller(plan, FakeCluster(1), watcher) as controller:
        controller.run()
    assert done
    return watcher


def test_a_torn_checkpoint_is_tried_once_and_one_that_is_gone_not_at_all(
    bench: Bench, plan: Plan, from_the_beginning: Numbers
):
    watcher = before_the_branch(bench, plan, lambda path: (path / "torn").touch())
    assert_as_from_the_beginning(numbers(bench, plan), from_the_beginning)
    assert [resume for resume, *_ in attempts_of(bench, rows_of(bench, plan)["g1/10"])] == [8, 0]
    assert "no branch g1 tokens=2560 seed=1 at step 8: the trunk's checkpoint could not be loaded" in watcher.lines


def test_a_half_copied_checkpoint_is_left_alone(bench: Bench, plan: Plan, from_the_beginning: Numbers):
    watcher = before_the_branch(bench, plan, lambda path: (path / "manifest.json").unlink())
    assert_as_from_the_beginning(numbers(bench, plan), from_the_beginning)
    assert attempts_of(bench, rows_of(bench, plan)["g1/10"]) == [(0, None, None)]
    assert "no branch g1 tokens=2560 seed=1 at step 8: its trunk kept no checkpoint there" in watcher.lines


def test_a_trunk_that_began_on_another_layout_is_left_alone(bench: Bench, plan: Plan, from_the_beginning: Numbers):
    """Though the attempt that wrote the checkpoint ran as the branch would, its numbers are not the branch's to the
    bit."""

    def began_elsewhere(path: Path) -> None:
        fingerprint = rows_of(bench, plan)["g1/40"].fingerprint
        with bench.store._engine.begin() as connection:
            connection.exec_driver_sql(
                "UPDATE attempt SET layout = json_set(layout, '$.data', 2) WHERE fingerprint = ?", (fingerprint,)
            )

    watcher = before_the_branch(bench, plan, began_elsewhere)
    assert_as_from_the_beginning(numbers(bench, plan), from_the_beginning)
    assert attempts_of(bench, rows_of(bench, plan)["g1/10"]) == [(0, None, None)]
    assert "no branch g1 tokens=2560 seed=1 at step 8: its trunk ran on another layout" in watcher.lines


def test_a_trunk_from_another_sweep_serves_if_it_kept_what_is_asked_for(
    bench: Bench, tmp_path: Path, plan: Plan, from_the_beginning: Numbers
):
    """That sweep had the middle budget, canceled before it ran: so its checkpoint is still there, and the other not."""
    earlier = plan_of(tmp_path / "earlier", ["name=earlier", "axes={train.tokens: [5120, 10240]}"], SWEEP)
    watcher = Watcher()

    def cancel(_: Any) -> None:
        rows = rows_of(bench, earlier)
        bench.store.cancel(
            bench.store.sweep("earlier").id, [rows[f"{arm}/20"].fingerprint for arm in ("baseline", "g1")]
        )

    watcher.on_tick = cancel
    with bench.controller(earlier, FakeCluster(1), watcher) as controller:
        controller.run()
    assert {row.state for row in rows_of(bench, earlier).values()} == {"COMPLETE", "CANCELED"}
    bench.store.reopen(bench.store.sweep("earlier").id, [row.fingerprint for row in rows_of(bench, earlier).values()])
    bench.run(plan)
    assert_as_from_the_beginning(numbers(bench, plan), from_the_beginning)
    rows = rows_of(bench, plan)
    assert attempts_of(bench, rows["g1/20"]) == [(16, rows["g1/40"].fingerprint, None)]
    assert attempts_of(bench, rows["g1/10"]) == [(0, None, None)]


class Killed(BaseException):
    """The controller's process is gone."""


@pytest.mark.parametrize(
    "word",
    ["started   g1 tokens=10240", "started   g1 tokens=2560", "complete  g1 tokens=10240", "complete  g1 tokens=2560"],
)
def test_a_controller_that_dies_in_between_changes_no_number(
    bench: Bench, plan: Plan, from_the_beginning: Numbers, word: str
):
    watcher = Watcher()

    def die(line: str) -> None:
        if line.startswith(word):
            raise Killed

    watcher.on_line = die
    controller = bench.controller(plan, FakeCluster(2), watcher)
    controller.__enter__()
    with pytest.raises(Killed):
        controller.run()
    bench.store.renew_lease(controller.lease, -1.0)
    bench.run(plan)
    assert_as_from_the_beginning(numbers(bench, plan), from_the_beginning)
    assert {row.state for row in rows_of(bench, plan).values()} == {"COMPLETE"}


def test_the_table_says_which_trials_began_in_which(bench: Bench, plan: Plan):
    bench.run(plan)
    rows = rows_of(bench, plan)
    tables = {dict(table.axes)["train.tokens"]: table for table in results(bench.store, "budgets").tables}
    (note,) = [one for one in tables[2560].footnotes if one.startswith("branched from a longer run")]
    assert f"g1 at LR 3e-3, seed 1, from {rows['g1/40'].fingerprint} at step 8" in note
    assert not [one for one in tables[10240].footnotes if one.startswith("branched")]


def test_a_ladder_of_budgets_knows_which_losses_have_a_trunk_in_common(bench: Bench, plan: Plan):
    bench.run(plan)
    found = ladder(bench.store, "budgets", "tokens")
    assert [rung.size for rung in found.rungs if rung.arm == "g1"] == [2560, 5120, 10240]
    assert any("resampling whole trunks" in one for one in found.laws.problems)
