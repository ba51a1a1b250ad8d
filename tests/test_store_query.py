"""Free SQL on both back ends: it reads, and nothing else."""

# ruff: noqa: F811 (fixtures are imported by name)

from __future__ import annotations

import contextlib
import re
from collections.abc import Iterator
from pathlib import Path

import pytest
from store_backends import PostgresServer
from store_runs import Run, postgres_server, run, steps, store, store_url  # noqa: F401

from orchestrator.store import (
    Store,
    engine,
    query,
)
from orchestrator.sweep import UserError

# Free queries


WITHOUT_EFFECT = {"SET TRANSACTION READ WRITE", "BEGIN", ""}
"""Some back end takes these, when it is asked to, and nothing comes of them."""

HOSTILE = [
    "INSERT INTO event (at, kind, message) VALUES ('2026-01-01', 'x', 'x')",
    "DELETE FROM sweep_trial",
    "DROP TABLE event",
    "DROP VIEW results",
    "-- SELECT\nDROP TABLE event",
    "SELECT 1; DROP TABLE event",
    "SELECT 1; COMMIT; DROP TABLE event",
    "PRAGMA query_only = OFF",
    "PRAGMA journal_mode = DELETE",
    "PRAGMA writable_schema = ON",
    "SELECT 1; PRAGMA query_only = OFF",
    "ATTACH DATABASE 'stolen.db' AS stolen",
    "VACUUM INTO 'stolen.db'",
    "WITH x AS (SELECT 1) DELETE FROM event",
    "WITH gone AS (DELETE FROM event RETURNING id) SELECT * FROM gone",
    "EXPLAIN ANALYZE DELETE FROM event",
    "SELECT * INTO stolen FROM event",
    "SELECT set_config('transaction_read_only', 'off', false)",
    "SELECT load_extension('x')",
    "SELECT nextval('event_id_seq')",
    "SET TRANSACTION READ WRITE",
    "BEGIN",
    "COPY (SELECT 1) FROM PROGRAM 'true'",
    "DO $$ BEGIN DELETE FROM event; END $$",
    "SELECT FROM WHERE",
    "SELECT * FROM nothing_here",
    "",
]


def is_refused(store: Store, sql: str) -> bool:
    try:
        store.query(sql)
    except UserError:
        return True
    return False


