"""Opening a store: revisions, back ends, and what is refused."""

# ruff: noqa: F811 (fixtures are imported by name)

from __future__ import annotations

import subprocess
import sys
from datetime import datetime
from pathlib import Path

import pytest
from sqlalchemy import text
from store_runs import Run, postgres_server, probed, store, store_url  # noqa: F401

from orchestrator.store import (
    Store,
    engine,
    migrate,
    schema,
    views,
)
from orchestrator.sweep import UserError

# Schema


def test_the_revisions_lead_to_the_schema_in_the_code(store: Store) -> None:
    from alembic.autogenerate import compare_metadata
    from alembic.migration import MigrationContext

    with store._engine.connect() as connection:
        context = MigrationContext.configure(
            connection, opts={"version_table": schema.VERSION_TABLE, "compare_type": True}
        )
        assert compare_metadata(context, schema.metadata) == []
        assert migrate.current_revision(connection) == schema.REVISIONS[-1]


def test_the_code_knows_every_revision_and_the_newest_holds_todays_views() -> None:
    from alembic.script import ScriptDirectory

    scripts = ScriptDirectory.from_config(migrate.alembic_config())
    known = [script.revision for script in scripts.walk_revisions()]
    assert tuple(reversed(known)) == schema.REVISIONS
    newest = scripts.get_revision("head")
    assert newest is not None
    assert views.digest() == newest.module.VIEWS_DIGEST, "a changed view needs a new revision"


def test_a_store_of_the_first_revision_keeps_its_sweeps_and_takes_diagnostics(store_url: str) -> None:
    from alembic import command

    database = engine.make_engine(engine.parse_url(store_url))
    with engine.writing(database) as connection:
        command.upgrade(migrate.alembic_config(connection), "0001")
        connection.execute(
            text(
                "INSERT INTO sweep"
                " (name, question, baseline, verdict, settings, text, overrides, created_at, updated_at)"
                " VALUES ('old', '?', 'baseline', '{}', '{}', '', '[]', :now, :now)"
            ),
            {"now": datetime(2026, 1, 1)},
        )
    database.dispose()
    with Store(store_url) as store:
        assert [row.name for row in store.sweeps()] == ["old"]
        run = Run(store)
        run.store.record(run.lease, run.start(), [probed(5)])
        assert len(store.frame("diagnostics", "quick")) == 2


def test_a_store_shares_its_database_with_others_version_tables(store_url: str) -> None:
    database = engine.make_engine(engine.parse_url(store_url))
    with engine.writing(database) as connection:
        connection.execute(text("CREATE TABLE alembic_version (version_num VARCHAR(32))"))
        connection.execute(text("INSERT INTO alembic_version VALUES ('v3.0.0.d')"))
    with Store(store_url) as store:
        assert store.sweeps() == []
        assert store.query("SELECT version_num AS v FROM alembic_version").v[0] == "v3.0.0.d"
    database.dispose()


def test_a_store_of_newer_code_is_refused(store: Store, store_url: str) -> None:
    with engine.writing(store._engine) as connection:
        connection.execute(text(f"UPDATE {schema.VERSION_TABLE} SET version_num = '9999'"))
    with pytest.raises(UserError, match=r"schema version 9999, which is newer .* upgrade gatesweep"):
        Store(store_url)


def test_a_failed_migration_leaves_nothing_behind(store_url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(_connection: object) -> None:
        raise RuntimeError("power cut")

    monkeypatch.setattr(migrate, "create_views", fail)
    with pytest.raises(RuntimeError, match="power cut"):
        Store(store_url)
    monkeypatch.undo()
    with Store(store_url) as store:
        assert store.sweeps() == []


# Opening


@pytest.mark.parametrize(
    ("url", "message"),
    [
        ("gatesweep.db", "can't be read; use sqlite:///PATH"),
        ("mysql://host/name", "can't be kept in mysql"),
        ("sqlite://", "names no plain file"),
        ("sqlite:///:memory:", "names no plain file"),
        ("postgresql://nobody:secret@127.0.0.1:1/nothing", r"nobody:\*\*\*@127.0.0.1.* can't be opened"),
    ],
)
def test_a_bad_url_is_one_clear_message(url: str, message: str) -> None:
    with pytest.raises(UserError, match=message) as caught:
        Store(url)
    assert "secret" not in str(caught.value)


def test_a_file_that_is_no_database_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "notes.db"
    path.write_text("these are notes, and no database at all\n" * 50)
    with pytest.raises(UserError, match=r"notes.db can't be opened: file is not a database"):
        Store(f"sqlite:///{path}")


MOUNTS = """\
/dev/vda / ext4 rw 0 0
server:/home /home nfs4 rw 0 0
/dev/vdb /home/local ext4 rw 0 0
//nas/share /mnt/my\\040share cifs rw 0 0
sshfs /mnt/ssh fuse.sshfs rw 0 0
overlay /mnt/rootless fuse.fuse-overlayfs rw 0 0
"""


@pytest.mark.parametrize(
    ("path", "kind"),
    [
        ("/srv/gatesweep.db", None),
        ("/home/me/gatesweep.db", "nfs4"),
        ("/home/local/gatesweep.db", None),
        ("/homely/gatesweep.db", None),
        ("/mnt/my share/gatesweep.db", "cifs"),
        ("/mnt/ssh/gatesweep.db", "fuse.sshfs"),
        ("/mnt/rootless/gatesweep.db", None),
    ],
)
def test_a_network_file_system_is_recognised(path: str, kind: str | None) -> None:
    assert engine.network_file_system(Path(path), MOUNTS) == kind


def test_sqlite_is_refused_on_a_network_file_system(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(engine, "network_file_system", lambda *_: "nfs4")
    with pytest.raises(UserError, match=r"network file system \(nfs4\).*GATESWEEP_STORE"):
        Store(f"sqlite:///{tmp_path / 'x.db'}")


def test_sqlite_runs_with_the_pragmas_it_needs(tmp_path: Path) -> None:
    with Store(f"sqlite:///{tmp_path / 'deep' / 'x.db'}") as store, store._engine.connect() as connection:
        pragmas = {
            name: connection.exec_driver_sql(f"PRAGMA {name}").scalar()
            for name in ("journal_mode", "foreign_keys", "synchronous", "busy_timeout")
        }
    assert pragmas == {"journal_mode": "wal", "foreign_keys": 1, "synchronous": 1, "busy_timeout": 60_000}


def test_the_store_loads_neither_pandas_nor_alembic_by_itself() -> None:
    code = "import sys, orchestrator.store; print({'pandas', 'alembic', 'psycopg', 'torch'} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "set()"
