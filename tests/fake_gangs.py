"""A cluster without Ray: gangs that write the run dir as a trainer would, a few steps a poll, and fail on cue.

Their losses depend on config and step alone, so that a curve put together from several attempts can be compared with
an undisturbed one.
"""

from __future__ import annotations

import contextlib
import hashlib
import math
import secrets
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import pytest
from sweep_runs import NoMirror, Watcher, curve_numbers, plan_of

from models import run_dir, trust
from models.config import Layout, TrialConfig
from models.run_dir import AttemptSpec, DiagnosticRecord, Record, StepRecord, Summary, ValidationRecord
from orchestrator.controller import Controller
from orchestrator.controller.clock import Clock
from orchestrator.gang import GangEnd, GangShape, GangState, NodeRoom, Wanted, minus, times
from orchestrator.plan import Plan
from orchestrator.store import Store

STEPS_A_POLL = 3

Fate = Literal[
    "die",
    "raise",
    "not finite",
    "rise",
    "validation not finite",
    "hang",
    "disk full",
    "preempted",
    "lands late",
    "last checkpoint lost",
]
FateAt = Callable[[AttemptSpec, TrialConfig, int], Fate | None]
"""What becomes of an attempt after it has done a step; None: it goes on."""


def all_goes_well(_spec: AttemptSpec, _config: TrialConfig, _step: int) -> None:
    return None


LANDING_POLLS = 4
"""Longer than the next trial of 20 steps takes to begin, and shorter than it takes to end."""


class FakeLanding:
    """The last checkpoint of an attempt, which stands after some polls; or not."""

    def __init__(self, gang: FakeGang, end: GangEnd, is_lost: bool) -> None:
        self.gang, self.end, self.is_lost, self.polls = gang, end, is_lost, 0

    def poll(self) -> GangEnd | None:
        self.polls += 1
        if self.gang.state is GangState.DEAD:
            return GangEnd(None, "process 1 of a rank died: it was dismissed", rank_died=True)
        if self.polls < LANDING_POLLS:
            return None
        return GangEnd(None, "OSError: [Errno 28] No space left on device") if self.is_lost else self.end


