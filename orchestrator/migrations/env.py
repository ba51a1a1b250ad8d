"""Alembic's entry: runs the revisions on the connection that ``store.migrate`` hands over, in its transaction.

To write a new revision, use ``alembic_config`` of orchestrator/store/migrate.py with ``alembic.command.revision``.
"""

from __future__ import annotations

from typing import Literal

from alembic import context

from orchestrator.store.schema import VERSION_TABLE, UtcDateTime, metadata


def _render_item(kind: str, item: object, _context: object) -> str | Literal[False]:
    """Revisions stay free of our own types, so that they run for ever as they were written."""
    return "sa.DateTime(timezone=True)" if kind == "type" and isinstance(item, UtcDateTime) else False


connection = context.config.attributes["connection"]
context.configure(
    connection=connection,
    target_metadata=metadata,
    version_table=VERSION_TABLE,
    transactional_ddl=True,
    compare_type=True,
    render_item=_render_item,
    render_as_batch=connection.dialect.name == "sqlite",
)
with context.begin_transaction():
    context.run_migrations()
