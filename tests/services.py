"""Processes that tests start: a service with all that it has started, free ports, and what Ray needs for it."""

from __future__ import annotations

import contextlib
import os
import socket
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import psutil

from models import run_dir

TREE = Path(__file__).parents[1]

MINIMAL_RAY = """
import ray._private.utils
ray._private.utils.get_dashboard_dependency_error = lambda: ImportError("not wanted")
from ray.scripts.scripts import main
main()
"""
"""Ray as it is without its extra for dashboards: agents that begin in a fraction of the time."""
LOST_AFTER = {"initial_delay_ms": 2000, "period_ms": 1000, "timeout_ms": 2000, "failure_threshold": 5}
"""A node that does not answer is given up after some ten seconds; Ray's own is half a minute."""


def free_ports(count: int) -> list[int]:
    sockets = [socket.socket() for _ in range(count)]
    for one in sockets:
        one.bind(("127.0.0.1", 0))
    ports = [one.getsockname()[1] for one in sockets]
    for one in sockets:
        one.close()
    return ports


def is_listening(port: int) -> bool:
    try:
        socket.create_connection(("127.0.0.1", port), timeout=5).close()
    except OSError:
        return False
    return True


class Service:
    """A child process with all that it has started, and what it said."""

    def __init__(self, command: list[str], log: Path, environment: dict[str, str], cwd: Path) -> None:
        self.log = log
        with log.open("a") as stream:
            self.process = subprocess.Popen(
                command, env=environment, cwd=cwd, stdout=stream, stderr=stream, start_new_session=True
            )
        self._root = psutil.Process(self.process.pid)
        self._known: set[psutil.Process] = {self._root}

    @property
    def is_dead(self) -> bool:
        return self.process.poll() is not None

    def family(self) -> list[psutil.Process]:
        """The process and its descendants, those included that lost their parent meanwhile."""
        known = {one.pid: one for one in self._known if one.is_running()}
        everyone = sorted(psutil.process_iter(["ppid", "create_time"]), key=lambda one: one.info["create_time"] or 0)
        for one in everyone:  # parents before their children
            if one.info["ppid"] in known:
                known.setdefault(one.pid, one)
        self._known = set(known.values())
        return [one for one in known.values() if _state(one) != psutil.STATUS_ZOMBIE]

    def named(self, word: str) -> list[psutil.Process]:
        found = []
        for one in self.family():
            with contextlib.suppress(psutil.NoSuchProcess):
                if word in " ".join(one.cmdline()[:2]):
                    found.append(one)
        return sorted(found, key=lambda one: one.pid)

    def kill(self) -> None:
        """With SIGKILL, all of it; what was stopped, too."""
        family = self.family()
        for one in family:
            with contextlib.suppress(psutil.NoSuchProcess):
                one.kill()
        self.process.wait()
        psutil.wait_procs(family, timeout=10)


def _state(one: psutil.Process) -> str:
    try:
        return str(one.status())
    except psutil.NoSuchProcess:
        return str(psutil.STATUS_ZOMBIE)


def is_begun(node: Service) -> bool:
    return "Ray runtime started" in node.log.read_text()


@dataclass(frozen=True)
class Rank:
    """A rank at work: its process holds the log of its attempt open."""

    process: psutil.Process
    number: int
    attempt_dir: Path
    node: Service

    @property
    def token(self) -> str:
        return self.attempt_dir.name.partition("-")[2]


def ranks_of(nodes: Sequence[Service], home: Path) -> list[Rank]:
    """Those that are at an attempt of the sweep, in a lasting order."""
    found = []
    for node in nodes:
        for process in node.named("ray::_Rank"):
            with contextlib.suppress(psutil.Error):
                for path in (Path(one.path) for one in process.open_files()):
                    if path.name.startswith("log-rank") and home in path.parents:
                        found.append(Rank(process, int(path.stem[len("log-rank") :]), path.parent, node))
    working = [one for one in found if run_dir.read_summary(one.attempt_dir) is None]
    return sorted(working, key=lambda one: (str(one.attempt_dir), one.number))


def ray_environment(token_file: Path, lost_after: Mapping[str, int] = LOST_AFTER, **more: str) -> dict[str, str]:
    """Of a Ray that asks for a token, and of what is run by it; patient on a busy machine."""
    kept = {name: text for name, text in os.environ.items() if not name.startswith(("RAY_", "MLFLOW_"))}
    kept = {name: text for name, text in kept.items() if name == "GATESWEEP_KEY_FILE" or "GATESWEEP" not in name}
    health = {f"RAY_health_check_{name}": str(value) for name, value in lost_after.items()}
    patient = {"RAY_agent_register_timeout_ms": "300000", "RAY_worker_register_timeout_seconds": "300"}
    patient |= {"RAY_raylet_start_wait_time_s": "300", "RAY_worker_niceness": "0"}  # Ray's own is 15
    secret = {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN_PATH": str(token_file)}
    own = {"PYTHONPATH": f"{TREE}", "OMP_NUM_THREADS": "1", "RAY_prestart_worker_first_driver": "0"}
    return {**kept, **health, **patient, **secret, **own, **more}


def laptop(folder: Path, *arguments: str) -> str:
    """``gatesweep`` in a process that has ended when this returns."""
    environment = {
        **{name: value for name, value in os.environ.items() if not name.startswith(("RAY_", "GATESWEEP_", "MLFLOW_"))},
        "PYTHONPATH": str(TREE),
        "GATESWEEP_HOME": str(folder / "laptop"),
    }
    command = [sys.executable, "-c", "from orchestrator.cli import main; main()", *arguments]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout
