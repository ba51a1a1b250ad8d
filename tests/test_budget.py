"""Budgets: what is charged, the notice at 80 %, the stop at 100 %, and how a user goes on; over fake gangs."""

# ruff: noqa: F811 (fixtures are imported by name)

from __future__ import annotations

from datetime import datetime
from pathlib import Path
from typing import Any

import pytest
from fake_gangs import Bench, FakeClock, FakeCluster, bench, plan, undisturbed  # noqa: F401
from sqlalchemy import text
from store_runs import Run, a_plan, postgres_server, store, store_url  # noqa: F401
from sweep_runs import Watcher, plan_of
from test_cli import Gatesweep, Machine, folder, gatesweep, machine  # noqa: F401

from orchestrator import report
from orchestrator.controller import BudgetUsedUp
from orchestrator.plan import Plan
from orchestrator.report.figures import memory_text
from orchestrator.store import BUDGET, BUDGET_EXTENDED, BudgetLine, Spent, Store, engine, migrate
from orchestrator.sweep import CheckpointConfig, UserError, check_extension, limits

ON_GPUS = ["resources={gpus: 2, cpus: 1}"]


def run_until_stopped(bench: Bench, plan: Plan, hours_a_tick: float, clock: FakeClock | None = None) -> Watcher:
    """Every look at the sweep takes ``hours_a_tick`` on a clock of its own."""
    watcher, clock = Watcher(), clock or FakeClock()
    watcher.on_tick = lambda _: setattr(clock, "now", clock.now + 3600 * hours_a_tick)
    with bench.controller(plan, FakeCluster(2), watcher, clock) as controller, pytest.raises(BudgetUsedUp) as stopped:
        controller.run()
    watcher.lines.append(str(stopped.value))
    return watcher


def budget_events(bench: Bench) -> list[str]:
    return [event.message for event in bench.store.events(bench.store.sweep("tiny").id, kind=BUDGET)]


def test_a_used_up_budget_stops_the_run_and_not_the_sweep(bench: Bench, tmp_path: Path, undisturbed: Any):
    limited = plan_of(tmp_path, ["budget.wall_hours=10"])
    watcher = run_until_stopped(bench, limited, 4.1)
    assert watcher.lines[-1] == "budget.wall_hours 10 is used up"
    rows = bench.trials(limited)
    assert {(row.state, row.cause) for row in rows.values()} == {("WAITING", "budget")}
    assert budget_events(bench) == ["80% of budget.wall_hours 10 is used", "budget.wall_hours 10 is used up"]
    bench.run(plan_of(tmp_path, ["budget.wall_hours=1000", "retry.error=0"]))
    assert bench.curves(limited) == undisturbed


@pytest.mark.parametrize(("budget", "resources", "hours"), [("cpu_hours", [], 1.0), ("gpu_hours", ON_GPUS, 2.0)])
def test_every_rank_of_every_running_attempt_is_charged(
    bench: Bench, tmp_path: Path, budget: str, resources: list[str], hours: float
):
    """Two gangs, an hour a look: 2 of CPUs or 4 of GPUs."""
    limited = plan_of(tmp_path, [f"budget.{budget}={7 * hours}", *resources])
    clock = FakeClock()
    run_until_stopped(bench, limited, 1.0, clock)
    num_ticks = (clock.now - 1000.0) / 3600
    # One look before both run, and a last one in which they stop.
    assert 7 / 2 <= num_ticks <= 7 / 2 + 3


def test_nothing_starts_on_a_used_up_budget_until_it_is_extended(bench: Bench, tmp_path: Path):
    limited = plan_of(tmp_path, ["budget.wall_hours=10"])
    run_until_stopped(bench, limited, 6.0)
    sweep_id = bench.store.sweep("tiny").id
    force_wall_hours(bench.store, 10.5)
    (line,) = bench.store.budget(sweep_id)
    assert (line.limit, line.is_used_up) == (10.0, True)
    assert run_until_stopped(bench, limited, 0.0).started() == []
    assert budget_events(bench) == ["budget.wall_hours 10 is used up"], "nothing is told twice"
    bench.store.add_event(sweep_id, BUDGET_EXTENDED, check_extension("wall_hours=+2.5"))
    bench.run(limited)
    assert set(bench.states(limited).values()) == {"COMPLETE"}
    assert bench.store.budget(sweep_id)[0].limit == 12.5


