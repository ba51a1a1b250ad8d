"""Pruning by rank in a running sweep: over fake gangs, through crashes, in the tables, and with confirming seeds."""

# ruff: noqa: F811 (fixtures are imported by name)

import io
from collections import Counter
from statistics import fmean

import pytest
from fake_gangs import STEPS_A_POLL, FakeCluster, bench, bench_in, fake_step, fake_validation  # noqa: F401
from rich.console import Console
from sweep_runs import Watcher, plan_of

from orchestrator.controller.pruning import decision_in_words
from orchestrator.plan import PlannedTrial
from orchestrator.report import results, status_table, to_json
from orchestrator.store import RankDecision
from orchestrator.sweep import UserError

RATES = (1e-3, 2e-3, 4e-3, 8e-3)
GRID = ("axes.train.lr=[1e-3,2e-3,4e-3,8e-3]", "seeds=[1,2]", "baseline_seeds=2")
HALVING = ("prune.rank={method: halving, audit_share: 0.0}",)
LONG = ("train.tokens=20480", "checkpoint.every_steps=40", "diagnostics=null")
"""80 steps, so that a trial which is told to stop does so far from its end."""


@pytest.fixture
def planned(tmp_path):
    return plan_of(tmp_path, [*GRID, *HALVING, *LONG])


@pytest.fixture(scope="module")
def calm(tmp_path_factory):
    """How it ends when nothing goes wrong: the states, the decisions, and the curves of a sweep that does not prune."""
    folder = tmp_path_factory.mktemp("calm")
    pruned, whole = plan_of(folder, [*GRID, *HALVING, *LONG]), plan_of(folder, [*GRID, *LONG, "name=whole"])
    with pytest.MonkeyPatch.context() as patch, bench_in(folder / "a") as a, bench_in(folder / "b") as b:
        patch.setattr("orchestrator.controller.loop.POLL_SECONDS", 0.0)
        a.run(pruned)
        b.run(whole)
        return states_by_cell(a, pruned), a.store.rank_decisions(1), b.curves(whole)


def config_of(plan, arm, lr, seed=1):
    return next(one.config for one in plan.trials if (one.arm, one.axes["train.lr"], one.seed) == (arm, lr, seed))


def at_quarter(config):
    """Step 20 of 80 has no validation: the mean over the 4 training steps up to it."""
    return fmean(fake_step(config, step, None).loss_nats for step in range(17, 21))


def at_half(config):
    return fake_validation(config, 40).loss_nats


def survivors(plan, arm, seed=1):
    """What halving should keep after each rung, from the numbers that the fake gangs write."""
    first = sorted(RATES, key=lambda lr: at_quarter(config_of(plan, arm, lr, seed)))[:2]
    return first, sorted(first, key=lambda lr: at_half(config_of(plan, arm, lr, seed)))[:1]


def rows_of(bench, plan):
    return bench.store.trials(bench.store.sweep(plan.sweep.name).id)


def states_by_cell(bench, plan):
    return {(row.arm, row.config.train.lr, row.seed): row.state for row in rows_of(bench, plan)}


def test_each_arm_ends_with_the_rate_that_led_at_every_rung(bench, planned):
    bench.run(planned)
    states = states_by_cell(bench, planned)
    for arm in ("baseline", "g1"):
        _, (best,) = survivors(planned, arm)
        for lr in RATES:
            expected = "COMPLETE" if lr == best else "PRUNED"
            assert {states[arm, lr, seed] for seed in (1, 2)} == {expected}
    decisions = bench.store.rank_decisions(1)
    assert sorted((one.arm, one.fraction) for one in decisions) == [
        (arm, share) for arm in ("baseline", "g1") for share in (0.25, 0.5)
    ]


def test_what_is_stopped_ends_soon_after_its_rung_and_its_other_seeds_never_begin(bench, planned):
    bench.run(planned)
    for row in rows_of(bench, planned):
        if row.state != "PRUNED":
            continue
        first, _ = survivors(planned, row.arm)
        rung = 40 if row.config.train.lr in first else 20
        assert row.cause == "rank"
        assert row.reason.startswith(f"{row.arm} at {rung * 100 // 80} % of the schedule, seed 1: learning rate")
        if row.seed == 1:
            assert rung <= row.end_step <= rung + 2 * STEPS_A_POLL
            assert bench.store.curve(row.fingerprint).steps[-1].step == row.end_step
        else:
            assert (row.num_attempts, row.end_step) == (0, 0)


def test_a_trial_that_was_paused_at_its_rungs_has_the_curve_of_one_that_was_not(bench, planned, calm):
    bench.run(planned)
    complete = {row.fingerprint for row in rows_of(bench, planned) if row.state == "COMPLETE"}
    paused = [row for row in rows_of(bench, planned) if row.fingerprint in complete and row.num_attempts > 1]
    assert paused, "with two gangs and four rates someone has to wait"
    assert {one.cause for row in paused for one in bench.store.attempts(row.fingerprint)} <= {"rung", "complete"}
    undisturbed = calm[2]
    for fingerprint, numbers in bench.curves(planned).items():
        if fingerprint in complete:
            assert numbers == undisturbed[fingerprint]


