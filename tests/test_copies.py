"""Checkpoints and reports on another file system: whole or not at all, back only when signed, and no trouble for a
sweep. On a folder, in memory, and on a local S3 server."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from uuid import uuid4

import pytest
from fake_gangs import FakeCluster, bench, plan  # noqa: F401
from rich.console import Console
from small_trials import corpus_trial, new_attempt
from store_runs import Run
from sweep_runs import plan_of
from typer.testing import CliRunner

from models import run_dir, trust
from models.config import TrialConfig
from orchestrator.cli.app import app
from orchestrator.cli.home import Home
from orchestrator.copies import Copier, CopyError, Place, copy_checkpoint, fetch, noted_url
from orchestrator.copies import place as places
from orchestrator.doctor import Level, check_copies
from orchestrator.store import Store
from orchestrator.sweep import UserError

BUCKET = "a-bucket"
SECRET = "do-not-tell-anyone-1"


@pytest.fixture(autouse=True)
def no_waiting(monkeypatch):
    monkeypatch.setattr("tenacity.nap.time.sleep", lambda _: None)
    monkeypatch.setattr(places, "_S3_PATIENCE", {"retries": {"total_max_attempts": 1}})


@pytest.fixture(scope="module")
def s3_server() -> Iterator[str]:
    from moto.server import ThreadedMotoServer

    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    yield f"http://{host}:{port}"
    server.stop()


@pytest.fixture
def s3(s3_server: str, monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """boto3's client, and its bucket, which is empty; credentials as a user gives them."""
    import boto3
    import s3fs

    monkeypatch.setenv("AWS_ENDPOINT_URL", s3_server)
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "testing")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", SECRET)
    monkeypatch.setenv("AWS_DEFAULT_REGION", "us-east-1")
    client = boto3.client("s3")
    client.create_bucket(Bucket=BUCKET)
    s3fs.S3FileSystem.clear_instance_cache()
    yield client
    for one in keys(client):
        client.delete_object(Bucket=BUCKET, Key=one)
    s3fs.S3FileSystem.clear_instance_cache()


def keys(client: Any) -> list[str]:
    return [one["Key"] for one in client.list_objects_v2(Bucket=BUCKET).get("Contents", [])]


@pytest.fixture(params=["file", "memory", "s3"])
def any_place(request, tmp_path) -> Place:
    if request.param == "s3":
        request.getfixturevalue("s3")
        return Place(f"s3://{BUCKET}/some/prefix", "test")
    return Place(f"memory://{uuid4().hex}" if request.param == "memory" else f"file://{tmp_path}/there", "test")


@pytest.fixture
def place(tmp_path) -> Place:
    return Place(str(tmp_path / "there"), "test")


@dataclass(frozen=True)
class Trial:
    home: Path
    folder: Path
    checkpoint: Path

    @property
    def fingerprint(self) -> str:
        return self.folder.name


def make_trial(home: Path, seed: int = 1, step: int = 4, config: TrialConfig | None = None) -> Trial:
    """A run dir with a signed checkpoint of plain files."""
    trial = config or corpus_trial(Path("/nowhere/corpus.jsonl"), seed=seed)
    spec = new_attempt(home, trial)
    checkpoint = run_dir.checkpoint_path(spec.attempt_dir, step)
    (checkpoint / "more").mkdir(parents=True)
    for name in ("common.pt", "__0_0.distcp", "more/__1_0.distcp"):
        (checkpoint / name).write_bytes(f"{name} of seed {seed} ".encode() * 1000)
    trust.seal(checkpoint, "checkpoint")
    return Trial(home, Path(spec.trial_dir), checkpoint)


@pytest.fixture
def trial(tmp_path) -> Trial:
    return make_trial(tmp_path / "home")


def contents(folder: Path) -> dict[str, bytes]:
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def copied_of(place: Place, trial: Trial) -> Path:
    """Where a folder of this machine keeps the copy of the checkpoint."""
    return Path(place.url) / trial.checkpoint.relative_to(trial.home)


# -- there and back -------------------------------------------------------------------------------------------


