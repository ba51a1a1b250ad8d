"""The command line: what it prints, its exit codes, and that a user's mistake changes nothing.

Runs here go over fake gangs, without MLflow; the program over a real Ray is in test_recovery.py.
"""

from __future__ import annotations

import csv
import io
import json
import os
import re
import signal
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

import pytest
from fake_gangs import FakeCluster, FateAt, all_goes_well
from sweep_runs import SWEEP, write_sweep

from orchestrator import cli
from orchestrator.cli import run as cli_run
from orchestrator.cli.home import Home
from orchestrator.store import Store
from orchestrator.tracking import Sent


@dataclass(frozen=True)
class Said:
    code: int
    out: str
    err: str


Gatesweep = Callable[..., Said]


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working folder with a sweep file; the home is to be ``runs`` in it."""
    write_sweep(tmp_path)
    monkeypatch.chdir(tmp_path)
    for name in list(os.environ):
        if name.startswith(("GATESWEEP_", "MLFLOW_TRACKING")) or name == "RAY_ADDRESS":
            monkeypatch.delenv(name)
    monkeypatch.setenv("COLUMNS", "120")
    return tmp_path


@pytest.fixture
def gatesweep(folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Gatesweep:
    """The command, in this process."""

    def call(*arguments: str) -> Said:
        monkeypatch.setattr(sys, "argv", ["gatesweep", *arguments])
        capsys.readouterr()
        code: object = 0
        try:
            cli.main()
        except SystemExit as ended:
            code = ended.code or 0
        captured = capsys.readouterr()
        assert isinstance(code, int), code
        return Said(code, captured.out, captured.err)

    return call


class NothingMirrored:
    """In place of the mirrors: they are tested elsewhere, and MLflow takes seconds to import."""

    def __init__(self, store: Store, sweep_id: int, *_: Any, **__: Any) -> None:
        store.set_mlflow_run(sweep_id, None, "a run")

    def start(self) -> None: ...

    def nudge(self) -> None: ...

    def update(self) -> int:
        return 0

    def close(self, timeout_seconds: float) -> bool:
        return True


class Machine(FakeCluster):
    """What ``run`` takes for Ray; it remembers every time that one was started."""

    def __init__(self) -> None:
        super().__init__(2)
        self.num_ray_starts = 0
        self.on_follow: Callable[[], None] = lambda: None

    def __call__(self, address: str | None) -> Self:
        self.num_ray_starts += 1
        return self

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None: ...

    def meet(self, fate: FateAt) -> None:
        self.fate = fate


@pytest.fixture
def machine(monkeypatch: pytest.MonkeyPatch) -> Machine:
    fake = Machine()
    monkeypatch.setattr(cli_run, "Cluster", fake)
    monkeypatch.setattr(cli_run, "Mirror", NothingMirrored)
    monkeypatch.setattr(cli_run, "StudyMirror", NothingMirrored)
    monkeypatch.setattr(cli_run, "mirror", lambda *_: Sent())
    monkeypatch.setattr("orchestrator.controller.loop.POLL_SECONDS", 0.0)
    return fake


def store_of(folder: Path) -> Store:
    return Store(f"sqlite:///{folder / 'runs' / 'gatesweep.db'}")


def states(folder: Path, sweep: str = "tiny") -> dict[str, str]:
    with store_of(folder) as store:
        return {f"{row.arm}/{row.seed}": row.state for row in store.trials(store.sweep(sweep).id)}


def dying_g1(_spec: Any, config: Any, step: int) -> Any:
    return "raise" if config.gate is not None and step == 8 else None


# -- plan -------------------------------------------------------------------------------------------------------


def test_plan_prints_every_trial_and_writes_nothing(gatesweep: Gatesweep, folder: Path):
    before = sorted(path.name for path in folder.iterdir())
    said = gatesweep("plan", "tiny.yaml", "seeds=[1,2,3]", "axes.train.lr=[1e-3,2e-3]")
    assert (said.code, said.err) == (0, "")
    rows = [line.split() for line in said.out.splitlines() if re.match(r" *\d+ +(baseline|g1) ", line)]
    assert len(rows) == 12
    assert {(row[1], row[2], row[3]) for row in rows} == {
        (arm, lr, seed) for arm in ("baseline", "g1") for lr in ("1e-3", "2e-3") for seed in "123"
    }
    assert {row[-1] for row in rows} == {"new"}
    assert "12 trials: 12 new; 0 cells refused" in said.out
    assert "training FLOPs in all" in said.out
    assert "g1 changes gate {position: sdpa}; so parameters +" in said.out
    assert "price: unknown; a throughput is known once a trial of this sweep is complete" in said.out
    assert "of checkpoints at the end: 2 a trial" in said.out
    assert sorted(path.name for path in folder.iterdir()) == before


def test_plan_shows_what_exists_already(gatesweep: Gatesweep, folder: Path, machine: Machine):
    gatesweep("run", "tiny.yaml")
    said = gatesweep("plan", "tiny.yaml", "seeds=[1,2]")
    assert "4 trials: 2 new, 2 complete" in said.out


def test_plan_tells_which_trials_another_sweep_has_trained(gatesweep: Gatesweep, folder: Path, machine: Machine):
    gatesweep("run", "tiny.yaml")
    said = gatesweep("plan", "tiny.yaml", "name=again", "seeds=[1,2]")
    assert "4 trials: 2 new, 2 complete" in said.out
    assert said.out.count("COMPLETE, by tiny") == 2
    assert "taken from other sweeps, unless run --no-reuse: 2 from tiny" in said.out


def test_plan_refuses_confirming_seeds_that_another_sweep_has_trained(
    gatesweep: Gatesweep, folder: Path, machine: Machine
):
    gatesweep("run", "tiny.yaml", "seeds=[3]")
    choosing = ("name=again", "axes={train.lr: [1e-3, 3e-3]}", "seeds={select: [1, 2], confirm: [3]}")
    said = gatesweep("plan", "tiny.yaml", *choosing)
    assert said.code == 2
    assert "seeds.confirm: tiny (2) trained 2 of the trials" in said.err
    assert gatesweep("plan", "tiny.yaml", *choosing[:2], "seeds={select: [1, 2], confirm: [4]}").code == 0


def test_plan_lists_refused_cells_under_their_reason(gatesweep: Gatesweep, folder: Path):
    said = gatesweep("plan", "tiny.yaml", "resources.layout.tensor=3")
    assert "refused: 2 cells" in said.out
    assert "model.num_query_heads 4 is not divisible by layout.tensor 3" in said.out
    assert not (folder / "runs").exists()


# -- a user's mistakes ------------------------------------------------------------------------------------------

MISTAKES = {
    "unknown key": ("train:", "trian:", r"tiny\.yaml:6:3: base\.trian: unknown key .*did you mean 'train'"),
    "wrong type": ("lr: 3e-3", "lr: fast", r"tiny\.yaml:6:\d+: base\.train\.lr: got 'fast'; allowed: a number above 0"),
    "unknown word": ("position: sdpa", "position: spda", r"tiny\.yaml:10:\d+: .*got 'spda'.*did you mean 'sdpa'"),
    "gate not allowed at a place": (
        "position: sdpa",
        "position: dense, granularity: headwise",
        r"tiny\.yaml:10:\d+: .*headwise is not allowed at position dense",
    ),
    "impossible shape": (
        "preset: cpu-tiny",
        "preset: cpu-tiny, num_query_heads: 3",
        r"tiny\.yaml:4:\d+: .*num_query_heads 3 must be a multiple of num_kv_heads 2",
    ),
    "batch that holds no whole sequences": (
        "batch_tokens: 256",
        "batch_tokens: 250",
        r"tiny\.yaml:6:\d+: .*train\.batch_tokens 250 must be a multiple of data\.sequence_length 64",
    ),
    "missing corpus": (
        "corpus: corpus.jsonl",
        "corpus: corpse.jsonl",
        r"tiny\.yaml:5:\d+: .*there is no file .*corpse",
    ),
    "no YAML": ("arms:", "arms: [", r"tiny\.yaml:\d+:\d+: not valid YAML"),
    "unknown baseline": ("baseline: baseline", "baseline: base", r"tiny\.yaml:7:\d+: baseline: got 'base'"),
    "a seed twice": ("seeds: [1]", "seeds: [1, 1]", r"tiny\.yaml:11:\d+: seeds\[1\]: got 1 twice"),
}


@pytest.mark.parametrize("verb", ["plan", "run"])
@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_mistake_in_the_file_is_one_message_and_nothing_else(
    gatesweep: Gatesweep, folder: Path, mistake: str, verb: str
):
    old, new, expected = MISTAKES[mistake]
    assert old in SWEEP
    (folder / "tiny.yaml").write_text(SWEEP.replace(old, new, 1))
    said = gatesweep(verb, "tiny.yaml")
    assert (said.code, said.out) == (2, "")
    assert re.match(rf"error: {expected}", said.err), said.err
    assert len(said.err.splitlines()) == 1
    assert "Traceback" not in said.err
    assert not (folder / "runs").exists()


@pytest.mark.parametrize("verb", ["plan", "run"])
@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["tyny.yaml"], r"error: tyny\.yaml: no such file \(did you mean tiny\.yaml\?\)"),
        (["tiny.yaml", "train.lrr=1"], r"error: override train\.lrr=1: .*unknown key 'lrr'.*did you mean 'lr'"),
        (["tiny.yaml", "train.lr"], r"error: override .*train\.lr"),
        (["tiny.yaml", "train.tokens=none"], r"error: override train\.tokens=none: .*got 'none'"),
    ],
)
def test_a_mistake_on_the_command_line_is_one_message(
    gatesweep: Gatesweep, folder: Path, verb: str, arguments: list[str], expected: str
):
    said = gatesweep(verb, *arguments)
    assert (said.code, said.out) == (2, "")
    assert re.match(expected, said.err), said.err
    assert not (folder / "runs").exists()


def test_run_refuses_a_sweep_with_a_cell_that_cannot_run_and_starts_nothing(
    gatesweep: Gatesweep, folder: Path, machine: Machine
):
    said = gatesweep("run", "tiny.yaml", "resources.layout.tensor=3", "axes.train.lr=[1e-3,2e-3,3e-3]")
    assert (said.code, said.out) == (2, "")
    lines = said.err.splitlines()
    assert lines[0].endswith("tiny.yaml: 6 cell(s) are refused, nothing was started:")
    assert "model.num_query_heads 4 is not divisible by layout.tensor 3" in lines[1]
    assert lines[2].strip() == (
        "baseline, train.lr=0.001; baseline, train.lr=0.002; baseline, train.lr=0.003; g1, train.lr=0.001; and 2 more"
    )
    assert len(lines) == 3
    assert machine.num_ray_starts == 0
    assert not (folder / "runs").exists()


@pytest.mark.parametrize(
    ("variable", "value", "expected"),
    [
        ("GATESWEEP_HOME", "tiny.yaml/runs", r"error: GATESWEEP_HOME .*tiny\.yaml/runs can't be made: Not a directory"),
        (
            "GATESWEEP_STORE",
            "mysql://host/x",
            r"error: the store can't be kept in mysql; use sqlite:///PATH or postgres",
        ),
        ("GATESWEEP_STORE", "nonsense", r"error: the store's URL 'nonsense' can't be read"),
    ],
)
def test_a_mistake_in_the_environment_is_one_message(
    gatesweep: Gatesweep, machine: Machine, monkeypatch: pytest.MonkeyPatch, variable: str, value: str, expected: str
):
    monkeypatch.setenv(variable, value)
    said = gatesweep("run", "tiny.yaml")
    assert (said.code, said.out) == (2, "")
    assert re.match(expected, said.err), said.err
    assert machine.num_ray_starts == 0


def test_resources_that_the_cluster_lacks_are_refused_and_leave_nothing_running(
    gatesweep: Gatesweep, folder: Path, machine: Machine
):
    said = gatesweep("run", "tiny.yaml", "resources.cpus=5000")
    assert said.code == 2
    assert "a gang asks for 1 rank(s) x 5000 CPU" in said.err
    assert set(states(folder).values()) == {"WAITING"}
    with store_of(folder) as store:
        assert store.lease_holder(store.sweep("tiny").id) is None


@pytest.mark.parametrize(
    "verb", [["status"], ["results", "tiny"], ["query", "SELECT 1"], ["rerun", "tiny", "--failed"]]
)
def test_before_the_first_run_readers_say_so_and_make_no_home(gatesweep: Gatesweep, folder: Path, verb: list[str]):
    said = gatesweep(*verb)
    assert (said.code, said.out) == (2, "")
    assert re.match(r"error: nothing has run yet: no store at sqlite:////.*runs/gatesweep\.db", said.err)
    assert not (folder / "runs").exists()


# -- run --------------------------------------------------------------------------------------------------------


def test_run_ends_in_the_table_and_again_it_starts_nothing(gatesweep: Gatesweep, folder: Path, machine: Machine):
    first = gatesweep("run", "tiny.yaml")
    assert (first.code, first.err) == (0, "")
    lines = first.out.splitlines()
    assert lines[0] == "tiny: 2 trials, 2 new, 0 finished, 2 to run"
    events = [line.split(maxsplit=1)[1] for line in lines[1:] if re.match(r"\d\d:\d\d:\d\d ", line)]
    assert [event.split()[0] for event in events if not event.startswith("tiny:")].count("complete") == 2
    assert "\x1b" not in first.out
    again = gatesweep("run", "tiny.yaml")
    assert (again.code, again.err) == (0, "")
    assert again.out.splitlines()[0] == "tiny: 2 trials, 0 new, 2 finished, 0 to run"
    assert first.out.endswith(again.out.partition("\n")[2])
    assert machine.num_ray_starts == 1


def test_failed_trials_give_exit_code_1_and_the_way_on(gatesweep: Gatesweep, folder: Path, machine: Machine):
    machine.meet(dying_g1)
    said = gatesweep("run", "tiny.yaml")
    assert said.code == 1
    assert "1 trial(s) FAILED; gatesweep status says why, gatesweep rerun tiny --failed" in said.out
    status = gatesweep("status")
    assert status.code == 0
    for part in ("tiny: 1 failed trial", "error: ValueError: the corpus is gone; no retry allowed", "| the last words"):
        assert part in status.out

    machine.meet(all_goes_well)
    assert gatesweep("run", "tiny.yaml").code == 1  # FAILED is final until it is said otherwise
    rerun = gatesweep("rerun", "tiny", "--failed")
    assert (rerun.code, rerun.out.split()[0]) == (0, "1")
    assert gatesweep("run", "tiny.yaml").code == 0
    assert states(folder) == {"baseline/1": "COMPLETE", "g1/1": "COMPLETE"}


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_stops_cleanly_and_the_next_run_goes_on(
    gatesweep: Gatesweep, folder: Path, machine: Machine, number: signal.Signals
):
    def interrupting(_spec: Any, _config: Any, step: int) -> None:
        if step == 7:
            os.kill(os.getpid(), number)

    before = signal.getsignal(number)
    machine.meet(interrupting)
    said = gatesweep("run", "tiny.yaml")
    assert said.code == 130
    assert f"stopping: {number.name}; running trials checkpoint and will be resumed" in said.out
    assert f"stopped: {number.name}; the same command goes on from here" in said.out
    assert "WAITING" in states(folder).values()
    assert signal.getsignal(number) == before
    machine.meet(all_goes_well)
    again = gatesweep("run", "tiny.yaml")
    assert again.code == 0
    assert "attempt 2 from step" in again.out


def test_run_is_refused_while_another_one_runs_the_sweep_and_leaves_its_plan_alone(
    gatesweep: Gatesweep, folder: Path, machine: Machine
):
    gatesweep("run", "tiny.yaml")
    with store_of(folder) as store:
        lease = store.acquire_lease(store.sweep("tiny").id, "another-host:77", 60)
        said = gatesweep("run", "tiny.yaml", "seeds=[5,6]")
        assert (said.code, said.out) == (2, "")
        assert said.err.startswith("error: sweep tiny is run by another-host:77 now; nothing was changed")
        store.release_lease(lease)
    assert states(folder) == {"baseline/1": "COMPLETE", "g1/1": "COMPLETE"}


@pytest.mark.parametrize("dies", [False, True])
def test_run_waits_for_another_one_to_end_or_to_lose_its_lease(
    gatesweep: Gatesweep, folder: Path, machine: Machine, monkeypatch: pytest.MonkeyPatch, dies: bool
):
    gatesweep("run", "tiny.yaml")
    with store_of(folder) as store:
        lease = store.acquire_lease(store.sweep("tiny").id, "another-host:77", 0.3 if dies else 60)
        looks = []

        def next_look(_: float) -> None:
            looks.append(store.lease_holder(lease.sweep_id))
            if not dies and len(looks) == 3:
                store.release_lease(lease)

        monkeypatch.setattr(cli_run.time, "sleep", next_look)
        said = gatesweep("run", "tiny.yaml", "seeds=[1,2]", "--wait")
    assert said.code == 0
    assert said.out.count("is run by another-host:77 now: waiting until it ends") == 1
    assert len(looks) >= 1 if dies else len(looks) == 3
    assert set(states(folder).values()) == {"COMPLETE"}
    assert len(states(folder)) == 4


# -- readers ----------------------------------------------------------------------------------------------------


@pytest.fixture
def ran(gatesweep: Gatesweep, machine: Machine) -> Gatesweep:
    """A sweep of two seeds that has run: g1's higher rate diverged, all else is complete."""

    def diverging(_spec: Any, config: Any, step: int) -> Any:
        return "rise" if config.gate is not None and config.train.lr > 1e-3 and step > 3 else None

    machine.meet(diverging)
    assert gatesweep("run", "tiny.yaml", "seeds=[1,2]", "axes.train.lr=[1e-3,2e-3]").code == 0
    return gatesweep


