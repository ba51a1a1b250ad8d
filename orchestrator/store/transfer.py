"""A whole store into another, empty one: SQLite to Postgres, back, or into a file that is kept. Without loss.

Every table's rows are hashed as Python sees them, once when they are read and once when they are read back from the
target, inside the transaction that wrote them: what does not come out equal is not kept. The hash is a sum over rows,
since two databases need not sort text alike.
"""

from __future__ import annotations

import hashlib
import json
import os
import sqlite3
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from sqlalchemy import JSON, Connection, Engine, Table, func, insert, select, text
from sqlalchemy.exc import DBAPIError

from orchestrator.store.engine import make_engine, parse_url, read_only_engine, reading, writing
from orchestrator.store.lease import database_seconds
from orchestrator.store.migrate import current_revision, migrate
from orchestrator.store.schema import REVISIONS, lease, metadata, sweep
from orchestrator.sweep import UserError

ROWS_AT_ONCE = 5_000


@dataclass(frozen=True)
class Moved:
    """A table that arrived whole."""

    table: str
    num_rows: int
    checksum: str
    """The same of the same rows in every store: 64 hexadecimal digits."""


@dataclass(frozen=True)
class Transfer:
    moved: tuple[Moved, ...]
    run_by: tuple[tuple[str, str], ...]
    """(sweep, controller) of what ran meanwhile: what it writes later is not in the copy."""


def export_store(url: str, to: str) -> Transfer:
    """Copy the store at ``url`` into ``to``: a new SQLite file by its path, or the URL of an empty database."""
    source = make_engine(parse_url(url))
    try:
        if "://" in to:
            return _into(source, to)
        path = Path(to)
        if path.exists():
            raise UserError(f"{path} exists; export only makes new files")
        aside = path.with_name(f".{path.name}.{os.getpid()}")
        try:
            transfer = _into(source, f"sqlite:///{aside.absolute()}")
            _into_one_file(aside)
            aside.replace(path)
        finally:
            for leftover in (aside, *(aside.with_name(aside.name + suffix) for suffix in ("-wal", "-shm"))):
                leftover.unlink(missing_ok=True)
        return transfer
    finally:
        source.dispose()


def import_store(origin: str, url: str) -> Transfer:
    """Copy a SQLite file, by its path, or the store at a URL, into the empty store at ``url``."""
    if "://" not in origin and not Path(origin).is_file():
        raise UserError(f"there is no file {origin}")
    source = make_engine(parse_url(origin)) if "://" in origin else read_only_engine(Path(origin))
    try:
        return _into(source, url)
    finally:
        source.dispose()


def _into(source: Engine, url: str) -> Transfer:
    place = source.url.render_as_string(hide_password=True)
    try:
        with reading(source) as origin:
            _refuse_other_schema(origin, place)
            target = make_engine(parse_url(url))
            try:
                migrate(target)
                with writing(target) as goal:
                    _refuse_filled(goal, target.url.render_as_string(hide_password=True))
                    moved = tuple(_move(origin, goal, table) for table in metadata.sorted_tables)
                    _go_on_numbering(goal)
                return Transfer(moved, _run_by(origin))
            finally:
                target.dispose()
    except DBAPIError as error:
        raise UserError(f"the copy of {place} failed, and nothing was kept: {str(error.orig).strip()}") from error


def _refuse_other_schema(origin: Connection, place: str) -> None:
    revision = current_revision(origin)
    if revision is None:
        raise UserError(f"{place} holds no store")
    if revision != REVISIONS[-1]:
        raise UserError(
            f"{place} has schema version {revision}, this gatesweep works with {REVISIONS[-1]}; first run "
            "gatesweep db upgrade with GATESWEEP_STORE set to it"
        )


def _refuse_filled(goal: Connection, place: str) -> None:
    if goal.dialect.name == "postgresql":
        goal.execute(text("LOCK TABLE sweep, trial IN SHARE ROW EXCLUSIVE MODE"))  # nobody submits meanwhile
    filled = [table.name for table in metadata.sorted_tables if goal.execute(select(table).limit(1)).first()]
    if filled:
        raise UserError(
            f"{place} is not empty (there are rows in {', '.join(filled)}); a store is copied into a new one"
        )