def test_what_was_copied_comes_back_byte_for_byte_into_an_empty_home(trial, any_place, tmp_path):
    assert copy_checkpoint(trial.folder, any_place)
    found = fetch(tmp_path / "other", trial.fingerprint[:6], any_place)

    assert contents(found.checkpoint) == contents(trial.checkpoint)
    assert found.checkpoint.relative_to(tmp_path / "other") == trial.checkpoint.relative_to(trial.home)
    trust.check(found.checkpoint, "checkpoint")
    other = run_dir.trial_dir(tmp_path / "other", trial.fingerprint)
    assert run_dir.latest_checkpoint(other) == (4, found.checkpoint)
    assert run_dir.read_trial_config(other) == run_dir.read_trial_config(trial.folder)


def test_it_is_copied_once_to_each_place(trial, place, tmp_path):
    assert copy_checkpoint(trial.folder, place)
    assert noted_url(trial.folder) == place.url
    assert not copy_checkpoint(trial.folder, place)
    assert copy_checkpoint(trial.folder, Place(str(tmp_path / "elsewhere"), "test"))


def test_a_lost_note_sends_nothing_twice(trial, place):
    copy_checkpoint(trial.folder, place)
    (trial.folder / "copied.json").unlink()
    assert not copy_checkpoint(trial.folder, place)
    assert noted_url(trial.folder) == place.url


def test_a_later_checkpoint_is_copied_too_and_the_furthest_one_comes_back(trial, place, tmp_path):
    copy_checkpoint(trial.folder, place)
    later = make_trial(trial.home, step=10).checkpoint
    assert copy_checkpoint(trial.folder, place)
    assert fetch(tmp_path / "other", trial.fingerprint, place).step == 10
    assert later.exists()


def test_cut_short_at_any_file_it_is_no_copy_and_the_next_pass_makes_it_whole(trial, tmp_path, monkeypatch):
    put = Place.put
    for last in range(6):  # config.json, attempt.json, three files, the manifest
        place = Place(str(tmp_path / f"there-{last}"), "test")
        left = [last]

        def put_some(self: Place, source: Path, name: str, left: list[int] = left) -> None:
            if not left[0]:
                raise CopyError("the line is cut")
            left[0] -= 1
            put(self, source, name)

        monkeypatch.setattr(Place, "put", put_some)
        with pytest.raises(CopyError, match="the line is cut"):
            copy_checkpoint(trial.folder, place)
        with pytest.raises(UserError, match=r"no trial|no whole checkpoint"):
            fetch(tmp_path / "other", trial.fingerprint, place)
        monkeypatch.setattr(Place, "put", put)
        assert copy_checkpoint(trial.folder, place)
        assert fetch(tmp_path / f"other-{last}", trial.fingerprint, place).num_bytes > 0


def test_a_torn_checkpoint_is_not_copied(trial, place):
    (trial.checkpoint / "common.pt").write_bytes(b"torn")
    with pytest.raises(trust.Altered, match=r"common\.pt"):
        copy_checkpoint(trial.folder, place)
    assert not Path(place.url).exists()


# -- what is not taken ----------------------------------------------------------------------------------------


def test_a_copy_that_was_changed_is_refused_and_leaves_nothing(trial, place, tmp_path):
    copy_checkpoint(trial.folder, place)
    path = copied_of(place, trial) / "common.pt"
    path.write_bytes(path.read_bytes()[:-1] + b"!")
    with pytest.raises(UserError, match=r"not what was signed: common\.pt has the SHA-256"):
        fetch(tmp_path / "other", trial.fingerprint, place)
    assert not list((tmp_path / "other").rglob("*step_*"))


def test_another_keys_copy_is_refused_before_its_files_are_read(trial, place, tmp_path, monkeypatch):
    copy_checkpoint(trial.folder, place)
    for path in copied_of(place, trial).rglob("*.distcp"):
        path.unlink()
    monkeypatch.setenv(trust.KEY_FILE_VARIABLE, str(tmp_path / "another" / "key"))
    with pytest.raises(UserError, match="signed with another key"):
        fetch(tmp_path / "other", trial.fingerprint, place)


def test_a_manifest_whose_names_lead_out_of_the_folder_is_refused(trial, place, tmp_path):
    copy_checkpoint(trial.folder, place)
    manifest = copied_of(place, trial) / trust.MANIFEST
    content = json.loads(manifest.read_text())
    content["files"]["../../../outside"] = content["files"].pop("common.pt")
    manifest.write_text(json.dumps(content))
    with pytest.raises(UserError, match="changed after it was signed"):
        fetch(tmp_path / "other", trial.fingerprint, place)


