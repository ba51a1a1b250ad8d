"""Real training under a real Ray, disturbed: what is killed or stopped ends with the numbers of a calm run.

One sweep is run again and again in new homes: a trial that learns, and one whose learning rate makes it diverge.
"""

# ruff: noqa: F811 (fixtures are imported by name)

from __future__ import annotations

import contextlib
import os
import re
import signal
import sqlite3
import subprocess
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import psutil
import pytest
from sweep_runs import NoMirror, Watcher, cluster, curve_numbers, plan_of, wait_for, write_corpus  # noqa: F401

from models import run_dir
from orchestrator.controller import Controller, SweepStopped
from orchestrator.controller.resume import attempt_dir
from orchestrator.gang import UNITS, Cluster, NodeRoom
from orchestrator.plan import Plan
from orchestrator.store import Store, TrialRow

SWEEP = """\
name: tiny
question: does it survive?
base:
  model: {preset: cpu-tiny}
  data: {corpus: corpus.jsonl, sequence_length: 64, validation: {slice_bytes: 1024, points: 2}}
  train: {tokens: 51200, batch_tokens: 256, warmup_fraction: 0.0}
baseline: baseline
arms:
  baseline: {}
axes:
  train.lr: [3e-3, 30.0]
seeds: [1]
checkpoint: {every_steps: 20}
"""
"""200 steps, some seconds; the second trial diverges in its first ones."""

LEARNS, DIVERGES = "lr=0.003", "lr=30"


class OneGang:
    """The cluster, with room for a single gang of so many ranks: later trials take it over warm."""

    def __init__(self, cluster: Cluster, num_ranks: int = 1) -> None:
        self._cluster, self._room = cluster, (num_ranks * UNITS, 0)

    def rooms(self) -> list[NodeRoom]:
        return [replace(node, total=self._room, available=self._room) for node in self._cluster.rooms()[:1]]

    def __getattr__(self, name: str) -> Any:
        return getattr(self._cluster, name)


class Home:
    """A home folder, and controllers in it."""

    def __init__(self, folder: Path, text: str = SWEEP, overrides: Sequence[str] = ()) -> None:
        self.folder, self.plan = folder, plan_of(folder, overrides, text)
        self.store = Store(f"sqlite:///{folder / 'runs' / 'gatesweep.db'}")

    def controller(self, cluster: Any, watcher: Watcher, plan: Plan | None = None) -> Controller:
        plan = plan or self.plan
        sweep_id = self.store.add(plan).sweep_id
        home = self.folder / "runs"
        return Controller(plan.sweep, sweep_id, self.store, cluster, NoMirror(), home, watcher)  # type: ignore[arg-type]

    def run(self, cluster: Any) -> Watcher:
        watcher = Watcher()
        with self.controller(cluster, watcher) as controller:
            controller.run()
        return watcher

    def trial(self, word: str) -> TrialRow:
        rows = self.store.trials(self.store.sweep("tiny").id)
        return next(row for row in rows if word in f"{row.arm} lr={row.axes.get('train.lr', 0):g}")

    def steps_done(self) -> int:
        """Of the learning trial."""
        return len(self.store.curve(self.trial(LEARNS).fingerprint).steps)

    def everything(self) -> list[Any]:
        rows = self.store.trials(self.store.sweep("tiny").id)
        return [[row, self.store.attempts(row.fingerprint), self.store.curve(row.fingerprint)] for row in rows]

    def result(self, word: str) -> Result:
        row = self.trial(word)
        return Result(row.state, row.cause, row.reason, row.end_step, curve_numbers(self.store, row.fingerprint))


@dataclass(frozen=True)
class Result:
    """All of a trial that must not hang on how it was run."""

    state: str
    cause: str | None
    reason: str | None
    end_step: int | None
    curve: list[tuple[Any, ...]]


@pytest.fixture(scope="module")
def undisturbed(cluster: Cluster, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Result]:
    home = Home(tmp_path_factory.mktemp("calm"))
    home.run(OneGang(cluster))
    return {word: home.result(word) for word in (LEARNS, DIVERGES)}


@pytest.fixture
def home(tmp_path: Path) -> Iterator[Home]:
    opened = Home(tmp_path)
    yield opened
    opened.store.close()


def when_it_has_done(num_steps: int, act: Any) -> Any:
    """A tick handler that acts once, when the learning trial has done some steps of its first attempt."""
    done: list[bool] = []

    def on_tick(snapshot: Any) -> None:
        for running in snapshot.running:
            if not done and LEARNS in running.name and running.step >= num_steps:
                done.append(True)
                act()

    return on_tick


