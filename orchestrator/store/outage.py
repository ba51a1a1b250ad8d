"""A database that can't be used for a while: told from a defect by the driver's own codes, never by a guess.

Not reached, restarting, out of connections or disk, locked, read-only: what was asked can be asked again. A statement
that is wrong, a constraint or a damaged file is no outage: it would be wrong for ever.
"""

from __future__ import annotations

import sqlite3
from typing import Protocol

from sqlalchemy.exc import DBAPIError

from orchestrator.store.rows import StoreError

_SQLITE_PASSING = {
    sqlite3.SQLITE_BUSY, sqlite3.SQLITE_LOCKED, sqlite3.SQLITE_READONLY, sqlite3.SQLITE_IOERR, sqlite3.SQLITE_FULL,
    sqlite3.SQLITE_CANTOPEN, sqlite3.SQLITE_PROTOCOL,
}  # fmt: skip
_POSTGRES_PASSING = ("08", "53", "57P", "58", "25006")
"""Beginnings of SQLSTATE: connection, resources (disk, memory, connections), shutdown and start, the system's I/O, and
a server that became a read-only standby. https://www.postgresql.org/docs/current/errcodes-appendix.html"""


class StoreOutage(StoreError):
    """The database can't be used now. What was asked for was most likely not done, and can be asked for again."""


class Patience(Protocol):
    """Who waits for the database, instead of being told."""

    def wait(self, outage: StoreOutage) -> None:
        """Return after a while to try again, or raise."""

    def over(self) -> None:
        """What was waited for has been done."""


def as_outage(error: DBAPIError, place: str) -> StoreOutage | None:
    """None when it is a defect, or a mistake in what was asked."""
    if not (error.connection_invalidated or _is_passing(error.orig)):
        return None
    return StoreOutage(f"the store {place} can't be used: {' '.join(str(error.orig).split())[:300]}")


def _is_passing(cause: BaseException | None) -> bool:
    code = getattr(cause, "sqlite_errorcode", None)
    if code is not None:
        return (code & 0xFF) in _SQLITE_PASSING
    if cause is None or not hasattr(cause, "sqlstate"):
        return False
    state: str | None = cause.sqlstate
    # Without a code psycopg could not connect, or lost the connection.
    return state.startswith(_POSTGRES_PASSING) if state else type(cause).__name__ == "OperationalError"
