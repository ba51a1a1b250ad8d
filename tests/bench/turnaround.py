"""Turnaround: from the return of a trial's last optimizer step to the next one's first forward pass, beside Ray's own.

    OMP_NUM_THREADS=1 python tests/bench/turnaround.py [--transitions 20] [--only gatesweep]

The quick start's model and arms for a few steps, through the real controller, store and Ray gang. The final validation
and probe are left out: any of the frameworks would spend them. The final checkpoint is in, and written while the next
trial begins; the others save nothing. All moments are those of the log lines that the trainer writes in any case, to a
millisecond; the last of them is that of the first batch, which the model is given next.

Beside it, in the same run on the same Ray, the same trainer on the same model: Ray Tune (a class Trainable a trial) by
default and with ``reuse_actors=True``, and consecutive ``TorchTrainer.fit()`` of two ranks.
"""

from __future__ import annotations

import argparse
import contextlib
import itertools
import os
import statistics
import tempfile
import time
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path
from typing import Any

import psutil

from models import run_dir
from models.config import Layout, TrialConfig
from models.run_dir import AttemptSpec
from orchestrator.controller import Controller
from orchestrator.gang import Cluster
from orchestrator.plan import expand
from orchestrator.store import Store
from orchestrator.sweep import load

ROOT = Path(__file__).parents[2]
SHORT = [
    "train.tokens=8192",  # four steps
    "checkpoint.every_steps=2",  # one in the middle and one at the end, as in the quick start
    "data.validation.slice_bytes=2048",
    "data.validation.points=1",
    "axes={train.lr: [1e-3, 2e-3, 3e-3]}",
    "resources.max_trials=1",
]
TWO_RANKS = "resources.layout.tensor=2"
PARTS = ("checkpoint", "hand-over", "build")
COLD_PARTS = ("placement, process", "imports, join", "launch", "build")


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--transitions", type=int, default=20, help="of one rank and of two, warm; and of Tune's reuse")
    parser.add_argument("--cold", type=int, default=3, help="of cold gangs, of Tune by default and of TorchTrainer")
    parser.add_argument("--only", choices=("gatesweep", "ray"), help="a half of the run")
    return parser.parse_args()


@dataclass(frozen=True)
class Marks:
    """When an attempt did what, in seconds; from rank 0's log."""

    begins: float
    first: float
    trained: float
    measured: float
    ended: float


def marks_of(log: Path) -> Marks:
    found: dict[str, float] = {}
    for line in log.read_text().splitlines():
        for name, words in {
            "begins": " begins",
            "first": "the first batch is there",
            "trained": " steps are done",
            "measured": "measured",
            "ended": "ended complete",
        }.items():
            if words in line and line[:2] == "20" and "models.trainer" in line:
                found.setdefault(name, datetime.strptime(line[:23], "%Y-%m-%d %H:%M:%S,%f").timestamp())
    return Marks(**found)


def all_marks(home: Path) -> list[Marks]:
    """Of every attempt in a home, in the order of time."""
    return sorted((marks_of(log) for log in home.glob("trials/*/attempts/*/log-rank0.txt")), key=lambda one: one.begins)


def transitions(marks: Sequence[Marks]) -> list[tuple[float, ...]]:
    """By transition: the checkpoint's copy, from there to the next trial's begin, and to its first batch."""
    return [
        (before.ended - before.measured, after.begins - before.ended, after.first - after.begins)
        for before, after in itertools.pairwise(marks)
    ]


# -- Gatesweep --------------------------------------------------------------------------------------------------


class Quiet:
    """Neither a view nor a mirror."""

    def tick(self, _snapshot: Any) -> None: ...

    def tell(self, _line: str) -> None: ...

    def nudge(self) -> None: ...


@dataclass
class Watched:
    """The cluster, and when it was asked for gangs."""

    cluster: Cluster
    starts: list[tuple[float, Any]] = field(default_factory=list)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.cluster, name)

    def start_gang(self, *arguments: Any, **options: Any) -> Any:
        asked = time.time()
        gang = self.cluster.start_gang(*arguments, **options)
        self.starts.append((asked, gang))
        return gang


def run_sweep(cluster: Any, home: Path, overrides: Collection[str]) -> list[Marks]:
    plan = expand(load(ROOT / "sweeps" / "quickstart.yaml", [*SHORT, *overrides]))
    quiet: Any = Quiet()
    with Store(f"sqlite:///{home / 'gatesweep.db'}") as store:
        sweep_id = store.add(plan).sweep_id
        with Controller(plan.sweep, sweep_id, store, cluster, quiet, home, quiet) as controller:
            controller.run()
        states = {trial.state for trial in store.trials(sweep_id)}
    assert states == {"COMPLETE"}, states
    return all_marks(home)


