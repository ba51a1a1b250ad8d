"""Gangs of which only the run dirs are there: another process writes them in real time, all of them, step by step.

The controller reads what real gangs would have written; the writer never waits for it.
"""

from __future__ import annotations

import multiprocessing
import time
from collections.abc import Sequence
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from fake_gangs import FakeCluster, FakeGang, all_goes_well, fake_probe, fake_step, fake_validation

from models import run_dir
from models.run_dir import AttemptSpec, Summary
from orchestrator.gang import GangEnd, GangShape, GangState

TICK_SECONDS = 0.05


class Written:
    """By trial in the order of launching, shared by both processes: when its first step was due, and its last step."""

    def __init__(self, num_trials: int) -> None:
        self.begun = multiprocessing.RawArray("d", num_trials)
        self.steps = multiprocessing.RawArray("i", num_trials)

    def age(self, number: int, passed: int, steps_a_second: float) -> float | None:
        """Seconds since the step after ``passed`` was due to be written; None when it is not written."""
        if self.steps[number] <= passed:
            return None
        return time.monotonic() - self.begun[number] - (passed + 1) / steps_a_second


def write_run_dirs(orders: Connection, written: Written, steps_a_second: float) -> None:
    """The process of all gangs: writes what is due, until it is told to end; then says how late it ever was."""
    running: list[list[Any]] = []
    latest = 0.0
    while True:
        begun = time.monotonic()
        while orders.poll():
            order = orders.recv()
            if order is None:
                orders.send(latest)
                return
            number, spec = order
            config = run_dir.read_trial_config(Path(spec.trial_dir))
            written.begun[number] = begun
            running.append([number, spec, config, run_dir.metrics_path(spec.attempt_dir).open("a"), 0])
        for gang in list(running):
            number, spec, config, stream, step = gang
            due = min(config.train.num_steps, int((begun - written.begun[number]) * steps_a_second))
            pace = {"tokens_per_second": config.train.batch_tokens * steps_a_second}
            for done in range(step + 1, due + 1):
                record = fake_step(config, done, None).model_copy(update=pace)
                stream.write(run_dir.record_line(record))
                if done in config.validation_steps():
                    stream.write(run_dir.record_line(fake_validation(config, done)))
                if spec.diagnostics and done in spec.diagnostics.steps(config.train.num_steps):
                    stream.write(run_dir.record_line(fake_probe(config, done)))
            stream.flush()
            written.steps[number] = gang[4] = due
            if due == config.train.num_steps:
                stream.close()
                facts = {"outcome": "complete", "step": due, "resume_step": 0, "seconds": due / steps_a_second}
                summary = Summary.model_validate({**facts, **pace})
                run_dir.write_json(spec.attempt_dir / "summary.json", summary)
                running.remove(gang)
        latest = max(latest, time.monotonic() - begun)
        time.sleep(max(0.0, TICK_SECONDS - (time.monotonic() - begun)))


class WrittenGang(FakeGang):
    """A gang of which only the run dir is there, written by another process."""

    def __init__(self, shape: GangShape, nodes: Sequence[str], cluster: WrittenCluster) -> None:
        super().__init__(shape, all_goes_well, nodes=nodes)
        self.cluster = cluster

    def launch(self, spec: AttemptSpec) -> None:
        super().launch(spec)
        self.cluster.orders.send((len(self.cluster.launched), spec))
        self.cluster.launched.append(Path(spec.trial_dir).name)

    def progress(self) -> tuple[int, int]:
        size, _ = super().progress()
        return size, size

    def poll_end(self) -> GangEnd | None:
        summary = run_dir.read_summary(self.spec.attempt_dir)
        if summary is None:
            return None
        self.state = GangState.IDLE
        return GangEnd(summary)


class WrittenCluster(FakeCluster):
    def __init__(self, num_gangs: int, orders: Connection) -> None:
        super().__init__(num_gangs)
        self.orders = orders
        self.launched: list[str] = []
        """Fingerprints."""

    def start_gang(
        self, shape: GangShape, num_threads: int, nodes: Sequence[str] = (), lease: Any = None
    ) -> WrittenGang:
        gang = WrittenGang(shape, nodes or [*self.num_gangs][:1], self)
        self.gangs.append(gang)
        return gang

    def wait(self, gangs: Sequence[FakeGang], seconds: float) -> list[FakeGang]:
        time.sleep(seconds)
        return []
