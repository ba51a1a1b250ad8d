"""What a sweep stands on, started here and ours to break: Ray with several nodes, PostgreSQL, MLflow, controllers.

Everything listens on free ports, MLflow on loopback alone; Ray, which has no cluster on loopback, asks for a token.
Whoever dies is started again by ``World.tend``, as an operator would do.
"""

from __future__ import annotations

import contextlib
import secrets
import shutil
import signal
import subprocess
import sys
import tempfile
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import psutil
import ray
from services import (
    MINIMAL_RAY,
    Rank,
    Service,
    free_ports,
    is_begun,
    is_listening,
    ranks_of,
    ray_environment,
)
from store_backends import PostgresServer
from sweep_runs import wait_for

NUM_NODES, CPUS_A_NODE = 2, 2
HOME_MEGABYTES = 2048
STARTS = 5
CLUSTER_LOST = "Once there is a cluster again, the same command goes on from here"
ENDED_BY_RAY = ("WrongClusterID", "Failed to connect to GCS within")
"""Ray's library ends a process that asks something of a head which is gone in that moment, when it comes back as
another, or has not come back within a minute."""
NO_ROOM = "and the cluster holds"
"""A controller that begins while a node is away is told that a gang has no room."""
NODE_NAMES = ("node-manager-port", "object-manager-port", "dashboard-agent-listen-port", "dashboard-agent-grpc-port")
NODE_NAMES += ("runtime-env-agent-port", "metrics-export-port")


class World:
    """A cluster, a database, a tracking server, and the controllers of one sweep after the other."""

    def __init__(self, folder: Path, postgres: PostgresServer) -> None:
        self.folder, self.postgres = folder, postgres
        self._short = Path(tempfile.mkdtemp(prefix="gsc", dir="/tmp"))  # Unix sockets have short paths
        (folder / "token").write_text(secrets.token_hex(32))
        self.port, self._tracker_port = free_ports(2)
        self.address = f"{ray.util.get_node_ip_address()}:{self.port}"
        self.nodes: list[Service] = []
        self.tracker: Service | None = None
        self.controller: Service | None = None
        self.is_tracker_wanted = self.is_head_wanted = True
        self.num_controllers = self._num_services = 0
        self._killed: set[int] = set()
        self._short_of_a_node: set[int] = set()
        """Controllers, by pid, under which a node died."""
        try:
            self._start_cluster()  # before all else: see _until_begun
            self.tracker = self._start_tracker()
            wait_for(self.is_tracker_up, "the tracking server")
        except BaseException:
            self.close()
            raise

    # -- starting -------------------------------------------------------------------------------------------------

    def _service(self, name: str, command: list[str], **environment: str) -> Service:
        self._num_services += 1
        log = self.folder / f"{name}-{self._num_services}.log"
        return Service(
            [sys.executable, *command], log, ray_environment(self.folder / "token", **environment), self.folder
        )

    def _start_cluster(self) -> None:
        self.head = self._until_begun(self._start_head)
        self.nodes = []
        for _ in range(NUM_NODES):
            self.nodes.append(self._until_begun(self._start_node))

    def _until_begun(self, start: Callable[[], Service]) -> Service:
        """On a busy machine Ray gives up: its agents have 15 s to begin, which nothing changes."""
        for _ in range(STARTS):
            node = start()
            wait_for(lambda node=node: is_begun(node) or node.is_dead, "Ray to start")
            if not node.is_dead:
                return node
            node.kill()
        raise AssertionError(node.log.read_text())

    def _start_head(self) -> Service:
        return self._start_ray("head", ["--head", f"--port={self.port}", "--num-cpus=0"])

    def _start_node(self) -> Service:
        return self._start_ray("node", [f"--address={self.address}", f"--num-cpus={CPUS_A_NODE}"])

    def _start_ray(self, name: str, own: list[str]) -> Service:
        ports = dict(zip(NODE_NAMES, free_ports(len(NODE_NAMES)), strict=True))
        where = []
        if "--head" in own:
            where = [f"--temp-dir={self._short}", "--include-dashboard=false"]
            where += [f"--ray-client-server-port={free_ports(1)[0]}"]
        command = ["-c", MINIMAL_RAY, "start", "--block", "--disable-usage-stats", *own, *where]
        command += ["--object-store-memory=80000000", "--include-log-monitor=false"]
        command += ["--min-worker-port=0", "--max-worker-port=0", *(f"--{name}={port}" for name, port in ports.items())]
        return self._service(name, command)

    def _start_tracker(self) -> Service:
        where = [f"--backend-store-uri=sqlite:///{self.folder}/mlflow.db", f"--artifacts-destination={self.folder}/art"]
        where += ["--host=127.0.0.1", f"--port={self._tracker_port}", "--workers=1"]
        return self._service("mlflow", ["-m", "mlflow", "server", *where], MLFLOW_SERVER_ENABLE_JOB_EXECUTION="false")

    def is_tracker_up(self) -> bool:
        self.tend()
        return is_listening(self._tracker_port)

    @property
    def tracking_uri(self) -> str:
        return f"http://127.0.0.1:{self._tracker_port}"

    # -- a sweep --------------------------------------------------------------------------------------------------

    def begin(self, run: Run) -> None:
        self.run, self.num_controllers = run, 0
        self._start_controller()

    def _start_controller(self) -> None:
        self.num_controllers += 1
        command = ["-c", "from orchestrator.cli import main; main()", "run", str(self.run.sweep_file)]
        self.controller = self._service(
            "controller",
            [*command, "--address", self.address],
            GATESWEEP_HOME=str(self.run.home),
            GATESWEEP_STORE=self.run.store_url,
            GATESWEEP_MLFLOW=self.tracking_uri,
        )

    def kill_controller(self) -> None:
        assert self.controller is not None
        self._killed.add(self.controller.process.pid)
        self.controller.kill()

    def kill_head(self) -> None:
        """All that the cluster knew is gone with it; it is started again, at the same address, once it is wanted."""
        self.is_head_wanted = False
        self.head.kill()

    def is_done(self) -> bool:
        """Whether the sweep has ended well by its controller's account."""
        return self.controller is not None and self.controller.process.poll() == 0

    def is_whole(self) -> bool:
        return all(is_begun(one) and not one.is_dead for one in (self.head, *self.nodes))

    def tend(self) -> None:
        """Start again what has died. A controller that gave up by itself is a defect, unless Ray's head was gone."""
        if self.is_head_wanted and self.head.is_dead:
            for one in (self.head, *self.nodes):  # nodes of a head that is gone are none of the next one's
                one.kill()
            self.head = self._start_head()
        self._tend_nodes()
        if self.is_tracker_wanted and self.tracker is not None and self.tracker.is_dead:
            self.tracker = self._start_tracker()
        if self.controller is not None and self.controller.is_dead and not self.is_done():
            said = self.controller.log.read_text()
            is_told = any(one in said for one in (CLUSTER_LOST, *ENDED_BY_RAY))
            pid = self.controller.process.pid
            has_no_room = NO_ROOM in said and (pid in self._short_of_a_node or not self.is_whole())
            assert is_told or has_no_room or pid in self._killed, said[-5000:]
            if self.is_whole():  # on less it may be told that the sweep has no room
                self._start_controller()

    def _tend_nodes(self) -> None:
        """Two that begin at once on one host would take each other's sockets."""
        if self.controller is not None and any(node.is_dead for node in self.nodes):
            self._short_of_a_node.add(self.controller.process.pid)
        for place, node in enumerate(self.nodes):
            others = [self.head, *(one for one in self.nodes if one is not node)]
            if node.is_dead and not self.head.is_dead and all(is_begun(one) or one.is_dead for one in others):
                node.kill()
                self.nodes[place] = self._start_node()

    def ranks(self) -> list[Rank]:
        """Those that are at an attempt of the sweep, in a lasting order."""
        return ranks_of(self.nodes, self.run.home)

    def told(self) -> str:
        """The last that the controller said."""
        return "" if self.controller is None else self.controller.log.read_text()[-3000:]

    def close(self) -> None:
        services = [self.controller, *self.nodes, getattr(self, "head", None), self.tracker]
        for one in services:
            if one is not None:
                one.kill()
        shutil.rmtree(self._short, ignore_errors=True)


