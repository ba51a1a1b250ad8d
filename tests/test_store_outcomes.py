"""What the tables are made of agrees with the views and the whole rows, on both back ends."""

# ruff: noqa: F811 (fixtures are imported by name)

from __future__ import annotations

import math
from datetime import datetime
from pathlib import Path

from sqlalchemy import text
from store_runs import (  # noqa: F401
    STEPS,
    Run,
    a_plan,
    postgres_server,
    run,
    steps,
    store,
    store_url,
    validation,
)

from models.config import Layout
from orchestrator.plan import PlannedTrial
from orchestrator.store import Outcome, Store, check_store, engine, migrate
from orchestrator.sweep import VerdictConfig


def test_an_outcome_says_what_the_trial_and_the_view_say(run: Run) -> None:
    first, second, third, _ = (planned.fingerprint for planned in run.plan.trials)
    run.complete(first, 2.5)
    run.end(run.start(fingerprint=second), "WAITING", cause="killed")
    attempt = run.start(fingerprint=second)
    run.store.record(run.lease, attempt, steps(1, 3))
    run.end(attempt, "DIVERGED", cause="nonfinite", end_step=3)
    run.end(run.start(fingerprint=third), "FAILED", cause="error", log_tail="one\ntwo")
    view = {row["fingerprint"]: row for row in run.store.frame("results", "quick").to_dict("records")}
    outcomes = run.store.outcomes(run.sweep_id, 0.1)
    for outcome, trial in zip(outcomes, run.store.trials(run.sweep_id), strict=True):
        shared = ("fingerprint", "arm", "axes", "seed", "state", "cause", "reason", "num_parameters", "num_attempts")
        assert [getattr(outcome, name) for name in shared] == [getattr(trial, name) for name in shared]
        train = trial.config.train
        told = (outcome.lr, outcome.num_steps, outcome.batch_tokens, outcome.precision)
        assert told == (train.lr, train.num_steps, train.batch_tokens, trial.config.precision)
        assert outcome.training_flops == trial.training_flops
        shown = view[trial.fingerprint]
        assert outcome.trained_in == (shown["trained_in"] if trial.num_attempts else None)
        assert outcome.num_attempts == shown["num_attempts"]
    assert outcomes[0].tails["slice"].loss_nats == view[first]["validation_loss_nats"] == 2.5
    assert [bool(outcome.tails) for outcome in outcomes] == [True, False, False, False]


def test_a_shared_trial_names_the_sweep_that_ran_it(run: Run) -> None:
    run.complete(run.fingerprint, 2.5)
    other = run.store.add(a_plan("sister")).sweep_id
    assert [one.trained_in for one in run.store.outcomes(other, 0.1)] == ["quick", None, None, None]


def test_layouts_are_those_of_attempts_that_a_trial_builds_on(run: Run) -> None:
    assert run.outcome().layouts == ()
    run.end(run.start(), "WAITING")
    assert [Layout.model_validate(one) for one in run.outcome().layouts] == [Layout(data=2)]
    for layout, resume_step in ((Layout(), 0), (Layout(), 5), (Layout(tensor=2), 10), (Layout(data=2), 10)):
        attempt = run.store.start_attempt(
            run.lease, run.fingerprint, layout=layout, provenance={}, resume_step=resume_step
        )
        run.end(attempt, "WAITING")
    assert [Layout.model_validate(one) for one in run.outcome().layouts] == [Layout(), Layout(data=2)]


def test_trials_are_counted_by_state_in_every_sweep_that_shows_them(run: Run) -> None:
    run.complete(run.fingerprint, 2.5)
    other = run.store.add(a_plan("half", lrs=(1e-3,))).sweep_id
    assert run.store.num_by_state() == {
        run.sweep_id: {"COMPLETE": 1, "WAITING": 3},
        other: {"COMPLETE": 1, "WAITING": 1},
    }
    run.store.add(a_plan("half", lrs=(4e-3,)))  # what is not current any more is not counted
    assert run.store.num_by_state()[other] == {"WAITING": 2}


