"""The store at scale: ``status``, ``results`` and submission with 10^5 trials and 10^7 metric rows.

    python tests/bench/store_scale.py                    # SQLite and Postgres, ten sweeps of 10,000 trials
    python tests/bench/store_scale.py --sweeps 1         # one sweep of 100,000: 10 arms, 10 rates, 5 tables, 200 seeds
    python tests/bench/store_scale.py --sweeps 1 --arms 100 --rates 100 --tables 1            # the same of 10 seeds
    python tests/bench/store_scale.py --tables 100 --only-submit   # 10,000 cells of one seed: the dearest to plan
    python tests/bench/store_scale.py --sweeps 1 --keep /tmp/filled   # SQLite's store stays there, and is taken again
    python tests/bench/store_scale.py --small            # seconds: that the script itself works

Trials are submitted as a user submits them (plan.expand, Store.add, which is timed); their attempts and records are
then made inside the database, for no trainer could write 10^7 rows while one waits. One trial in fifty diverges, one
in fifty needs a second attempt, one in a thousand fails, one in a hundred still waits. What is kept of ended trials is
written by the store's own code. Times are medians, in this process and as a whole command with its start and its end.
"""

from __future__ import annotations

import argparse
import io
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from rich.console import Console
from sqlalchemy import text

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from store_backends import PostgresServer
from sweep_runs import write_corpus

from orchestrator import report
from orchestrator.plan import expand
from orchestrator.store import Store
from orchestrator.store.ended import keep_missing
from orchestrator.store.engine import make_engine, parse_url
from orchestrator.sweep import load

STEPS_A_TRIAL, VALIDATIONS_A_TRIAL = 100, 10

SWEEP = """\
name: sweep{number}
question: How fast are the tables?
base:
  model: {{preset: cpu-tiny}}
  data: {{corpus: corpus.jsonl, sequence_length: 64, validation: {{slice_bytes: 1024, points: 10}}}}
  train: {{tokens: 25600, batch_tokens: 256, warmup_fraction: {warmup}}}
baseline: arm0
arms:
{arms}
axes:
  train.lr: [{rates}]
  train.weight_decay: [{decays}]
seeds: [{seeds}]
baseline_seeds: {num_seeds}
verdict: {{margin: 0.01}}
controls: []
"""


