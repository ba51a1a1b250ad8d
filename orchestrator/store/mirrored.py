"""What the mirror to MLflow keeps in the store: which run is whose, and how far each was sent."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from sqlalchemy import Connection, Update, bindparam, select, update

from orchestrator.store import schema

_LINK = schema.sweep_trial


def run_of(connection: Connection, sweep_id: int, fingerprint: str) -> str | None:
    run_id: str | None = connection.scalar(
        select(_LINK.c.mlflow_run_id).where(_LINK.c.sweep_id == sweep_id, _LINK.c.fingerprint == fingerprint)
    )
    return run_id


def set_run(connection: Connection, sweep_id: int, fingerprint: str | None, run_id: str | None) -> None:
    connection.execute(_of(sweep_id, fingerprint).values(mlflow_run_id=run_id))


def cursor(connection: Connection, sweep_id: int, fingerprint: str) -> dict[str, Any] | None:
    found: dict[str, Any] | None = connection.scalar(
        select(_LINK.c.mirror_cursor).where(_LINK.c.sweep_id == sweep_id, _LINK.c.fingerprint == fingerprint)
    )
    return found


def set_cursor(
    connection: Connection, sweep_id: int, fingerprint: str | None, cursor: Mapping[str, Any] | None
) -> None:
    connection.execute(_of(sweep_id, fingerprint).values(mirror_cursor=None if cursor is None else dict(cursor)))


def set_cursors(connection: Connection, sweep_id: int, cursors: Mapping[str, Mapping[str, Any]]) -> None:
    """By fingerprint."""
    of_one = update(_LINK).where(_LINK.c.sweep_id == sweep_id, _LINK.c.fingerprint == bindparam("of"))
    rows = [{"of": fingerprint, "cursor": dict(cursors[fingerprint])} for fingerprint in sorted(cursors)]
    if rows:
        connection.execute(of_one.values(mirror_cursor=bindparam("cursor", type_=_LINK.c.mirror_cursor.type)), rows)


def _of(sweep_id: int, fingerprint: str | None) -> Update:
    """The sweep itself where ``fingerprint`` is None, else a trial in it."""
    if fingerprint is None:
        return update(schema.sweep).where(schema.sweep.c.id == sweep_id)
    return update(_LINK).where(_LINK.c.sweep_id == sweep_id, _LINK.c.fingerprint == fingerprint)