def test_a_calm_run_ends_well_and_the_high_rate_diverges(undisturbed: dict[str, Result]):
    learns, diverges = undisturbed[LEARNS], undisturbed[DIVERGES]
    assert learns.state == "COMPLETE"
    probed = [step for step in (50, 100, 150, 200) for _layer in (1, 2)]
    assert [row[0] for row in learns.curve] == [*range(1, 201), 100, 200, *probed]
    losses = [row[4] for row in learns.curve[:200]]
    assert sum(losses[-20:]) < 0.8 * sum(losses[:20])
    assert diverges.state == "DIVERGED"
    assert diverges.cause in ("loss_above_start", "loss_above_best", "gradient_norm", "nonfinite")
    assert diverges.end_step is not None
    assert diverges.reason
    assert f"{diverges.end_step}" in diverges.reason
    assert diverges.curve[-1][0] == diverges.end_step < 200


def test_a_rank_preempted_then_frozen_then_killed_costs_three_attempts_and_no_bit(
    tmp_path: Path, cluster: Cluster, undisturbed: dict[str, Result], monkeypatch: pytest.MonkeyPatch
):
    """SIGTERM, SIGSTOP and SIGKILL, one after the other, each in the middle of another attempt."""
    monkeypatch.setattr("orchestrator.gang.gangs.STACKS_SECONDS", 0.1)
    home, watcher = Home(tmp_path, overrides=["retry={hang_seconds: 5, hang_steps: 1, backoff_seconds: 0}"]), Watcher()
    strikes = [(50, signal.SIGTERM), (90, signal.SIGSTOP), (130, signal.SIGKILL)]
    with home.controller(OneGang(cluster), watcher) as controller:

        def strike_next() -> None:
            if strikes:
                step, number = strikes.pop(0)
                watcher.on_tick = when_it_has_done(step, lambda: strike(number))

        def strike(number: signal.Signals) -> None:
            (attempt,) = controller.running
            os.kill(attempt.gang.members[0]["pid"], number)
            strike_next()

        strike_next()
        controller.run()
    row = home.trial(LEARNS)
    attempts = home.store.attempts(row.fingerprint)
    preempted, hung, killed = (next(one for one in attempts if one.cause == cause) for cause in STRUCK)
    after = dict(enumerate(attempts))  # by the number of the one before: numbers begin with 1
    assert row.state == "COMPLETE"
    assert {one.cause for one in attempts} == {*STRUCK, "complete"}
    assert after[preempted.number].resume_step == preempted.end_step
    assert after[hung.number].resume_step >= 60
    assert 100 <= after[killed.number].resume_step < 200  # the one of step 120 may have been in the writing
    assert "models.trainer" in (killed.log_tail or "")
    assert home.result(LEARNS) == undisturbed[LEARNS]
    # Also where and why the other one diverged is the same in a second home.
    assert home.result(DIVERGES) == undisturbed[DIVERGES]
    home.store.close()


STRUCK = ("preempted", "hang", "rank_died")
STAGES = (
    "resources.layout.pipeline=2",
    "resources.micro_batch_sequences=2",
    "train.tokens=10240",
    "checkpoint.every_steps=10",
    "retry.backoff_seconds=0",
)


def test_stages_that_are_killed_and_a_torn_checkpoint_cost_the_steps_since_the_one_before(
    cluster: Cluster, tmp_path: Path
):
    """40 steps of two pipeline stages: killed after 22, and the newest of their checkpoints cut short."""
    home, watcher, torn = Home(tmp_path, SWEEP.replace("[3e-3, 30.0]", "[3e-3]"), STAGES), Watcher(), []
    with home.controller(OneGang(cluster, num_ranks=2), watcher) as controller:

        def strike() -> None:
            (attempt,) = controller.running
            for member in attempt.gang.members:
                os.kill(member["pid"], signal.SIGKILL)
            wait_for(lambda: not any(is_running(member["pid"]) for member in attempt.gang.members), "the ranks' end")
            step, newest = next(run_dir.complete_checkpoints(Path(attempt.spec.attempt_dir)))
            os.truncate(newest / "__1_0.distcp", 100)
            torn.append((step, newest))

        watcher.on_tick = when_it_has_done(22, strike)
        controller.run()
    row = home.trial(LEARNS)
    first, second, third = home.store.attempts(row.fingerprint)
    ((step, newest),) = torn
    assert (row.state, first.cause, second.cause) == ("COMPLETE", "rank_died", "corrupt_checkpoint")
    assert (second.resume_step, third.resume_step) == (step, step - 10)
    assert f"CheckpointError: checkpoint {newest} is torn: __1_0.distcp has 100 bytes" in (second.reason or "")
    probed = [step for step in (10, 20, 30, 40) for _ in range(row.config.model.num_layers)]
    assert [curve[0] for curve in home.result(LEARNS).curve] == [*range(1, 41), 20, 40, *probed]
    before, again = ({record["step"]: record for record in steps_of(home, row, one)} for one in (first, third))
    assert len(before.keys() & again.keys()) >= 10
    assert all(before[number] == again[number] for number in before.keys() & again.keys())
    home.store.close()


