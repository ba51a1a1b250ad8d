"""What the controller knows of its trials without asking for everything again, and what it finds out in time."""

# ruff: noqa: F811 (fixtures are imported by name)

from __future__ import annotations

from pathlib import Path

import pytest
from fake_gangs import Bench, FakeClock, FakeCluster, bench, plan  # noqa: F401
from store_backends import postgres_server, store_url  # noqa: F401
from store_runs import Run, run, store  # noqa: F401
from sweep_runs import SWEEP, Watcher, plan_of

from orchestrator.controller.known_trials import FULL_READ_SECONDS, KnownTrials
from orchestrator.controller.launching import launch
from orchestrator.gang import GangShape
from orchestrator.plan import Plan
from orchestrator.store import TrialTaken

FOUR = SWEEP.replace("seeds: [1]", "seeds: [1, 2]")


def known_trials(bench: Bench, plan: Plan, clock: FakeClock) -> KnownTrials:
    of_sweep = GangShape.of(plan.sweep.resources)
    return KnownTrials(bench.store, bench.store.add(plan).sweep_id, clock, lambda _: of_sweep)


def test_trials_that_a_new_submission_leaves_out_are_found_to_be_gone(bench: Bench, tmp_path: Path):
    clock = FakeClock()
    trials = known_trials(bench, plan_of(tmp_path, text=FOUR), clock)
    trials.read()
    before = {row.fingerprint: row for row in trials.rows}
    bench.store.add(plan_of(tmp_path, text=SWEEP))
    clock.now += FULL_READ_SECONDS + 1
    trials.read()
    assert {(row.arm, row.seed) for row in trials.rows} == {("baseline", 1), ("g1", 1)}
    assert len(before) == 4
    assert trials.counts["WAITING"] == 2


def test_the_look_at_all_trials_reads_no_config_again(bench: Bench, tmp_path: Path):
    clock = FakeClock()
    trials = known_trials(bench, plan_of(tmp_path, text=FOUR), clock)
    trials.read()
    first, *others = trials.rows
    bench.store.cancel(1, [first.fingerprint])
    clock.now += FULL_READ_SECONDS + 1
    trials.read()
    now = {row.fingerprint: row for row in trials.rows}
    assert all(now[row.fingerprint] is row for row in others)
    assert now[first.fingerprint].state == "CANCELED"
    assert now[first.fingerprint].config is first.config


def test_a_trial_that_was_tried_since_it_was_read_is_resumed_and_not_begun_anew(bench: Bench, plan: Plan):
    cluster = FakeCluster(1)
    with bench.controller(plan, cluster) as controller:
        controller._refresh(now=True)
        (stale, *_), lease = controller.trials.rows, controller.lease
        own = {"layout": stale.layout, "provenance": {}}
        before = controller.store.start_attempt(lease, stale.fingerprint, **own)
        controller.store.end_attempt(lease, before, state="WAITING", cause="node_lost", reason="gone")
        gang = cluster.start_gang(GangShape.of(plan.sweep.resources), 1)
        gang.poll_start()
        assert stale.num_attempts == 0
        begun = launch(controller.sweep_run, controller.branching, gang, stale)  # type: ignore[arg-type]
        assert begun is not None
        assert begun[0].row.number == 2
        assert controller.trials[stale.fingerprint].num_attempts == 2


def test_an_attempt_opens_only_after_those_that_its_caller_has_seen(run: Run):
    first = run.start()
    run.store.end_attempt(run.lease, first, state="WAITING", cause="node_lost", reason="gone")
    own = {"layout": run.plan.trials[0].layout, "provenance": {}}
    with pytest.raises(TrialTaken, match="has had 1 attempts, 0 when it was read"):
        run.store.start_attempt(run.lease, run.fingerprint, num_earlier=0, **own)
    assert run.store.start_attempt(run.lease, run.fingerprint, num_earlier=1, **own).number == 2


def test_a_gang_whose_last_end_is_not_booked_yet_takes_no_trial(bench: Bench, tmp_path: Path):
    """Both end together; the first end that is booked makes the loop look for room."""
    cluster = FakeCluster(2)
    plan = plan_of(tmp_path, text=FOUR + "resources: {warm: off}\n")
    with bench.controller(plan, cluster) as controller:
        controller.run()
    assert [gang.num_attempts for gang in cluster.gangs] == [1, 1, 1, 1]


def test_of_trials_that_end_together_each_makes_room_before_the_next_is_booked(bench: Bench, tmp_path: Path):
    watcher = Watcher()
    with bench.controller(plan_of(tmp_path, text=FOUR), FakeCluster(2), watcher) as controller:
        controller.run()
    said = [line.split()[0] for line in watcher.lines if line.startswith(("started", "complete"))]
    assert said == ["started", "started", "complete", "started", "complete", "started", "complete", "complete"]
