"""A store is checked, upgraded, and moved whole between SQLite and Postgres."""

# ruff: noqa: F811 (fixtures are imported by name)

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
from sqlalchemy import select, text
from store_backends import PostgresServer
from store_runs import STEPS, Run, a_plan, postgres_server, probed, run, steps, store, store_url, validation  # noqa: F401

from models.run_dir import trial_dir
from orchestrator.cli import app
from orchestrator.store import (
    Finding,
    Store,
    check_store,
    engine,
    export_store,
    import_store,
    migrate,
    schema,
    transfer,
    upgrade_store,
)
from orchestrator.sweep import UserError


@pytest.fixture
def filled(tmp_path: Path) -> str:
    """The URL of a SQLite store with something in every table, and with texts that are easy to lose."""
    url = f"sqlite:///{tmp_path / 'filled.db'}"
    with Store(url) as opened:
        run = Run(opened)
        run.complete(run.fingerprint, 2.5)
        other = run.plan.trials[1].fingerprint
        run.end(
            run.start(fingerprint=other), "WAITING", cause="killed", log_tail="tab\tback\\slash 'quote' ü \u2028 \n"
        )
        attempt = run.start(fingerprint=other, hosts=["n1", "n2"])
        infinite = steps(1, 1, loss=float("inf"))
        run.store.record(run.lease, attempt, [*infinite, probed(5, score=0.1 + 0.2)])
        run.store.set_mirror_cursor(run.sweep_id, other, {"step": 5, "validations": [[5, "slice"]]})
        run.store.add_event(run.sweep_id, "odd", "\\N and \\. are COPY's own words", other, 2)
        run.store.add(a_plan("second", lrs=(1e-3,)))
    return url


def content(url: str) -> dict[str, list[tuple[object, ...]]]:
    database = engine.make_engine(engine.parse_url(url))
    with engine.reading(database) as connection:
        tables = {
            table.name: sorted(map(tuple, connection.execute(select(table))), key=repr)
            for table in schema.metadata.sorted_tables
        }
    database.dispose()
    return tables


def test_a_store_goes_to_postgres_and_back_without_loss(
    filled: str, postgres_server: PostgresServer, tmp_path: Path
) -> None:
    shared, back = postgres_server.new_schema(), tmp_path / "back.db"
    there = import_store(str(tmp_path / "filled.db"), shared)
    again = export_store(shared, str(back))
    empty = {name for name, rows in content(filled).items() if not rows}
    assert not empty & {
        "sweep",
        "arm",
        "lease",
        "trial",
        "sweep_trial",
        "attempt",
        "step_metric",
        "validation",
        "event",
    }
    assert "layer_diagnostic" not in empty
    assert content(filled) == content(shared) == content(f"sqlite:///{back}")
    assert there.moved == again.moved
    assert {one.table: one.num_rows for one in there.moved} == {
        name: len(rows) for name, rows in content(filled).items()
    }
    assert there.run_by == (("quick", "host-a:1"),)
    assert [path.name for path in tmp_path.glob("*back*")] == ["back.db"], "one file, nothing beside it"


def test_a_moved_store_takes_new_rows(filled: str, postgres_server: PostgresServer) -> None:
    """Ids go on behind those that came along."""
    shared = postgres_server.new_schema()
    import_store(filled, shared)
    with Store(shared) as store:
        store.add_event(None, "after", "the move")
        assert store.add(a_plan("third")).sweep_id == 3
        assert [event.kind for event in store.events()][-1] == "after"


def test_a_store_is_copied_into_an_empty_one_only(filled: str, store_url: str, tmp_path: Path) -> None:
    with Store(store_url) as target:
        Run(target)
    before = content(store_url)
    with pytest.raises(UserError, match=r"not empty \(there are rows in .*sweep"):
        import_store(filled, store_url)
    assert content(store_url) == before
    (tmp_path / "taken.db").write_text("mine")
    with pytest.raises(UserError, match=r"taken.db exists; export only makes new files"):
        export_store(filled, str(tmp_path / "taken.db"))
    with pytest.raises(UserError, match="there is no file"):
        import_store(str(tmp_path / "nothing.db"), store_url)