def test_a_sweep_resubmitted_with_another_layout_goes_on_from_the_checkpoint_and_says_so(
    cluster: Cluster, tmp_path: Path
):
    """Two tensor-parallel ranks are stopped on their way, and one rank ends the trial."""
    text = SWEEP.replace("[3e-3, 30.0]", "[3e-3]")
    one_rank = ["train.tokens=10240", "checkpoint.every_steps=10", "resources.micro_batch_sequences=2"]
    home = Home(tmp_path, text, [*one_rank, "resources.layout.tensor=2"])
    watcher = Watcher()
    with home.controller(OneGang(cluster, num_ranks=2), watcher) as controller:
        watcher.on_tick = when_it_has_done(12, lambda: controller.request_stop("the layout changes"))
        with pytest.raises(SweepStopped, match="the layout changes"):
            controller.run()
    again = plan_of(tmp_path, one_rank, text)
    with home.controller(OneGang(cluster), Watcher(), again) as controller:
        controller.run()
    row = home.trial(LEARNS)
    first, second = home.store.attempts(row.fingerprint)
    assert (row.state, first.cause) == ("COMPLETE", "interrupted")
    assert (first.layout.tensor, second.layout.tensor) == (2, 1)
    assert second.resumed_from == 1
    assert 12 <= second.resume_step < 40
    assert [step[0] for step in home.result(LEARNS).curve[:40]] == [*range(1, 41)]
    losses = [curve[4] for curve in home.result(LEARNS).curve[:40]]
    assert abs(losses[second.resume_step] - losses[second.resume_step - 1]) < 0.5
    home.store.close()


def steps_of(home: Home, row: TrialRow, attempt: Any) -> list[dict[str, Any]]:
    folder = attempt_dir(run_dir.trial_dir(home.folder / "runs", row.fingerprint), attempt)
    records, _ = run_dir.read_records(folder)
    return [record.model_dump(exclude={"tokens_per_second"}) for record in records if record.kind == "step"]


