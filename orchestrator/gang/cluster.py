"""The connection to Ray, and what the cluster holds."""

from __future__ import annotations

import contextlib
import importlib
import os
import socket
import tempfile
import time
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import ray
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from orchestrator.gang import detached
from orchestrator.gang.ending import RankError, words
from orchestrator.gang.gangs import Gang
from orchestrator.gang.lease_file import GangLease
from orchestrator.gang.ranks import source_hash
from orchestrator.gang.shapes import GangShape, NodeRoom, units
from orchestrator.sweep import UserError

CONNECT_SECONDS = 10.0
ANSWER_SECONDS = 2.0
NODE_SECONDS = 600.0


@dataclass(frozen=True)
class Node:
    """A host of the cluster, as Ray knows it."""

    id: str
    host: str
    address: str


class Cluster:
    """The connection to Ray: an address, or a local one that lives as long as this context."""

    def __init__(self, address: str | None = None) -> None:
        os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
        # Ray would hide the GPUs from ranks that ask for none, and warn about it.
        os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
        if address is not None:
            _refuse_unreachable(address)
        try:
            with contextlib.nullcontext() if address else _loopback_only():
                ray.init(
                    address=address or "local",
                    include_dashboard=None if address else False,
                    log_to_driver=False,
                    logging_level="ERROR",
                    namespace="gatesweep",
                )
        except ConnectionError as error:
            raise UserError(f"no Ray cluster at {address!r}: {error}") from error
        except Exception as error:
            # An overloaded machine: Ray gives its own processes a time limit.
            raise UserError(f"Ray did not start here, try again: {type(error).__name__}: {error}") from error
        self._meetings = None if address else tempfile.TemporaryDirectory(prefix="gatesweep-meetings-")
        _hush()
        self.outlives_driver = address is not None
        """A local Ray dies with its driver, kill -9 included, and its gangs with it."""
        self._head, self._rooms = _head_address(), list[NodeRoom]()
        self._driver_hash = source_hash()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        ray.shutdown()
        if self._meetings is not None:
            self._meetings.cleanup()

    @property
    def identity(self) -> str:
        """The name of the Ray session: no other cluster, nor this one once it is started anew, has it."""
        return str(ray.get_runtime_context().get_session_name())

    def rooms(self) -> list[NodeRoom]:
        """The living nodes with what is free of them, whoever holds the rest. Some tenths of a second old.

        Without a head, as they were last: Ray's own call would wait, and end this process when another head answers.
        """
        if self._rooms and not self.is_reachable():
            return self._rooms
        state: Any = importlib.import_module("ray._private.state")
        available = state.available_resources_per_node()
        self._rooms = [
            NodeRoom(node["NodeID"], units(node["Resources"]), units(available.get(node["NodeID"], node["Resources"])))
            for node in ray.nodes()
            if node["Alive"]
        ]
        return self._rooms

    def start_gang(
        self, shape: GangShape, num_threads: int, nodes: Sequence[str] = (), lease: GangLease | None = None
    ) -> Gang:
        """``nodes``: where each bundle is to be; without, Ray chooses. With a lease, on a cluster that outlives this
        driver, the gang does so, too, until the lease is over."""
        meetings = None if self._meetings is None else Path(self._meetings.name)
        lasting = lease if self.outlives_driver else None
        return Gang(shape, num_threads, self._driver_hash, nodes, meetings, lasting)

    def wait(self, gangs: Collection[Gang], seconds: float) -> list[Gang]:
        """The gangs of which something has ended; waits for the first such news, at most so long."""
        of = {one: gang for gang in gangs for one in gang.awaited()}
        if not of:
            time.sleep(seconds)
            return []
        done, _ = ray.wait(list(of), num_returns=1, timeout=seconds)
        return list({id(of[one]): of[one] for one in done}.values())

    def find_gangs(self, wanted: Sequence[detached.Wanted]) -> list[Gang | str]:
        """Gangs that an earlier driver left: for each the gang, which goes on, or why it can't be adopted."""
        return detached.find(wanted, self._driver_hash)

    def end_gangs(self, gang_ids: Collection[str]) -> None:
        """Gangs that an earlier driver left, and that nobody wants."""
        detached.end(gang_ids)

    def is_reachable(self) -> bool:
        """Whether Ray's head answers. When it does not, Ray ends this process after a minute."""
        if self._head is None:
            return True
        try:
            socket.create_connection(self._head, timeout=ANSWER_SECONDS).close()
        except OSError:
            return False
        return True

    def answering(self) -> str | None:
        """The identity of the cluster whose head answers at our address; None when none does, or it does not say.

        Asked over a connection of its own: a head that was restarted, and has lost what it knew, takes ours for
        nobody's.
        """
        if self._head is None:
            return self.identity
        if not self.is_reachable():
            return None
        try:
            client = importlib.import_module("ray._raylet").GcsClient(address=ray.get_runtime_context().gcs_address)
            name = client.internal_kv_get(b"session_name", b"session", timeout=ANSWER_SECONDS)
        except Exception:
            return None
        return None if name is None else str(name.decode())

    def nodes(self) -> list[Node]:
        """The living ones."""
        alive = [node for node in ray.nodes() if node["Alive"]]
        return [Node(node["NodeID"], node["NodeManagerHostname"], node["NodeManagerAddress"]) for node in alive]

    def on_nodes(self, calls: Sequence[tuple[Node, Callable[..., Any], tuple[Any, ...]]]) -> list[Any]:
        """Each function in a process on its node, all at once, whatever else runs there. The answers in order; an
        exception in place of one that failed, as text in a RankError."""
        asked = []
        for node, function, arguments in calls:
            place = NodeAffinitySchedulingStrategy(node.id, soft=False)
            asked.append(ray.remote(num_cpus=0, scheduling_strategy=place)(function).remote(*arguments))
        answers: list[Any] = []
        for one in asked:
            try:
                answers.append(ray.get(one, timeout=NODE_SECONDS))
            except Exception as error:
                answers.append(RankError(words(error)))
        return answers


