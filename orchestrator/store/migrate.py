"""Bringing a database to the newest schema, or refusing it.

A database that is up to date costs one query and no import of Alembic. Openers that find an old one take turns: the
first migrates, the others find the work done.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from sqlalchemy import Connection, Engine, inspect, text
from sqlalchemy.exc import DBAPIError

import orchestrator
from orchestrator.store.ended import keep_missing
from orchestrator.store.engine import make_engine, parse_url, writing
from orchestrator.store.schema import REVISIONS, VERSION_TABLE
from orchestrator.store.views import create_views, drop_views
from orchestrator.sweep import UserError

if TYPE_CHECKING:
    from alembic.config import Config

_LOCK = 7_316_480_121
"""Any number, the same in every process: the key of Postgres's advisory lock."""


def alembic_config(connection: Connection | None = None) -> Config:
    from alembic.config import Config

    config = Config()
    folder = Path(orchestrator.__file__).parent / "migrations"
    config.set_main_option("script_location", str(folder).replace("%", "%%"))
    config.set_main_option("path_separator", "os")
    config.attributes["connection"] = connection
    return config


def current_revision(connection: Connection) -> str | None:
    """The schema version of a database, or None when it holds no store yet."""
    if not inspect(connection).has_table(VERSION_TABLE):
        return None
    revision: str | None = connection.scalar(text(f"SELECT version_num FROM {VERSION_TABLE}"))
    return revision


def upgrade_store(url: str) -> tuple[str | None, str]:
    """Upgrade the store at ``url``; its schema version before (None: there was no store) and after."""
    engine = make_engine(parse_url(url))
    try:
        try:
            with engine.connect() as connection:
                before = current_revision(connection)
        except DBAPIError as error:
            place = engine.url.render_as_string(hide_password=True)
            raise UserError(f"the store {place} can't be opened: {str(error.orig).strip()}") from error
        migrate(engine)
        return before, REVISIONS[-1]
    finally:
        engine.dispose()


def migrate(engine: Engine) -> None:
    """Upgrade to the newest schema; refuse one that is newer than this code."""
    place = engine.url.render_as_string(hide_password=True)
    try:
        with engine.connect() as connection:
            revision = current_revision(connection)
        if revision == REVISIONS[-1]:
            return
        with writing(engine) as connection:
            if connection.dialect.name == "postgresql":
                connection.execute(text("SELECT pg_advisory_xact_lock(:key)"), {"key": _LOCK})
            revision = current_revision(connection)
            if revision is not None and revision not in REVISIONS:
                raise UserError(
                    f"the store {place} has schema version {revision}, which is newer than this gatesweep knows "
                    f"(up to {REVISIONS[-1]}); upgrade gatesweep"
                )
            if revision != REVISIONS[-1]:
                _upgrade(connection)
    except DBAPIError as error:
        raise UserError(f"the store {place} can't be opened: {str(error.orig).strip()}") from error


def _upgrade(connection: Connection) -> None:
    from alembic import command

    drop_views(connection)
    command.upgrade(alembic_config(connection), "head")
    create_views(connection)
    for sweep_id in connection.scalars(text("SELECT id FROM sweep ORDER BY id")).all():
        keep_missing(connection, sweep_id)
