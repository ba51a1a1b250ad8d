"""The store's back ends as fixtures: SQLite always, and a real PostgreSQL where its server is installed.

``store_url`` runs a test once a back end, each time on an empty one of its own. A module that wants it imports it
together with ``postgres_server``.
"""

from __future__ import annotations

import importlib.util
import os
import pwd
import shutil
import subprocess
import tempfile
from collections.abc import Iterator, Sequence
from functools import cache
from pathlib import Path

import pytest

BACKENDS = ("sqlite", "postgresql")
_SERVER_FOLDERS = [str(path) for path in sorted(Path("/usr/lib/postgresql").glob("*/bin"), reverse=True)]


def _server_binary(name: str) -> str | None:
    return shutil.which(name, path=os.pathsep.join([*_SERVER_FOLDERS, os.environ.get("PATH", "")]))


def _unprivileged() -> tuple[list[str], int | None]:
    """The command prefix and the user id to run the server with: it refuses root."""
    if os.geteuid() != 0:
        return [], None
    known = {entry.pw_name: entry for entry in pwd.getpwall()}
    user = known.get("postgres") or known["nobody"]
    return ["setpriv", f"--reuid={user.pw_uid}", f"--regid={user.pw_gid}", "--clear-groups"], user.pw_uid


class PostgresServer:
    """A throw-away server on a Unix socket, without durability; one schema a test.

    ``run``: what a command begins with to run on another host; there it listens on ``address``, too, for the network's.
    """

    def __init__(self, run: Sequence[str] = (), address: str = "") -> None:
        prefix, user_id = _unprivileged()
        self._folder = Path(tempfile.mkdtemp(prefix="pg"))
        if user_id is not None:
            os.chown(self._folder, user_id, -1)
        self._data = self._folder / "data"
        self._num_schemas, self._address = 0, address
        self._run = [*run, *prefix, "env", "LC_ALL=C", f"HOME={self._folder}"]
        initdb, self._control = _server_binary("initdb"), _server_binary("pg_ctl")
        try:
            self._call([str(initdb), "-D", str(self._data), "-U", "gatesweep", "-A", "trust", "-E", "UTF8", "-N"])
            with (self._data / "pg_hba.conf").open("a") as allowed:
                allowed.write("host all all samenet trust\n")
            options = (
                f"-F -k {self._folder} -c listen_addresses='{address}' -c shared_buffers=32MB -c max_connections=60"
            )
            log = str(self._folder / "log")
            self._start = [str(self._control), "-D", str(self._data), "-w", "-l", log, "-o", options, "start"]
            self._call(self._start)
        except BaseException:
            shutil.rmtree(self._folder, ignore_errors=True)
            raise

    def _call(self, command: list[str]) -> None:
        done = subprocess.run(
            [*self._run, *command], cwd=self._folder, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
        )
        if done.returncode:
            raise RuntimeError(f"{command[0]} failed:\n{done.stdout}")

    def new_schema(self) -> str:
        """The URL of an empty schema; far cheaper than a database a test."""
        import psycopg

        self._num_schemas += 1
        name = f"store{self._num_schemas}"
        with psycopg.connect(f"host={self._folder} user=gatesweep dbname=postgres", autocommit=True) as connection:
            connection.execute(f"CREATE SCHEMA {name}")
        return f"postgresql+psycopg://gatesweep@/postgres?host={self._folder}&options=-csearch_path%3D{name}"

    def over_network(self, url: str) -> str:
        """The same store by the server's address."""
        return url.replace(f"host={self._folder}", f"host={self._address}")

    def pause(self) -> None:
        """Stop at once, as a crash would; ``resume`` starts it again on what it had."""
        self._call([str(self._control), "-D", str(self._data), "-m", "immediate", "-w", "stop"])

    def resume(self) -> None:
        self._call(self._start)

    def stop(self) -> None:
        if not self._folder.exists():
            return
        self._call([str(self._control), "-D", str(self._data), "-m", "immediate", "-w", "stop"])
        shutil.rmtree(self._folder)


@cache
def _the_server() -> PostgresServer:
    """One for all modules that import the fixture: pytest makes a fixture of its own for each of them."""
    return PostgresServer()


def why_no_server() -> str | None:
    """What is missing for one; None when nothing is."""
    if _server_binary("initdb") is None:
        return "PostgreSQL's server is not installed (no initdb in /usr/lib/postgresql/*/bin or on the PATH)"
    if importlib.util.find_spec("psycopg") is None:
        return "psycopg is not installed"
    if os.geteuid() == 0 and shutil.which("setpriv") is None:
        return "PostgreSQL refuses root, and there is no setpriv to step down with"
    return None


@pytest.fixture(scope="session")
def postgres_server() -> Iterator[PostgresServer]:
    """One server a session; skipped where there can be none."""
    if reason := why_no_server():
        pytest.skip(reason)
    server = _the_server()
    yield server
    server.stop()


@pytest.fixture(params=BACKENDS)
def store_url(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    """The URL of an empty database, once a back end."""
    if request.param == "sqlite":
        return f"sqlite:///{tmp_path / 'gatesweep.db'}"
    server: PostgresServer = request.getfixturevalue("postgres_server")
    return server.new_schema()