def test_results_as_a_table(ran: Gatesweep):
    said = ran("results", "tiny")
    assert (said.code, said.err) == (0, "")
    assert said.out.startswith("tiny: does it run?")
    for part in ("baseline", "g1", "nats", "diverged", "verdict"):
        assert part in said.out
    assert max(map(len, said.out.splitlines())) <= 120


def test_results_as_csv_json_and_markdown(ran: Gatesweep):
    rows = list(csv.DictReader(io.StringIO(ran("results", "tiny", "--format", "csv").out)))
    assert {row["arm"] for row in rows} == {"baseline", "g1"}
    content = json.loads(ran("results", "tiny", "--format", "json").out)
    assert "tiny" in json.dumps(content)
    markdown = ran("results", "tiny", "--format", "markdown").out
    assert any(set(line) <= set("|-: ") and "|" in line for line in markdown.splitlines())
    assert "\x1b" not in markdown
    for format, part in (
        ("table", "F-Attn"),
        ("csv", "num_loss_spikes"),
        ("json", '"num_loss_spikes"'),
        ("markdown", "| arm |"),
    ):
        said = ran("results", "tiny", "--diagnostics", "--format", format)
        assert (said.code, part in said.out, "verdict" in said.out) == (0, True, False)
    for denominator in ("tokens", "flops", "parameters", "wall-clock"):
        assert f'"denominator": "{denominator}"' in ran(
            "results", "tiny", "--denominator", denominator, "--format", "json"
        ).out  # fmt: skip
    assert "--ladder, --denominator" in ran("results", "tiny", "--denominator", "flops", "--ladder").err
    bad = ran("results", "tiny", "--format", "xml")
    assert bad.code == 2
    assert "xml" in bad.err


def test_query_reads_the_views(ran: Gatesweep):
    sql = "SELECT arm, state, COUNT(*) AS n FROM results GROUP BY arm, state ORDER BY arm, state"
    assert [line.split() for line in ran("query", sql).out.splitlines()] == [
        ["arm", "state", "n"],
        ["baseline", "COMPLETE", "4"],
        ["g1", "COMPLETE", "2"],
        ["g1", "DIVERGED", "2"],
    ]
    rows = list(csv.DictReader(io.StringIO(ran("query", sql, "--format", "csv").out)))
    assert rows[0] == {"arm": "baseline", "state": "COMPLETE", "n": "4"}
    assert json.loads(ran("query", sql, "--format", "json").out)[2] == {"arm": "g1", "state": "DIVERGED", "n": 2}
    missing = ran("query", "SELECT validation_loss_nats FROM results WHERE state = 'DIVERGED'")
    assert [line.strip() for line in missing.out.splitlines()[1:]] == ["NULL", "NULL"]
    assert ran("query", "SELECT arm FROM results WHERE arm = 'none'").out == "no rows\n"
    cut = ran("query", sql, "--format", "csv", "--max-rows", "2")
    assert (len(cut.out.splitlines()), "there are more rows than these 2" in cut.err) == (3, True)


@pytest.mark.parametrize(
    "sql",
    [
        "DELETE FROM trial",
        "DROP TABLE trial",
        "UPDATE trial SET state = 'COMPLETE'",
        "PRAGMA user_version = 3",
        "SELECT 1; DELETE FROM trial",
        "WITH gone AS (SELECT 1) DELETE FROM trial",
        "ATTACH 'other.db' AS other",
    ],
)
def test_query_refuses_to_write(gatesweep: Gatesweep, folder: Path, machine: Machine, sql: str):
    gatesweep("run", "tiny.yaml")
    said = gatesweep("query", sql)
    assert (said.code, said.out) == (2, "")
    assert said.err.startswith("error: ")
    assert "Traceback" not in said.err
    assert states(folder) == {"baseline/1": "COMPLETE", "g1/1": "COMPLETE"}


