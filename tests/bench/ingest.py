"""How many metric records a second go from gangs to SQL, with everything on: search, probes, MLflow, Optuna's copy.

    python tests/bench/ingest.py                           # 100 gangs, 2,000 steps a second between them, on SQLite
    python tests/bench/ingest.py --backend postgresql
    python tests/bench/ingest.py --rate 2000 4000 8000     # one after another: what is the most that does not pile up?
    python tests/bench/ingest.py --server                  # MLflow behind a tracking server, which is another process
    python tests/bench/ingest.py --small                   # seconds: that the script itself works

Gangs are simulated by one process that writes real run dirs in real time (all fields of a step in one record; every
50 steps a validation, every 100 a probe of all layers); the controller, the store and the mirrors are the real ones.
A gang is idle between two trials, so that a whole run has less than it is fed with while all gangs write. Each second
the age of the oldest step that SQL, or MLflow, has not passed is taken of every trial, ended ones too. Printed: the
rate over the whole run, from the first step's writing to the last one's reading, these ages, whether SQL's grows, the
controller's share of a core, and the latest that a gang was with a write: it never waits for the controller.
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
import signal
import socket
import statistics
import subprocess
import sys
import tempfile
import threading
import time
import urllib.request
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
sys.path.insert(0, str(Path(__file__).resolve().parent))

from store_scale import backend
from sweep_runs import write_corpus
from written_gangs import Written, WrittenCluster, write_run_dirs

from orchestrator.controller import Controller, Snapshot
from orchestrator.plan import expand
from orchestrator.search import StudyMirror
from orchestrator.store import Store
from orchestrator.sweep import load
from orchestrator.tracking import Mirror, is_server

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
CATCH_UP_SECONDS = 60.0


class Gauge:
    """Looks on once a second, in a thread: the ages of the oldest steps that SQL and MLflow have not passed."""

    def __init__(self, store: Store, cluster: WrittenCluster, written: Written, steps_a_second: float) -> None:
        self.store, self.cluster, self.written, self.pace = store, cluster, written, steps_a_second
        self.sql_ages: list[float] = []
        self.mlflow_ages: list[float] = []
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
            numbers = {fingerprint: number for number, fingerprint in enumerate(list(self.cluster.launched))}
            running = list(self.controller.running) if self.controller else []
            known = [one for one in running if one.row.fingerprint in numbers]  # one may be about to be launched
            self._take(self.sql_ages, [(numbers[one.row.fingerprint], one.step) for one in known])
            found = self.store.query(PASSED)
            passed = dict(zip(found.fingerprint, found.step, strict=True))
            self._take(self.mlflow_ages, [(number, int(passed[one])) for one, number in numbers.items()])

    def _take(self, ages: list[float], passed: list[tuple[int, int]]) -> None:
        """The oldest of all trials."""
        found = [self.written.age(number, step, self.pace) for number, step in passed]
        ages.append(max((age for age in found if age is not None), default=0.0))


PASSED = "SELECT fingerprint, COALESCE(CAST(mirror_cursor ->> 'step' AS INTEGER), 0) AS step FROM sweep_trial"


def measure(url: str, home: Path, tracking: str, num_gangs: int, trial_seconds: float, rate: float) -> bool:
    """Whether SQL kept up."""
    pace = rate / num_gangs
    steps, num_trials = round(trial_seconds * pace), 2 * num_gangs
    plan = expand(load(_written_sweep(home, steps, num_trials)))
    written = Written(num_trials)
    ours, theirs = multiprocessing.Pipe()
    given = (theirs, written, pace)
    writer = multiprocessing.get_context("fork").Process(target=write_run_dirs, args=given, daemon=True)
    writer.start()
    with Store(url) as store:
        sweep_id = store.add(plan).sweep_id
        copy = StudyMirror(store, sweep_id, "ingest", f"sqlite:///{home / 'optuna.db'}")
        artifacts = None if is_server(tracking) else str(home / "artifacts")
        mirror = Mirror(store, sweep_id, tracking, artifacts, also={"Optuna's copy": copy.update})
        cluster: Any = WrittenCluster(num_gangs, ours)
        gauge = Gauge(store, cluster, written, pace)
        mirror.start()
        with Controller(plan.sweep, sweep_id, store, cluster, mirror, home, gauge) as controller:
            gauge.controller = controller
            gauge.thread.start()
            begun, main_before, spent = time.monotonic(), time.thread_time(), time.process_time()
            controller.run()
            seconds, spent = time.monotonic() - begun, time.process_time() - spent
            gauge.is_over.set()
        found = store.query("SELECT COUNT(*) AS steps FROM step_metric").steps[0]
        ours.send(None)
        latest = ours.recv()
        writer.join()
        whole = time.monotonic() - min(written.begun) - (time.monotonic() - begun - seconds)
        share = (gauge.main_seconds - main_before) / seconds
        print(f"{found:,} steps of {num_trials} trials on {num_gangs} gangs, fed with {rate:,.0f} a second")
        print(f"into SQL: {found / whole:,.0f} a second over the whole run of {whole:.1f} s")
        keeps_up = _keeps_up(gauge.sql_ages)
        print(f"behind in SQL: {_ages(gauge.sql_ages)}, which {'does not grow' if keeps_up else 'GROWS'}")
        print(f"behind in MLflow: {_ages(gauge.mlflow_ages)}")
        print(f"controller's thread: {share:.0%} of a core; with the mirrors {spent / seconds:.0%}")
        print(f"the gangs' slowest round over all {num_gangs} run dirs: {latest:.2f} s", flush=True)
        begun = time.monotonic()
        state = "all there" if mirror.close(CATCH_UP_SECONDS) else "not all there"
        waited = time.monotonic() - begun
        print(f"MLflow's plots, which come after all points: {state} {waited:.1f} s later")
        return keeps_up


def _written_sweep(home: Path, steps: int, num_trials: int) -> Path:
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
    return path


def _ages(ages: list[float]) -> str:
    return f"median {statistics.median(ages):.1f} s, most {max(ages):.1f} s" if ages else "not seen"


def _keeps_up(ages: list[float]) -> bool:
    """Whether the second half of the run is no further behind than the first, but for a second."""
    half = len(ages) // 2
    return half == 0 or statistics.median(ages[half:]) <= statistics.median(ages[:half]) + 1.0


@contextmanager
def tracking_server(home: Path) -> Iterator[str]:
    """MLflow's own, on a SQLite of its own."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    uri = f"http://127.0.0.1:{port}"
    command = [sys.executable, "-m", "mlflow", "server", "--backend-store-uri", f"sqlite:///{home / 'served.db'}"]
    command += ["--artifacts-destination", str(home / "served"), "--port", str(port), "--workers", "1"]
    with (home / "server.log").open("w") as log:
        server = subprocess.Popen(command, stdout=log, stderr=log, start_new_session=True)
    try:
        while True:
            with suppress(OSError), urllib.request.urlopen(f"{uri}/health"):
                break
            time.sleep(0.5)
        yield uri
    finally:
        os.killpg(server.pid, signal.SIGTERM)
        server.wait()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--small", action="store_true", help="4 gangs, 400 steps a second, 8 trials of a second")
    parser.add_argument("--backend", choices=("sqlite", "postgresql"), default="sqlite")
    parser.add_argument("--server", action="store_true", help="MLflow behind a tracking server")
    parser.add_argument("--gangs", type=int, default=100)
    parser.add_argument("--rate", type=float, nargs="+", default=[2_000], help="steps a second of all gangs together")
    parser.add_argument("--seconds", type=float, default=50, help="that a trial takes")
    given = parser.parse_args()
    rates, num_gangs, seconds = ([400.0], 4, 1.0) if given.small else (given.rate, given.gangs, given.seconds)
    kept_up = []
    for rate in rates:
        with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as made, ExitStack() as stack:
            home = Path(made)
            url = stack.enter_context(backend(given.backend, home))
            served = stack.enter_context(tracking_server(home)) if given.server else None
            if measure(url, home, served or f"sqlite:///{home / 'mlflow.db'}", num_gangs, seconds, rate):
                kept_up.append(rate)
        print(flush=True)
    if len(rates) > 1:
        print(f"the highest rate that SQL kept up with: {max(kept_up, default=0):,.0f} a second")


if __name__ == "__main__":
    main()
