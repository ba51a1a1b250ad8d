"""A sweep handed to a cluster: what is sent, what never is, and what its driver does. Ray Jobs is a fake here."""

from __future__ import annotations

import hashlib
import json
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from rich.console import Console
from sweep_runs import SWEEP, plan_of, write_sweep

from orchestrator import cli
from orchestrator.cli import parcel, submit, submitted
from orchestrator.gang import jobs, source_hash
from orchestrator.plan import Plan, expand
from orchestrator.sweep import UserError, load

ADDRESS = ("--address", "http://head:8265")
PROVENANCE = {"source_hash": source_hash(), "commit": "abc", "dirty": False}
PLANNED = "Running entrypoint\ntiny: 2 trials, 2 new, 0 finished, 2 to run\n"


class FakeRayJobs:
    """Ray's JobSubmissionClient: keeps what it is sent; ``status`` and ``log`` are what it says of the newest job."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.requests, self.stopped = folder, [], []
        self.status, self.log = "RUNNING", PLANNED

    def list_jobs(self) -> list[Any]:
        return [self.get_job_info(one["submission_id"]) for one in self.requests]

    def submit_job(self, **request: Any) -> str:
        sent = Path(request["runtime_env"]["working_dir"])
        shutil.copytree(sent, self.folder / request["submission_id"])
        self.requests.append(request)
        return request["submission_id"]

    def get_job_info(self, job_id: str) -> Any:
        newest = job_id == self.requests[-1]["submission_id"]
        metadata = next(one["metadata"] for one in self.requests if one["submission_id"] == job_id)
        status = self.status if newest else "STOPPED"
        facts = {"submission_id": job_id, "metadata": metadata, "status": status, "message": "", "end_time": None}
        return SimpleNamespace(**facts, start_time=1_000 * len(self.requests))

    def get_job_logs(self, _job_id: str) -> str:
        return self.log

    def stop_job(self, job_id: str) -> bool:
        self.stopped.append(job_id)
        return True


@pytest.fixture
def ray_jobs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> FakeRayJobs:
    fake = FakeRayJobs(tmp_path / "sent")
    monkeypatch.setattr(jobs, "_client", lambda _address, _headers: fake)
    monkeypatch.setattr(submit, "POLL_SECONDS", 0.0)
    return fake


Run = Callable[..., tuple[int, str]]


@pytest.fixture
def gatesweep(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Run:
    """The command, as on a laptop: exit code and all that was printed."""
    monkeypatch.setenv("GATESWEEP_HOME", str(tmp_path / "laptop"))

    def run(*arguments: str) -> tuple[int, str]:
        monkeypatch.setattr(sys, "argv", ["gatesweep", *arguments])
        code: Any = 0
        try:
            cli.main()
        except SystemExit as ended:
            code = ended.code or 0
        said = capsys.readouterr()
        return code, said.out + said.err

    return run


def packed(folder: Path, plan: Plan, overrides: tuple[str, ...] = ()) -> Path:
    folder.mkdir()
    parcel.pack(plan, overrides, PROVENANCE, folder, None)
    return folder


def test_the_parcel_holds_this_very_version_and_the_files_beside_the_sweep(
    tmp_path: Path, ray_jobs: FakeRayJobs, gatesweep: Run
):
    file = write_sweep(tmp_path / "sweeps")
    code, said = gatesweep("submit", str(file), "train.tokens=2560", *ADDRESS, "--home", "/shared/home")
    assert code == 0, said
    assert "tiny: 2 trials, 2 new" in said
    sent = tmp_path / "sent" / "gatesweep-tiny-1"
    digest = hashlib.sha256()
    for package in ("models", "orchestrator"):
        for path in sorted((sent / package).rglob("*.py")):
            digest.update(f"{package}/{path.relative_to(sent / package)}".encode() + path.read_bytes())
    assert digest.hexdigest()[:16] == source_hash()
    assert (sent / "models" / "data").is_dir()
    assert list((sent / "orchestrator").rglob("*.mako"))
    assert (sent / "sweep" / "corpus.jsonl").read_bytes() == (file.parent / "corpus.jsonl").read_bytes()
    said_to_driver = json.loads((sent / "parcel.json").read_text())
    assert said_to_driver["sweep_file"] == "tiny.yaml"
    assert said_to_driver["overrides"] == ["train.tokens=2560"]
    assert ray_jobs.requests[0]["runtime_env"]["env_vars"] == {
        "RAY_JOB_STOP_WAIT_TIME_S": str(submit.STOP_SECONDS),
        "GATESWEEP_HOME": "/shared/home",
    }


def test_nothing_of_the_laptops_environment_is_sent(
    tmp_path: Path, ray_jobs: FakeRayJobs, gatesweep: Run, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setenv("GATESWEEP_STORE", "postgresql+psycopg://me:hush-hush@db/sweeps")
    monkeypatch.setenv("GATESWEEP_MLFLOW", "https://me:hush-hush@mlflow")
    code, said = gatesweep("submit", str(write_sweep(tmp_path / "sweeps")), *ADDRESS)
    assert code == 0, said
    sent = [path for path in (tmp_path / "sent").rglob("*") if path.is_file()]
    assert not [path for path in sent if b"hush-hush" in path.read_bytes()]
    assert "hush-hush" not in repr(ray_jobs.requests) + said


@pytest.mark.parametrize(
    "options",
    [
        ("--store", "postgresql://me:hush-hush@db/sweeps"),
        ("--mlflow", "https://me:hush-hush@mlflow"),
        ("question=postgresql://me:hush-hush@db",),
    ],
)
def test_a_url_with_a_password_is_refused_before_anyone_is_asked(
    tmp_path: Path, ray_jobs: FakeRayJobs, gatesweep: Run, options: tuple[str, ...]
):
    code, said = gatesweep("submit", str(write_sweep(tmp_path / "sweeps")), *options, *ADDRESS)
    assert code == 2
    assert "--store-file" in said
    assert "hush-hush" not in said
    assert not ray_jobs.requests


def test_a_password_in_the_sweep_file_is_refused(tmp_path: Path, ray_jobs: FakeRayJobs, gatesweep: Run):
    file = write_sweep(tmp_path / "sweeps", SWEEP + "# https://me:hush-hush@host\n")
    code, said = gatesweep("submit", str(file), *ADDRESS)
    assert code == 2
    assert "tiny.yaml: a URL with a password" in said
    assert not ray_jobs.requests


def test_what_plan_refuses_is_refused_here(tmp_path: Path, ray_jobs: FakeRayJobs, gatesweep: Run):
    file = write_sweep(tmp_path / "sweeps")
    code, said = gatesweep("submit", str(file), "resources.layout.pipeline=3", *ADDRESS)
    assert code == 2
    assert "nothing was started" in said
    assert not ray_jobs.requests


def test_a_corpus_that_belongs_to_the_cluster_is_not_looked_for_here(
    tmp_path: Path, ray_jobs: FakeRayJobs, gatesweep: Run
):
    file = write_sweep(tmp_path / "sweeps", SWEEP.replace("corpus.jsonl", "/shared/corpus.jsonl"))
    code, said = gatesweep("submit", str(file), *ADDRESS)
    assert code == 0, said
    assert [path.name for path in (tmp_path / "sent/gatesweep-tiny-1/sweep").iterdir()] == ["tiny.yaml"]


def test_large_files_beside_the_sweep_are_refused_with_the_mend(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(parcel, "MOST_FILE_BYTES", 1000)
    with pytest.raises(UserError, match=r"at most 1,000 are sent along. Copy it onto the path that the cluster shares"):
        packed(tmp_path / "parcel", plan_of(tmp_path / "sweeps"))


def test_files_in_other_folders_keep_their_places(tmp_path: Path):
    file = write_sweep(tmp_path / "a" / "sweeps", SWEEP.replace("corpus.jsonl", "../corpora/c.jsonl"))
    (tmp_path / "a" / "corpora").mkdir()
    (file.parent / "corpus.jsonl").rename(tmp_path / "a" / "corpora" / "c.jsonl")
    folder = packed(tmp_path / "parcel", expand(load(file, ())))
    sent = parcel.Parcel.model_validate_json((folder / "parcel.json").read_text())
    placed = parcel.unpack_sweep(folder, sent, tmp_path / "home")
    fingerprints = [[one.fingerprint for one in expand(load(path, ())).trials] for path in (file, placed)]
    assert fingerprints[0] == fingerprints[1]


def test_a_sweep_that_runs_is_told_and_not_doubled(tmp_path: Path, ray_jobs: FakeRayJobs, gatesweep: Run):
    file = write_sweep(tmp_path / "sweeps")
    gatesweep("submit", str(file), *ADDRESS)
    code, said = gatesweep("submit", str(file), *ADDRESS)
    assert code == 0
    assert "gatesweep-tiny-1 is RUNNING already; nothing was sent" in said
    ray_jobs.status = "SUCCEEDED"
    _, said = gatesweep("submit", str(file), *ADDRESS)
    assert [one["submission_id"] for one in ray_jobs.requests] == ["gatesweep-tiny-1", "gatesweep-tiny-2"]


def test_a_driver_that_fails_at_once_is_told_with_its_words(tmp_path: Path, ray_jobs: FakeRayJobs, gatesweep: Run):
    ray_jobs.status, ray_jobs.log = "FAILED", "Running entrypoint\nerror: GATESWEEP_HOME is not set on the cluster\n"
    code, said = gatesweep("submit", str(write_sweep(tmp_path / "sweeps")), *ADDRESS)
    assert code == 2
    assert "gatesweep-tiny-1 failed before it began" in said
    assert "GATESWEEP_HOME is not set on the cluster" in said


def test_stop_status_and_logs_find_the_sweeps_last_job(tmp_path: Path, ray_jobs: FakeRayJobs, gatesweep: Run):
    file = write_sweep(tmp_path / "sweeps")
    gatesweep("submit", str(file), *ADDRESS)
    _, listed = gatesweep("status", *ADDRESS)
    assert "gatesweep-tiny-1" in listed
    assert "RUNNING" in listed
    assert gatesweep("logs", "tiny", *ADDRESS)[1] == PLANNED
    assert gatesweep("submit", "--stop", "tiny", *ADDRESS)[0] == 0
    assert ray_jobs.stopped == ["gatesweep-tiny-1"]
    ray_jobs.status = "STOPPED"
    code, said = gatesweep("submit", "--stop", "tiny", *ADDRESS)
    assert (code, "has ended already" in said) == (2, True)
    code, said = gatesweep("submit", "--stop", "other", *ADDRESS)
    assert (code, "its sweeps: tiny" in said) == (2, True)


@pytest.mark.parametrize("arguments", [("submit",), ("submit", "x.yaml", "--stop", "tiny")])
def test_submit_wants_a_file_or_a_stop(gatesweep: Run, arguments: tuple[str, ...]):
    code, said = gatesweep(*arguments, *ADDRESS)
    assert (code, "allowed: a sweep FILE to submit, or --stop SWEEP" in said) == (2, True)


def test_the_address_given_counts_and_not_rays_variables(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("RAY_ADDRESS", "http://other:1")
    monkeypatch.setenv("RAY_API_SERVER_ADDRESS", "http://other:2")
    with pytest.raises(UserError, match=r"Ray Jobs at http://127.0.0.1:9: ConnectionError: .*127.0.0.1:9"):
        jobs.Jobs("http://127.0.0.1:9")


def test_the_token_comes_from_a_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    seen: dict[str, str] = {}
    monkeypatch.setattr(jobs, "_client", lambda _address, headers: seen.update(headers))
    (tmp_path / "token").write_text("abc\n")
    jobs.Jobs("http://head:8265", tmp_path / "token")
    assert seen == {"Authorization": "Bearer abc"}
    with pytest.raises(UserError, match=r"--token-file .*none can't be read"):
        jobs.Jobs("http://head:8265", tmp_path / "none")


def drive(folder: Path, home: Path | None) -> tuple[int, str]:
    console = Console(width=200, record=True)
    environment = {"RAY_ADDRESS": "10.0.0.1:6379"} | ({} if home is None else {"GATESWEEP_HOME": str(home)})
    return submitted.run_parcel(folder, environment, console), console.export_text()


def test_the_driver_runs_the_sweep_from_the_shared_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    ran: list[Any] = []
    monkeypatch.setattr("orchestrator.cli.run.run_sweep", lambda *given, **_: ran.append(given) or 0)
    plan = plan_of(tmp_path / "sweeps", ("train.tokens=2560",))
    folder, home = packed(tmp_path / "parcel", plan, ("train.tokens=2560",)), tmp_path / "home"
    for _ in range(2):  # the second submission finds the files in place
        assert drive(folder, home)[0] == 0
    there, at_home, address, _ = ran[-1]
    assert [trial.fingerprint for trial in there.trials] == [trial.fingerprint for trial in plan.trials]
    assert Path(there.trials[0].config.data.corpus).is_relative_to(home / "submitted")
    assert (at_home.directory, address) == (home, "10.0.0.1:6379")
    assert len(list((home / "submitted").iterdir())) == 1


def test_a_driver_with_other_packages_than_those_sent_refuses(tmp_path: Path):
    folder = packed(tmp_path / "parcel", plan_of(tmp_path / "sweeps"))
    sent = json.loads((folder / "parcel.json").read_text())
    (folder / "parcel.json").write_text(json.dumps(sent | {"source_hash": "0123"}))
    with pytest.raises(UserError, match=r"the packages here have the hash .*, those sent 0123: others came first"):
        drive(folder, tmp_path / "home")
    with pytest.raises(UserError, match="which is not what gatesweep submit sent"):
        drive(tmp_path, tmp_path / "home")


def test_a_driver_without_a_home_refuses(tmp_path: Path):
    with pytest.raises(UserError, match=r"GATESWEEP_HOME is not set on the cluster; .* --home"):
        drive(packed(tmp_path / "parcel", plan_of(tmp_path / "sweeps")), None)
