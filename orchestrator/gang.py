"""Gangs: the Ray actors, one a rank, that run attempts; the only Ray.

A gang outlives its attempt: torch, Megatron and the process group stay up, and the next trial of the same shape
starts at once. All calls here return without waiting; the controller polls.
"""

from __future__ import annotations

import contextlib
import enum
import hashlib
import importlib
import os
import re
import socket
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import ray
from ray.util.placement_group import PlacementGroup, placement_group, remove_placement_group
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

from models.config import Layout
from models.run_dir import AttemptSpec, Summary, metrics_path
from orchestrator.sweep import UserError

PACKAGES = ("models", "orchestrator")
CONNECT_SECONDS = 10.0
DEATH_NEWS_SECONDS = 5.0
"""How long a gang with a failed rank is given to show a dead one: the survivors' broken collectives are told first."""


@dataclass(frozen=True)
class GangShape:
    """What a gang asks of the cluster: a bundle of CPUs and GPUs for each rank of a layout."""

    layout: Layout
    cpus_per_rank: float
    gpus_per_rank: float

    @property
    def device(self) -> str:
        return "cuda" if self.gpus_per_rank else "cpu"

    @property
    def bundle(self) -> dict[str, float]:
        resources = {"CPU": self.cpus_per_rank, "GPU": self.gpus_per_rank}
        return {name: amount for name, amount in resources.items() if amount}

    def __str__(self) -> str:
        bundle = " + ".join(f"{amount:g} {name}" for name, amount in self.bundle.items())
        return f"{self.layout.world_size} rank(s) x {bundle}"


class GangState(enum.Enum):
    STARTING = "starting"
    IDLE = "idle"
    BUSY = "busy"
    DEAD = "dead"


@dataclass(frozen=True)
class GangEnd:
    """How a gang's attempt ended: by its own account, or by an error that Ray saw."""

    summary: Summary | None
    error: str | None = None
    """Class and message of what Ray or the training raised."""
    rank_died: bool = False
    """A rank is gone or out of reach (killed, out of memory, its node lost), as opposed to an exception in it."""
    rank: int = 0
    """Whose error it is, and whose log tells more."""


def source_hash() -> str:
    """Of this process's own ``models`` and ``orchestrator``: the driver's and every rank's must be equal."""
    digest = hashlib.sha256()
    for package in PACKAGES:
        folder = Path(str(importlib.import_module(package).__file__)).parent
        for path in sorted(folder.rglob("*.py")):
            digest.update(f"{package}/{path.relative_to(folder)}".encode() + path.read_bytes())
    return digest.hexdigest()[:16]


class RankError(Exception):
    """What a rank raised, as text: the driver would load torch to unpickle an error of Megatron's or the trainer's."""


@contextlib.contextmanager
def _errors_as_text() -> Iterator[None]:
    try:
        yield
    except Exception as error:
        raise RankError(_words(error)) from None


class _Rank:
    """The actor: one rank's process. ``control`` methods answer while ``train`` runs."""

    def __init__(self, rank: int, layout: str, device: str, num_threads: int) -> None:
        self.rank, self.layout, self.device = rank, Layout.model_validate_json(layout), device
        self.num_threads = num_threads
        self.world: Any = None
        self.attempt_dir: Path | None = None
        self.stop_token: str | None = None

    def rendezvous(self) -> str:
        """Where the gang meets; asked of rank 0."""
        with socket.socket() as probe:
            probe.bind(("", 0))
            return f"tcp://{ray.util.get_node_ip_address()}:{probe.getsockname()[1]}"

    def join(self, init_method: str, driver_hash: str) -> dict[str, Any]:
        own = source_hash()
        if own != driver_hash:
            where = Path(str(importlib.import_module("models").__file__)).parent
            raise RuntimeError(
                f"rank {self.rank} on {socket.gethostname()} runs other code than the driver: package models at "
                f"{where} has hash {own}, the driver's is {driver_hash}; install the same version on every node, "
                "and when a file was edited while the sweep ran, run it again"
            )
        with _errors_as_text():
            trainer = importlib.import_module("models.trainer")
            self.world = trainer.World.join(
                self.rank, self.layout, self.device, init_method, num_threads=self.num_threads
            )
        return {"host": socket.gethostname(), "pid": os.getpid()}

    def train(self, spec: str) -> str:
        trainer = importlib.import_module("models.trainer")
        attempt = AttemptSpec.model_validate_json(spec)
        self.attempt_dir = attempt.attempt_dir
        with _errors_as_text():
            summary: Summary = trainer.train(attempt, self.world, lambda: self.stop_token == attempt.token)
        return summary.model_dump_json()

    def written(self) -> int:
        """Bytes of metrics written so far by the running attempt."""
        path = None if self.attempt_dir is None else metrics_path(self.attempt_dir)
        return path.stat().st_size if path is not None and path.exists() else 0

    def stop(self, token: str) -> None:
        """Ask the attempt ``token`` to checkpoint and end after its current step; a late call harms no other."""
        self.stop_token = token