@dataclass
class Run:
    """One sweep in a home of its own."""

    sweep_file: Path
    home: Path
    store_url: str
    late: dict[Path, bytes] = field(default_factory=dict)
    """What was written by gangs that had been given up, by file: nobody may have read it."""

    def steps_done(self) -> int:
        """Optimizer steps of all attempts together, those that were trained again included."""
        paths = self.home.glob("trials/*/attempts/*/metrics.jsonl")
        return sum(path.read_bytes().count(b'"kind":"step"') for path in paths)

    def take_room(self) -> None:
        """The home's file system is made no larger than what lies on it; asked again while ranks write to it."""
        while self._resize(f"{shutil.disk_usage(self.home).used}"):
            pass

    def give_room(self) -> None:
        assert not self._resize(f"{HOME_MEGABYTES}m")

    def _resize(self, size: str) -> int:
        return subprocess.run(["mount", "-o", f"remount,size={size}", self.home], capture_output=True).returncode


@contextlib.contextmanager
def small_disk(place: Path) -> Iterator[bool]:
    """A file system of its own at ``place``; False, and said aloud, where mounting is not allowed."""
    place.mkdir(parents=True)
    mount = shutil.which("mount")
    asked = [str(mount), "-t", "tmpfs", "-o", f"size={HOME_MEGABYTES}m", "tmpfs", str(place)]
    done = mount and subprocess.run(asked, capture_output=True)
    if not done or done.returncode:
        warnings.warn("no full disk among the faults: mounting a file system is not allowed here", stacklevel=2)
        yield False
        return
    try:
        yield True
    finally:
        subprocess.run(["umount", "-l", str(place)], check=True)


def send(process: psutil.Process, number: signal.Signals) -> None:
    """To one of our own; it may be gone already."""
    with contextlib.suppress(psutil.NoSuchProcess):
        process.send_signal(number)
