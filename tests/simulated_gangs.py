"""A cluster of simulated gangs with the real one's face, in real or in virtual time, and the schedule to compare with.

A trial takes a time drawn from its fingerprint. Its gang writes the run dir as a trainer would, so that everything of
the controller is at work. In virtual time ``wait`` moves the clock to the next event instead of sleeping.
"""

from __future__ import annotations

import hashlib
import heapq
import time
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

from fake_gangs import fake_step, fake_validation

from models import run_dir
from models.config import TrialConfig
from models.run_dir import AttemptSpec, Summary
from orchestrator.controller.clock import Clock
from orchestrator.gang import UNITS, GangEnd, GangShape, GangState, NodeRoom, Room, minus

SWEEP = """\
name: simulated
question: How full can the cluster be kept?
base:
  model: {{preset: cpu-tiny}}
  data: {{corpus: corpus.jsonl, sequence_length: 64, validation: {{slice_bytes: 1024, points: 1}}}}
  train: {{tokens: 1024, batch_tokens: 256, lr: 3e-3}}
baseline: single
arms:
  single: {{}}
{arms}
seeds: [{seeds}]
baseline_seeds: {num_seeds}
controls: []
diagnostics: null
resources: {{cpus: 1, by: [{rules}]}}
"""
"""4 steps a trial."""

MIXED = {
    "pair": "{tensor: 2}",
    "four": "{tensor: 2, data: 2}",
    "eight": "{tensor: 2, data: 4}",
}
"""Arms beside ``single`` and their layouts: 1, 2, 4 and 8 ranks of a CPU, in bundles of 1 or 2."""


def sweep_text(num_seeds: int, layouts: dict[str, str] = MIXED) -> str:
    """``num_seeds`` trials of every shape."""
    arms = "\n".join(f"  {arm}: {{model: {{init_std: {0.01 + 0.001 * n:.3f}}}}}" for n, arm in enumerate(layouts))
    rules = ", ".join(f"{{where: {{arm: {arm}}}, layout: {layout}}}" for arm, layout in layouts.items())
    seeds = ", ".join(map(str, range(1, num_seeds + 1)))
    return SWEEP.format(arms=arms, seeds=seeds, num_seeds=num_seeds, rules=rules)


class VirtualClock(Clock):
    def __init__(self) -> None:
        self.now = 0.0

    def monotonic(self) -> float:
        return self.now

    def sleep(self, seconds: float) -> None:
        self.now += seconds


Seconds = Callable[[TrialConfig], float]


def drawn(mean_seconds: float) -> Seconds:
    """Between half and one and a half times the mean, by the trial's fingerprint."""

    def seconds(config: TrialConfig) -> float:
        digest = hashlib.sha256(config.fingerprint().encode()).digest()
        return mean_seconds * (0.5 + int.from_bytes(digest[:4], "big") / 2**32)

    return seconds


class SimulatedGang:
    def __init__(self, cluster: SimulatedCluster, shape: GangShape, nodes: Sequence[str]) -> None:
        self.cluster, self.shape, self.nodes = cluster, shape, list(nodes)
        self.state = GangState.STARTING
        self.members = [{"host": node, "node_id": node} for node in nodes for _ in range(shape.ranks_per_bundle)]
        self.num_attempts = self.step = self.num_bytes = 0
        self.ready_at = cluster.clock.monotonic() + cluster.start_seconds
        self.begun_at = self.ends_at = 0.0
        self.is_landing = self.is_detached = False
        self.gang_id = f"gang-{id(self)}"
        cluster.expect(self.ready_at, self)

    def poll_start(self) -> None:
        if self.state is GangState.STARTING and self.cluster.clock.monotonic() >= self.ready_at:
            self.state = GangState.IDLE

    def is_placed(self) -> bool:
        return True

    def launch(self, spec: AttemptSpec) -> None:
        assert self.state is GangState.IDLE
        self.spec, self.state, self.step = spec, GangState.BUSY, spec.resume_step
        self.config = run_dir.read_trial_config(Path(spec.trial_dir))
        self.num_attempts += 1
        self.num_bytes = 0
        self.begun_at = self.cluster.clock.monotonic()
        if self.num_attempts > 1:
            self.cluster.gaps.append(self.begun_at - self.ends_at)
        self.seconds = self.cluster.seconds(self.config)
        self.ends_at = self.begun_at + self.seconds
        self.cluster.expect(self.ends_at, self)

    def progress(self) -> tuple[int, int]:
        elapsed = self.cluster.clock.monotonic() - self.begun_at
        self._write(min(self.config.train.num_steps - 1, int(elapsed / self.seconds * self.config.train.num_steps)))
        return self.num_bytes, self.step

    def poll_end(self) -> GangEnd | None:
        if self.cluster.clock.monotonic() < self.ends_at:
            return None
        self._write(self.config.train.num_steps)
        self.state = GangState.IDLE
        facts = {"outcome": "complete", "step": self.step, "resume_step": 0, "seconds": self.seconds}
        return GangEnd(Summary.model_validate({**facts, "tokens_per_second": self._speed()}))

    def stop(self, token: str) -> None:
        raise AssertionError("nothing stops a simulated trial")

    def dump_stacks(self) -> None:
        raise AssertionError("no simulated trial hangs")

    def dismiss(self) -> None:
        self.state = GangState.DEAD

    def _speed(self) -> float:
        return self.config.train.tokens / self.seconds

    def _write(self, step: int) -> None:
        lines = ""
        for number in range(self.step + 1, step + 1):
            record = fake_step(self.config, number, None).model_copy(update={"tokens_per_second": self._speed()})
            lines += run_dir.record_line(record)
            if number in self.config.validation_steps():
                lines += run_dir.record_line(fake_validation(self.config, number))
        if lines:
            with run_dir.metrics_path(self.spec.attempt_dir).open("a") as stream:
                stream.write(lines)
            self.step, self.num_bytes = step, self.num_bytes + len(lines)