def test_the_first_failed_trials_come_with_their_last_log(run: Run) -> None:
    for planned in reversed(run.plan.trials[:3]):
        run.end(run.start(fingerprint=planned.fingerprint), "WAITING", cause="killed", log_tail="earlier")
        run.end(run.start(fingerprint=planned.fingerprint), "FAILED", cause="error", log_tail="later")
    rows = run.store.failed(run.sweep_id, 2)
    assert [row.fingerprint for row in rows] == [planned.fingerprint for planned in run.plan.trials[:2]]
    assert [(row.arm, row.axes, row.cause, row.log_tail) for row in rows] == [
        ("baseline", {"train.lr": lr}, "error", "later") for lr in (1e-3, 4e-3)
    ]


def test_events_are_the_last_of_a_kind(run: Run) -> None:
    for number in range(4):
        run.store.add_event(run.sweep_id, "odd" if number % 2 else "even", str(number))
    assert [event.message for event in run.store.events(run.sweep_id, last=3)] == ["1", "2", "3"]
    assert [event.message for event in run.store.events(run.sweep_id, kind="odd")] == ["1", "3"]
    assert [event.message for event in run.store.events(kind="even", last=1)] == ["2"]


def test_an_older_stores_trials_get_their_new_columns(store_url: str) -> None:
    from alembic import command

    planned = a_plan("older").trials[0]
    database = engine.make_engine(engine.parse_url(store_url))
    with engine.writing(database) as connection:
        command.upgrade(migrate.alembic_config(connection), "0002")
        for statement in _OLDER_ROWS:
            connection.execute(text(statement), _older_values(planned))
    database.dispose()
    with Store(store_url) as store:
        (outcome,) = store.outcomes(store.sweep("older").id, 0.1)
        assert (outcome.batch_tokens, outcome.precision) == (planned.config.train.batch_tokens, "fp32")
        assert outcome.num_steps == STEPS


_OLDER_ROWS = (
    "INSERT INTO sweep (id, name, question, baseline, verdict, settings, text, overrides, created_at, updated_at)"
    " VALUES (1, 'older', '?', 'baseline', '{}', '{}', '', '[]', :now, :now)",
    "INSERT INTO arm (sweep_id, name, position, settings, current) VALUES (1, 'baseline', 0, '{}', true)",
    "INSERT INTO trial (fingerprint, config, lr, seed, num_steps, num_parameters, training_flops, state,"
    " reopened_after, created_at, updated_at)"
    " VALUES (:fingerprint, :config, :lr, 1, :num_steps, 1, 1.0, 'WAITING', 0, :now, :now)",
    "INSERT INTO sweep_trial (sweep_id, fingerprint, arm, axes, seed, layout, position, current)"
    " VALUES (1, :fingerprint, 'baseline', '{}', 1, '{}', 0, true)",
)
"""As the second revision kept them."""


def _older_values(planned: PlannedTrial) -> dict[str, object]:
    return {
        "now": datetime(2026, 1, 1),
        "fingerprint": planned.fingerprint,
        "config": planned.config.model_dump_json(),
        "lr": planned.config.train.lr,
        "num_steps": planned.config.train.num_steps,
    }


# What is kept of a trial that has ended


def kept(run: Run) -> list[tuple[object, ...]]:
    with run.store._engine.connect() as connection:
        rows = connection.execute(text("SELECT fingerprint, tail, slice_points, slice_loss_nats FROM outcome"))
        return sorted(tuple(row) for row in rows)


def worked_out(run: Run, tail: float = 0.1) -> list[Outcome]:
    """The outcomes of a store in which nothing is kept."""
    with engine.writing(run.store._engine) as connection:
        connection.execute(text("DELETE FROM outcome"))
    return run.store.outcomes(run.sweep_id, tail)