def seeds(number: int) -> list[str]:
    return [f"seeds={list(range(1, number + 1))}", f"baseline_seeds={number}"]


def seeds_for(num_transitions: int) -> list[str]:
    """Of 12 cells."""
    return seeds(num_transitions // 12 + 1)


def cold_parts(cluster: Cluster, home: Path, overrides: Sequence[str]) -> tuple[float, ...]:
    """A sweep of one trial, from the question for a gang to its first forward pass."""
    watched = Watched(cluster)
    one = ["axes={train.lr: [1e-3]}", "arms={baseline: {}}", "match=none", *seeds(1)]
    (marks,) = run_sweep(watched, home, [*one, *overrides])
    ((asked, gang),) = watched.starts
    process = max(asked, max(member["created"] for member in gang.members))
    joined = max(member["joined"] for member in gang.members)
    return process - asked, joined - process, marks.begins - joined, marks.first - marks.begins


@contextlib.contextmanager
def members_that_tell() -> Iterator[None]:
    """Gangs note when their processes were created, and when all had joined, as the driver sees it."""
    from orchestrator.gang import Gang, GangState

    poll = Gang.poll_start

    def poll_start(gang: Gang) -> str | None:
        error = poll(gang)
        if gang.state is GangState.IDLE:
            for member in gang.members:
                member.setdefault("joined", time.time())
                member.setdefault("created", psutil.Process(member["pid"]).create_time())
        return error

    Gang.poll_start = poll_start  # type: ignore[method-assign]
    try:
        yield
    finally:
        Gang.poll_start = poll  # type: ignore[method-assign]


# -- Ray Tune and Ray Train -------------------------------------------------------------------------------------


def short_configs() -> list[TrialConfig]:
    return [trial.config for trial in expand(load(ROOT / "sweeps" / "quickstart.yaml", [*SHORT, *seeds(1)])).trials]


def attempt(home: Path, config: TrialConfig, number: int, layout: Layout) -> AttemptSpec:
    """Without a checkpoint; every attempt its own run dir."""
    directory = run_dir.trial_dir(home, f"{number:04d}")
    run_dir.write_trial_config(directory, config)
    return AttemptSpec(
        fingerprint=config.fingerprint(),
        number=1,
        token="bench",
        trial_dir=str(directory),
        data_dir=str(home / "data"),
        layout=layout,
    )


def tuned(home: Path, configs: Sequence[TrialConfig], *, reuse: bool) -> list[Marks]:
    """One trial after the other on one CPU; the trainer's process group stays where the actor does."""
    from ray import tune

    specs = [attempt(home, configs[n % len(configs)], n, Layout()).model_dump_json() for n in range(len(configs))]

    class OneTrial(tune.Trainable):  # type: ignore[misc]
        def setup(self, config: dict[str, Any]) -> None:
            from models.trainer import World

            self.spec = AttemptSpec.model_validate_json(config["spec"])
            self.world = World.join(0, Layout(), "cpu", f"file://{home}/meet{os.getpid()}")

        def reset_config(self, new_config: dict[str, Any]) -> bool:
            self.spec = AttemptSpec.model_validate_json(new_config["spec"])
            return True

        def save_checkpoint(self, checkpoint_dir: str) -> None:
            """Asked for at the end of every trial: nothing is saved."""

        def step(self) -> dict[str, Any]:
            from models.trainer import train

            summary = train(self.spec, self.world)
            return {"step": summary.step, "done": True}

    tuner = tune.Tuner(
        tune.with_resources(OneTrial, {"cpu": 1}),
        param_space={"spec": tune.grid_search(specs)},
        tune_config=tune.TuneConfig(max_concurrent_trials=1, reuse_actors=reuse),
        run_config=tune.RunConfig(storage_path=str(home / "tune"), verbose=0),
    )
    results = tuner.fit()
    assert not results.errors, results.errors
    return all_marks(home)


def torch_trained(home: Path, configs: Sequence[TrialConfig]) -> list[Marks]:
    """Consecutive fits of two tensor-parallel ranks, each with its own workers."""
    from ray import train
    from ray.train.torch import TorchTrainer

    layout = Layout(tensor=2)

    def loop(config: dict[str, Any]) -> None:
        from torch import distributed

        from models.trainer import World
        from models.trainer import train as train_megatron

        rank = train.get_context().get_world_rank()
        distributed.destroy_process_group()  # Ray's own; the trainer makes the same again, in milliseconds
        world = World.join(rank, layout, "cpu", f"file://{config['meet']}")
        train_megatron(AttemptSpec.model_validate_json(config["spec"]), world)

    for number, config in enumerate(configs):
        spec = attempt(home, config, number, layout)
        trainer = TorchTrainer(
            loop,
            train_loop_config={"spec": spec.model_dump_json(), "meet": str(home / f"meet{number}")},
            scaling_config=train.ScalingConfig(num_workers=2, resources_per_worker={"CPU": 0.5}),
            run_config=train.RunConfig(storage_path=str(home / "train")),
        )
        trainer.fit()
    return all_marks(home)


# -- the table --------------------------------------------------------------------------------------------------


def row(name: str, parts: Sequence[tuple[float, ...]], names: Sequence[str]) -> float:
    """Print a line, and return the median of the whole in milliseconds."""
    totals = [1e3 * sum(one) for one in parts]
    low, high = (min(totals), max(totals)) if len(totals) < 4 else statistics.quantiles(totals, n=4)[::2]
    split = ", ".join(
        f"{part} {1e3 * statistics.median(values):,.0f}"
        for part, values in zip(names, zip(*parts, strict=True), strict=True)
    )
    median = statistics.median(totals)
    print(f"{name:<44}{len(totals):>4}{median:>10,.0f}   {low:,.0f} to {high:,.0f}   {split}", flush=True)
    return median


def ours(options: argparse.Namespace, cluster: Cluster, folder: Path) -> dict[str, float]:
    medians = {}
    for name, overrides in {"one rank": [], "two ranks": [TWO_RANKS]}.items():
        home = folder / name.replace(" ", "-")
        marks = run_sweep(cluster, home, [*overrides, *seeds_for(options.transitions)])
        medians[f"{name}, warm"] = row(f"gatesweep, {name}, warm", transitions(marks)[: options.transitions], PARTS)
    with members_that_tell():
        for name, overrides in {"one rank": [], "two ranks": [TWO_RANKS]}.items():
            cold = [
                cold_parts(cluster, folder / f"cold-{name.replace(' ', '-')}-{number}", overrides)
                for number in range(options.cold)
            ]
            medians[f"{name}, cold"] = row(f"gatesweep, {name}, cold", cold, COLD_PARTS)
    return medians


def rays(options: argparse.Namespace, folder: Path) -> dict[str, float]:
    medians = {}
    configs = short_configs() * (options.transitions // 12 + 2)
    for name, number, reuse in (
        ("Ray Tune, reuse_actors=True", options.transitions, True),
        ("Ray Tune, default", options.cold, False),
    ):
        marks = tuned(folder / f"tune-{reuse}", configs[: number + 1], reuse=reuse)
        medians[name] = row(f"{name}, one rank, nothing saved", transitions(marks), PARTS)
    marks = torch_trained(folder / "train", configs[: options.cold + 1])
    medians["TorchTrainer"] = row("Ray Train's TorchTrainer, two ranks", transitions(marks), PARTS)
    return medians


def main() -> None:
    options = arguments()
    load_before = os.getloadavg()[0]
    print(f"load {load_before:.1f} on {os.cpu_count()} cores; milliseconds from the last optimizer step, without the")
    print("final validation, to the next first forward pass")
    print(f"{'':<44}{'n':>4}{'median':>10}   quartiles   medians of the parts")
    medians: dict[str, float] = {}
    with tempfile.TemporaryDirectory() as name, Cluster() as cluster:
        folder = Path(name)
        if options.only != "ray":
            medians |= ours(options, cluster, folder)
        if options.only != "gatesweep":
            medians |= rays(options, folder)
    if options.only is None:
        for theirs, own in (
            ("Ray Tune, default", "one rank, warm"),
            ("Ray Tune, default", "one rank, cold"),
            ("Ray Tune, reuse_actors=True", "one rank, warm"),
            ("TorchTrainer", "two ranks, warm"),
            ("TorchTrainer", "two ranks, cold"),
        ):
            print(f"{theirs} takes {medians[theirs] / medians[own]:.2f} times gatesweep's ({own})")


if __name__ == "__main__":
    main()