class SimulatedCluster:
    """``num_nodes`` nodes of ``cpus``. A trial takes ``seconds``, and a gang ``start_seconds`` before its first one."""

    def __init__(self, num_nodes: int, cpus: int, seconds: Seconds, clock: Clock, start_seconds: float = 0.0) -> None:
        self.clock, self.seconds, self.start_seconds = clock, seconds, start_seconds
        self.sizes = {f"node-{number:04d}": (cpus * UNITS, 0) for number in range(num_nodes)}
        self.gangs: list[SimulatedGang] = []
        self.gaps: list[float] = []
        """Seconds of a warm gang between the end of a trial and the launch of the next."""
        self._events: list[tuple[float, int, SimulatedGang]] = []
        self._num_events = 0

    outlives_driver = False
    identity = "simulated-cluster"

    def is_reachable(self) -> bool:
        return True

    def answering(self) -> str | None:
        return self.identity

    def expect(self, at: float, gang: SimulatedGang) -> None:
        self._num_events += 1
        heapq.heappush(self._events, (at, self._num_events, gang))

    def rooms(self) -> list[NodeRoom]:
        free = dict(self.sizes)
        self.gangs = [gang for gang in self.gangs if gang.state is not GangState.DEAD]
        for gang in self.gangs:
            for node in gang.nodes:
                free[node] = minus(free[node], gang.shape.bundle_units)
                assert free[node] >= (0, 0), "more was started on a node than it holds"
        return [NodeRoom(name, total, free[name]) for name, total in self.sizes.items()]

    def start_gang(
        self, shape: GangShape, num_threads: int, nodes: Sequence[str] = (), lease: Any = None
    ) -> SimulatedGang:
        self.gangs.append(SimulatedGang(self, shape, nodes))
        return self.gangs[-1]

    def wait(self, gangs: Sequence[Any], seconds: float) -> list[SimulatedGang]:
        now = self.clock.monotonic()
        until = min(self._events[0][0], now + seconds) if self._events else now + seconds
        if isinstance(self.clock, VirtualClock):
            self.clock.now = max(now, until)
        elif until > now:
            time.sleep(until - now)
        news = []
        while self._events and self._events[0][0] <= self.clock.monotonic():
            news.append(heapq.heappop(self._events)[2])
        return news


def list_schedule(trials: Iterable[tuple[GangShape, float]], sizes: dict[str, tuple[int, int]]) -> float:
    """Makespan in seconds of the list schedule that knows every duration: whenever something ends, the trials are gone
    through in order, and each one that fits is started, at once and at no cost."""
    queues: dict[GangShape, list[tuple[int, float]]] = {}
    for number, (shape, seconds) in enumerate(trials):
        queues.setdefault(shape, []).append((number, seconds))
    for queue in queues.values():
        queue.reverse()
    room, running, now = Room(sizes), [], 0.0
    while True:
        blocked: set[GangShape] = set()
        while heads := [(queue[-1], shape) for shape, queue in queues.items() if queue and shape not in blocked]:
            (number, seconds), shape = min(heads, key=lambda head: head[0][0])
            nodes = room.place(shape)
            if nodes is None:
                blocked.add(shape)
                continue
            queues[shape].pop()
            for node in nodes:
                room.change(node, minus((0, 0), shape.bundle_units))
            heapq.heappush(running, (now + seconds, number, shape, nodes))
        if not running:
            return now
        now = running[0][0]
        while running and running[0][0] <= now:
            _, _, shape, nodes = heapq.heappop(running)
            for node in nodes:
                room.change(node, shape.bundle_units)