def is_running(pid: int) -> bool:
    """Neither gone nor a zombie that Ray has yet to collect."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


def test_a_file_that_changed_after_planning_fails_its_own_trial_and_a_rerun_mends_it(tmp_path: Path, cluster: Cluster):
    pairs = "zip:\n  - {train.lr: [3e-3, 2e-3], data.corpus: [corpus.jsonl, other.jsonl]}\n"
    write_corpus(tmp_path / "other.jsonl", seed=1)
    home = Home(tmp_path, SWEEP.replace("axes:\n  train.lr: [3e-3, 30.0]\n", pairs), ["train.tokens=5120"])
    write_corpus(tmp_path / "other.jsonl", seed=2)
    had_torch = "torch" in sys.modules
    home.run(OneGang(cluster))
    assert ("torch" in sys.modules) == had_torch  # the rank's error came as text
    row = home.trial("lr=0.002")
    assert (row.state, row.cause, row.num_attempts) == ("FAILED", "error", 1)
    assert row.reason is not None
    assert row.reason.startswith("CorpusError: ")
    assert "other.jsonl has changed since the sweep was planned" in row.reason
    log = home.store.attempts(row.fingerprint)[0].log_tail
    assert log is not None
    assert "CorpusError" in log
    assert home.trial(LEARNS).state == "COMPLETE"
    fingerprints = [one.fingerprint for one in home.store.trials(home.store.sweep("tiny").id) if one.state == "FAILED"]
    assert home.store.reopen(home.store.sweep("tiny").id, fingerprints) == 1

    write_corpus(tmp_path / "other.jsonl", seed=1)
    home.run(OneGang(cluster))
    assert home.trial("lr=0.002").state == "COMPLETE"
    assert home.trial(LEARNS).num_attempts == 1


# -- the program itself -----------------------------------------------------------------------------------------


def gatesweep(folder: Path, *arguments: str) -> subprocess.Popen[str]:
    """The command in its own process group, as a shell starts it."""
    command = [sys.executable, "-c", "import sys; from orchestrator.cli import main; main()", *arguments]
    environment = {**os.environ, "GATESWEEP_HOME": str(folder / "runs"), "PYTHONPATH": os.pathsep.join(sys.path)}
    environment.pop("RAY_ADDRESS", None)
    return subprocess.Popen(
        command, cwd=folder, env=environment, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
        start_new_session=True,
    )  # fmt: skip


def finish(process: subprocess.Popen[str]) -> tuple[int, str, str]:
    out, err = process.communicate(timeout=240)
    return process.returncode, out, err


def until_steps(home: Home, num_steps: int, process: subprocess.Popen[str]) -> None:
    """Wait until the learning trial has that many steps in the store."""

    def there() -> bool:
        assert process.poll() is None, process.communicate()
        return home.steps_done() >= num_steps

    wait_for(there, f"{num_steps} steps")


@contextlib.contextmanager
def standing_still(process: subprocess.Popen[str]) -> Iterator[None]:
    """The ranks of a running command are suspended, and go on (or see that they are orphans) afterwards."""
    ranks = [one for one in psutil.Process(process.pid).children(recursive=True) if "_Rank" in "".join(one.cmdline())]
    assert ranks
    for rank in ranks:
        rank.suspend()
    try:
        yield
    finally:
        for rank in ranks:
            with contextlib.suppress(psutil.NoSuchProcess):
                rank.resume()


def shorten_lease(home: Home) -> None:
    """A killed controller's lease runs out by itself, in 20 s: time that a test need not wait."""
    with sqlite3.connect(home.folder / "runs" / "gatesweep.db") as connection:
        connection.execute("UPDATE lease SET expires_at = 0")


def test_the_program_survives_kill_9_and_ctrl_c_and_loses_and_doubles_nothing(
    home: Home, cluster: Cluster, undisturbed: dict[str, Result]
):
    """SIGKILL of the controller, the same command again, Ctrl-C, on to the end, then once more for nothing."""
    home.store.add(home.plan)
    first = gatesweep(home.folder, "run", "tiny.yaml")
    until_steps(home, 45, first)  # a save waits for the one before it: that of step 20 stands
    # The ranks stand still meanwhile: on a busy machine they would be done before the other command has started.
    with standing_still(first):
        code, out, err = finish(gatesweep(home.folder, "run", "tiny.yaml", "seeds=[1,2]"))
        assert (code, out) == (2, "")
        assert re.search(rf"error: sweep tiny is run by \S+:{first.pid} now; nothing was changed", err)
        os.kill(first.pid, signal.SIGKILL)
        first.communicate()
    assert home.trial(LEARNS).state == "RUNNING"
    shorten_lease(home)

    second = gatesweep(home.folder, "run", "tiny.yaml")
    until_steps(home, home.steps_done() + 25, second)
    os.killpg(second.pid, signal.SIGINT)  # as a terminal does: to every process of the group
    code, out, err = finish(second)
    assert code == 130, err
    assert "Traceback" not in err
    assert "its controller is gone" in out
    assert "stopped: SIGINT; the same command goes on from here" in out
    row = home.trial(LEARNS)
    assert (row.state, row.cause) == ("WAITING", "interrupted")

    home.run(OneGang(cluster))
    row = home.trial(LEARNS)
    attempts = home.store.attempts(row.fingerprint)
    assert [one.cause for one in attempts] == ["controller_lost", "interrupted", "complete"]
    assert 20 <= attempts[1].resume_step < attempts[2].resume_step == attempts[1].end_step
    assert home.result(LEARNS) == undisturbed[LEARNS]
    assert home.result(DIVERGES) == undisturbed[DIVERGES]
    assert len(list((run_dir.trial_dir(home.folder / "runs", row.fingerprint) / "attempts").iterdir())) == 3

    before = home.everything()
    code, out, err = finish(gatesweep(home.folder, "run", "tiny.yaml"))
    assert code == 0, err
    assert out.splitlines()[0] == "tiny: 2 trials, 0 new, 2 finished, 0 to run"
    assert "started" not in out
    assert "baseline" in out.partition("\n")[2]
    assert home.everything() == before
