"""How many metric records a second go from gangs to SQL, with everything on: search, probes, MLflow, Optuna's copy.

    python tests/bench/ingest.py                        # 100 gangs, 2,000 steps a second between them, on SQLite
    python tests/bench/ingest.py --backend postgresql
    python tests/bench/ingest.py --small                # seconds: that the script itself works

Gangs are simulated by one process that writes real run dirs in real time (all fields of a step in one record; every
50 steps a validation, every 100 a probe of all layers); the controller, the store and the mirrors are the real ones.
Printed: the rate that was written and the one that was read into SQL, how far SQL and MLflow lag behind the gangs, the
controller's share of a core, and the latest that a gang was with a write: it never waits for the controller.
"""

from __future__ import annotations

import argparse
import multiprocessing
import statistics
import sys
import tempfile
import threading
import time
from collections.abc import Sequence
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
sys.path.insert(0, str(Path(__file__).resolve().parent))

from fake_gangs import FakeCluster, FakeGang, all_goes_well, fake_probe, fake_step, fake_validation
from store_scale import backend
from sweep_runs import write_corpus

from models import run_dir
from models.run_dir import AttemptSpec, Summary
from orchestrator.controller import Controller, Snapshot
from orchestrator.gang import GangEnd, GangShape, GangState
from orchestrator.plan import expand
from orchestrator.search import StudyMirror
from orchestrator.store import Store
from orchestrator.sweep import load
from orchestrator.tracking import Mirror

SWEEP = """\
name: ingest
question: How fast do records get into SQL?
base:
  model: {{preset: cpu-tiny}}
  data: {{corpus: corpus.jsonl, sequence_length: 64, validation: {{slice_bytes: 1024, points: {points}}}}}
  train: {{tokens: {tokens}, batch_tokens: 256, lr: 3e-3}}
baseline: baseline
arms:
  baseline: {{}}
  g1: {{gate: {{position: sdpa}}}}
seeds: [{seeds}]
baseline_seeds: {num_seeds}
diagnostics: {{points: {probes}}}
controls: []
resources: {{micro_batch_sequences: 1}}
"""
TICK_SECONDS = 0.05
CATCH_UP_SECONDS = 60.0


def write_run_dirs(orders: Connection, steps_a_second: float) -> None:
    """The process of all gangs: writes what is due, until it is told to end; then says how late it ever was."""
    running: list[list[Any]] = []
    latest = 0.0
    while True:
        begun = time.monotonic()
        while orders.poll():
            spec = orders.recv()
            if spec is None:
                orders.send(latest)
                return
            config = run_dir.read_trial_config(Path(spec.trial_dir))
            running.append([spec, config, run_dir.metrics_path(spec.attempt_dir).open("a"), begun, 0])
        for gang in list(running):
            spec, config, stream, started, step = gang
            due = min(config.train.num_steps, int((begun - started) * steps_a_second))
            for done in range(step + 1, due + 1):
                stream.write(run_dir.record_line(fake_step(config, done, None)))
                if done in config.validation_steps():
                    stream.write(run_dir.record_line(fake_validation(config, done)))
                if spec.diagnostics and done in spec.diagnostics.steps(config.train.num_steps):
                    stream.write(run_dir.record_line(fake_probe(config, done)))
            stream.flush()
            gang[4] = due
            if due == config.train.num_steps:
                stream.close()
                facts = {"outcome": "complete", "step": due, "resume_step": 0, "seconds": due / steps_a_second}
                summary = Summary.model_validate({**facts, "tokens_per_second": 256 * steps_a_second})
                run_dir.write_json(spec.attempt_dir / "summary.json", summary)
                running.remove(gang)
        latest = max(latest, time.monotonic() - begun)
        time.sleep(max(0.0, TICK_SECONDS - (time.monotonic() - begun)))


class WrittenGang(FakeGang):
    """A gang of which only the run dir is there, written by another process."""

    def __init__(self, shape: GangShape, nodes: Sequence[str], orders: Connection) -> None:
        super().__init__(shape, all_goes_well, nodes=nodes)
        self.orders = orders

    def launch(self, spec: AttemptSpec) -> None:
        super().launch(spec)
        self.orders.send(spec)

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

    def start_gang(
        self, shape: GangShape, num_threads: int, nodes: Sequence[str] = (), lease: Any = None
    ) -> WrittenGang:
        gang = WrittenGang(shape, nodes or [*self.num_gangs][:1], self.orders)
        self.gangs.append(gang)
        return gang

    def wait(self, gangs: Sequence[FakeGang], seconds: float) -> list[FakeGang]:
        time.sleep(seconds)
        return []


