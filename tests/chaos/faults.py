"""The faults: what is broken, how it is told that it was, and how it is mended. A fault is a generator: it strikes when
it is first asked, waits in its ``yield``s, and is over with what it mended.

What is struck is drawn from a seed; when is told by what training has done, never by a clock.
"""

from __future__ import annotations

import os
import random
import signal
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

from world import Rank, Run, World, send

from models import run_dir
from models.run_dir import StepRecord
from orchestrator.store import Store

NO_LOSS = 1e9
STEPS_BETWEEN = (5, 25)
"""Optimizer steps between the end of a fault and the next one, at least and at most."""


@dataclass
class Scene:
    """Where a fault happens, and what came of it."""

    world: World
    run: Run
    store: Store
    draw: random.Random
    notes: Counter[str] = field(default_factory=Counter)
    """What is worth telling, counted."""

    def a_gang(self, ranks: list[Rank]) -> list[Rank]:
        chosen = self.draw.choice(sorted({one.attempt_dir for one in ranks}))
        return [one for one in ranks if one.attempt_dir == chosen]

    def is_over(self) -> bool:
        return self.world.is_done()

    def until_followed(self) -> Iterator[None]:
        """A controller that finds no database when it starts says so and ends: one that runs waits for it."""
        sweep_id = self.store.sweep("chaos").id
        while self.store.lease_holder(sweep_id) is None and not self.is_over():
            yield

    def until_trained(self) -> Iterator[None]:
        """Some steps further, or as far as it goes while what is broken is broken."""
        goal = self.run.steps_done() + self.draw.randint(*STEPS_BETWEEN)
        while self.run.steps_done() < goal and self.world.ranks() and not self.is_over():
            yield

    def has_ended(self, gang: list[Rank]) -> bool:
        """By the store's account."""
        fingerprint, token = gang[0].attempt_dir.parents[1].name, gang[0].token
        return any(one.token == token and one.ended_at for one in self.store.attempts(fingerprint))

    def num_disk_full(self) -> int:
        """Attempts that have died of a full disk."""
        fingerprints = [trial.fingerprint for trial in self.store.trials(self.store.sweep("chaos").id)]
        attempts = [one for fingerprint in fingerprints for one in self.store.attempts(fingerprint)]
        return sum(one.cause == "disk_full" for one in attempts)


Fault = Callable[[Scene, list[Rank]], Iterator[None]]
"""Given the ranks that are at work."""


def rank_killed(scene: Scene, ranks: list[Rank]) -> Iterator[None]:
    send(scene.draw.choice(ranks).process, signal.SIGKILL)
    yield


def gang_killed(scene: Scene, ranks: list[Rank]) -> Iterator[None]:
    for rank in scene.a_gang(ranks):
        send(rank.process, signal.SIGKILL)
    yield


def controller_killed(scene: Scene, ranks: list[Rank]) -> Iterator[None]:
    """Its lease is cut short: it would run out by itself, after 20 s."""
    scene.world.kill_controller()
    with scene.store._engine.begin() as connection:
        connection.exec_driver_sql("UPDATE lease SET expires_at = 0")
    yield


def node_killed(scene: Scene, ranks: list[Rank]) -> Iterator[None]:
    """Ray's own process on the node: its ranks die with it."""
    for raylet in scene.draw.choice(ranks).node.named("raylet"):
        send(raylet, signal.SIGKILL)
    yield


def head_restarted(scene: Scene, ranks: list[Rank]) -> Iterator[None]:
    """Ray's head, which without a database of its own comes back knowing nothing, at the same address: at once, or when
    the controller has given it up."""
    world, is_long = scene.world, scene.draw.random() < 0.5
    world.kill_head()
    yield from scene.until_trained()
    while is_long and world.controller is not None and not world.controller.is_dead:
        yield
    scene.notes["heads away until given up" if is_long else "heads back at once"] += 1
    world.is_head_wanted = True
    while not world.is_whole() and not scene.is_over():
        yield


def tracker_stopped(scene: Scene, ranks: list[Rank]) -> Iterator[None]:
    world = scene.world
    assert world.tracker is not None
    world.is_tracker_wanted = False
    world.tracker.kill()
    yield from scene.until_trained()
    world.is_tracker_wanted = True