@pytest.mark.parametrize("name", ["config.json", "attempts/001-test/attempt.json"])
def test_what_another_trial_left_beside_it_is_refused(trial, place, tmp_path, name):
    copy_checkpoint(trial.folder, place)
    stranger = make_trial(tmp_path / "strange", seed=2)
    shutil.copy(stranger.folder / name, Path(place.url) / "trials" / trial.fingerprint / name)
    with pytest.raises(UserError, match="another"):
        fetch(tmp_path / "other", trial.fingerprint, place)


def test_a_sound_checkpoint_is_left_alone_and_a_torn_one_is_mended(trial, place):
    copy_checkpoint(trial.folder, place)
    before = contents(trial.checkpoint)
    assert fetch(trial.home, trial.fingerprint, place).num_bytes == 0
    (trial.checkpoint / "common.pt").write_bytes(b"torn")
    assert fetch(trial.home, trial.fingerprint, place).num_bytes > 0
    assert contents(trial.checkpoint) == before


def test_a_prefix_that_fits_none_or_several_is_refused(trial, place, tmp_path):
    for one in (trial, make_trial(tmp_path / "home", seed=2)):
        copy_checkpoint(one.folder, place)
    with pytest.raises(UserError, match="begins with 'zz'"):
        fetch(tmp_path / "other", "zz", place)
    with pytest.raises(UserError, match="begins with ''"):
        fetch(tmp_path / "other", "", place)


# -- credentials ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "url",
    [
        f"s3://me:{SECRET}@bucket/x",
        f"s3://{SECRET}@bucket/x",
        f"https://host/x?sig={SECRET}",
        f"simplecache::s3://{SECRET}/x",
        f"s3://bucket/{SECRET}\n",
    ],
)
def test_a_url_with_a_credential_is_refused_and_not_repeated(url):
    with pytest.raises(UserError, match="VARIABLE: a URL with a user") as refusal:
        Place(url, "VARIABLE")
    assert SECRET not in str(refusal.value)
    with pytest.raises(UserError, match="GATESWEEP_MLFLOW_ARTIFACTS: a URL with a user") as refusal:
        Home.of({"GATESWEEP_MLFLOW_ARTIFACTS": url})
    assert SECRET not in str(refusal.value)


def test_a_place_that_is_none_and_a_package_that_is_missing_are_told():
    with pytest.raises(UserError, match="VARIABLE copies: allowed"):
        Place("copies", "VARIABLE")
    with pytest.raises(UserError, match=r"VARIABLE gs://bucket/x: .*gcsfs.*pip install"):
        Place("gs://bucket/x", "VARIABLE").open()
    with pytest.raises(UserError, match="VARIABLE nosuch://x: "):
        Place("nosuch://x", "VARIABLE").open()


def test_errors_of_s3_name_the_place_once_and_no_secret_and_make_no_bucket(s3, trial):
    place = Place("s3://no-such-bucket/x", "test")
    with pytest.raises(CopyError, match=r"s3://no-such-bucket/x/trials/.* can't be") as error:
        copy_checkpoint(trial.folder, place)
    assert SECRET not in str(error.value)
    assert [one["Name"] for one in s3.list_buckets()["Buckets"]] == [BUCKET]


# -- while a sweep runs ---------------------------------------------------------------------------------------


@dataclass
class Flaky:
    """Stands for a place that can be taken away."""

    is_down: bool = False
    url: str = "s3://flaky"


def copier_over(monkeypatch, home: Path, place: Any, clock: list[float]) -> tuple[Copier, list[tuple[str, str]], list]:
    events: list[tuple[str, str]] = []
    copied: list[str] = []

    def copy(folder: Path, place: Any) -> bool:
        if folder.name == "torn":
            raise trust.Altered("common.pt is missing")
        if place.is_down:
            raise CopyError(f"no route, key {SECRET}")
        copied.append(folder.name)
        return True

    monkeypatch.setattr("orchestrator.copies.background.copy_checkpoint", copy)
    copier = Copier(home, place, lambda kind, message: events.append((kind, message)), clock=lambda: clock[0])
    return copier, events, copied