def force_wall_hours(store: Store, hours: float) -> None:
    with store._engine.begin() as connection:
        connection.execute(text("UPDATE lease SET held_seconds = :seconds"), {"seconds": hours * 3600})


def test_an_extension_counts_while_the_sweep_runs(bench: Bench, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("orchestrator.controller.loop.REFRESH_SECONDS", 0.0)
    limited = plan_of(tmp_path, ["budget.wall_hours=10"])
    watcher, clock, ticks = Watcher(), FakeClock(), []

    def later(_: Any) -> None:
        clock.now += 3600
        ticks.append(1)
        if len(ticks) == 2:
            bench.store.add_event(bench.store.sweep("tiny").id, BUDGET_EXTENDED, "wall_hours=+1000")

    watcher.on_tick = later
    with bench.controller(limited, FakeCluster(1), watcher, clock) as controller:
        controller.run()
    assert len(ticks) > 10
    assert set(bench.states(limited).values()) == {"COMPLETE"}


def test_attempts_and_controllers_are_charged_by_the_store_over_all_runs(store: Store):
    run = Run(store)
    first = store.start_attempt(run.lease, run.fingerprint, layout=run.plan.trials[0].layout, provenance={}, **TWO_GPUS)
    back_date(store, "attempt", "started_at", "2026-01-01 00:00:00+00:00")
    run.end(first, "WAITING")
    held = store.attempts(run.fingerprint)[0].held_seconds
    assert held is not None
    spent = store.spent(run.sweep_id)
    assert spent.gpu_hours == pytest.approx(2 * held / 3600)
    assert spent.cpu_hours == pytest.approx(4 * held / 3600)
    second = store.start_attempt(
        run.lease, run.fingerprint, layout=run.plan.trials[0].layout, provenance={}, **TWO_GPUS
    )
    assert second.held_seconds is None
    assert store.spent(run.sweep_id).gpu_hours >= spent.gpu_hours, "an open attempt is charged until now"
    other = store.add(a_plan("other")).sweep_id
    assert store.spent(other).gpu_hours == 0.0


TWO_GPUS = {"cpus": 4.0, "gpus": 2.0}


def back_date(store: Store, table: str, column: str, moment: Any) -> None:
    value = f"'{moment}'" if isinstance(moment, str) else moment
    if isinstance(moment, str) and store._engine.dialect.name == "sqlite":
        value = f"'{moment.removesuffix('+00:00')}.000000'"
    with store._engine.begin() as connection:
        connection.execute(text(f"UPDATE {table} SET {column} = {value}"))


def test_the_time_of_a_controller_counts_until_its_last_renewal(store: Store):
    run = Run(store)
    hour = 3600.0
    shift(store, "renewed_at", -hour)
    store.renew_lease(run.lease, 60)
    assert store.spent(run.sweep_id).wall_hours == pytest.approx(1.0, abs=0.01)
    shift(store, "renewed_at", -hour)
    assert store.spent(run.sweep_id).wall_hours == pytest.approx(2.0, abs=0.01), "the present holder's time, too"
    shift(store, "expires_at", -hour)
    assert store.spent(run.sweep_id).wall_hours == pytest.approx(1.0, abs=0.01), "a dead one's up to its renewal"
    second = store.acquire_lease(run.sweep_id, "host-b:2", 60)
    shift(store, "renewed_at", -hour)
    store.release_lease(second)
    assert store.spent(run.sweep_id).wall_hours == pytest.approx(2.0, abs=0.01)


def shift(store: Store, column: str, seconds: float) -> None:
    with store._engine.begin() as connection:
        connection.execute(text(f"UPDATE lease SET {column} = {column} + {seconds}"))


@pytest.mark.parametrize("released", [True, False])
def test_an_attempt_whose_controller_was_lost_is_charged_until_then_and_not_until_it_is_found(
    store: Store, released: bool
):
    run = Run(store)
    store.start_attempt(run.lease, run.fingerprint, layout=run.plan.trials[0].layout, provenance={}, **TWO_GPUS)
    back_date(store, "attempt", "started_at", "2026-01-01 00:00:00+00:00")
    left = 1767225600.0 + 600  # ten minutes later
    if released:
        store.release_lease(run.lease)
        back_date(store, "lease", "left_at", left)
    else:
        back_date(store, "lease", "expires_at", left)
    heir = store.acquire_lease(run.sweep_id, "host-b:2", 60)
    assert store.free(heir, store.orphans(heir)) == [run.fingerprint]
    assert store.attempts(run.fingerprint)[0].held_seconds == pytest.approx(600.0)


def test_attempts_of_an_older_store_are_charged_as_its_sweeps_stand(store_url: str):
    from alembic import command

    now, database = datetime(2026, 1, 1), engine.make_engine(engine.parse_url(store_url))
    settings = '{"resources": {"cpus": 3.0, "gpus": 0.5}}'
    with engine.writing(database) as connection:
        command.upgrade(migrate.alembic_config(connection), "0003")
        for statement in (
            "INSERT INTO sweep (id, name, question, baseline, verdict, settings, text, overrides, created_at,"
            " updated_at) VALUES (1, 'old', '?', 'baseline', '{}', :settings, '', '[]', :now, :now)",
            "INSERT INTO lease (sweep_id, holder, token, expires_at) VALUES (1, '', 3, 0)",
            "INSERT INTO trial (fingerprint, config, lr, seed, num_steps, num_parameters, training_flops, state,"
            " reopened_after, created_at, updated_at) VALUES ('f', '{}', 1, 1, 1, 1, 1, 'WAITING', 0, :now, :now)",
            "INSERT INTO attempt (fingerprint, number, token, sweep_id, layout, provenance, resume_step, started_at,"
            " ended_at, seconds) VALUES ('f', 1, 't', 1, :layout, '{}', 0, :now, :now, 1800)",
            "INSERT INTO attempt (fingerprint, number, token, sweep_id, layout, provenance, resume_step, started_at,"
            " ended_at) VALUES ('f', 2, 't', 1, :layout, '{}', 0, :now, :now)",
        ):
            connection.execute(
                text(statement), {"now": now, "settings": settings, "layout": '{"tensor": 2, "data": 2}'}
            )
    database.dispose()
    with Store(store_url) as store:
        measured, lost = store.attempts("f")
        assert (measured.cpus, measured.gpus, measured.held_seconds) == (12.0, 2.0, 1800.0)
        assert lost.held_seconds is None
        assert store.spent(1) == Spent(gpu_hours=1.0, cpu_hours=6.0, wall_hours=0.0)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("gpu_hours", "allowed: gpu_hours=.HOURS, cpu_hours=.HOURS, wall_hours=.HOURS"),
        ("gpu_hour=+1", "did you mean 'gpu_hours'"),
        ("gpu_hours=10", "allowed: what is added, such as gpu_hours=.10"),
        ("gpu_hours=+0", "allowed: what is added"),
        ("gpu_hours=+nan", "allowed: what is added"),
        ("gpu_hours=+inf", "allowed: what is added"),
    ],
)
def test_an_extension_that_is_none_is_refused(text: str, said: str):
    with pytest.raises(UserError, match=said):
        check_extension(text)