def test_what_is_kept_of_a_trial_is_what_its_records_say(run: Run) -> None:
    resumed, other, late, _ = (planned.fingerprint for planned in run.plan.trials)
    run.end(run.start(fingerprint=resumed), "WAITING")
    attempt = run.store.start_attempt(run.lease, resumed, layout=Layout(), provenance={}, resume_step=10)
    on_all = validation(STEPS, 2.25, "full")
    run.store.record(run.lease, attempt, [validation(10, 9.0), validation(19, 3.0), validation(STEPS, 2.0), on_all])
    run.end(attempt, "COMPLETE")
    run.complete(other, math.nan)
    run.complete(late, 2.5)
    assert [row[:3] for row in kept(run)] == sorted(
        (one, 0.1, 2 if one == resumed else 1) for one in (resumed, other, late)
    )
    told = run.store.outcomes(run.sweep_id, 0.1)
    assert (told[0].slice_loss_nats, told[0].full_loss_nats, told[0].num_attempts) == (2.5, 2.25, 2)
    assert told[1].slice_points == 1
    assert told[1].slice_loss_nats is None
    assert told == worked_out(run)


def test_a_tail_that_no_sweep_declared_is_worked_out(run: Run) -> None:
    run.complete(run.fingerprint, 2.5)
    run.store.record(run.lease, run.store.attempts(run.fingerprint)[0], [validation(10, 4.5)])
    assert run.outcome(tail=0.75).tails["slice"].loss_nats == 3.5
    assert run.outcome().tails["slice"].loss_nats == 2.5


def test_a_record_that_comes_after_the_end_counts(run: Run) -> None:
    run.complete(run.fingerprint, 2.5)
    before = kept(run)
    run.store.record(run.lease, run.store.attempts(run.fingerprint)[0], [validation(19, 3.5)])
    assert [row[2:] for row in before] == [(1, 2.5)]
    assert [row[2:] for row in kept(run)] == [(2, 3.0)]
    assert run.store.outcomes(run.sweep_id, 0.1) == worked_out(run)


def test_another_sweeps_tail_is_kept_when_it_takes_the_trial(run: Run) -> None:
    run.complete(run.fingerprint, 2.5)
    wide = run.store.add(a_plan("wide", verdict=VerdictConfig(margin=0.01, tail=0.5))).sweep_id
    assert [row[1] for row in kept(run)] == [0.1, 0.5]
    second = run.plan.trials[1].fingerprint
    run.complete(second, 2.0)  # both sweeps have it when it ends
    assert [row[1] for row in kept(run) if row[0] == second] == [0.1, 0.5]
    assert [one.slice_loss_nats for one in run.store.outcomes(wide, 0.5)] == [2.5, 2.0, None, None]


def test_an_older_stores_complete_trials_are_kept_once_it_is_upgraded(run: Run) -> None:
    run.complete(run.fingerprint, 2.5)
    before = run.store.outcomes(run.sweep_id, 0.1)
    with engine.writing(run.store._engine) as connection:
        connection.execute(text("DELETE FROM outcome"))
        migrate.keep_missing(connection, run.sweep_id)
    assert [row[2:] for row in kept(run)] == [(1, 2.5)]
    assert run.store.outcomes(run.sweep_id, 0.1) == before


def test_a_kept_loss_that_is_not_that_of_the_records_is_found(run: Run, tmp_path: Path) -> None:
    run.complete(run.fingerprint, 2.5)
    url = run.store._engine.url.render_as_string(hide_password=False)

    def problems() -> list[str]:
        return [one.message for one in check_store(url, tmp_path) if one.level == "problem"]

    assert problems() == []
    with engine.writing(run.store._engine) as connection:
        connection.execute(text("UPDATE outcome SET slice_loss_nats = 2.25, num_attempts = 2"))
    assert problems() == [
        "what is kept for tables is of COMPLETE trials with all their attempts: 1 do not",
        "losses kept for tables are those of the validations: 1 do not",
    ]
