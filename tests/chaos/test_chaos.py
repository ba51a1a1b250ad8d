"""A sweep on a cluster whose parts are broken one after the other ends as if nothing had happened.

CHAOS_FAULTS faults (10; ``make chaos``: 100), each kind in turn, drawn from CHAOS_SEED.
"""

# ruff: noqa: F811 (fixtures are imported by name)

from __future__ import annotations

import itertools
import os
import random
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest
from check import Result, causes_of, check, results
from faults import FAULTS, STEPS_BETWEEN, Fault, Scene, disk_full, schedule
from store_backends import PostgresServer, postgres_server  # noqa: F401
from sweep_runs import write_sweep
from world import Run, World, small_disk

from orchestrator.store import Store

SWEEP = """\
name: chaos
question: does it survive?
base:
  model: {preset: cpu-tiny}
  data: {corpus: corpus.jsonl, sequence_length: 64, validation: {slice_bytes: 1024, points: 2}}
  train: {tokens: 38400, batch_tokens: 256, warmup_fraction: 0.0}
baseline: baseline
arms:
  baseline: {}
  pair: {gate: {position: sdpa}}
axes:
  train.lr: [3e-3, 30.0]
seeds: [1]
controls: []
resources: {by: [{where: {arm: pair}, layout: {data: 2}, placement: strict_spread}]}
checkpoint: {every_steps: 15}
retry: {infrastructure: 1000, backoff_seconds: 0}
"""
"""Two trials of 150 steps, one of them on ranks of two nodes, and two that diverge in their first steps."""

LOOK_SECONDS = 0.2
STANDSTILL_SECONDS = 600.0
"""Far more than anything here takes without news, a new node on a busy machine included."""


@pytest.fixture(scope="module")
def world(postgres_server: PostgresServer, tmp_path_factory: pytest.TempPathFactory) -> Iterator[World]:
    opened = World(tmp_path_factory.mktemp("world"), postgres_server)
    yield opened
    opened.close()


@pytest.fixture(scope="module")
def undisturbed(world: World, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Result]:
    folder = tmp_path_factory.mktemp("calm")
    run = Run(write_sweep(folder, SWEEP, "chaos.yaml"), folder / "runs", world.postgres.new_schema())
    world.begin(run)
    assert _until_done(world) == 2, "the ranks of a gang were to be on two nodes"
    with Store(run.store_url) as store:
        calm = results(store)
    assert Counter(one.state for one in calm.values()) == {"COMPLETE": 2, "DIVERGED": 2}
    return calm


def _until_done(world: World) -> int:
    """The most nodes that a gang was seen on."""
    seen = 0
    while not world.is_done():
        world.tend()
        places = {(rank.attempt_dir, id(rank.node)) for rank in world.ranks()}
        seen = max([seen, *Counter(folder for folder, _ in places).values()])
        time.sleep(LOOK_SECONDS)
    return seen


class Injector:
    """Faults one after the other, over as many runs of the sweep as they take."""

    def __init__(self, kinds: dict[str, Fault], seed: int, wanted: int) -> None:
        self.kinds, self.draw, self.wanted = kinds, random.Random(seed), wanted
        self._names = schedule(list(kinds), self.draw)
        self.struck: Counter[str] = Counter()
        self.notes: Counter[str] = Counter()

    @property
    def num_left(self) -> int:
        return self.wanted - self.struck.total()

    def disturb(self, world: World, run: Run) -> None:
        """The sweep from its start to its end."""
        with Store(run.store_url) as store:
            scene = Scene(world, run, store, self.draw, self.notes)
            world.begin(run)
            fault: Iterator[None] | None = None
            due = self.draw.randint(*STEPS_BETWEEN)
            seen, moved_at = None, time.monotonic()
            while fault is not None or not world.is_done():
                if fault is None and self.num_left and run.steps_done() >= due and (ranks := world.ranks()):
                    name = next(self._names)
                    self.struck[name] += 1
                    fault = self.kinds[name](scene, ranks)
                    _say(f"{self.struck.total():3d} after {run.steps_done()} steps: {name}")
                if fault is not None and next(fault, fault) is fault:
                    fault, due = None, run.steps_done() + self.draw.randint(*STEPS_BETWEEN)
                world.tend()
                now = (run.steps_done(), world.num_controllers, self.struck.total(), fault is None)
                seen, moved_at = (now, time.monotonic()) if now != seen else (seen, moved_at)
                assert time.monotonic() - moved_at < STANDSTILL_SECONDS, f"nothing moves: {world.told()}"
                time.sleep(LOOK_SECONDS)


def _say(line: str) -> None:
    print(f"chaos: {line}", flush=True)


def _survive(world: World, undisturbed: dict[str, Result], folder: Path, kinds: dict[str, Fault], wanted: int) -> None:
    sweep_file, injector = write_sweep(folder / "sweep", SWEEP, "chaos.yaml"), None
    for number in itertools.count(1):
        home = folder / f"runs-{number}"
        with small_disk(home) as is_small:
            possible = {name: fault for name, fault in kinds.items() if is_small or fault is not disk_full}
            injector = injector or Injector(possible, int(os.environ.get("CHAOS_SEED", "1")), wanted)
            run = Run(sweep_file, home, world.postgres.new_schema())
            injector.disturb(world, run)
            with Store(run.store_url) as store:
                check(world, run, store, undisturbed)
                injector.notes.update(causes_of(store))
        if not injector.num_left:
            break
    _say(f"{number} runs; struck: {dict(injector.struck)}; seen: {dict(injector.notes)}")
    assert injector.struck.total() == wanted


@pytest.mark.timeout(0)
def test_whatever_is_broken_no_trial_is_lost_or_doubled_and_no_bit_changes(
    world: World, undisturbed: dict[str, Result], tmp_path: Path
):
    _survive(world, undisturbed, tmp_path, FAULTS, int(os.environ.get("CHAOS_FAULTS", "10")))