class Gauge:
    """Looks on once a second, in a thread: how far behind SQL and MLflow are, in seconds of the gangs' time."""

    def __init__(self, store: Store, sweep_id: int, home: Path, steps_a_second: float) -> None:
        self.store, self.sweep_id, self.home, self.pace = store, sweep_id, home, steps_a_second
        self.sql_lags: list[float] = []
        self.mlflow_lags: list[float] = []
        self.main_seconds = 0.0
        self.controller: Controller | None = None
        self.is_over = threading.Event()
        self.thread = threading.Thread(target=self._look_on, daemon=True)

    def tell(self, line: str) -> None: ...

    def tick(self, snapshot: Snapshot) -> None:
        """In the controller's own thread."""
        self.main_seconds = time.thread_time()

    def _look_on(self) -> None:
        while not self.is_over.wait(1.0):
            for attempt in list(self.controller.running[:5]) if self.controller else ():
                path = run_dir.metrics_path(attempt.spec.attempt_dir)
                written = path.read_text().count('"kind":"step"') if path.exists() else 0
                if written < 2 * self.pace or written >= attempt.trial.config.train.num_steps:
                    continue
                cursor = self.store.mirror_cursor(self.sweep_id, attempt.row.fingerprint) or {}
                self.sql_lags.append((written - attempt.step) / self.pace)
                self.mlflow_lags.append((written - cursor.get("step", 0)) / self.pace)


def measure(url: str, home: Path, num_gangs: int, num_trials: int, steps: int, rate: float) -> None:
    path = home / "ingest.yaml"
    num_seeds = num_trials // 2
    path.write_text(
        SWEEP.format(
            points=max(1, steps // 50),
            probes=max(1, steps // 100),
            tokens=steps * 256,
            seeds=", ".join(map(str, range(1, num_seeds + 1))),
            num_seeds=num_seeds,
        )
    )
    write_corpus(home / "corpus.jsonl")
    plan = expand(load(path))
    pace = rate / num_gangs
    ours, theirs = multiprocessing.Pipe()
    writer = multiprocessing.get_context("fork").Process(target=write_run_dirs, args=(theirs, pace), daemon=True)
    writer.start()
    with Store(url) as store:
        sweep_id = store.add(plan).sweep_id
        copy = StudyMirror(store, sweep_id, "ingest", f"sqlite:///{home / 'optuna.db'}")
        tracking = f"sqlite:///{home / 'mlflow.db'}"
        mirror = Mirror(store, sweep_id, tracking, str(home / "artifacts"), also={"Optuna's copy": copy.update})
        gauge = Gauge(store, sweep_id, home, pace)
        mirror.start()
        begun, spent = time.monotonic(), time.process_time()
        cluster: Any = WrittenCluster(num_gangs, ours)
        with Controller(plan.sweep, sweep_id, store, cluster, mirror, home, gauge) as controller:
            gauge.controller = controller
            gauge.thread.start()
            main_before = time.thread_time()
            controller.run()
            gauge.is_over.set()
        seconds, spent = time.monotonic() - begun, time.process_time() - spent
        found = store.query("SELECT COUNT(*) AS steps FROM step_metric").steps[0]
        ours.send(None)
        latest = ours.recv()
        writer.join()
        share = (gauge.main_seconds - main_before) / seconds
        print(f"{found:,} steps of {len(plan.trials)} trials on {num_gangs} gangs, {rate:,.0f} a second written")
        print(f"into SQL: {found / seconds:,.0f} a second over {seconds:.1f} s; lag {_lag(gauge.sql_lags)}")
        print(f"MLflow's points: lag {_lag(gauge.mlflow_lags)}")
        print(f"controller's thread: {share:.0%} of a core; with the mirrors {spent / seconds:.0%}")
        print(f"the gangs' slowest round over all {num_gangs} run dirs: {latest:.2f} s", flush=True)
        begun = time.monotonic()
        state = "all there" if mirror.close(CATCH_UP_SECONDS) else "not all there"
        waited = time.monotonic() - begun
        print(f"MLflow's plots, which come after all points: {state} {waited:.1f} s later")


def _lag(lags: list[float]) -> str:
    return f"median {statistics.median(lags):.1f} s, most {max(lags):.1f} s" if lags else "not seen"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--small", action="store_true", help="4 gangs, 400 steps a second, 8 trials")
    parser.add_argument("--backend", choices=("sqlite", "postgresql"), default="sqlite")
    parser.add_argument("--gangs", type=int, default=100)
    parser.add_argument("--rate", type=float, default=2_000, help="steps a second of all gangs together")
    parser.add_argument("--steps", type=int, default=1_000, help="of a trial")
    given = parser.parse_args()
    num_gangs, rate, steps = (4, 400.0, 400) if given.small else (given.gangs, given.rate, given.steps)
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as made, backend(given.backend, Path(made)) as url:
        measure(url, Path(made), num_gangs, 2 * num_gangs, steps, rate)


if __name__ == "__main__":
    main()