def test_a_copy_that_differs_is_not_kept(filled: str, store_url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    honest = transfer._plain
    counted = iter(range(10_000))
    monkeypatch.setattr(transfer, "_plain", lambda value: (honest(value), next(counted)))  # each row another each time
    with pytest.raises(UserError, match=r"table sweep did not arrive as it was.*nothing was kept"):
        import_store(filled, store_url)
    assert not any(content(store_url).values())
    monkeypatch.undo()
    import_store(filled, store_url)


def test_a_failed_export_leaves_no_file(filled: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object) -> Iterator[None]:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(transfer, "_go_on_numbering", fail)
    with pytest.raises(OSError, match="No space left"):
        export_store(filled, str(tmp_path / "copy.db"))
    assert list(tmp_path.glob("*copy*")) == []


def test_a_store_of_another_schema_is_not_copied(filled: str, tmp_path: Path) -> None:
    database = engine.make_engine(engine.parse_url(filled))
    with engine.writing(database) as connection:
        connection.execute(text(f"UPDATE {schema.VERSION_TABLE} SET version_num = '0001'"))
    database.dispose()
    with pytest.raises(UserError, match=r"schema version 0001, .* works with \d+; first run gatesweep db upgrade"):
        export_store(filled, str(tmp_path / "copy.db"))


def test_an_upgrade_says_from_where_to_where(store_url: str) -> None:
    from alembic import command

    database = engine.make_engine(engine.parse_url(store_url))
    with engine.writing(database) as connection:
        command.upgrade(migrate.alembic_config(connection), "0001")
    database.dispose()
    assert upgrade_store(store_url) == ("0001", schema.REVISIONS[-1])
    assert upgrade_store(store_url) == (schema.REVISIONS[-1], schema.REVISIONS[-1])
    assert [finding.level for finding in check_store(store_url, Path("nowhere"))].count("problem") == 0


# Checks


def levels(findings: list[Finding]) -> set[str]:
    return {finding.level for finding in findings}


def test_a_sound_store_has_nothing_but_ok(run: Run, store_url: str, tmp_path: Path) -> None:
    run.complete(run.fingerprint, 2.5)
    run.start(fingerprint=run.plan.trials[1].fingerprint)
    for planned in run.plan.trials[:2]:
        trial_dir(tmp_path, planned.fingerprint).mkdir(parents=True)
    assert levels(check_store(store_url, tmp_path / "trials")) == {"ok"}


def test_run_dirs_that_do_not_match_are_named(run: Run, store_url: str, tmp_path: Path) -> None:
    run.complete(run.fingerprint, 2.5)
    trial_dir(tmp_path, "stranger").mkdir(parents=True)
    found = [finding.message for finding in check_store(store_url, tmp_path / "trials") if finding.level == "warning"]
    assert len(found) == 2
    assert "no trial in this store: stranger" in found[0]
    assert run.fingerprint in found[1]


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        ("UPDATE trial SET state = 'RUNNING'", "RUNNING trials have an attempt that has not ended: 4 do not"),
        ("UPDATE attempt SET ended_at = NULL", "attempts that have not ended belong to RUNNING trials: 1 do not"),
        ("UPDATE attempt SET number = 7", "numbered without gaps: 1 do not"),
        ("UPDATE trial SET state = 'DIVERGED'", "have been attempted: 3 do not"),
        ("DROP VIEW curves", "views are missing: curves"),
        ("DROP INDEX ix_trial_state", "the schema is not that of its version: .*ix_trial_state"),
        ("UPDATE gatesweep_version SET version_num = '0001'", "schema version 0001; .* gatesweep db upgrade"),
        ("UPDATE gatesweep_version SET version_num = '9999'", "schema version 9999; .* upgrade gatesweep"),
    ],
)
def test_damage_is_found(run: Run, store_url: str, tmp_path: Path, damage: str, message: str) -> None:
    run.complete(run.fingerprint, 2.5)
    with engine.writing(run.store._engine) as connection:
        connection.execute(text(damage))
    problems = [finding.message for finding in check_store(store_url, tmp_path) if finding.level == "problem"]
    with pytest.raises(AssertionError, match=message):
        raise AssertionError("\n".join(problems))


def test_rows_without_their_parent_are_found(run: Run, store_url: str, tmp_path: Path) -> None:
    run.complete(run.fingerprint, 2.5)
    with run.store._engine.connect() as connection:
        if connection.dialect.name == "sqlite":
            connection.exec_driver_sql("COMMIT")
            connection.exec_driver_sql("PRAGMA foreign_keys = OFF")
            connection.exec_driver_sql("BEGIN IMMEDIATE")
        else:
            connection.exec_driver_sql("SET session_replication_role = replica")
        connection.exec_driver_sql("DELETE FROM attempt")
        connection.commit()
        connection.invalidate()
    problems = [finding.message for finding in check_store(store_url, tmp_path) if finding.level == "problem"]
    assert f"{STEPS} rows of step_metric point nowhere by attempt_id (to attempt)" in problems


def test_a_damaged_file_is_found(tmp_path: Path) -> None:
    url = f"sqlite:///{tmp_path / 'x.db'}"
    with Store(url) as store:
        run = Run(store)
        run.store.record(run.lease, run.start(), [*steps(1, 2000), validation(STEPS, 2.0)])
    export_store(url, str(tmp_path / "whole.db"))
    damaged = tmp_path / "damaged.db"
    shutil.copy(tmp_path / "whole.db", damaged)
    with damaged.open("r+b") as stream:
        stream.seek(-4096, 2)
        stream.write(b"\xff" * 2048)
    findings = check_store(f"sqlite:///{damaged}", tmp_path)
    assert any(finding.level == "problem" and "damaged" in finding.message for finding in findings)


# The command line


def test_the_verbs_speak_plainly(
    filled: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("GATESWEEP_HOME", str(tmp_path / "home"))
    monkeypatch.setattr(app.console, "width", 200)

    def db(*arguments: str) -> tuple[int, str]:
        code = app.app(["db", *arguments], standalone_mode=False) or 0
        return code, capsys.readouterr().out

    with pytest.raises(UserError, match="there is no store at"):
        db("check")
    assert db("upgrade") == (0, f"schema version none -> {schema.REVISIONS[-1]}\n")
    code, said = db("import", str(tmp_path / "filled.db"))
    assert (code, "rows copied and found equal" in said, "quick is run by host-a:1" in said) == (0, True, True)
    code, said = db("export", str(tmp_path / "copy.db"))
    assert (code, (tmp_path / "copy.db").exists()) == (0, True)
    code, said = db("check")
    assert (code, "run dirs were not looked at" in said) == (0, True)
    database = engine.make_engine(engine.parse_url(f"sqlite:///{tmp_path / 'home' / 'gatesweep.db'}"))
    with engine.writing(database) as connection:
        connection.execute(text("UPDATE attempt SET number = number + 5"))
    database.dispose()
    code, said = db("check")
    assert (code, "problem" in said) == (1, True)