def sweep_text(number: int, num_trials: int, num_tables: int, num_arms: int, num_rates: int) -> str:
    """Arms at rates; the rest of the trials are seeds, for a few values of one more axis: a table each."""
    num_seeds = max(1, num_trials // (num_arms * num_rates * num_tables))
    arms = [f"  arm{index}: {{model: {{ffn_size: {192 + 4 * index}}}}}" for index in range(num_arms)]
    return SWEEP.format(
        number=number,
        warmup=0.05 + number / 1000,
        arms="\n".join(arms),
        rates=", ".join(f"{1e-4 * 512 ** (index / max(1, num_rates - 1)):.6g}" for index in range(num_rates)),
        decays=", ".join(f"{index / 100}" for index in range(num_tables)),
        seeds=", ".join(map(str, range(1, num_seeds + 1))),
        num_seeds=num_seeds,
    )


# Of a trial, by its row number r: what became of it. Of an attempt: the steps and validations that it wrote.
FILL = (
    "CREATE TEMPORARY TABLE numbered AS SELECT fingerprint, ROW_NUMBER() OVER (ORDER BY fingerprint) AS r FROM trial",
    "CREATE UNIQUE INDEX numbered_fingerprint ON numbered (fingerprint)",
    """
    INSERT INTO attempt (fingerprint, number, token, sweep_id, layout, hosts, provenance, resume_step,
                         resumed_from_attempt, started_at, ended_at, cause, reason, end_step, seconds,
                         tokens_per_second, log_tail)
    SELECT t.fingerprint, k.number, 'abcd', st.sweep_id, '{"tensor": 1}', '["host-a"]',
           '{"commit": "0123456789abcdef", "dirty": false, "backend": "local", "packages": {"torch": "2.13.0"}}',
           CASE WHEN k.number = 2 THEN :steps / 2 ELSE 0 END, CASE WHEN k.number = 2 THEN 1 END,
           t.created_at, t.created_at,
           CASE WHEN r % 50 = 1 AND k.number = 1 THEN 'node_lost' WHEN r % 1000 = 3 THEN 'error' ELSE 'finished' END,
           'because', :steps, 12.5, 1000.0, CASE WHEN r % 1000 = 3 THEN 'Traceback\nValueError: no' END
    FROM trial t JOIN numbered n ON n.fingerprint = t.fingerprint
    JOIN sweep_trial st ON st.fingerprint = t.fingerprint
    JOIN (SELECT 1 AS number UNION ALL SELECT 2) k ON k.number = 1 OR r % 50 = 1
    WHERE r % 100 <> 2
    ORDER BY st.sweep_id, st.position, k.number
    """,
    """
    UPDATE trial SET cause = 'finished', reason = 'because',
      state = (SELECT CASE WHEN r % 100 = 2 THEN 'WAITING' WHEN r % 1000 = 3 THEN 'FAILED'
                           WHEN r % 50 = 4 THEN 'DIVERGED' ELSE 'COMPLETE' END
               FROM numbered n WHERE n.fingerprint = trial.fingerprint),
      end_step = :steps
    """,
    "UPDATE trial SET cause = NULL, reason = NULL, end_step = NULL WHERE state = 'WAITING'",
    """
    INSERT INTO step_metric (attempt_id, step, tokens, fraction, lr, loss_nats, gradient_norm, tokens_per_second,
                             nonfinite)
    SELECT a.id, s.n, s.n * 256, 1.0 * s.n / :steps, 0.001,
           3.0 - 0.001 * s.n + (a.id % 997) * 0.0001, 1.0, 1000.0, FALSE
    FROM attempt a CROSS JOIN series s WHERE s.n > a.resume_step AND s.n <= :steps ORDER BY a.id, s.n
    """,
    """
    INSERT INTO validation (attempt_id, step, split, tokens, fraction, loss_nats, bits_per_byte, num_tokens, num_bytes,
                            nonfinite)
    SELECT a.id, s.n * :every, 'slice', s.n * :every * 256, 1.0 * s.n * :every / :steps,
           3.0 - 0.001 * s.n + (a.id % 997) * 0.0001, 1.5, 1024, 1024, FALSE
    FROM attempt a CROSS JOIN series s WHERE s.n * :every > a.resume_step AND s.n * :every <= :steps ORDER BY a.id, s.n
    """,
)


def fill(url: str, steps: int) -> int:
    """Attempts and records for all trials; returns the number of metric rows."""
    engine = make_engine(parse_url(url))
    numbers = {"steps": steps, "every": max(1, steps // VALIDATIONS_A_TRIAL)}
    with engine.connect().execution_options(gatesweep_write=True) as connection, connection.begin():
        connection.execute(text("CREATE TEMPORARY TABLE series (n INTEGER PRIMARY KEY)"))
        connection.execute(text("INSERT INTO series VALUES (:n)"), [{"n": n} for n in range(1, steps + 1)])
        if connection.dialect.name == "postgresql":
            connection.execute(text("SET LOCAL session_replication_role = replica"))  # no check a row of a foreign key
        for statement in FILL:
            connection.execute(text(statement), {name: numbers[name] for name in numbers if f":{name}" in statement})
        for sweep_id in connection.scalars(text("SELECT id FROM sweep")).all():
            keep_missing(connection, sweep_id)
        rows = connection.scalar(text("SELECT (SELECT COUNT(*) FROM step_metric) + (SELECT COUNT(*) FROM validation)"))
    if engine.dialect.name == "postgresql":
        with engine.connect().execution_options(isolation_level="AUTOCOMMIT") as connection:
            connection.execute(text("VACUUM ANALYZE"))  # as its own daemon does within a minute
    engine.dispose()
    return int(rows or 0)


def seconds(function: Callable[[], object], repeats: int) -> float:
    times = []
    for _ in range(repeats):
        begun = time.perf_counter()
        function()
        times.append(time.perf_counter() - begun)
    return statistics.median(times)


def command(url: str, *arguments: str) -> Callable[[], object]:
    main = "from orchestrator.cli.app import main; main()"
    environment = {**os.environ, "GATESWEEP_STORE": url}
    return lambda: subprocess.run(
        [sys.executable, "-c", main, *arguments], env=environment, check=True, capture_output=True
    )


def cpu_seconds() -> float:
    """Of the commands that have ended."""
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def show(renderable: object) -> None:
    Console(file=io.StringIO(), width=160).print(renderable)


def measure(name: str, url: str, folder: Path, given: argparse.Namespace) -> None:
    num_sweeps, repeats = given.sweeps, given.repeats
    num_trials = 100_000 // num_sweeps // (100 if given.small else 1)
    with Store(url) as store:
        if store.sweeps():
            print(f"{name}: as it was kept: {', '.join(row.name for row in store.sweeps())}", flush=True)
            ask(name, url, store, repeats)
            return
        submissions = []
        for number in range(num_sweeps):
            path = folder / f"sweep{number}.yaml"
            path.write_text(sweep_text(number, num_trials, given.tables, given.arms, given.rates))
            begun = time.perf_counter()
            plan = expand(load(path))
            planned = time.perf_counter()
            store.add(plan)
            submissions.append((time.perf_counter() - begun, planned - begun, len(plan.trials)))
        whole, planning, count = (statistics.median_low(column) for column in zip(*submissions, strict=True))
        print(f"{name}: submit {count:,} trials: {whole:.2f} s, of which plan {planning:.2f} s", flush=True)
        if given.only_submit:
            return
        begun = time.perf_counter()
        rows = fill(url, STEPS_A_TRIAL)
        print(
            f"{name}: {num_sweeps * count:,} trials, {rows:,} metric rows (made in {time.perf_counter() - begun:.0f} s)"
        )
        ask(name, url, store, repeats)


def ask(name: str, url: str, store: Store, repeats: int) -> None:
    timed = {
        "status": lambda: show(report.status_table(store)),
        "results": lambda: show(report.ResultsView(report.results(store, "sweep0"))),
    }
    for verb, call in timed.items():
        arguments = (verb, "sweep0") if verb == "results" else (verb,)
        inside, used = seconds(call, repeats), cpu_seconds()
        outside = seconds(command(url, *arguments), repeats)
        used = (cpu_seconds() - used) / repeats
        print(
            f"{name}: {verb}: {inside:.2f} s in process, {outside:.2f} s as a command ({used:.2f} s of CPU)", flush=True
        )


@contextmanager
def backend(name: str, folder: Path) -> Iterator[str]:
    if name == "sqlite":
        folder.mkdir(parents=True, exist_ok=True)
        yield f"sqlite:///{folder / 'gatesweep.db'}"
        return
    server = PostgresServer()
    try:
        yield server.new_schema()
    finally:
        server.stop()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--small", action="store_true", help="a hundredth of it")
    parser.add_argument("--sweeps", type=int, default=10, help="how many share the 10^5 trials")
    parser.add_argument("--tables", type=int, default=5, help="values of one more axis; the rest of a sweep are seeds")
    parser.add_argument("--backends", default="sqlite,postgresql")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--arms", type=int, default=10)
    parser.add_argument("--rates", type=int, default=10)
    parser.add_argument("--only-submit", action="store_true", help="fill and ask nothing")
    parser.add_argument("--keep", type=Path, help="a folder for SQLite's filled store; what it holds is asked as it is")
    given = parser.parse_args()
    for name in given.backends.split(","):
        with tempfile.TemporaryDirectory() as made, backend(name, given.keep or Path(made)) as url:
            write_corpus(Path(made) / "corpus.jsonl")
            measure(name, url, Path(made), given)


if __name__ == "__main__":
    main()
