"""A rank's process: joins its gang, trains, and answers while it trains."""

from __future__ import annotations

import contextlib
import gc
import hashlib
import importlib
import os
import signal
import socket
import sys
import threading
import traceback
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import ray

from models import trust
from models.config import Layout
from models.run_dir import AttemptSpec, Summary, metrics_path, stacks_path, write_json
from orchestrator.gang.ending import RankError, words
from orchestrator.gang.lease_file import GangLease
from orchestrator.gang.orphan import Guard

PACKAGES = ("models", "orchestrator")
LANDING_SECONDS = 30.0
"""What a process that is told to end gives the checkpoint that it writes."""
LANDINGS_KEPT = 4
"""Another controller may ask again."""


def source_hash() -> str:
    """Of this process's own ``models`` and ``orchestrator``: the driver's and every rank's must be equal."""
    digest = hashlib.sha256()
    for package in PACKAGES:
        folder = Path(str(importlib.import_module(package).__file__)).parent
        for path in sorted(folder.rglob("*.py")):
            digest.update(f"{package}/{path.relative_to(folder)}".encode() + path.read_bytes())
    return digest.hexdigest()[:16]


def _loopback_interface() -> str:
    """Where ranks on one host talk, so that gloo listens nowhere else; ``lo`` on Linux."""
    addresses = psutil.net_if_addrs()
    return next((name for name in addresses if any(one.address == "127.0.0.1" for one in addresses[name])), "lo")


@contextlib.contextmanager
def _errors_as_text() -> Iterator[None]:
    try:
        yield
    except SystemExit as error:
        # Megatron ends a process that computes wrongly by its exit code, which Ray would not tell.
        raise RankError(f"SystemExit: {error.code}") from None
    except Exception as error:
        raise RankError(words(error)) from None


def _stacks() -> str:
    """What every thread of this process is doing."""
    names = {thread.ident: thread.name for thread in threading.enumerate()}
    frames = sys._current_frames().items()
    return "\n".join(
        f"thread {names.get(ident, ident)}\n{''.join(traceback.format_stack(frame))}" for ident, frame in frames
    )