class FakeGang:
    def __init__(
        self, shape: GangShape, fate: FateAt, start_error: str | None = None, nodes: Sequence[str] = ("fake-host",)
    ) -> None:
        self.shape, self.fate, self.start_error = shape, fate, start_error
        self.state = GangState.STARTING
        self.nodes = list(nodes)
        self.members = [{"host": node, "pid": 1} for node in nodes for _ in range(shape.ranks_per_bundle)]
        self.num_attempts = 0
        self.spec: AttemptSpec = None  # type: ignore[assignment]
        self.lease: Any = None
        self.stop_token: str | None = None
        self.gang_id, self.is_detached = secrets.token_hex(4), False
        self.end: GangEnd | None = None
        self.is_hung = False
        self.landing: FakeLanding | None = None
        self.refused_checkpoint: str | None = None

    def poll_start(self) -> str | None:
        if self.start_error is None and self.state is GangState.STARTING:
            self.state = GangState.IDLE
        return self.start_error

    def is_placed(self) -> bool:
        return True

    def launch(self, spec: AttemptSpec) -> None:
        assert self.state is GangState.IDLE
        self.spec, self.state, self.step = spec, GangState.BUSY, spec.resume_step
        self.num_attempts += 1
        self.config = run_dir.read_trial_config(Path(spec.trial_dir))
        self.refused_checkpoint = self.end = None
        if spec.resume_checkpoint is not None and (Path(spec.resume_checkpoint) / "torn").exists():
            self.refused_checkpoint = spec.resume_checkpoint
        elif spec.resume_checkpoint is not None:
            assert (Path(spec.resume_checkpoint) / "fake").read_text() == str(spec.resume_step)
        run_dir.log_path(spec.attempt_dir, 0).write_text("begin\nthe last words\n")

    def progress(self) -> tuple[int, int]:
        path = run_dir.metrics_path(self.spec.attempt_dir)
        return (path.stat().st_size if path.exists() else 0), self.step

    def dump_stacks(self) -> None:
        run_dir.stacks_path(self.spec.attempt_dir, 0).write_text("thread MainThread\n")

    def stop(self, token: str) -> None:
        self.stop_token = token

    def poll_end(self) -> GangEnd | None:
        if self.state is GangState.DEAD:
            return GangEnd(None, "process 1 of a rank died: it was dismissed", rank_died=True)
        if self.refused_checkpoint:
            return GangEnd(None, f"CheckpointError: {self.refused_checkpoint} is torn")
        for _ in range(0 if self.is_hung or self.end else STEPS_A_POLL):
            self.end = self._one_step()
            if self.end is not None:
                break
        if self.end is not None and self.end.summary is not None and self.end.landing is None:
            self.state = GangState.IDLE
        return self.end

    def renew(self, lease: Any = None) -> None:
        self.lease = lease or self.lease

    def train_on(self, num_polls: int) -> None:
        """What an orphan does while no controller looks."""
        for _ in range(num_polls):
            if self.state is GangState.BUSY and self.end is None:
                self.poll_end()

    def give_up(self) -> None:
        """The grace is over: it checkpoints, and ends itself."""
        if self.state is GangState.BUSY and self.end is None:
            self.save()
            self._ended("stopped", "no controller was heard of for 600 s")
        self.dismiss()

    def free(self) -> None:
        self.state = GangState.IDLE

    @property
    def is_landing(self) -> bool:
        return self.landing is not None and self.landing.polls < LANDING_POLLS

    def dismiss(self) -> None:
        self.state = GangState.DEAD

    def _one_step(self) -> GangEnd | None:
        fate = self.fate(self.spec, self.config, self.step + 1)
        if fate == "hang":
            self.is_hung = True
            return None
        self.step += 1
        self._write(fake_step(self.config, self.step, fate))
        if fate == "die":
            return GangEnd(None, "process 1 of a rank died: SIGKILL", rank_died=True)
        if fate == "disk full":
            return GangEnd(None, "OSError: [Errno 28] No space left on device")
        if fate == "out of memory":
            return GangEnd(None, "OutOfMemoryError: CUDA out of memory. Tried to allocate 2.00 GiB.")
        if fate == "preempted":
            self.save()
            return self._ended("stopped")
        if fate == "raise":
            return GangEnd(None, "ValueError: the corpus is gone")
        if fate == "not finite":
            return self._ended("nonfinite", f"loss nan, gradient norm nan at step {self.step}")
        if self.step in self.config.validation_steps():
            self._write(fake_validation(self.config, self.step, fate))
        if self.spec.diagnostics and self.step in self.spec.diagnostics.steps(self.config.train.num_steps):
            self._write(fake_probe(self.config, self.step))
        if self.step == self.config.train.num_steps:
            end = self._ended("complete")
            if fate in ("lands late", "last checkpoint lost"):
                self.state = GangState.BUSY
                self.landing = FakeLanding(self, end, fate == "last checkpoint lost")
                return GangEnd(end.summary, landing=self.landing)  # type: ignore[arg-type]
            return end
        every = self.spec.checkpoint_every_steps
        if (every and self.step % every == 0) or self.step in self.spec.branch_steps:
            self.save()
        if self.stop_token == self.spec.token:
            self.save()
            return self._ended("stopped")
        return None

    def save(self) -> None:
        folder = run_dir.checkpoint_path(self.spec.attempt_dir, self.step)
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "fake").write_text(str(self.step))
        (folder / trust.MANIFEST).write_text('{"files": {}}')

    def _write(self, record: Record) -> None:
        with run_dir.metrics_path(self.spec.attempt_dir).open("a") as stream:
            stream.write(run_dir.record_line(record))

    def _ended(self, outcome: str, error: str | None = None) -> GangEnd:
        facts = {"outcome": outcome, "step": self.step, "resume_step": self.spec.resume_step, "error": error}
        summary = Summary.model_validate({**facts, "seconds": 1.0, "tokens_per_second": 100.0})
        run_dir.write_json(self.spec.attempt_dir / "summary.json", summary)
        return GangEnd(summary)