_RankActor = ray.remote(concurrency_groups={"control": 1})(_Rank)


class Gang:
    """A placement group, its ranks, and at most one attempt."""

    def __init__(self, shape: GangShape, num_threads: int, driver_hash: str) -> None:
        self.shape, self.state = shape, GangState.STARTING
        layout = shape.layout
        # Tensor-parallel ranks talk at every layer: a gang that can be on one node is.
        self._group: PlacementGroup = placement_group([shape.bundle] * layout.world_size, strategy="PACK")
        self._ranks = [self._rank(rank, num_threads) for rank in range(layout.world_size)]
        meeting = self._ranks[0].rendezvous.remote()
        self._joins = [rank.join.remote(meeting, driver_hash) for rank in self._ranks]
        self._trains: list[Any] = []
        self._written: Any = None
        self._failed_since: float | None = None
        self.members: list[dict[str, Any]] = []
        """Host and pid of every rank, once it is up."""
        self.num_attempts = 0

    def _rank(self, rank: int, num_threads: int) -> Any:
        return _RankActor.options(
            num_cpus=self.shape.cpus_per_rank,
            num_gpus=self.shape.gpus_per_rank,
            max_restarts=0,
            scheduling_strategy=PlacementGroupSchedulingStrategy(
                placement_group=self._group, placement_group_bundle_index=rank
            ),
            runtime_env={"env_vars": {"OMP_NUM_THREADS": str(num_threads)}},
        ).remote(rank, self.shape.layout.model_dump_json(), self.shape.device, num_threads)

    def poll_start(self) -> str | None:
        """IDLE once every rank is up; the error that kept the gang from starting, if one did."""
        if self.state is not GangState.STARTING:
            return None
        done, waiting = ray.wait(self._joins, num_returns=len(self._joins), timeout=0)
        try:
            # A rank that failed is worth telling before the others have given up waiting for it.
            ray.get(done)
            if not waiting:
                self.members = ray.get(self._joins)
                self.state = GangState.IDLE
        except Exception as error:
            return _words(error)
        return None

    def launch(self, spec: AttemptSpec) -> None:
        assert self.state is GangState.IDLE, self.state
        self._trains = [rank.train.remote(spec.model_dump_json()) for rank in self._ranks]
        self._written = self._failed_since = None
        self.num_attempts += 1
        self.state = GangState.BUSY

    def written(self) -> int | None:
        """Bytes of metrics that rank 0 has reported, None when there is no new answer."""
        if self._written is None:
            self._written = self._ranks[0].written.options(concurrency_group="control").remote()
            return None
        done, _ = ray.wait([self._written], timeout=0)
        if not done:
            return None
        answer, self._written = self._written, None
        try:
            return int(ray.get(answer))
        except ray.exceptions.RayError:
            return None  # the rank is gone: poll_end tells

    def stop(self, token: str) -> None:
        self._ranks[0].stop.options(concurrency_group="control").remote(token)

    def poll_end(self) -> GangEnd | None:
        """The attempt's end, None while it runs. The gang is IDLE after a good end, to be dismissed after a bad one."""
        done, waiting = ray.wait(self._trains, num_returns=len(self._trains), timeout=0)
        answers = {self._trains.index(train): _answer(train) for train in done}
        errors = [(rank, answer) for rank, answer in answers.items() if isinstance(answer, Exception)]
        if errors:
            # The most telling one: a death, then what a rank raised, then a collective that broke for its sake.
            rank, error = min(errors, key=lambda one: _blame(one[1]))
            self._failed_since = self._failed_since or time.monotonic()
            is_death = isinstance(error, ray.exceptions.RayActorError)
            if waiting and not is_death and time.monotonic() - self._failed_since < DEATH_NEWS_SECONDS:
                return None
            words = _death(error) if is_death else _words(error)
            return GangEnd(summary=None, error=words, rank_died=_blame(error) != _RAISED, rank=rank)
        if waiting:
            return None
        self.state = GangState.IDLE
        return GangEnd(summary=Summary.model_validate_json(answers[0]))

    def dismiss(self) -> None:
        """Kill every rank and give the resources back."""
        self.state = GangState.DEAD
        for rank in self._ranks:
            ray.kill(rank, no_restart=True)
        remove_placement_group(self._group)