def _move(origin: Connection, goal: Connection, table: Table) -> Moved:
    hashing = _Checksum()
    if goal.dialect.name == "postgresql":
        _copy_in(goal, table, hashing.passing(_rows(origin, table)))
    else:
        for chunk in _chunks(hashing.passing(_rows(origin, table))):
            goal.execute(insert(table), [dict(zip(table.columns.keys(), row, strict=True)) for row in chunk])
    arrived = _Checksum()
    for _ in arrived.passing(_rows(goal, table)):
        pass
    if arrived != hashing:
        raise UserError(
            f"table {table.name} did not arrive as it was: {hashing.num_rows:,} rows read, {arrived.num_rows:,} found, "
            "or their content differs; nothing was kept"
        )
    return Moved(table.name, hashing.num_rows, f"{hashing.total:064x}")


def _rows(connection: Connection, table: Table) -> Iterator[Sequence[Any]]:
    query = select(table).order_by(*table.primary_key.columns)
    result = connection.execute(query, execution_options={"yield_per": ROWS_AT_ONCE})
    for part in result.partitions():
        yield from part


def _chunks(rows: Iterator[Sequence[Any]]) -> Iterator[list[Sequence[Any]]]:
    chunk: list[Sequence[Any]] = []
    for row in rows:
        chunk.append(row)
        if len(chunk) == ROWS_AT_ONCE:
            yield chunk
            chunk = []
    if chunk:
        yield chunk


def _copy_in(goal: Connection, table: Table, rows: Iterator[Sequence[Any]]) -> None:
    """By COPY: ten times as fast as INSERT."""
    import psycopg

    nested = [isinstance(getattr(column.type, "impl_instance", column.type), JSON) for column in table.columns]
    names = ", ".join(f'"{name}"' for name in table.columns.keys())  # noqa: SIM118 (columns are no dict)
    raw = goal.connection.driver_connection
    assert isinstance(raw, psycopg.Connection)
    try:
        with raw.cursor() as cursor, cursor.copy(f"COPY {table.name} ({names}) FROM STDIN".encode()) as stream:
            for row in rows:
                pairs = zip(row, nested, strict=True)
                stream.write_row([_json(value) if is_json else value for value, is_json in pairs])
    except psycopg.Error as error:
        raise UserError(f"Postgres did not take table {table.name}, and nothing was kept: {error}") from error


def _json(value: object) -> str | None:
    return None if value is None else json.dumps(value)


class _Checksum:
    """Rows counted, and the sum of their hashes."""

    def __init__(self) -> None:
        self.num_rows = self.total = 0

    def passing(self, rows: Iterator[Sequence[Any]]) -> Iterator[Sequence[Any]]:
        for row in rows:
            content = repr([_plain(value) for value in row]).encode(errors="surrogatepass")
            self.total = (self.total + int.from_bytes(hashlib.sha256(content).digest())) % 2**256
            self.num_rows += 1
            yield row

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Checksum) and (self.num_rows, self.total) == (other.num_rows, other.total)

    __hash__ = None  # type: ignore[assignment]


def _plain(value: Any) -> Any:
    """What is the same for equal values, wherever they were stored. The order of JSON's keys counts: arms have one."""
    if isinstance(value, datetime):
        return value.astimezone(UTC).isoformat()
    return json.dumps(value) if isinstance(value, dict | list) else value


def _go_on_numbering(goal: Connection) -> None:
    """Postgres counts ids by itself, and must go on behind those that came along."""
    if goal.dialect.name != "postgresql":
        return
    for table in metadata.sorted_tables:
        column = table.autoincrement_column
        sequence = column is not None and goal.scalar(select(func.pg_get_serial_sequence(table.name, column.name)))
        last = goal.scalar(select(func.max(column))) if sequence and column is not None else None
        if last is not None:
            goal.execute(select(func.setval(sequence, last)))


def _run_by(origin: Connection) -> tuple[tuple[str, str], ...]:
    held = (
        select(sweep.c.name, lease.c.holder)
        .join(lease, lease.c.sweep_id == sweep.c.id)
        .where(lease.c.expires_at > database_seconds(origin))
        .order_by(sweep.c.name)
    )
    return tuple((row.name, row.holder) for row in origin.execute(held))


def _into_one_file(path: Path) -> None:
    """No write-ahead log beside it, and all of it on the disk: such a file can be renamed and copied."""
    connection = sqlite3.connect(path)
    try:
        connection.execute("PRAGMA journal_mode = DELETE")
    finally:
        connection.close()
    with path.open("rb") as stream:
        os.fsync(stream.fileno())