def fake_loss(config: TrialConfig, step: int) -> float:
    """Falling, and different for every trial and step, but for trials with one trunk."""
    if config.train.trunk_tokens is not None:
        train = config.train.model_copy(update={"tokens": config.train.trunk_tokens})
        config = config.model_copy(update={"train": train})
    digest = hashlib.sha256(f"{config.fingerprint()} {step}".encode()).digest()
    return 3.0 - 0.01 * step + digest[0] / 10_000


def fake_step(config: TrialConfig, step: int, fate: Fate | None) -> StepRecord:
    loss = None if fate == "not finite" else fake_loss(config, step) + (5.0 if fate == "rise" else 0.0)
    return StepRecord(
        step=step,
        tokens=step * config.train.batch_tokens,
        fraction=step / config.train.num_steps,
        lr=config.train.lr,
        loss_nats=loss,
        gradient_norm=None if loss is None else 1.0,
        tokens_per_second=1000.0,
        nonfinite=loss is None,
    )


def fake_validation(config: TrialConfig, step: int, fate: Fate | None = None) -> ValidationRecord:
    loss = None if fate == "validation not finite" else fake_loss(config, step) + 0.1
    return ValidationRecord(
        step=step,
        tokens=step * config.train.batch_tokens,
        fraction=step / config.train.num_steps,
        split="slice",
        loss_nats=loss,
        bits_per_byte=None if loss is None else loss / math.log(2),
        num_tokens=1024,
        num_bytes=1024,
        nonfinite=loss is None,
    )


def fake_probe(config: TrialConfig, step: int) -> DiagnosticRecord:
    by_layer = [fake_loss(config, step) + layer for layer in range(config.model.num_layers)]
    return DiagnosticRecord(
        step=step,
        tokens=step * config.train.batch_tokens,
        fraction=step / config.train.num_steps,
        first_token_attention=[[value / 10] * config.model.num_query_heads for value in by_layer],
        max_activation=by_layer,
        attention_output_rms=by_layer,
        ffn_output_rms=by_layer,
        residual_rms=by_layer,
        gradient_norm=by_layer,
        update_ratio=by_layer,
    )


class FakeClock(Clock):
    """Stands still until it is moved."""

    def __init__(self) -> None:
        self.now = 1000.0

    def monotonic(self) -> float:
        return self.now

    def sleep(self, seconds: float) -> None:
        pass


class FakeCluster:
    """Of ``hosts`` that hold a gang each, or of one that holds ``capacity`` gangs, of a sweep's plain shape.

    ``outlives_driver``: gangs are detached, and can be found again.
    """

    def __init__(
        self,
        capacity: int = 2,
        fate: FateAt = all_goes_well,
        start_error: str | None = None,
        hosts: Sequence[str] = (),
        outlives_driver: bool = False,
    ) -> None:
        self.outlives_driver, self.reachable, self.was_replaced = outlives_driver, True, False
        self.fate, self.start_error = fate, start_error
        self.num_gangs = dict.fromkeys(hosts, 1) or {"fake-host": capacity}
        self.fit(GangShape(Layout(), 1, 0))
        self.gangs: list[FakeGang] = []

    identity = "fake-cluster"

    def fit(self, shape: GangShape) -> None:
        one = times(shape.bundle_units, shape.num_bundles)
        self.sizes: dict[str, tuple[int, int]] = {host: times(one, number) for host, number in self.num_gangs.items()}

    def rooms(self) -> list[NodeRoom]:
        free = dict(self.sizes)
        for gang in self.gangs:
            for node in gang.nodes if gang.state is not GangState.DEAD else ():
                free[node] = minus(free[node], gang.shape.bundle_units)
        return [NodeRoom(host, total, free[host]) for host, total in self.sizes.items()]

    def start_gang(self, shape: GangShape, num_threads: int, nodes: Sequence[str] = (), lease: Any = None) -> FakeGang:
        self.gangs.append(FakeGang(shape, self.fate, self.start_error, nodes or [*self.num_gangs][:1]))
        self.gangs[-1].lease, self.gangs[-1].is_detached = lease, self.outlives_driver
        return self.gangs[-1]

    def wait(self, gangs: Sequence[FakeGang], seconds: float) -> list[FakeGang]:
        return []

    def find_gangs(self, wanted: Sequence[Wanted]) -> list[FakeGang | str]:
        return [self._find(one) for one in wanted]

    def _find(self, wanted: Wanted) -> FakeGang | str:
        for gang in self.gangs:
            if gang.gang_id == wanted.gang_id and gang.state is not GangState.DEAD:
                if gang.spec is None or gang.spec.token != wanted.token:
                    return "its gang is at another one, or at none"
                gang.state = GangState.BUSY
                return gang
        return "its gang is gone"

    def end_gangs(self, gang_ids: Collection[str]) -> None:
        for gang in self.gangs:
            if gang.gang_id in gang_ids:
                gang.dismiss()

    def is_reachable(self) -> bool:
        return self.reachable

    def answering(self) -> str | None:
        return ("another" if self.was_replaced else self.identity) if self.is_reachable() else None