def test_extensions_add_up_and_make_no_budget_where_none_is_declared():
    declared = {"gpu_hours": 10.0, "cpu_hours": None, "wall_hours": None}
    assert limits(declared, ["gpu_hours=+5", "wall_hours=+1", "gpu_hours=+2.5"]) == {"gpu_hours": 17.5}


def test_gpu_hours_without_gpus_are_refused_with_what_is_allowed(tmp_path: Path):
    with pytest.raises(UserError, match=r"budget\.gpu_hours: got 5, and resources\.gpus is 0; allowed on CPUs: cpu_h"):
        plan_of(tmp_path, ["budget.gpu_hours=5"])


def test_a_budget_is_told_as_used_of_how_much_and_how_to_go_on():
    lines = [BudgetLine("gpu_hours", 1000.0, 1234.5), BudgetLine("wall_hours", 48.0, 12.0)]
    assert report.budget_lines(lines, "x") == [
        "x: gpu_hours 1,234 of 1,000, used up: nothing starts; gatesweep run FILE --extend gpu_hours=+HOURS goes on",
        "x: wall_hours 12 of 48, 25% used",
    ]


def test_the_plan_prices_what_is_left_at_the_measured_pace_or_at_the_peak(bench: Bench, tmp_path: Path):
    on_h100 = plan_of(tmp_path, ["budget.gpu_hours=1e-12", "resources={gpus: 1, accelerator: h100}"])
    (line,) = report.budget_forecast(on_h100, {}, None)
    assert line.startswith("gpu_hours: 0 of 0 used; the rest takes at least 0, the GPUs at their peak all the time: ")
    half = plan_of(tmp_path, ["budget={cpu_hours: 1, wall_hours: 2}"])
    assert report.budget_forecast(half, {}, None) == [
        "cpu_hours: 0 of 1 used; what the rest takes is known once a trial is complete",
        "wall_hours: 0 of 2 used",
    ]
    done, left = half.trials
    standing = report.Standing(
        bench.store.spent(bench.store.add(half).sweep_id), ("cpu_hours=+1",), float(done.training_flops), 0.0, 3.0, 1
    )
    pace = left.training_flops / done.training_flops
    told = report.budget_forecast(half, {done.fingerprint: "COMPLETE"}, standing)[0]
    assert told == (
        f"cpu_hours: 0 of 2 used; the rest takes about {3 * pace:.3g}, at the pace of the complete trial: "
        f"{3 * pace - 2:.3g} more than there is"
    )


