"""What the controller does about hangs, full disks, torn checkpoints, preemptions and bad hosts, over fake gangs."""

# ruff: noqa: F811 (fixtures are imported by name)

from __future__ import annotations

import io
import shutil
from collections import namedtuple
from typing import Any

import pytest
from fake_gangs import Bench, FakeCluster, FateAt, bench, plan, undisturbed  # noqa: F401
from rich.console import Console
from sweep_runs import Watcher, plan_of

from models import run_dir
from orchestrator.controller import disk
from orchestrator.gang import GangState
from orchestrator.plan import Plan
from orchestrator.report import status_table

Curves = dict[str, list[tuple[Any, ...]]]


def in_attempts(fate: str, arm: str, step: int, attempts: int = 1) -> FateAt:
    """``fate`` at one step of the first attempts of one arm."""

    def at(spec: Any, config: Any, now: int) -> Any:
        is_arm = (config.gate is not None) == (arm == "g1")
        return fate if is_arm and now == step and spec.number <= attempts else None

    return at


def test_a_gang_that_does_nothing_more_is_hung_and_its_trial_resumes_elsewhere(
    bench: Bench, tmp_path, undisturbed: Curves
):
    plan = plan_of(tmp_path, ["retry={hang_seconds: 0.05, hang_steps: 0.001}"])
    watcher = bench.run(plan, in_attempts("hang", "g1", 8))
    assert bench.curves(plan) == undisturbed
    row = bench.trials(plan)["g1/1"]
    first, second = bench.store.attempts(row.fingerprint)
    assert (first.cause, second.resume_step) == ("hang", 5)
    assert "after step 7" in str(first.reason)
    stacks = run_dir.stacks_path(run_dir.trial_dir(bench.home, row.fingerprint) / "attempts" / first_name(first), 0)
    assert "MainThread" in stacks.read_text()
    assert any(line.startswith("gang dismissed") for line in watcher.lines)


def first_name(attempt: Any) -> str:
    return f"{attempt.number:03d}-{attempt.token}"


def test_a_gang_that_is_hung_after_a_divergence_rule_fired_has_diverged(bench: Bench, tmp_path):
    rule = "prune={divergence: {loss_above_start: 1.0, patience_steps: 1}}"
    plan = plan_of(tmp_path, [rule, "retry={hang_seconds: 0.05, hang_steps: 0.001}"])

    def at(spec: Any, config: Any, now: int) -> Any:
        if config.gate is None:
            return None
        return "rise" if now == 6 else "hang" if now == 7 else None

    bench.run(plan, at)
    assert bench.states(plan) == {"baseline/1": "COMPLETE", "g1/1": "DIVERGED"}


def test_a_full_disk_pauses_the_sweep_until_there_is_room_and_costs_no_retry(
    bench: Bench, tmp_path, monkeypatch: pytest.MonkeyPatch, undisturbed: Curves
):
    plan = plan_of(tmp_path, ["retry={error: 0, infrastructure: 0}"])
    usage = namedtuple("usage", "total used free")
    asked: list[int] = []

    def disk_usage(_: Any) -> Any:
        asked.append(1)
        return usage(2**40, 0, 0 if len(asked) < 5 else 2**40)

    monkeypatch.setattr(disk, "SHORTEST_PAUSE_SECONDS", 0.0)
    monkeypatch.setattr(disk.shutil, "disk_usage", disk_usage)
    watcher = bench.run(plan, in_attempts("disk full", "g1", 12, attempts=2))
    assert bench.curves(plan) == undisturbed
    assert sum(line.startswith("PAUSED") for line in watcher.lines) == 1
    assert any(line.startswith("goes on") for line in watcher.lines)
    causes = [attempt.cause for attempt in bench.store.attempts(bench.trials(plan)["g1/1"].fingerprint)]
    assert causes == ["disk_full", "disk_full", "complete"]


