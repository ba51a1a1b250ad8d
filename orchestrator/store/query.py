"""Free SQL, read-only even against a hostile statement, and the views as DataFrames.

Nothing here shares a connection with the rest of the store. Only one statement that starts like a question is
taken, and the back end refuses writes by itself: SQLite opens the file read-only and an authorizer allows nothing
but reading; Postgres runs a READ ONLY transaction over the protocol that takes a single statement. There, a role that
may do more than read could still call a function that does harm (end sessions, read the server's files): a reader
role, by a URL of its own, can't. ``SET ROLE`` would not do: a query could take it back with ``set_config``.
"""

from __future__ import annotations

import json
import re
import sqlite3
import time
from collections.abc import Sequence
from itertools import islice
from typing import TYPE_CHECKING, Any, Literal
from urllib.parse import quote

from sqlalchemy.exc import DBAPIError

from orchestrator.store.engine import READING_PRAGMAS
from orchestrator.sweep import UserError

if TYPE_CHECKING:
    import pandas as pd
    from sqlalchemy import Engine

TIMEOUT_SECONDS = 60.0

MAX_VALUE_BYTES = 50_000_000
"""The longest text or blob that SQLite makes for a query: ``zeroblob(1e9)`` is a question, too."""

_QUESTION = re.compile(r"(?:\s|--[^\n]*(?:\n|$)|/\*.*?\*/)*(?:SELECT|WITH|VALUES|EXPLAIN)\b", re.IGNORECASE | re.DOTALL)
_SQLITE_READS = {
    sqlite3.SQLITE_SELECT,
    sqlite3.SQLITE_READ,
    sqlite3.SQLITE_FUNCTION,
    sqlite3.SQLITE_RECURSIVE,
}
_TYPES: dict[str, tuple[str, ...]] = {
    "boolean": ("nonfinite", "git_dirty"),
    "float64": (
        "lr", "step_lr", "training_flops", "loss_nats", "gradient_norm", "validation_loss_nats", "bits_per_byte",
        "full_validation_loss_nats", "full_bits_per_byte", "tokens_per_second", "seconds", "first_token_attention",
        "max_activation", "attention_output_rms", "ffn_output_rms", "residual_rms", "update_ratio", "gate_score",
        "flops", "cpus", "gpus",
    ),
    "Int64": ("end_step", "resumed_from_attempt", "branch_step", "peak_memory_bytes"),
}  # fmt: skip
_MOMENTS = ("started_at", "ended_at")
_NESTED = ("layout", "hosts", "provenance", "heads", "gates")

View = Literal["results", "curves", "attempts", "diagnostics", "denominators"]

VIEW_ORDER = {
    "results": "position",
    "curves": "position, step",
    "attempts": "position, attempt",
    "diagnostics": "position, step, layer",
    "denominators": "position, step",
}
"""The documented views, and the order of their rows within a sweep."""

Table = tuple[list[str], list[tuple[Any, ...]]]


def run(
    engine: Engine,
    sql: str,
    parameters: Sequence[str] = (),
    seconds: float = TIMEOUT_SECONDS,
    max_rows: int | None = None,
) -> Table:
    """Column names and rows of one reading statement; ``?`` stands for a parameter. One row more than ``max_rows``
    are given at most: the caller sees that there are more."""
    if not _QUESTION.match(sql):
        shown = " ".join(sql.split())[:60]
        raise UserError(f"query reads only: a statement must start with SELECT, WITH, VALUES or EXPLAIN, got {shown!r}")
    ask = _run_sqlite if engine.dialect.name == "sqlite" else _run_postgres
    return ask(engine, sql, parameters, seconds, max_rows)


def _allow_reads(action: int, name: str | None, *_: object) -> int:
    return sqlite3.SQLITE_OK if action in _SQLITE_READS and name != "load_extension" else sqlite3.SQLITE_DENY


def _run_sqlite(engine: Engine, sql: str, parameters: Sequence[str], seconds: float, max_rows: int | None) -> Table:
    connection = sqlite3.connect(f"file:{quote(str(engine.url.database))}?mode=ro", uri=True, timeout=seconds)
    try:
        for pragma in ("PRAGMA query_only = ON", *READING_PRAGMAS):
            connection.execute(pragma)
        connection.setlimit(sqlite3.SQLITE_LIMIT_ATTACHED, 0)
        connection.setlimit(sqlite3.SQLITE_LIMIT_LENGTH, MAX_VALUE_BYTES)
        connection.set_authorizer(_allow_reads)
        deadline = time.monotonic() + seconds
        connection.set_progress_handler(lambda: int(time.monotonic() > deadline), 100_000)
        cursor = connection.execute(sql, tuple(parameters))
        names = [column[0] for column in cursor.description or ()]
        return names, cursor.fetchall() if max_rows is None else cursor.fetchmany(max_rows + 1)
    except (sqlite3.Error, sqlite3.Warning) as error:
        raise UserError(_refusal(str(error), seconds)) from error
    finally:
        connection.close()