def test_a_plan_is_priced_by_complete_trials_else_by_the_peak_else_not_at_all(bench: Bench, tmp_path: Path):
    cpus = plan_of(tmp_path, ["resources.layout.data=2"])
    assert report.price_lines(cpus, {}, None) == [
        "price: unknown; a throughput is known once a trial of this sweep is complete, or by resources.expected_flops"
    ]
    given = plan_of(tmp_path, ["resources={cpus: 2, expected_flops: 1e9}", "budget.cpu_hours=1e-9"])
    hours = sum(trial.training_flops for trial in given.trials) / 1e9 * 2 / 3600
    (line,) = report.price_lines(given, {}, None)
    assert line.startswith(f"price: about {hours:.3g} CPU-hours, {hours:.3g} of them still to do; ")
    assert line.endswith("hours a trial; at resources.expected_flops (1e+09 FLOP/s a rank)")
    assert f"about {hours:.3g}, at resources.expected_flops" in report.budget_forecast(given, {}, None)[0]
    done, left = cpus.trials
    sweep_id = bench.store.add(cpus).sweep_id
    standing = report.Standing(bench.store.spent(sweep_id), (), float(done.training_flops), 0.0, 3.0, 1)
    pace = left.training_flops / done.training_flops
    walls = " to ".join(f"{hours:.3g}" for hours in sorted((1.5, 1.5 * pace)))
    assert report.price_lines(cpus, {done.fingerprint: "COMPLETE"}, standing) == [
        f"price: about {3 + 3 * pace:.3g} CPU-hours, {3 * pace:.3g} of them still to do; {walls} hours a trial; at the "
        f"pace of the complete trial ({done.training_flops / 3 / 3600:.3g} FLOP/s a CPU)"
    ]
    # 989.5e12 FLOP/s in bf16, as in the data sheet; two ranks of one GPU each.
    big = plan_of(tmp_path, ["train.tokens=2e12", "resources={gpus: 1, accelerator: h100, layout: {data: 2}}"])
    (line,) = report.price_lines(big, {}, None)
    hours = [trial.training_flops / 989.5e12 / 3600 for trial in big.trials]
    assert line.startswith(f"price: at least {sum(hours):.3g} GPU-hours, {sum(hours):.3g} of them still to do; ")
    assert f"; {min(hours) / 2:.3g} to {max(hours) / 2:.3g} hours a trial; the GPUs at their peak" in line
    (unknown,) = report.price_lines(plan_of(tmp_path, ["resources.gpus=1"]), {}, None)
    assert unknown.endswith("complete, or by resources.expected_flops or resources.accelerator")