@pytest.mark.parametrize("first_look", [True, False])
def test_a_query_cannot_write(run: Run, first_look: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without the first look at the statement, the back end refuses writes by itself."""
    monkeypatch.chdir(tmp_path)
    if not first_look:
        monkeypatch.setattr(query, "_QUESTION", re.compile(""))
    run.store.add_event(run.sweep_id, "kept", "kept")
    for sql in HOSTILE:
        assert is_refused(run.store, sql) or (sql in WITHOUT_EFFECT and not first_look), sql
        assert [event.kind for event in run.store.events(run.sweep_id)] == ["kept"], sql
        assert run.store.query("SELECT COUNT(*) AS n FROM results").n[0] == 4, sql
    assert list(tmp_path.glob("stolen*")) == []
    run.store.add_event(run.sweep_id, "writing", "goes on")


def test_a_query_that_never_ends_is_stopped(store: Store) -> None:
    endless = "WITH RECURSIVE n(i) AS (SELECT 1 UNION ALL SELECT i + 1 FROM n) SELECT COUNT(*) FROM n"
    with pytest.raises(UserError, match=r"stopped after 0.2 s|statement timeout"):
        store.query(endless, timeout_seconds=0.2)


def test_a_query_may_hold_percent_signs_and_question_marks(run: Run) -> None:
    found = run.store.query("SELECT arm, '?' AS mark FROM results WHERE arm LIKE '%line' -- 100 %s\nLIMIT 1")
    assert found.to_dict("records") == [{"arm": "baseline", "mark": "?"}]


def test_a_frame_of_an_unknown_view_or_sweep_is_refused(run: Run) -> None:
    with pytest.raises(UserError, match="no view 'result'; allowed: results, curves, attempts, diagnostics"):
        run.store.frame("result")  # type: ignore[arg-type]
    with pytest.raises(UserError, match="did you mean 'quick'"):
        run.store.frame("results", "quic")


def test_a_query_is_cut_at_its_cap_and_says_so(run: Run) -> None:
    run.store.record(run.lease, run.start(), steps(1, 5))
    sql = "SELECT step FROM curves ORDER BY step"
    cut = run.store.query(sql, max_rows=3)
    assert (list(cut.step), cut.attrs["is_cut"]) == ([1, 2, 3], True)
    whole = run.store.query(sql, max_rows=5)
    assert (list(whole.step), whole.attrs["is_cut"]) == ([1, 2, 3, 4, 5], False)
    empty = run.store.query("SELECT step, loss_nats FROM curves WHERE step > 99", max_rows=3)
    assert (list(empty.columns), len(empty), empty.attrs["is_cut"]) == (["step", "loss_nats"], 0, False)


def test_a_capped_query_does_not_wait_for_what_it_leaves_out(store: Store) -> None:
    endless = "WITH RECURSIVE n(i) AS (SELECT 1 UNION ALL SELECT i + 1 FROM n) SELECT i FROM n"
    assert list(store.query(endless, max_rows=2).i) == [1, 2]


def test_a_capped_query_cannot_write_either(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(query, "_QUESTION", re.compile(""))
    run.store.add_event(run.sweep_id, "kept", "kept")
    for sql in HOSTILE:
        with contextlib.suppress(UserError):
            run.store.query(sql, max_rows=10)
        assert [event.kind for event in run.store.events(run.sweep_id)] == ["kept"], sql
        assert len(run.store.trials(run.sweep_id)) == 4, sql


def test_sqlite_makes_no_value_that_fills_the_memory(tmp_path: Path) -> None:
    with (
        Store(f"sqlite:///{tmp_path / 'x.db'}") as store,
        pytest.raises(UserError, match=r"too big|out of memory"),
    ):
        store.query("SELECT zeroblob(900000000)")


# The reader role


def role_on(url: str, name: str, attributes: str = "") -> str:
    """A login role, made as README.md says, and the store's URL by it."""
    path = Path(query.__file__).with_name("README.md")
    statements = re.findall(r"```postgresql\n(CREATE ROLE.*?)```", path.read_text(), re.DOTALL)
    database = engine.make_engine(engine.parse_url(url))
    with engine.writing(database) as connection:
        schema_name = connection.exec_driver_sql("SELECT current_schema()").scalar()
        connection.exec_driver_sql(f"DROP ROLE IF EXISTS {name}")
        text = statements[0].replace("gatesweep_reader", name).replace("SCHEMA public", f"SCHEMA {schema_name}")
        connection.exec_driver_sql(text + attributes.replace("CURRENT_SCHEMA", schema_name))
    database.dispose()
    return url.replace("//gatesweep@", f"//{name}@")


@pytest.fixture
def postgres_url(postgres_server: PostgresServer) -> Iterator[str]:
    url = postgres_server.new_schema()
    yield url
    database = engine.make_engine(engine.parse_url(url))
    with engine.writing(database) as connection:
        for name in ("reads", "writes"):
            connection.exec_driver_sql(
                f"DO $$ BEGIN IF EXISTS (SELECT 1 FROM pg_roles WHERE rolname = '{name}') THEN"
                f" DROP OWNED BY {name}; DROP ROLE {name}; END IF; END $$"
            )
    database.dispose()


def test_a_reader_role_answers_queries_and_does_nothing_else(
    postgres_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(query, "_QUESTION", re.compile(""))
    with Store(postgres_url) as owner:
        Run(owner)
        reader_url = role_on(postgres_url, "reads")
        with Store(postgres_url, reader_url) as store:
            assert store.query("SELECT CURRENT_USER AS me, COUNT(*) AS n FROM results").to_dict("records") == [
                {"me": "reads", "n": 4}
            ]
            server_side = [f"SELECT {call}" for call in ("pg_read_file('/etc/passwd')", "lo_import('/etc/passwd')")]
            escapes = ["SELECT set_config('role', 'gatesweep', false)", "SET ROLE gatesweep"]
            for sql in (*HOSTILE, *server_side, *escapes):
                assert is_refused(store, sql) or sql in WITHOUT_EFFECT, sql
            assert len(owner.trials(1)) == 4


def test_a_reader_sees_every_table_and_can_change_none(postgres_url: str) -> None:
    with Store(postgres_url) as owner:
        run = Run(owner)
        with Store(role_on(postgres_url, "reads")) as store:  # as one's whole store: status and results need no more
            assert store.outcomes(run.sweep_id, 0.1) == owner.outcomes(run.sweep_id, 0.1)
            assert store.num_by_state() == {run.sweep_id: {"WAITING": 4}}
            with pytest.raises(Exception, match="permission denied"):
                store.add_event(run.sweep_id, "no", "no")


def test_a_reader_that_may_write_is_refused(postgres_url: str) -> None:
    with Store(postgres_url) as owner:
        Run(owner)
        writer_url = role_on(postgres_url, "writes", "GRANT INSERT ON ALL TABLES IN SCHEMA CURRENT_SCHEMA TO writes;")
        for url, name in ((writer_url, "writes"), (postgres_url, "gatesweep")):
            with Store(postgres_url, url) as store, pytest.raises(UserError, match=f"the role {name} may do more"):
                store.query("SELECT 1")