class Cluster:
    """The connection to Ray: an address, or a local one that lives as long as this context."""

    def __init__(self, address: str | None = None) -> None:
        os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
        # Ray would hide the GPUs from ranks that ask for none, and warn about it.
        os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
        if address is not None:
            _refuse_unreachable(address)
        try:
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
        _hush()
        self._driver_hash = source_hash()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        ray.shutdown()

    def capacity(self, shape: GangShape) -> int:
        """Gangs of this shape that the living nodes hold together, whoever uses them now.

        Raises UserError when they cannot hold one.
        """
        per_node = []
        for node in ray.nodes():
            if node["Alive"]:
                have = node["Resources"]
                per_node.append(min(int(have.get(name, 0) // amount) for name, amount in shape.bundle.items()))
        ranks = sum(per_node)
        if ranks < shape.layout.world_size:
            raise UserError(
                f"resources: a gang asks for {shape}, and the cluster holds {ranks} such rank(s): "
                f"{ {name: amount for name, amount in ray.cluster_resources().items() if name in ('CPU', 'GPU')} }"
            )
        return ranks // shape.layout.world_size

    def start_gang(self, shape: GangShape, num_threads: int) -> Gang:
        return Gang(shape, num_threads, self._driver_hash)


def _refuse_unreachable(address: str) -> None:
    """UserError when nobody listens at ``host:port``: Ray would try for minutes, and print all the while."""
    host, _, port = address.removeprefix("ray://").rpartition(":")
    if not host or not port.isdigit():
        return  # "auto" and the like: Ray knows
    try:
        socket.create_connection((host.strip("[]"), int(port)), timeout=CONNECT_SECONDS).close()
    except OSError as error:
        raise UserError(f"no Ray cluster at {address!r}: {error}") from error


def _hush() -> None:
    """Ray prints a paragraph for every dead worker, whatever log_to_driver says; the controller tells it in a line."""
    worker: Any = importlib.import_module("ray._private.worker")
    if hasattr(worker, "print_to_stdstream"):
        worker.print_to_stdstream = lambda *_, **__: None


def _answer(train: Any) -> Any:
    """What a rank that is done returned or raised."""
    try:
        return ray.get(train)
    except Exception as error:
        return error


_DEATH, _RAISED, _BROKEN = range(3)
_BROKEN_COLLECTIVE = re.compile(r"gloo/transport/|Gloo connectFullMesh|NCCL error|DistBackendError|DistNetworkError")


def _blame(error: Exception) -> int:
    """How much an error tells about why a gang failed, the least telling last."""
    if isinstance(error, ray.exceptions.RayActorError):
        return _DEATH
    return _BROKEN if _BROKEN_COLLECTIVE.search(_words(error)) else _RAISED


def _words(error: BaseException) -> str:
    """Class and message of the original error, without Ray's frames around it."""
    cause = getattr(error, "cause", None) or error
    if isinstance(cause, RankError):
        return str(cause)
    text = str(cause).strip() or type(cause).__name__
    return f"{type(cause).__name__}: {text}"[:4000]


def _death(error: BaseException) -> str:
    """One line of Ray's long message about a dead actor: which process, where, and what the system saw."""
    text = str(error)
    pid, address = re.search(r"pid: (\d+)", text), re.search(r"ip: (\S+)", text)
    detail = re.search(r"(?:Worker exit detail|The actor is dead because): (.+?)(?: Some common causes|$)", text, re.M)
    process = f"process {pid[1]} of a rank" if pid else "a rank's process"
    return f"{process}{f' at {address[1]}' if address else ''} died: {detail[1] if detail else text[:300]}"
