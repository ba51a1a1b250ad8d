"""Whether a store is sound: its schema, its keys, what must hold between trials and attempts, and the run dirs."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from sqlalchemy import Connection, inspect, text
from sqlalchemy.exc import DBAPIError

from orchestrator.store.engine import make_engine, parse_url, reading
from orchestrator.store.migrate import current_revision
from orchestrator.store.schema import REVISIONS, VERSION_TABLE, metadata
from orchestrator.store.views import VIEWS

NUM_NAMED = 3
"""Of many run dirs, how many a line names."""

Level = Literal["ok", "warning", "problem"]


@dataclass(frozen=True)
class Finding:
    level: Level
    message: str


_MUST_BE_NONE = {
    "RUNNING trials have an attempt that has not ended": """
        SELECT COUNT(*) FROM trial t WHERE t.state = 'RUNNING' AND NOT EXISTS (
            SELECT 1 FROM attempt a WHERE a.fingerprint = t.fingerprint AND a.ended_at IS NULL)""",
    "attempts that have not ended belong to RUNNING trials": """
        SELECT COUNT(*) FROM attempt a JOIN trial t ON t.fingerprint = a.fingerprint
        WHERE a.ended_at IS NULL AND t.state <> 'RUNNING'""",
    "no trial runs twice": """
        SELECT COUNT(*) FROM (SELECT fingerprint FROM attempt WHERE ended_at IS NULL
                              GROUP BY fingerprint HAVING COUNT(*) > 1) doubled""",
    "attempts of a trial are numbered without gaps": """
        SELECT COUNT(*) FROM (SELECT fingerprint FROM attempt GROUP BY fingerprint
                              HAVING MIN(number) <> 1 OR MAX(number) <> COUNT(*)) gaps""",
    "COMPLETE, PRUNED and DIVERGED trials have been attempted": """
        SELECT COUNT(*) FROM trial t WHERE t.state IN ('COMPLETE', 'PRUNED', 'DIVERGED') AND NOT EXISTS (
            SELECT 1 FROM attempt a WHERE a.fingerprint = t.fingerprint)""",
    "what is kept for tables is of COMPLETE trials with all their attempts": """
        SELECT COUNT(*) FROM outcome o JOIN trial t ON t.fingerprint = o.fingerprint
        WHERE t.state <> 'COMPLETE'
           OR o.num_attempts <> (SELECT COUNT(*) FROM attempt a WHERE a.fingerprint = o.fingerprint)""",
    "losses kept for tables are those of the validations": """
        SELECT COUNT(*) FROM outcome o JOIN (
            SELECT k.fingerprint, k.tail, COUNT(*) AS num, COUNT(v.loss_nats) AS known, AVG(v.loss_nats) AS mean
            FROM outcome k JOIN curve_validation v
                ON v.fingerprint = k.fingerprint AND v.split = 'slice' AND v.fraction > 1.0 - k.tail
            GROUP BY k.fingerprint, k.tail
        ) d ON d.fingerprint = o.fingerprint AND d.tail = o.tail
        WHERE d.num <> COALESCE(o.slice_points, 0) OR (d.known < d.num) <> (o.slice_loss_nats IS NULL)
           OR ABS(d.mean - o.slice_loss_nats) > 1e-9""",
}
"""What holds in a sound store -> how many rows go against it."""


def check_store(url: str, trials_dir: Path) -> list[Finding]:
    """All findings, changing nothing. ``trials_dir`` holds a folder a trial; it may be missing."""
    engine = make_engine(parse_url(url))
    try:
        with reading(engine) as connection:
            revision = current_revision(connection)
            if revision != REVISIONS[-1]:
                what = "holds no store" if revision is None else f"has schema version {revision}"
                newer = revision is not None and revision not in REVISIONS
                mend = "upgrade gatesweep" if newer else "gatesweep db upgrade"
                return [Finding("problem", f"the database {what}; this gatesweep works with {REVISIONS[-1]}: {mend}")]
            return [
                Finding("ok", f"schema version {revision}, the newest"),
                *_schema(connection),
                *_file(connection),
                *_keys(connection),
                *_rules(connection),
                *_run_dirs(connection, trials_dir),
            ]
    except DBAPIError as error:
        return [Finding("problem", f"the database is damaged, or can't be read: {str(error.orig).strip()}")]
    finally:
        engine.dispose()


def _schema(connection: Connection) -> Iterator[Finding]:
    from alembic.autogenerate import compare_metadata
    from alembic.migration import MigrationContext

    ours = {*metadata.tables, VERSION_TABLE}
    context = MigrationContext.configure(
        connection,
        opts={
            "version_table": VERSION_TABLE,
            "compare_type": True,
            # MLflow's and Optuna's tables may live beside ours.
            "include_name": lambda name, kind, parents: kind != "table" or name in ours,
        },
    )
    differences = compare_metadata(context, metadata)
    for difference in differences:
        yield Finding("problem", f"the schema is not that of its version: {difference}")
    missing = set(VIEWS) - set(inspect(connection).get_view_names())
    if missing:
        yield Finding("problem", f"views are missing: {', '.join(sorted(missing))}")
    if not differences and not missing:
        yield Finding("ok", f"{len(metadata.tables)} tables and {len(VIEWS)} views are as they should be")


def _file(connection: Connection) -> Iterator[Finding]:
    if connection.dialect.name != "sqlite":
        return
    said = [str(row[0]) for row in connection.exec_driver_sql("PRAGMA integrity_check(10)")]
    if said == ["ok"]:
        yield Finding("ok", "the file's pages and indices are sound")
    else:
        yield from (Finding("problem", f"the file is damaged: {line}") for line in said)


def _keys(connection: Connection) -> Iterator[Finding]:
    """Also on Postgres row by row: keys can be switched off there while rows come in (session_replication_role)."""
    is_sound = True
    for table in metadata.sorted_tables:
        for key in table.foreign_key_constraints:
            pairs = [(element.parent.name, element.column.name) for element in key.elements]
            parent = key.referred_table.name
            matches = " AND ".join(f"p.{theirs} = c.{ours}" for ours, theirs in pairs)
            given = " AND ".join(f"c.{ours} IS NOT NULL" for ours, _ in pairs)
            query = f"SELECT COUNT(*) FROM {table.name} c WHERE {given} AND NOT EXISTS"
            orphans = connection.scalar(text(f"{query} (SELECT 1 FROM {parent} p WHERE {matches})"))
            if orphans:
                is_sound = False
                columns = ", ".join(ours for ours, _ in pairs)
                yield Finding("problem", f"{orphans:,} rows of {table.name} point nowhere by {columns} (to {parent})")
    if is_sound:
        yield Finding("ok", "every foreign key points at a row")


def _rules(connection: Connection) -> Iterator[Finding]:
    for rule, query in _MUST_BE_NONE.items():
        number = connection.scalar(text(query))
        yield Finding("problem", f"{rule}: {number:,} do not") if number else Finding("ok", rule)


def _run_dirs(connection: Connection, trials_dir: Path) -> Iterator[Finding]:
    if not trials_dir.is_dir():
        yield Finding("warning", f"there is no folder {trials_dir}: run dirs were not looked at")
        return
    folders = {path.name for path in trials_dir.iterdir() if path.is_dir()}
    known = set(connection.scalars(text("SELECT fingerprint FROM trial")))
    begun = set(connection.scalars(text("SELECT DISTINCT fingerprint FROM attempt")))
    strangers, lost = sorted(folders - known), sorted(begun - folders)
    if strangers:
        yield Finding("warning", f"run dirs of no trial in this store: {_named(strangers)}")
    if lost:
        yield Finding("warning", f"trials that were begun and have no run dir in {trials_dir}: {_named(lost)}")
    if not strangers and not lost:
        yield Finding("ok", f"each of {len(begun):,} trials that were begun has its run dir, and no other is there")


def _named(names: list[str]) -> str:
    more = f" and {len(names) - NUM_NAMED:,} more" if len(names) > NUM_NAMED else ""
    return ", ".join(names[:NUM_NAMED]) + more