def test_the_plan_tells_what_checkpoints_will_take(tmp_path: Path):
    plan = plan_of(tmp_path, ["checkpoint={keep: 3}"])
    sizes = [12 * trial.num_parameters for trial in plan.trials]
    (line,) = report.disk_lines(plan)
    assert line.startswith(f"disk: {memory_text(3 * sum(sizes))} of checkpoints at the end: 3 a trial, ")
    assert memory_text(max(sizes)) in line


@pytest.mark.parametrize(
    ("rule", "num_kept"),
    [({}, 2), ({"every_steps": 7}, 2), ({"every_steps": 30}, 1), ({"every_steps": 30, "final": False}, 0)],
)
def test_as_many_checkpoints_stay_as_were_written_and_no_more_than_keep(rule: dict[str, Any], num_kept: int):
    assert CheckpointConfig(**rule).num_kept(20) == num_kept


def test_the_pace_is_that_of_complete_trials_with_all_their_attempts(store: Store):
    run = Run(store)
    assert store.pace(run.sweep_id) == (0.0, 0.0, 0.0, 0)
    for state in ("WAITING", "COMPLETE"):
        attempt = store.start_attempt(
            run.lease, run.fingerprint, layout=run.plan.trials[0].layout, provenance={}, **TWO_GPUS
        )
        run.end(attempt, state)
    back_date(store, "attempt", "held_seconds", 1800.0)
    assert store.pace(run.sweep_id) == (5678.0, 2.0, 4.0, 1)


def test_the_command_line_says_how_to_go_on_and_goes_on(gatesweep: Gatesweep, machine: Machine, folder: Path):
    assert gatesweep("run", "tiny.yaml", "budget.wall_hours=10", "seeds=[1,2]", "retry.error=1").code == 0
    with Store(f"sqlite:///{folder / 'runs' / 'gatesweep.db'}") as store:
        force_wall_hours(store, 11.0)
    more = ("run", "tiny.yaml", "budget.wall_hours=10", "seeds=[1,2,3]")
    stopped = gatesweep(*more)
    assert stopped.code == 3
    assert "wall_hours 11 of 10, used up: nothing starts; gatesweep run FILE --extend wall_hours=+HOURS" in stopped.out
    assert "baseline" in stopped.out, "the table of what there is"
    assert "used up" in gatesweep("status").out
    assert "wall_hours: 11 of 10 used" in gatesweep("plan", *more[1:]).out
    refused = gatesweep(*more, "--extend", "cpu_hours=+1")
    assert refused.code == 2
    assert "sweep tiny has no budget.cpu_hours; it has: wall_hours" in refused.err
    assert gatesweep(*more, "--extend", "wall_hours=+5").code == 0
    assert "wall_hours=+1 from now on" in gatesweep("set", "tiny", "wall_hours=+1").out
    assert "wall_hours 11 of 16, 69% used" in gatesweep("status").out
