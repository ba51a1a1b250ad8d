"""Opening a database: SQLite with its pragmas, refused on a network file system, or Postgres.

Transactions are begun by us, not by Python's sqlite3: a writer takes SQLite's write lock at once (BEGIN IMMEDIATE),
since a reader that turns writer half-way is refused without waiting.
"""

from __future__ import annotations

import os
import sqlite3
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from urllib.parse import quote

from sqlalchemy import URL, Connection, Engine, create_engine, event, make_url
from sqlalchemy.exc import ArgumentError, NoSuchModuleError

from orchestrator.sweep import UserError

BUSY_SECONDS = 60
"""How long a SQLite writer waits for another one."""

READING_PRAGMAS = ("PRAGMA cache_size = -65536", "PRAGMA mmap_size = 1073741824")
"""64 MB of pages instead of 2, and the file itself mapped: a table of 10^5 trials reads the same pages many times."""

_NETWORK_TYPES = {
    "nfs", "nfs3", "nfs4", "cifs", "smb3", "smbfs", "lustre", "gpfs", "beegfs", "ceph", "glusterfs", "afs", "ncpfs",
    "ocfs2", "orangefs", "pvfs2", "wekafs", "panfs", "davfs", "9pnfs",
}  # fmt: skip
_LOCAL_FUSE = {"fuse.fuse-overlayfs", "fuse.ext2", "fuse.ntfs-3g"}


def parse_url(url: str) -> URL:
    """The database's URL, or a UserError that says which are allowed."""
    allowed = "use sqlite:///PATH or postgresql+psycopg://USER@HOST/NAME"
    try:
        parsed = make_url(url)
        backend = parsed.get_backend_name()
    except (ArgumentError, NoSuchModuleError, ValueError):
        raise UserError(f"the store's URL {url!r} can't be read; {allowed}") from None
    if backend == "postgresql":
        return parsed.set(drivername="postgresql+psycopg")
    if backend != "sqlite":
        raise UserError(f"the store can't be kept in {backend}; {allowed}")
    if not parsed.database or parsed.database == ":memory:" or parsed.query:
        raise UserError(f"the store's URL {url!r} names no plain file; {allowed}")
    return parsed.set(database=str(Path(parsed.database).absolute()))


def network_file_system(path: Path, mounts: str) -> str | None:
    """The type of the network file system that holds ``path``, judged by the text of /proc/mounts, or None."""
    best, kind = "", ""
    for line in mounts.splitlines():
        fields = line.split(" ")
        if len(fields) < 3:
            continue
        point = fields[1].replace("\\040", " ").replace("\\011", "\t").replace("\\134", "\\")
        holds = point == "/" or path == Path(point) or Path(point) in path.parents
        if holds and len(point) >= len(best):
            best, kind = point, fields[2]
    is_network = kind in _NETWORK_TYPES or (kind.startswith("fuse.") and kind not in _LOCAL_FUSE)
    return kind if is_network else None


def _refuse_network(path: Path) -> None:
    mounts = Path("/proc/mounts")
    if not mounts.exists():
        return
    kind = network_file_system(Path(os.path.realpath(path)), mounts.read_text(errors="replace"))
    if kind is not None:
        raise UserError(
            f"{path} is on a network file system ({kind}), where SQLite's locks can't be trusted; set GATESWEEP_STORE "
            "to a path on a local disk (sqlite:////PATH) or to a Postgres (postgresql+psycopg://USER@HOST/NAME)"
        )


def _prepare_sqlite(connection: sqlite3.Connection, _record: object) -> None:
    connection.isolation_level = None
    connection.execute(f"PRAGMA busy_timeout = {BUSY_SECONDS * 1000}")
    connection.execute("PRAGMA foreign_keys = ON")
    connection.execute("PRAGMA synchronous = NORMAL")
    for pragma in READING_PRAGMAS:
        connection.execute(pragma)
    deadline = time.monotonic() + BUSY_SECONDS
    while True:  # the first switch to WAL does not heed busy_timeout
        try:
            connection.execute("PRAGMA journal_mode = WAL")
            return
        except sqlite3.OperationalError as error:
            if "locked" not in str(error) or time.monotonic() > deadline:
                raise
            time.sleep(0.02)


def _begin_sqlite(connection: Connection) -> None:
    writes = connection.get_execution_options().get("gatesweep_write", False)
    connection.exec_driver_sql("BEGIN IMMEDIATE" if writes else "BEGIN")


def make_engine(url: URL) -> Engine:
    """An engine for a parsed URL; for SQLite the folder is made and its file system judged first."""
    if url.get_backend_name() != "sqlite":
        try:
            return create_engine(url, pool_pre_ping=True)
        except ModuleNotFoundError:
            raise UserError("a Postgres store needs psycopg: pip install 'gatesweep[postgres]'") from None
    path = Path(str(url.database))
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"the store's folder {path.parent} can't be made: {error.strerror}") from None
    _refuse_network(path)
    engine = create_engine(url)
    event.listen(engine, "connect", _prepare_sqlite)
    event.listen(engine, "begin", _begin_sqlite)
    return engine


def read_only_engine(path: Path) -> Engine:
    """An engine for a SQLite file that is only looked at: neither it nor its folder need be writable."""
    where = f"file:{quote(str(path.absolute()))}?mode=ro"

    def connect() -> sqlite3.Connection:
        connection = sqlite3.connect(where, uri=True, isolation_level=None, timeout=BUSY_SECONDS)
        connection.execute("PRAGMA query_only = ON")
        return connection

    engine = create_engine(f"sqlite:///{path}", creator=connect)
    event.listen(engine, "begin", _begin_sqlite)
    return engine


@contextmanager
def reading(engine: Engine) -> Iterator[Connection]:
    """One consistent snapshot."""
    connection = engine.connect()
    if connection.dialect.name == "postgresql":
        connection = connection.execution_options(isolation_level="REPEATABLE READ", postgresql_readonly=True)
    with connection, connection.begin():
        yield connection


@contextmanager
def writing(engine: Engine) -> Iterator[Connection]:
    """One transaction: all of it is kept, or nothing."""
    with engine.connect().execution_options(gatesweep_write=True) as connection, connection.begin():
        yield connection