def test_a_mistake_in_sql_is_a_message(ran: Gatesweep):
    said = ran("query", "SELECT arn FROM results")
    assert (said.code, said.out) == (2, "")
    assert "no such column: arn" in said.err


@pytest.mark.parametrize("verb", [["results"], ["rerun", "--failed"], ["cancel"]])
def test_an_unknown_sweep_gets_the_nearest_name(ran: Gatesweep, verb: list[str]):
    said = ran(verb[0], "tinny", *verb[1:])
    assert (said.code, said.out) == (2, "")
    assert said.err.startswith("error: no sweep 'tinny' in the store")
    assert "did you mean 'tiny'?" in said.err


def test_status_counts_the_trials_of_every_sweep(ran: Gatesweep, folder: Path):
    write_sweep(folder, SWEEP.replace("name: tiny", "name: other"), "other.yaml")
    assert ran("run", "other.yaml").code == 0
    said = ran("status")
    assert said.code == 0
    rows = {line.split()[0]: line.split()[1:] for line in said.out.splitlines() if line.startswith(("tiny ", "other "))}
    assert rows["tiny"] == ["6", "2", "8", "-"]  # complete, diverged, all, and nobody runs it
    assert rows["other"][-2:] == ["2", "-"]


# -- rerun and cancel -------------------------------------------------------------------------------------------