def first_of(plan: Plan, fate: str, then: str | None = None) -> FateAt:
    """``fate`` at the last step of the first attempt that comes to it, ``then`` at step 2 of the one after it."""
    seen: list[str] = []

    def at(spec: Any, config: Any, now: int) -> Any:
        if now == config.train.num_steps and not seen:
            seen.append(spec.token)
            return fate
        return then if seen and now == 2 and spec.token != seen[0] and len(seen) < 2 and not seen.append("") else None

    return at


def test_the_next_trial_starts_while_the_last_checkpoint_of_one_is_written(
    bench: Bench, plan: Plan, undisturbed: Curves
):
    cluster, watcher = FakeCluster(1, first_of(plan, "lands late")), Watcher()
    with bench.controller(plan, cluster, watcher) as controller:
        controller.run()
    told = [line.split()[0] for line in watcher.lines]
    assert told == ["started", "started", "complete", "complete"]
    assert len(cluster.gangs) == 1
    assert bench.curves(plan) == undisturbed
    assert set(bench.states(plan).values()) == {"COMPLETE"}


def test_a_last_checkpoint_that_is_lost_costs_its_own_trial_an_attempt_and_the_next_one_nothing(
    bench: Bench, plan: Plan, undisturbed: Curves, monkeypatch: pytest.MonkeyPatch
):
    """Resumed from the one before: complete means that what a trial is exported from is there."""
    monkeypatch.setattr(disk, "SHORTEST_PAUSE_SECONDS", 0.0)
    cluster, watcher = FakeCluster(1, first_of(plan, "last checkpoint lost")), Watcher()
    with bench.controller(plan, cluster, watcher) as controller:
        controller.run()
    assert len(cluster.gangs) == 1
    assert bench.curves(plan) == undisturbed
    rows = bench.trials(plan).values()
    assert {row.state for row in rows} == {"COMPLETE"}
    assert sorted(row.num_attempts for row in rows) == [1, 2]
    lost = next(row for row in rows if row.num_attempts == 2)
    first, second = bench.store.attempts(lost.fingerprint)
    assert (first.cause, second.resume_step) == ("disk_full", 15)


def test_a_gang_that_dies_with_a_last_checkpoint_in_the_writing_loses_it_and_its_trial_is_resumed(
    bench: Bench, plan: Plan, undisturbed: Curves
):
    cluster = FakeCluster(1, first_of(plan, "lands late", then="die"))
    with bench.controller(plan, cluster) as controller:
        controller.run()
    assert len(cluster.gangs) == 2
    assert bench.curves(plan) == undisturbed
    rows = bench.trials(plan).values()
    assert {row.state for row in rows} == {"COMPLETE"}
    assert [row.num_attempts for row in rows] == [2, 2]


def test_a_disk_that_is_full_when_an_attempt_is_to_begin_pauses_too(
    bench: Bench, plan: Plan, monkeypatch: pytest.MonkeyPatch, undisturbed: Curves
):
    monkeypatch.setattr(disk, "SHORTEST_PAUSE_SECONDS", 0.0)
    write, refusals = run_dir.write_json, iter([True, False, True])

    def write_json(path: Any, content: Any) -> None:
        if next(refusals, False):
            raise OSError(28, "No space left on device")
        write(path, content)

    monkeypatch.setattr(run_dir, "write_json", write_json)
    bench.run(plan)
    assert bench.curves(plan) == undisturbed


def test_out_of_gpu_memory_ends_the_trial_with_the_micro_batch_that_would_fit(bench: Bench, plan: Plan):
    bench.run(plan, in_attempts("out of memory", "g1", 8))
    row = bench.trials(plan)["g1/1"]
    (attempt,) = bench.store.attempts(row.fingerprint)
    assert (row.state, attempt.cause) == ("FAILED", "gpu_out_of_memory")
    assert "never retried; resources.micro_batch_sequences: 2 would fit" in str(attempt.reason)