def test_seed_1_of_all_rates_comes_to_its_rung_before_any_other_seed_begins(bench, planned):
    watcher = bench.run(planned)
    started = watcher.started()
    first_of_others = next(i for i, name in enumerate(started) if name.endswith("seed=2"))
    assert {name for name in started[:first_of_others] if "attempt" not in name} == {
        f"{arm} lr={lr:g} seed=1" for arm in ("baseline", "g1") for lr in RATES
    }


@pytest.mark.parametrize("killed_after", ["ranked", "pruned", "paused"])
def test_a_controller_that_is_killed_is_followed_by_one_that_ends_the_same(bench, planned, calm, killed_after):
    class Killed(Exception):
        pass

    expected, decisions, _ = calm
    watcher = Watcher()

    def kill(line):
        if line.startswith(killed_after):
            raise Killed

    watcher.on_line = kill
    with pytest.raises(Killed), bench.controller(planned, FakeCluster(2), watcher) as controller:
        controller.run()
    assert states_by_cell(bench, planned) != expected
    bench.store.release_lease(controller.lease)
    bench.run(planned)
    assert states_by_cell(bench, planned) == expected
    assert by_arm(bench.store.rank_decisions(1)) == by_arm(decisions)


def by_arm(decisions):
    return sorted((one.arm, one.fraction, one.dropped, one.audited) for one in decisions)


def test_a_second_run_does_nothing(bench, planned):
    bench.run(planned)
    before = rows_of(bench, planned)
    watcher = bench.run(planned)
    assert rows_of(bench, planned) == before
    assert watcher.lines == []
    assert bench.store.add(planned).num_new == 0
    assert rows_of(bench, planned) == before


def test_an_audited_rate_is_finished_on_all_seeds_and_the_tables_tell_the_rate(bench, tmp_path):
    plan = plan_of(tmp_path, [*GRID, "prune.rank={method: halving, audit_share: 1.0}", *LONG])
    watcher = bench.run(plan)
    assert set(states_by_cell(bench, plan).values()) == {"COMPLETE"}
    marks = bench.store.rank_decisions(1)
    assert all(one.audited == one.dropped for one in marks)
    audit = results(bench.store, "tiny").pruning
    assert (audit.num_cells, audit.num_dropped, audit.num_drawn, audit.num_audited) == (8, 6, 6, 6)
    final = {
        (arm, lr): fmean(fake_validation(config_of(plan, arm, lr, seed), 80).loss_nats for seed in (1, 2))
        for arm in ("baseline", "g1")
        for lr in RATES
    }
    kept = {arm: survivors(plan, arm)[1][0] for arm in ("baseline", "g1")}
    false = sum(final[arm, lr] < final[arm, kept[arm]] for arm in kept for lr in RATES)
    assert audit.num_false == false
    assert audit.share_saved == 0.0
    (table,) = results(bench.store, "tiny").tables
    (note,) = [one for one in table.footnotes if one.startswith("pruned by rank")]
    assert f"6 of the 6 ranked too low are finished all the same: false-prune rate {false} of 6 [" in note
    started = watcher.started()
    last_kept = max(i for i, name in enumerate(started) if any(f"{a} lr={kept[a]:g} seed=2" == name for a in kept))
    first_audit = min(
        i
        for i, name in enumerate(started)
        if name.endswith("seed=2") and not any(f"lr={lr:g} " in name for lr in kept.values())
    )
    assert last_kept < first_audit, "the audit comes last"


def test_the_tables_rank_arms_by_what_is_complete_and_say_what_was_saved(bench, planned):
    bench.run(planned)
    found = results(bench.store, "tiny")
    (table,) = found.tables
    for row in table.rows:
        _, (best,) = survivors(planned, row.arm)
        edge = {RATES[0]: "lowest", RATES[-1]: "highest"}.get(best)
        assert (row.best_lr, len(row.losses_nats), row.edge, row.optimum) == (best, 2, edge, None), "pruned ones bound"
        assert row.rank is not None
        assert row.exploratory, "the rate was chosen on the seeds of the verdict, if by stopping all others"
    assert 0.5 < found.pruning.share_saved < 0.7
    (note,) = [one for one in table.footnotes if one.startswith("pruned by rank")]
    assert note.startswith("pruned by rank at 25 and 50 % of the schedule: 6 of 8 cells; 0 of the 6 ranked too low")
    assert note.endswith("trials stopped: baseline 6, g1 6")
    assert '"share_saved": 0.' in to_json(found)