def test_cancel_and_rerun_move_what_they_are_told_and_say_how_many(
    gatesweep: Gatesweep, folder: Path, machine: Machine
):
    def stop_at_once(_spec: Any, _config: Any, step: int) -> None:
        os.kill(os.getpid(), signal.SIGINT)

    machine.meet(stop_at_once)
    assert gatesweep("run", "tiny.yaml").code == 130
    assert set(states(folder).values()) == {"WAITING"}
    said = gatesweep("cancel", "tiny")
    assert (said.code, said.out) == (0, "2 trial(s) canceled\n")
    assert set(states(folder).values()) == {"CANCELED"}
    machine.meet(all_goes_well)
    assert gatesweep("run", "tiny.yaml").out.splitlines()[0] == "tiny: 2 trials, 0 new, 0 finished, 0 to run"
    assert gatesweep("rerun", "tiny", "--failed").out == "nothing to rerun\n"
    with store_of(folder) as store:
        one = store.trials(store.sweep("tiny").id)[0].fingerprint
    assert gatesweep("rerun", "tiny", "--trial", one).out.startswith("1 trial(s)")
    assert gatesweep("rerun", "tiny", "--canceled").out.startswith("1 trial(s)")
    assert gatesweep("run", "tiny.yaml").code == 0
    assert set(states(folder).values()) == {"COMPLETE"}


