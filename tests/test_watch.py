"""``gatesweep watch``: a frame from the store alone."""

# ruff: noqa: F811 (fixtures are imported by name)

from __future__ import annotations

import dataclasses
import io
from datetime import UTC, datetime, timedelta

import pytest
from rich.console import Console
from store_runs import STEPS, Run, a_plan, postgres_server, run, steps, store, store_url  # noqa: F401
from test_cli import Gatesweep, Machine, folder, gatesweep, machine  # noqa: F401

from orchestrator import report
from orchestrator.cli import watch
from orchestrator.report.watching import seconds_left
from orchestrator.store import CAP_SET, HOST_EXCLUDED, RunningRow, Store

NOW = datetime(2026, 5, 1, 12, 0, tzinfo=UTC)


def frame(store: Store, width: int = 110) -> list[str]:
    console = Console(file=io.StringIO(), width=width, force_terminal=False)
    console.print(report.watch_frame(store, store.sweep("quick")))
    text: str = console.file.getvalue()  # type: ignore[attr-defined]
    return [line.rstrip() for line in text.splitlines()]


def test_a_frame_tells_failures_before_what_runs_and_what_bounds_it(run: Run):
    first, second, third, _ = (trial.fingerprint for trial in run.plan.trials)
    run.complete(first, 2.5)
    run.end(run.start(fingerprint=second), "FAILED", "error")
    attempt = run.start(fingerprint=third, hosts=["node-7", "node-7"])
    run.store.record(run.lease, attempt, steps(1, STEPS // 2, loss=2.75))
    run.store.add_event(run.sweep_id, CAP_SET, "max_gpus=8")
    run.store.add_event(run.sweep_id, CAP_SET, "max_trials=none")
    run.store.add_event(run.sweep_id, HOST_EXCLUDED, "node-3 (node abc): hardware")
    lines = frame(run.store)
    assert lines[0].startswith("quick: 62% done (2 of 4 trials ended), about ")
    assert lines[0].endswith("run by host-a:1")
    assert lines[1] == "waiting 1  running 1  complete 1  failed 1" or set(lines[1].split("  ")) == {
        "waiting 1", "running 1", "complete 1", "failed 1"
    }  # fmt: skip
    shown = [line for line in lines if line]
    places = [
        next(number for number, line in enumerate(shown) if part in line)
        for part in (
            f"{second}  ",
            f"{STEPS // 2}/{STEPS}",
            "caps: max_gpus=8",
            "excluded host: node-3",
            "host_excluded:",
        )
    ]
    assert places == sorted(places)
    (line,) = [line for line in shown if f"{STEPS // 2}/{STEPS}" in line]
    for part in ("gated lr=1e-3 seed=1", "2.7500 nats", "100 tok/s", "node-7"):
        assert part in line
    assert line.count("node-7") == 1


def test_a_frame_shows_budgets_and_shared_trials_that_others_run(store: Store):
    run = Run(store, a_plan(verdict=None))
    plan = run.plan
    declared = plan.sweep.model_copy(update={"budget": plan.sweep.budget.model_copy(update={"wall_hours": 2.0})})
    store.add(dataclasses.replace(plan, sweep=declared))
    other = store.add(a_plan("other")).sweep_id
    lease = store.acquire_lease(other, "host-b:2", 60)
    store.start_attempt(lease, run.fingerprint, layout=plan.trials[0].layout, provenance={})
    text = "\n".join(frame(store))
    assert "budget: wall_hours 0" in text or "budget: wall_hours" in text
    assert "1 shared trial run in other sweeps" in text
    store.release_lease(run.lease)
    assert frame(store)[0].endswith("nobody runs it")


def test_running_rows_hold_the_newest_step_and_leave_out_what_has_ended(run: Run):
    attempt = run.start()
    (row,) = run.store.running(run.sweep_id)
    assert (row.step, row.loss_nats, row.num_steps, row.attempt) == (0, None, STEPS, 1)
    run.store.record(run.lease, attempt, steps(1, 7))
    assert run.store.running(run.sweep_id)[0].step == 7
    run.end(attempt, "WAITING")
    assert run.store.running(run.sweep_id) == []
    run.start(resume_step=5)
    (again,) = run.store.running(run.sweep_id)
    assert (again.step, again.resume_step, again.attempt) == (5, 5, 2)


def a_row(step: int, seconds: float, resume_step: int = 0) -> RunningRow:
    facts = {"arm": "g1", "axes": {}, "seed": 1, "fingerprint": "f", "attempt": 1, "hosts": (), "num_steps": 100}
    started = NOW - timedelta(seconds=seconds)
    return RunningRow(
        **facts, started_at=started, resume_step=resume_step, step=step, loss_nats=None, tokens_per_second=None
    )  # type: ignore[arg-type]


def test_the_time_left_is_shared_by_what_runs_and_unknown_before_a_step():
    assert seconds_left([a_row(0, 50)], 3, NOW) is None
    assert seconds_left([a_row(50, 50)], 0, NOW) == pytest.approx(50.0)
    assert seconds_left([a_row(50, 50), a_row(50, 50)], 4, NOW) == pytest.approx((2 * 50 + 4 * 100) / 2)
    assert seconds_left([a_row(50, 10, resume_step=40)], 0, NOW) == pytest.approx(50.0)
    assert seconds_left([a_row(50, 50), a_row(0, 5)], 0, NOW) == pytest.approx((50 + 100) / 2)


def test_the_verb_prints_one_frame_where_there_is_no_terminal_and_ctrl_c_leaves_the_live_one(
    gatesweep: Gatesweep, machine: Machine, folder, monkeypatch: pytest.MonkeyPatch
):
    assert gatesweep("watch", "tiny").code == 2
    assert gatesweep("run", "tiny.yaml").code == 0
    said = gatesweep("watch", "tiny", "--once")
    assert said.code == 0
    assert "tiny: 100% done (2 of 2 trials ended); nobody runs it" in said.out
    assert "sweep_done: all 2 trials have ended: 2 complete" in said.out

    def interrupted(_: float) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(watch.time, "sleep", interrupted)
    monkeypatch.setattr("rich.console.Console.is_terminal", True)
    assert gatesweep("watch", "tiny").code == 0