@dataclass
class Bench:
    """A home, its store, and controllers over fake gangs."""

    home: Path
    store: Store

    def controller(
        self,
        plan: Plan,
        cluster: Any,
        watcher: Watcher | None = None,
        clock: Clock | None = None,
        webhook: Any = None,
    ) -> Controller:
        sweep_id = self.store.add(plan).sweep_id
        view = watcher or Watcher()
        if isinstance(cluster, FakeCluster):
            cluster.fit(GangShape.of(plan.sweep.resources))
        given = (plan.sweep, sweep_id, self.store, cluster, NoMirror(), self.home, view, plan.confirmations)
        return Controller(*given, clock, webhook, plan)  # type: ignore[arg-type]

    def run(self, plan: Plan, fate: FateAt = all_goes_well, capacity: int = 2) -> Watcher:
        watcher = Watcher()
        with self.controller(plan, FakeCluster(capacity, fate), watcher) as controller:
            controller.run()
        return watcher

    def trials(self, plan: Plan) -> dict[str, Any]:
        """By arm and seed, as in ``g1/1``."""
        rows = self.store.trials(self.store.sweep(plan.sweep.name).id)
        return {f"{row.arm}/{row.seed}": row for row in rows}

    def states(self, plan: Plan) -> dict[str, str]:
        return {name: row.state for name, row in self.trials(plan).items()}

    def curves(self, plan: Plan) -> dict[str, list[tuple[Any, ...]]]:
        return {row.fingerprint: curve_numbers(self.store, row.fingerprint) for row in self.trials(plan).values()}


@contextlib.contextmanager
def bench_in(folder: Path) -> Iterator[Bench]:
    with Store(f"sqlite:///{folder / 'gatesweep.db'}") as store:
        yield Bench(folder, store)


@pytest.fixture
def bench(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Bench]:
    monkeypatch.setattr("orchestrator.controller.loop.POLL_SECONDS", 0.0)
    monkeypatch.setattr("orchestrator.failures.decision.LONGEST_BACKOFF_SECONDS", 0.0)
    with bench_in(tmp_path / "home") as opened:
        yield opened


@pytest.fixture
def plan(tmp_path: Path) -> Plan:
    """Two arms, one seed, 20 steps, a checkpoint every 5."""
    return plan_of(tmp_path)


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[tuple[Any, ...]]]:
    """The curves of ``plan`` when nothing goes wrong. Fingerprints do not hang on where the corpus lies."""
    folder = tmp_path_factory.mktemp("undisturbed")
    plan = plan_of(folder)
    with pytest.MonkeyPatch.context() as patch, bench_in(folder) as calm:
        patch.setattr("orchestrator.controller.loop.POLL_SECONDS", 0.0)
        calm.run(plan)
        return calm.curves(plan)
