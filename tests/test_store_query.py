"""Free SQL on both back ends: it reads, and nothing else."""

# ruff: noqa: F811 (fixtures are imported by name)

from __future__ import annotations

import re
from pathlib import Path

import pytest
from store_runs import Run, postgres_server, run, store, store_url  # noqa: F401

from orchestrator.store import (
    Store,
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
