"""Free SQL, read-only even against a hostile statement, and the views as DataFrames.

Nothing here shares a connection with the rest of the store. Only one statement that starts like a question is
taken, and the back end refuses writes by itself: SQLite opens the file read-only and an authorizer allows nothing
but reading; Postgres runs a READ ONLY transaction over the protocol that takes a single statement.
"""

from __future__ import annotations

import json
import re
import sqlite3
import time
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Literal
from urllib.parse import quote

from orchestrator.store.engine import READING_PRAGMAS
from orchestrator.sweep import UserError

if TYPE_CHECKING:
    import pandas as pd
    from sqlalchemy import Engine

TIMEOUT_SECONDS = 60.0

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
    ),
    "Int64": ("end_step", "resumed_from_attempt", "peak_memory_bytes"),
}  # fmt: skip
_MOMENTS = ("started_at", "ended_at")
_NESTED = ("layout", "hosts", "provenance", "heads", "gates")

View = Literal["results", "curves", "attempts", "diagnostics"]

VIEW_ORDER = {
    "results": "position",
    "curves": "position, step",
    "attempts": "position, attempt",
    "diagnostics": "position, step, layer",
}
"""The documented views, and the order of their rows within a sweep."""

Table = tuple[list[str], list[tuple[Any, ...]]]


def run(engine: Engine, sql: str, parameters: Sequence[str] = (), seconds: float = TIMEOUT_SECONDS) -> Table:
    """Column names and rows of one reading statement; ``?`` stands for a parameter."""
    if not _QUESTION.match(sql):
        shown = " ".join(sql.split())[:60]
        raise UserError(f"query reads only: a statement must start with SELECT, WITH, VALUES or EXPLAIN, got {shown!r}")
    ask = _run_sqlite if engine.dialect.name == "sqlite" else _run_postgres
    return ask(engine, sql, parameters, seconds)


def _allow_reads(action: int, name: str | None, *_: object) -> int:
    return sqlite3.SQLITE_OK if action in _SQLITE_READS and name != "load_extension" else sqlite3.SQLITE_DENY


def _run_sqlite(engine: Engine, sql: str, parameters: Sequence[str], seconds: float) -> Table:
    connection = sqlite3.connect(f"file:{quote(str(engine.url.database))}?mode=ro", uri=True, timeout=seconds)
    try:
        for pragma in ("PRAGMA query_only = ON", *READING_PRAGMAS):
            connection.execute(pragma)
        connection.set_authorizer(_allow_reads)
        deadline = time.monotonic() + seconds
        connection.set_progress_handler(lambda: int(time.monotonic() > deadline), 100_000)
        cursor = connection.execute(sql, tuple(parameters))
        names = [column[0] for column in cursor.description or ()]
        return names, cursor.fetchall()
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


def _run_postgres(engine: Engine, sql: str, parameters: Sequence[str], seconds: float) -> Table:
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
            cursor.execute(*given, prepare=True)
            names = [column.name for column in cursor.description or ()]
            return names, cursor.fetchall()
        except psycopg.Error as error:
            raise UserError(f"the query failed: {str(error).strip()}") from error
        finally:
            connection.rollback()


def to_frame(table: Table) -> pd.DataFrame:
    import pandas as pd

    names, rows = table
    return pd.DataFrame(rows, columns=pd.Index(names))


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