def test_a_place_that_is_down_is_told_of_once_and_caught_up_with(monkeypatch, tmp_path):
    monkeypatch.setenv("SOME_SECRET", SECRET)
    place = Flaky(is_down=True)
    copier, events, copied = copier_over(monkeypatch, tmp_path, place, [0.0])
    copier.add(["a", "b"])
    copier.step()
    copier.step()
    assert [kind for kind, _ in events] == ["copies_down"]
    assert SECRET not in events[0][1]
    assert (copied, copier.num_left) == ([], 2)
    place.is_down = False
    copier.step()
    assert [kind for kind, _ in events] == ["copies_down", "copies_back"]
    assert (copied, copier.num_left, copier.num_copied) == (["a", "b"], 0, 2)


def test_a_torn_checkpoint_holds_up_no_other_and_is_not_tried_again(monkeypatch, tmp_path):
    copier, events, copied = copier_over(monkeypatch, tmp_path, Flaky(), [0.0])
    copier.add(["torn", "a"])
    copier.step()
    assert [kind for kind, _ in events] == ["copy_refused"]
    assert (copied, copier.num_left) == (["a"], 0)


def test_closing_copies_what_is_left_and_gives_up_at_once_where_the_place_is_down(monkeypatch, tmp_path):
    for is_down, left in ((False, 0), (True, 2)):
        copier, _, _ = copier_over(monkeypatch, tmp_path, Flaky(is_down), [0.0])
        copier.start()
        copier.add(["a", "b"])
        assert copier.close(60.0) == left


def test_events_that_the_store_does_not_take_are_no_end_of_the_thread(monkeypatch, tmp_path):
    copier, _, copied = copier_over(monkeypatch, tmp_path, Flaky(), [0.0])
    monkeypatch.setattr(copier, "_tell_event", lambda *_: 1 / 0)
    copier.add(["torn", "a"])
    copier.step()
    assert copied == ["a"]


def test_the_controller_hands_over_what_is_complete_and_nothing_else(bench, plan):  # noqa: F811
    handed: list[str] = []

    class Noting:
        def add(self, fingerprints):
            handed.extend(fingerprints)

    with bench.controller(
        plan, FakeCluster(2, lambda _, config, step: "not finite" if config.gate and step == 3 else None)
    ) as controller:
        controller.sweep_run.copier = Noting()  # type: ignore[assignment]
        controller.run()
    rows = bench.trials(plan).values()
    assert {row.state for row in rows} == {"COMPLETE", "DIVERGED"}
    assert handed == [row.fingerprint for row in rows if row.state == "COMPLETE"]


# -- the verbs ------------------------------------------------------------------------------------------------


@pytest.fixture
def at_home(tmp_path, monkeypatch) -> Path:
    monkeypatch.setenv("GATESWEEP_HOME", str(tmp_path / "home"))
    for name in ("GATESWEEP_COPIES", "GATESWEEP_STORE", "GATESWEEP_MLFLOW", "MLFLOW_TRACKING_URI"):
        monkeypatch.delenv(name, raising=False)
    return tmp_path / "home"


def gatesweep(*arguments: str) -> str:
    result = CliRunner().invoke(app, [*arguments], catch_exceptions=False)
    assert result.exit_code == 0, result.output
    return result.output


def test_fetch_looks_where_it_is_told_else_where_copies_go_else_where_the_trial_was_copied_to(
    trial, at_home, place, tmp_path, monkeypatch
):
    copy_checkpoint(trial.folder, place)
    shutil.rmtree(trial.checkpoint)
    assert "as they were signed" in gatesweep("fetch", trial.fingerprint)
    assert "here already" in gatesweep("fetch", trial.fingerprint, "--from", place.url)
    monkeypatch.setenv("GATESWEEP_COPIES", str(tmp_path / "empty"))
    with pytest.raises(UserError, match=r"no trial in .*empty/trials"):
        gatesweep("fetch", trial.fingerprint)
    monkeypatch.delenv("GATESWEEP_COPIES")
    with pytest.raises(UserError, match="where from"):
        gatesweep("fetch", "zz")