def test_rerun_says_what_it_cannot_do(ran: Gatesweep, folder: Path):
    assert "say which trials: --failed, --canceled, --where KEY=VALUE or --trial" in ran("rerun", "tiny").err
    with store_of(folder) as store:
        finished = store.trials(store.sweep("tiny").id)[0].fingerprint
    said = ran("rerun", "tiny", "--trial", finished)
    assert said.code == 2
    assert re.search(r"is (COMPLETE|DIVERGED); only FAILED and CANCELED trials can be rerun", said.err)
    said = ran("rerun", "tiny", "--trial", "0123456789abcdef")
    assert "--trial 0123456789abcdef: no trial of this sweep" in said.err
    said = ran("cancel", "tiny", "--trial", finished)
    assert (said.code, said.err) == (2, f"error: cancel: neither WAITING nor RUNNING in tiny: {finished}\n")


def test_verbs_work_on_a_slice_of_a_sweep(ran: Gatesweep, folder: Path):
    assert ran("cancel", "tiny", "--where", "arm=g1").out == "0 trial(s) canceled\n"
    assert "--where width: no such key; allowed: arm, state" in ran("rerun", "tiny", "--where", "width=3").err


def test_caps_are_set_for_a_sweep_and_checked(ran: Gatesweep):
    assert ran("set", "tiny", "max_trials=1").out == "max_trials=1 from now on; heeded when the sweep runs again\n"
    said = ran("set", "tiny", "max_trial=1")
    assert said.code == 2
    assert "did you mean 'max_trials'?" in said.err