def test_the_status_tells_what_was_decided(bench, planned):
    bench.run(planned)
    console = Console(width=250, record=True, file=io.StringIO())
    console.print(status_table(bench.store))
    shown = console.export_text()
    assert "pruned_by_rank: " in shown
    assert "tiny: 6 of 8 cells pruned by rank, 0 of them audited" in shown


def test_the_choice_for_confirming_seeds_is_made_among_what_is_left(bench, tmp_path):
    grid = (GRID[0], "seeds={select: [1, 2], confirm: [3, 4]}", "baseline_seeds=2")
    plan = plan_of(tmp_path, [*grid, *HALVING, *LONG])
    bench.run(plan)
    rows = rows_of(bench, plan)
    confirming = [row for row in rows if row.seed in (3, 4)]
    assert {row.state for row in confirming} == {"COMPLETE"}
    assert {(row.arm, row.config.train.lr) for row in confirming} == {
        (arm, survivors(plan, arm)[1][0]) for arm in ("baseline", "g1")
    }
    (table,) = results(bench.store, "tiny").tables
    assert not any(row.exploratory for row in table.rows)


def test_a_failed_rate_is_left_out_and_nothing_waits_for_it(bench, planned):
    def fate(spec, config, step):
        return "raise" if config.train.lr == 1e-3 and config.seed == 1 and step == 10 else None

    bench.run(planned, fate)
    states = Counter(row.state for row in rows_of(bench, planned))
    assert states["FAILED"] == 2
    assert states["WAITING"] + states["RUNNING"] == 0
    for row in rows_of(bench, planned):
        if row.config.train.lr == 1e-3:
            assert row.state == ("FAILED" if row.seed == 1 else "COMPLETE")


def test_a_rate_that_diverges_is_dropped_with_its_other_seeds(bench, planned):
    def fate(spec, config, step):
        return "not finite" if config.train.lr == 8e-3 and step == 15 else None

    bench.run(planned, fate)
    states = states_by_cell(bench, planned)
    for arm in ("baseline", "g1"):
        assert (states[arm, 8e-3, 1], states[arm, 8e-3, 2]) == ("DIVERGED", "PRUNED")
        assert sum(states[arm, lr, 2] == "COMPLETE" for lr in RATES) == 1
    audit = results(bench.store, "tiny").pruning
    assert (audit.num_dropped, audit.num_diverged) == (6, 2)


@pytest.mark.parametrize("name", ["tiny", "other"])
def test_a_sweep_that_does_not_prune_has_what_was_stopped_finished(bench, planned, calm, tmp_path, name):
    """The same one, submitted anew without the rule, or another one that shares the trials."""
    bench.run(planned)
    whole = plan_of(tmp_path, [*GRID, *LONG, f"name={name}"])
    bench.run(whole)
    assert set(states_by_cell(bench, whole).values()) == {"COMPLETE"}
    assert bench.curves(whole) == calm[2]


def test_a_decision_in_words():
    losses = {1e-3: 2.5, 2e-3: 2.4, 4e-3: 2.6, 8e-3: None}
    decision = RankDecision("g1", {"train.tokens": 5120}, 0.25, (1, 2), losses, (4e-3, 8e-3), (4e-3,), "halving-1")
    assert decision_in_words(decision) == (
        "g1 train.tokens=5120 at 25 % of the schedule, seeds 1, 2: learning rate 0.001, 0.002 go on; 0.008 is stopped; "
        "0.004 is audited"
    )


@pytest.mark.parametrize(
    ("overrides", "said"),
    [
        (["prune.rank={method: halving}"], "prune.rank: it stops learning rates, and train.lr is on no axis"),
        ([GRID[0], "seeds=[1,2]", "prune.rank={seeds: 3}"], "prune.rank.seeds: got 3; allowed: at most the 2"),
        ([GRID[0], "prune.rank={reduction: 1}"], "prune.rank.reduction"),
        ([GRID[0], "prune.rank={first_fraction: 1.0}"], "prune.rank.first_fraction"),
        ([GRID[0], "seeds=[1,2]", "prune.rank={seeds: [2, 1]}"], "numbers that do not fall from rung to rung"),
        ([GRID[0], "prune.rank={method: asha}"], "prune.rank.method: got 'asha'; allowed: halving, hyperband"),
    ],
)
def test_rules_in_vain_are_refused_with_their_place(tmp_path, overrides, said):
    with pytest.raises(UserError) as caught:
        plan_of(tmp_path, overrides)
    assert said in str(caught.value)


def test_the_plan_is_the_same_with_and_without_pruning(planned, tmp_path):
    def fingerprints(plan) -> list[PlannedTrial]:
        return [one.fingerprint for one in plan.trials]

    assert fingerprints(planned) == fingerprints(plan_of(tmp_path, [*GRID, *LONG]))