def _head_address() -> tuple[str, int] | None:
    """Of the server that keeps the cluster's state; None when it is not told (over Ray's client)."""
    host, _, port = str(ray.get_runtime_context().gcs_address or "").rpartition(":")
    return (host.strip("[]"), int(port)) if host and port.isdigit() else None


def _refuse_unreachable(address: str) -> None:
    """UserError when nobody listens at ``host:port``: Ray would try for minutes, and print all the while."""
    host, _, port = address.removeprefix("ray://").rpartition(":")
    if not host or not port.isdigit():
        return  # "auto" and the like: Ray knows
    try:
        socket.create_connection((host.strip("[]"), int(port)), timeout=CONNECT_SECONDS).close()
    except OSError as error:
        raise UserError(f"no Ray cluster at {address!r}: {error}") from error


@contextlib.contextmanager
def _loopback_only() -> Iterator[None]:
    """A Ray that is started within listens on 127.0.0.1 alone; left alone it listens on every interface.

    ``_node_ip_address="127.0.0.1"`` would be replaced by the address that other hosts reach. This is Ray's own way on
    desktops, where it is the default; who sets Ray's variable for it has decided otherwise.
    """
    constants: Any = importlib.import_module("ray._private.ray_constants")
    if constants.ENABLE_RAY_CLUSTERS_ENV_VAR in os.environ:
        yield
        return
    before, constants.ENABLE_RAY_CLUSTER = constants.ENABLE_RAY_CLUSTER, False
    try:
        yield
    finally:
        constants.ENABLE_RAY_CLUSTER = before


def _hush() -> None:
    """Ray prints a paragraph for every dead worker, whatever log_to_driver says; the controller tells it in a line."""
    worker: Any = importlib.import_module("ray._private.worker")
    if hasattr(worker, "print_to_stdstream"):
        worker.print_to_stdstream = lambda *_, **__: None