def test_a_run_copies_what_is_complete_says_what_is_left_and_the_next_one_copies_it(
    at_home, place, tmp_path, monkeypatch
):
    at_home.mkdir()
    sweep = plan_of(tmp_path)
    with Store(Home.of().store_url) as store:
        run = Run(store, sweep)
        for trial in sweep.trials:
            make_trial(at_home, config=trial.config)
            run.complete(trial.fingerprint, 2.5)
        store.release_lease(run.lease)
    monkeypatch.setattr("orchestrator.cli.run.catch_up", lambda *_: None)
    monkeypatch.setattr("orchestrator.cli.app.console", Console(width=400))
    monkeypatch.setenv("GATESWEEP_COPIES", str(tmp_path / "file" / "no-folder"))
    (tmp_path / "file").write_text("in the way")
    file = str(tmp_path / "tiny.yaml")
    assert f"2 checkpoint(s) are not copied to {tmp_path}/file/no-folder; gatesweep status" in gatesweep("run", file)
    with Store(Home.of().store_url) as store:
        (event,) = store.events(kind="copies_down")
    assert "no-folder" in event.message
    monkeypatch.setenv("GATESWEEP_COPIES", place.url)
    assert f"2 checkpoint(s) copied to {place.url}" in gatesweep("run", file)
    assert "copied" not in gatesweep("run", file)
    for trial in sweep.trials:
        assert fetch(tmp_path / "other", trial.fingerprint, place).num_bytes > 0


@pytest.fixture
def ended(at_home) -> Iterator[Run]:
    at_home.mkdir(exist_ok=True)
    with Store(Home.of().store_url) as store:
        yield Run(store)


def test_a_report_goes_to_a_url_or_beside_the_copies(ended, s3, monkeypatch):
    sweep = ended.plan.sweep.name
    assert f"s3://{BUCKET}/told/report.html" in gatesweep("report", sweep, "--out", f"s3://{BUCKET}/told")
    monkeypatch.setenv("GATESWEEP_COPIES", f"s3://{BUCKET}/all/")
    assert f"copied to s3://{BUCKET}/all/reports/{sweep}" in gatesweep("report", sweep)
    assert {"told/report.html", f"all/reports/{sweep}/report.html"} <= set(keys(s3))
    assert not any(Path("s3:").glob("*"))


def test_an_export_goes_to_a_url_that_is_empty_with_its_config_last(trial, at_home, place, monkeypatch):
    def write(*arguments: str) -> int:
        folder = Path(arguments[-1])
        folder.mkdir()
        for name in ("config.json", "model.safetensors", "tokenizer.json"):
            (folder / name).write_text(name)
        return 0

    order: list[str] = []
    put = Place.put
    monkeypatch.setattr(Place, "put", lambda self, source, name: (order.append(name), put(self, source, name))[1])
    monkeypatch.setattr("orchestrator.cli.trained._models_verb", write)
    url = f"file://{place.url}"
    gatesweep("export", trial.fingerprint, "--format", "qwen3", "--to", url)
    assert order == ["model.safetensors", "tokenizer.json", "config.json"]
    with pytest.raises(UserError, match="something is there already"):
        gatesweep("export", trial.fingerprint, "--format", "qwen3", "--to", url)


def test_mlflows_artifacts_go_to_s3_with_its_own_database_here(ended, s3, at_home, monkeypatch):
    from orchestrator.tracking import mirror

    monkeypatch.setenv("GATESWEEP_MLFLOW_ARTIFACTS", f"s3://{BUCKET}/mlflow")
    home = Home.of()
    assert home.artifact_root == f"s3://{BUCKET}/mlflow"
    ended.complete(ended.plan.trials[0].fingerprint, 2.5)
    mirror(ended.store, ended.sweep_id, home.tracking_uri, home.artifact_location)
    assert any(key.startswith("mlflow/") and key.endswith("/artifacts/config.json") for key in keys(s3))


def test_doctor_writes_reads_and_removes_a_file_there(s3, place):
    (found,) = check_copies(f"s3://{BUCKET}/x")
    assert (found.level, keys(s3)) == (Level.OK, [])
    (found,) = check_copies("s3://no-such-bucket/x")
    assert found.level is Level.WARNING
    assert "no-such-bucket" in found.said
    assert not list(check_copies(None))