def _refusal(message: str, seconds: float) -> str:
    if message == "not authorized":
        message = "not authorized: a query may only read"
    elif message == "interrupted":
        message = f"stopped after {seconds:g} s"
    return f"the query failed: {message}"


def _run_postgres(engine: Engine, sql: str, parameters: Sequence[str], seconds: float, max_rows: int | None) -> Table:
    import psycopg
    from psycopg.types.string import TextLoader
    from sqlalchemy import create_engine
    from sqlalchemy.pool import NullPool

    alone = create_engine(engine.url, poolclass=NullPool)
    with alone.connect() as borrowed:
        connection = borrowed.connection.driver_connection
        assert isinstance(connection, psycopg.Connection)
        connection.adapters.register_loader("json", TextLoader)  # as SQLite gives it
        try:
            connection.execute("SET TRANSACTION READ ONLY")
            connection.execute("SET LOCAL TIME ZONE 'UTC'")
            connection.execute(f"SET LOCAL statement_timeout = {int(seconds * 1000)}")
            # Prepared: the server then refuses a second statement ("COMMIT; DROP ...") behind the first.
            given = [sql] if not parameters else [sql.replace("?", "%s"), tuple(parameters)]
            cursor = connection.cursor()
            # Streamed, what lies beyond the cap stays on the server; of no row at all a stream does not tell the names.
            rows = [] if max_rows is None else list(islice(cursor.stream(*given), max_rows + 1))
            if not rows:
                cursor.execute(*given, prepare=True)
                rows = cursor.fetchall()
            names = [column.name for column in cursor.description or ()]
            return names, rows
        except psycopg.Error as error:
            raise UserError(f"the query failed: {str(error).strip()}") from error
        finally:
            connection.rollback()


def check_reader(engine: Engine) -> None:
    """UserError when the reader's role could do more than read: the whole point of it would be lost unnoticed."""
    from sqlalchemy import text

    question = text(
        "SELECT CURRENT_USER, r.rolsuper OR r.rolcreaterole OR r.rolcreatedb OR r.rolreplication OR"
        " EXISTS (SELECT 1 FROM pg_roles g WHERE g.oid <> r.oid AND pg_has_role(r.oid, g.oid, 'MEMBER')) OR"
        " has_table_privilege('trial', 'INSERT, UPDATE, DELETE, TRUNCATE')"
        " FROM pg_roles r WHERE r.rolname = CURRENT_USER"
    )
    try:
        with engine.connect() as connection:
            name, may_more = connection.execute(question).one()
    except DBAPIError as error:
        raise UserError(f"GATESWEEP_STORE_READER can't be used: {str(error.orig).strip()}") from error
    if may_more:
        raise UserError(
            f"GATESWEEP_STORE_READER: the role {name} may do more than read; make one that can only SELECT "
            "(orchestrator/store/README.md has the SQL)"
        )


def to_frame(table: Table, max_rows: int | None = None) -> pd.DataFrame:
    """``attrs["is_cut"]`` says whether there were more than ``max_rows``."""
    import pandas as pd

    names, rows = table
    frame = pd.DataFrame(rows[:max_rows], columns=pd.Index(names))
    frame.attrs["is_cut"] = max_rows is not None and len(rows) > max_rows
    return frame


def view_frame(engine: Engine, view: str, sweep: str | None) -> pd.DataFrame:
    """A documented view with a column an axis, and types that do not depend on what is NULL."""
    import pandas as pd

    where, parameters = ("", []) if sweep is None else (" WHERE sweep = ?", [sweep])
    frame = to_frame(run(engine, f"SELECT * FROM {view}{where} ORDER BY sweep, {VIEW_ORDER[view]}", parameters))
    present = set(frame.columns)
    for kind, names in _TYPES.items():
        frame = frame.astype({name: kind for name in names if name in present})
    for name in present.intersection(_MOMENTS):
        frame[name] = pd.to_datetime(frame[name], utc=True, format="ISO8601")
    for name in present.intersection(_NESTED):
        frame[name] = frame[name].map(json.loads, na_action="ignore")
    return _expand_axes(frame)


def _expand_axes(frame: pd.DataFrame) -> pd.DataFrame:
    """The JSON column ``axes`` gives way to a column an axis, in the order of the sweep file."""
    place = list(frame.columns).index("axes")
    texts = frame.pop("axes")
    decoded: dict[str, dict[str, Any]] = {text: json.loads(text) for text in texts.unique()}
    names = dict.fromkeys(name for axes in decoded.values() for name in axes if name not in frame.columns)
    for shift, name in enumerate(names):
        values = texts.map({text: axes.get(name) for text, axes in decoded.items()})
        frame.insert(place + shift, name, values)
    return frame