def database_stopped(scene: Scene, ranks: list[Rank]) -> Iterator[None]:
    yield from scene.until_followed()
    scene.world.postgres.pause()
    try:
        yield from scene.until_trained()
    finally:
        scene.world.postgres.resume()


def checkpoint_torn(scene: Scene, ranks: list[Rank]) -> Iterator[None]:
    """The newest one of a gang that dies at the same moment."""
    gang = scene.a_gang(ranks)
    for rank in gang:
        send(rank.process, signal.SIGSTOP)
    for _, newest in run_dir.complete_checkpoints(gang[0].attempt_dir):
        torn = scene.draw.choice(sorted(newest.glob("*.distcp")))
        os.truncate(torn, torn.stat().st_size // 2)
        scene.notes["checkpoints torn"] += 1
        break
    for rank in gang:
        send(rank.process, signal.SIGKILL)
    yield


def orphan_writes(scene: Scene, ranks: list[Rank]) -> Iterator[None]:
    """A gang is cut off: its node answers nobody. When it has been given up it goes on, and writes. In the end it is
    made to have written more, of steps that its successor trains: numbers that nobody could mistake for that one's."""
    node = scene.draw.choice([one for one in ranks if one.number == 0]).node
    cut, raylets = [one for one in ranks if one.node is node], node.named("raylet")
    for one in [*(rank.process for rank in cut), *raylets]:
        send(one, signal.SIGSTOP)
    writers = [one for one in cut if one.number == 0]  # the others write next to nothing
    while not all(scene.has_ended([one]) for one in writers) and not scene.is_over():
        yield
    written = sum(_bytes_in(one.attempt_dir) for one in writers)
    for rank in cut:
        send(rank.process, signal.SIGCONT)
    while {one.process for one in writers} & {one.process for one in scene.world.ranks()}:
        yield
    scene.notes["bytes written by orphans"] += sum(_bytes_in(one.attempt_dir) for one in writers) - written
    for raylet in raylets:
        send(raylet, signal.SIGKILL)
    for one in writers:
        if scene.has_ended([one]):
            scene.run.late[run_dir.metrics_path(one.attempt_dir)] = _write_late(one.attempt_dir)


def _bytes_in(folder: Path) -> int:
    return sum(one.stat().st_size for one in [*folder.glob("*"), *folder.glob("checkpoints/step_*/*")])


def _write_late(attempt_dir: Path) -> bytes:
    """A hundred steps after the last one that the attempt has written itself; no checkpoint of it is as late."""
    records, end = run_dir.read_records(attempt_dir)
    last = max((record.step for record in records), default=0)
    more = [
        StepRecord(
            step=step, tokens=0, fraction=1.0, lr=0.0, loss_nats=NO_LOSS, gradient_norm=NO_LOSS, tokens_per_second=1.0
        )
        for step in range(last + 1, last + 101)
    ]
    written = "".join(run_dir.record_line(record) for record in more).encode()
    with run_dir.metrics_path(attempt_dir).open("ab") as stream:
        stream.truncate(end)
        stream.write(written)
    return written


def disk_full(scene: Scene, ranks: list[Rank]) -> Iterator[None]:
    """The home's file system has no room left, until an attempt has died of it."""
    before = scene.num_disk_full()
    scene.run.take_room()
    try:
        while scene.num_disk_full() == before and scene.world.ranks() and not scene.is_over():
            yield
    finally:
        scene.run.give_room()


FAULTS: dict[str, Fault] = {
    "rank killed": rank_killed,
    "controller killed": controller_killed,
    "checkpoint torn": checkpoint_torn,
    "database stopped": database_stopped,
    "node killed": node_killed,
    "orphan writes": orphan_writes,
    "tracker stopped": tracker_stopped,
    "head restarted": head_restarted,
    "gang killed": gang_killed,
    "disk full": disk_full,
}


def schedule(names: list[str], draw: random.Random) -> Iterator[str]:
    """Each kind once, in an order that is drawn, again and again."""
    while True:
        yield from draw.sample(names, len(names))