class _Rank:
    """The actor: one rank's process. ``control`` methods answer while ``train`` runs."""

    def __init__(
        self, rank: int, layout: str, device: str, num_threads: int, gang: str = "", lease: GangLease | None = None
    ) -> None:
        self.rank, self.layout, self.device = rank, Layout.model_validate_json(layout), device
        self.num_threads = num_threads
        self.world: Any = None
        self.attempt_dir: Path | None = None
        self.token: str | None = None
        self.stop_token: str | None = None
        self.end: str | BaseException | None = None
        self.has_ended = threading.Event()
        self.orphaned: str | None = None
        self.beats = 0
        self.is_training = self.is_terminated = False
        self.landings: dict[str, Any] = {}
        """The last checkpoints of the last attempts, by token: in the writing, or written."""
        self.guard = None if lease is None else Guard(rank, gang, lease, self._is_busy)
        signal.signal(signal.SIGTERM, self._on_sigterm)

    def _on_sigterm(self, *_: object) -> None:
        """A preemption: the attempt checkpoints after its current step and ends. A second one ends the process."""
        if self.is_terminated or not self.is_training:
            if not self.is_training and self.world is not None:
                self.world.writer.wait(LANDING_SECONDS)
            sys.exit(128 + signal.SIGTERM)
        self.is_terminated = True

    def _is_busy(self) -> bool:
        return self.is_training or any(not one.done() for one in list(self.landings.values()))

    def rendezvous(self) -> str:
        """Where the gang meets; asked of rank 0."""
        with socket.socket() as probe:
            probe.bind(("", 0))
            return f"tcp://{ray.util.get_node_ip_address()}:{probe.getsockname()[1]}"

    def join(self, init_method: str, driver_hash: str, key: str) -> dict[str, Any]:
        """Enter the gang. ``key`` signs checkpoints: it comes straight from the driver, and is in no metadata."""
        trust.use_key(key)
        own = source_hash()
        if own != driver_hash:
            where = Path(str(importlib.import_module("models").__file__)).parent
            raise RuntimeError(
                f"rank {self.rank} on {socket.gethostname()} runs other code than the driver: package models at "
                f"{where} has hash {own}, the driver's is {driver_hash}; install the same version on every node, "
                "and when a file was edited while the sweep ran, run it again"
            )
        if init_method.startswith("file:"):
            os.environ.setdefault("GLOO_SOCKET_IFNAME", _loopback_interface())
        with _errors_as_text():
            trainer = importlib.import_module("models.trainer")
            self.world = trainer.World.join(
                self.rank, self.layout, self.device, init_method, num_threads=self.num_threads
            )
        gc.freeze()  # what is loaded stays: to search it for garbage takes a third of a second, between any two trials
        return self._member()

    def _member(self) -> dict[str, Any]:
        node = ray.get_runtime_context().get_node_id()
        return {"host": socket.gethostname(), "pid": os.getpid(), "node_id": node}

    def train(self, spec: str) -> str:
        """How the attempt ended. One that is complete has yet to land: the rank is free for the next one."""
        attempt = AttemptSpec.model_validate_json(spec)
        self.attempt_dir, self.token, self.end, self.orphaned = attempt.attempt_dir, attempt.token, None, None
        self.has_ended.clear()
        self.beats, self.is_training = 0, True
        try:
            self.end = self._train(attempt).model_dump_json()
            return self.end
        except BaseException as error:
            self.end = error
            raise
        finally:
            self.is_training = False
            self.has_ended.set()

    def _train(self, attempt: AttemptSpec) -> Summary:
        trainer = importlib.import_module("models.trainer")
        with _errors_as_text():
            trained = trainer.start(attempt, self.world, self._should_stop, self._beat)
            summary: Summary = trained.summary
            if summary.outcome == "complete":
                self.landings = {
                    **dict(list(self.landings.items())[1 - LANDINGS_KEPT :]),
                    attempt.token: trained.landed,
                }
                return summary
            trained.landed.result()
        if summary.outcome == "stopped" and self.orphaned is not None:
            summary = summary.model_copy(update={"error": self.orphaned})
            write_json(attempt.attempt_dir / "summary.json", summary)
        return summary

    def _should_stop(self) -> bool:
        if self.is_terminated or self.stop_token == self.token:
            return True
        # Rank 0 decides for all: the trainer has the ranks agree.
        if self.rank == 0 and self.guard is not None and self.guard.watch.is_over:
            self.orphaned = self.guard.watch.reason()
        return self.orphaned is not None

    def follow(self, token: str) -> str:
        """What ``train`` returns or raises, for a controller that did not call it; blocks until then."""
        self.has_ended.wait()
        if self.token != token:
            raise RankError(f"RankError: rank {self.rank} has run attempt {self.token}, not {token}")
        if isinstance(self.end, BaseException):
            raise self.end
        assert self.end is not None
        return self.end

    def identity(self) -> dict[str, Any]:
        """Who this is, and which attempt it runs or ran last."""
        return {**self._member(), "source_hash": source_hash(), "token": self.token}

    def renew(self, lease: GangLease | None = None) -> None:
        """A sign of life of the controller; with a lease, of another one, which has adopted the gang."""
        if self.guard is not None and lease is not None:
            self.guard.watch.move(lease)
        elif self.guard is not None:
            self.guard.watch.heard()

    def landed(self, token: str) -> None:
        """Returns when the last checkpoint of an attempt that is complete stands; raises what befell it."""
        with _errors_as_text():
            self.landings[token].result()

    def _beat(self) -> None:
        self.beats += 1

    def progress(self) -> tuple[int, int]:
        """Bytes of metrics and micro-batches that the running attempt has behind it."""
        self.renew()
        path = None if self.attempt_dir is None else metrics_path(self.attempt_dir)
        return (path.stat().st_size if path is not None and path.exists() else 0), self.beats

    def dump_stacks(self) -> None:
        """Write what every thread is doing beside the log of a hung attempt."""
        if self.attempt_dir is not None:
            stacks_path(self.attempt_dir, self.rank).write_text(_stacks())

    def stop(self, token: str) -> None:
        """Ask the attempt ``token`` to checkpoint and end after its current step; a late call harms no other."""
        self.stop_token = token


RankActor = ray.remote(concurrency_groups={"control": 1, "follow": 1, "landing": 2})(_Rank)