def test_a_torn_checkpoint_is_passed_over_for_the_one_before(bench: Bench, plan: Plan, undisturbed: Curves):
    def at(spec: Any, config: Any, now: int) -> Any:
        if config.gate is None or now != 18 or spec.number > 1:
            return None
        (run_dir.checkpoint_path(spec.attempt_dir, 15) / "torn").touch()
        return "die"

    bench.run(plan, at)
    assert bench.curves(plan) == undisturbed
    attempts = bench.store.attempts(bench.trials(plan)["g1/1"].fingerprint)
    assert [(one.cause, one.resume_step) for one in attempts] == [
        ("rank_died", 0),
        ("corrupt_checkpoint", 15),
        ("complete", 10),
    ]


def test_a_preempted_attempt_goes_on_from_its_checkpoint_on_another_gang(bench: Bench, tmp_path, undisturbed: Curves):
    plan = plan_of(tmp_path, ["retry={error: 0, infrastructure: 0}"])
    bench.run(plan, in_attempts("preempted", "g1", 8, attempts=3))
    assert bench.curves(plan) == undisturbed
    attempts = bench.store.attempts(bench.trials(plan)["g1/1"].fingerprint)
    assert [(one.cause, one.resume_step) for one in attempts] == [("preempted", 0), ("complete", 8)]


def bad_host(plan: Plan, bench: Bench) -> FateAt:
    """Every attempt on host a dies at its third step."""

    def at(spec: Any, config: Any, now: int) -> Any:
        hosts = bench.store.attempts(spec.fingerprint)[-1].hosts
        return "die" if now == spec.resume_step + 3 and hosts == ("a",) else None

    return at


def test_a_host_that_fails_twice_gets_no_more_gangs_and_the_next_controller_knows(bench: Bench, tmp_path):
    plan = plan_of(tmp_path, ["seeds=[1,2,3]"])
    cluster, watcher = FakeCluster(fate=bad_host(plan, bench), hosts=("a", "b")), Watcher()
    with bench.controller(plan, cluster, watcher) as controller:
        controller.run()
    assert set(bench.states(plan).values()) == {"COMPLETE"}
    on_a = [gang for gang in cluster.gangs if gang.members[0]["host"] == "a"]
    assert len(on_a) == 2
    assert sum(line.startswith("excluded  host a") for line in watcher.lines) == 1
    console = Console(width=100, record=True, file=io.StringIO())
    console.print(status_table(bench.store))
    assert "tiny: 1 excluded host\n  a (node a): rank_died; this sweep uses it no more" in console.export_text()

    wider = plan_of(tmp_path, ["seeds=[1,2,3,4,5]"])
    again = FakeCluster(fate=bad_host(wider, bench), hosts=("a", "b"))
    with bench.controller(wider, again) as controller:
        controller.run()
    assert {gang.members[0]["host"] for gang in again.gangs} == {"b"}


def test_the_last_host_is_never_excluded(bench: Bench, tmp_path):
    plan = plan_of(tmp_path, ["retry={infrastructure: 1}"])
    cluster, watcher = FakeCluster(fate=bad_host(plan, bench), hosts=("a",)), Watcher()
    with bench.controller(plan, cluster, watcher) as controller:
        controller.run()
    assert set(bench.states(plan).values()) == {"FAILED"}
    assert any("it is the last one, so it stays" in line for line in watcher.lines)
    assert all(gang.state is GangState.DEAD for gang in cluster.gangs)


def test_a_disk_watch_waits_for_room(tmp_path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(disk, "SHORTEST_PAUSE_SECONDS", 0.0)
    watch, lines = disk.DiskWatch(tmp_path), []
    assert not watch.is_full(lines.append)
    watch.was_full()
    monkeypatch.setattr(disk, "ROOM_BYTES", shutil.disk_usage(tmp_path).total * 2)
    assert watch.is_full(lines.append)
    assert watch.is_full(lines.append)
    monkeypatch.setattr(disk, "ROOM_BYTES", 1)
    assert not watch.is_full(lines.append)
    assert len(lines) == 2