def test_logs_print_what_a_rank_said(ran: Gatesweep, folder: Path):
    with store_of(folder) as store:
        one = store.trials(store.sweep("tiny").id)[0].fingerprint
    assert ran("logs", one[:10]).out == "begin\nthe last words\n"
    assert f"no log of rank 3 at {folder}" in ran("logs", one, "--rank", "3").err.replace("\n", "")
    assert "has attempts [1], not 9" in ran("logs", one, "--attempt", "9").err


def test_diff_shows_how_two_trials_differ(ran: Gatesweep):
    asked = "SELECT min(fingerprint) AS one FROM results GROUP BY arm ORDER BY arm"
    first, second = (row["one"] for row in json.loads(ran("query", asked, "--format", "json").out))
    told = json.loads(ran("diff", first[:10], second, "--format", "json").out)
    assert "gate.position" in [one["key"] for one in told["config"]]
    assert "gate.position" in ran("diff", first, second).out
    assert "no trial has the fingerprint nothing" in ran("diff", first, "nothing").err


# -- help, and the environment ----------------------------------------------------------------------------------

VERBS = ("plan", "run", "status", "results", "query", "db", "rerun", "cancel", "set", "logs", "diff", "reproduce", "ui")


@pytest.mark.parametrize("verb", VERBS)
def test_every_verb_explains_itself(gatesweep: Gatesweep, folder: Path, verb: str):
    said = gatesweep(verb, "--help")
    assert (said.code, said.err) == (0, "")
    assert re.search(rf"Usage: .* {verb} ", said.out)
    assert not (folder / "runs").exists()


def test_help_lists_every_verb(gatesweep: Gatesweep):
    said = gatesweep("--help")
    assert said.code == 0
    assert all(re.search(rf"\b{verb}\b", said.out) for verb in VERBS)


def test_the_reading_verbs_do_not_wait_for_heavy_libraries():
    """Ray and MLflow take seconds to import; help and plan need neither, and no torch is ever loaded here."""
    code = (
        "import sys; import orchestrator.cli.app; import orchestrator.report; "
        "print([name for name in ('ray', 'mlflow', 'optuna', 'torch', 'matplotlib') if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=os.getcwd(),
                          env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)})  # fmt: skip
    assert done.stdout.strip() == "[]"


def test_the_controllers_process_loads_no_torch():
    code = "import sys; import orchestrator.cli.run; print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=os.getcwd(),
                          env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)})  # fmt: skip
    assert done.stdout.strip() == "False"


def test_home_is_runs_here_and_every_part_can_be_moved(folder: Path):
    plain = Home.of({})
    assert plain.directory == folder / "runs"
    assert plain.store_url == f"sqlite:///{folder}/runs/gatesweep.db"
    assert plain.artifact_location == f"{folder}/runs/mlartifacts"
    moved = Home.of(
        {
            "GATESWEEP_HOME": "elsewhere",
            "GATESWEEP_STORE": "postgresql+psycopg://user@host/gatesweep",
            "MLFLOW_TRACKING_URI": "http://host:5000",
        }
    )
    assert moved.directory == folder / "elsewhere"
    assert moved.store_url == "postgresql+psycopg://user@host/gatesweep"
    assert (moved.tracking_uri, moved.artifact_location) == ("http://host:5000", None)
    assert Home.of({"GATESWEEP_MLFLOW": "a", "MLFLOW_TRACKING_URI": "b"}).tracking_uri == "a"
