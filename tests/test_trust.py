"""What can run code is opened only when it is ours: same owner, nobody else may write, signed by our key."""

import json
import os
import pickle
import re
import shutil
import stat
import zlib
from pathlib import Path

import numpy as np
import pytest
import ranks
from small_trials import corpus_trial, new_attempt, write_corpus
from typer.testing import CliRunner

from models import run_dir, trust
from models.config import Layout

STEPS = 4
IS_ROOT = os.geteuid() == 0


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    return write_corpus(tmp_path_factory.mktemp("corpus") / "corpus.jsonl")


@pytest.fixture(scope="module")
def finished(world, corpus, tmp_path_factory):
    """A trial with everything that a trial writes: checkpoints, index caches, logs, probes."""
    from models.trainer import train

    home = tmp_path_factory.mktemp("finished")
    spec = new_attempt(home, corpus_trial(corpus, steps=STEPS), checkpoint_every_steps=2, final_checkpoint=True)
    train(spec, world)
    return home, spec


@pytest.fixture
def copied(finished, tmp_path):
    """A copy of the checkpoint of step 2."""
    return shutil.copytree(run_dir.checkpoint_path(finished[1].attempt_dir, 2), tmp_path / "step_00000002")


@pytest.fixture
def index_cache(finished, tmp_path):
    """A home whose corpus is prepared, and the folder of its one index cache."""
    home = shutil.copytree(finished[0], tmp_path / "home")
    (found,) = home.glob("data/*/indices/*")
    return home, found


class Bomb:
    """Its pickle makes a file when it is opened."""

    def __init__(self, mark):
        self.mark = mark

    def __reduce__(self):
        return Path.touch, (self.mark,)


def attempt_from(home, corpus, checkpoint):
    trial = corpus_trial(corpus, steps=STEPS)
    return new_attempt(home, trial, 2, resume_checkpoint=str(checkpoint), resume_step=2)


# -- what may be opened -----------------------------------------------------------------------------------------


def made_writable(folder, name):
    (folder / name).chmod(0o664)


def made_foreign(folder, name):
    os.chown(folder / name, 65534, -1)


def made_a_link(folder, name):
    (folder / name).rename(folder.parent / "elsewhere")
    (folder / name).symlink_to(folder.parent / "elsewhere")


def unsigned(folder, _):
    manifest = json.loads((folder / "manifest.json").read_text())
    old = {name: {"bytes": one["bytes"], "crc32": 0} for name, one in manifest["files"].items()}
    (folder / "manifest.json").write_text(json.dumps({"files": old}))


def signed_by_another(folder, _):
    trust.use_key("ab" * 32)
    try:
        trust.seal(folder, "checkpoint")
    finally:
        trust._given = None


REFUSED = {
    "a file that others may write": (made_writable, ".metadata", r"\.metadata can be written by others \(mode 0664\)"),
    "a folder that others may write": (
        lambda folder, _: folder.chmod(0o777), "", r"step_00000002 can be written by others \(mode 0777\)",
    ),
    "another user's file": (made_foreign, "common.pt", "common.pt belongs to uid 65534, not to this user"),
    "another user's folder": (made_foreign, "", "step_00000002 belongs to uid 65534, not to this user"),
    "a link": (made_a_link, "common.pt", "common.pt must be a plain file: a link can lead anywhere"),
    "no signature": (unsigned, "", "step_00000002 is not signed: an earlier version wrote it, or somebody else"),
    "another key": (signed_by_another, "", r"was signed with another key \([0-9a-f]{8}\) than this one"),
}  # fmt: skip


@pytest.mark.parametrize("how", REFUSED)
def test_a_checkpoint_that_may_not_be_ours_is_refused_with_the_mend(world, corpus, copied, tmp_path, how):
    from models.checkpoint import UntrustedCheckpoint
    from models.trainer import train

    change, name, told = REFUSED[how]
    if change is made_foreign and not IS_ROOT:
        pytest.skip("only root can give a file away")
    change(copied, name)
    with pytest.raises(UntrustedCheckpoint, match=f"was not opened: .*{told}.*(sign|chmod|Remove)"):
        train(attempt_from(tmp_path, corpus, copied), world)


def test_a_pickle_put_into_a_checkpoint_never_runs(world, corpus, copied, tmp_path):
    """With right size and CRC-32, which a checksum's reader would have taken: the signature is what tells."""
    from models.checkpoint import CheckpointError
    from models.trainer import train

    mark = tmp_path / "it ran"
    pickle.loads(pickle.dumps(Bomb(mark)))
    assert mark.exists(), "the bomb must work"
    mark.unlink()
    bomb = pickle.dumps(Bomb(mark))
    (copied / ".metadata").write_bytes(bomb)
    manifest = json.loads((copied / "manifest.json").read_text())
    manifest["files"][".metadata"] = trust.sealed_file(copied / ".metadata").model_dump()
    (copied / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(CheckpointError, match=r"is torn: manifest\.json was changed after it was signed"):
        train(attempt_from(tmp_path, corpus, copied), world)
    assert not mark.exists()
    trust.seal(copied, "checkpoint")  # the same folder, vouched for: now it is opened, which shows what was at stake
    with pytest.raises(Exception, match=r".*"):
        train(attempt_from(tmp_path / "again", corpus, copied), world)
    assert mark.exists()


def test_a_pickle_put_into_an_index_cache_never_runs(world, corpus, index_cache, tmp_path):
    from models.trainer import train

    home, cache = index_cache
    mark, npy = tmp_path / "it ran", next(cache.glob("*-document_index.npy"))
    npy.write_bytes(pickle.dumps(Bomb(mark)))
    np.load(npy, allow_pickle=True)  # as Megatron opens it
    assert mark.exists()
    mark.unlink()
    spec = new_attempt(home, corpus_trial(corpus, steps=STEPS), 2)
    with pytest.raises(trust.Untrusted, match=r"index cache .* is not as it was written: .*; remove the folder"):
        train(spec, world)
    assert not mark.exists()
    shutil.rmtree(cache)
    assert train(new_attempt(home, corpus_trial(corpus, steps=STEPS), 3), world).outcome == "complete"


def test_another_keys_index_cache_is_not_even_looked_at(world, corpus, index_cache):
    from models.trainer import train

    home, cache = index_cache
    theirs = cache.rename(cache.with_name(cache.name.replace(trust.key_id(), "00000000")))
    before = {path: path.read_bytes() for path in theirs.iterdir()}
    assert train(new_attempt(home, corpus_trial(corpus, steps=STEPS), 2), world).outcome == "complete"
    assert cache.is_dir()
    assert {path: path.read_bytes() for path in theirs.iterdir()} == before


def refused_on_every_rank(rank, folder, home, corpus, checkpoint):
    """A rank's own key: rank 1 has another one, and needs none."""
    from models.checkpoint import UntrustedCheckpoint
    from models.trainer import World, train

    if rank == 1:
        trust.use_key("cd" * 32)
    layout = Layout(data=2)
    world = World.join(rank, layout, "cpu", f"file://{folder}/meet")
    trial = corpus_trial(corpus, steps=STEPS)
    good = new_attempt(home, trial, 2, layout=layout, resume_checkpoint=str(checkpoint), resume_step=2)
    outcome = train(good, world).outcome
    (checkpoint / "manifest.json").chmod(0o666)
    bad = new_attempt(home, trial, 3, layout=layout, resume_checkpoint=str(checkpoint), resume_step=2)
    try:
        train(bad, world)
    except UntrustedCheckpoint as refusal:
        return outcome, str(refusal)
    return outcome, None


def test_rank_0_judges_for_all_ranks(corpus, copied, tmp_path):
    """Also that other layouts than the writer's open what it signed."""
    for outcome, told in ranks.run(refused_on_every_rank, 2, tmp_path, corpus, copied):
        assert outcome == "complete"
        assert re.search(r"manifest\.json can be written by others", told)


def test_what_is_sealed_is_writable_by_its_owner_alone(tmp_path):
    """Also under the umask of systems where every user has a group."""
    before = os.umask(0o002)
    try:
        folder = tmp_path / "sealed"
        folder.mkdir()
        (folder / "a").write_text("a")
        trust.seal(folder, "indices")
    finally:
        os.umask(before)
    for path in (folder, *folder.iterdir()):
        assert not path.stat().st_mode & 0o022, path
    trust.check(folder, "indices")
    with pytest.raises(trust.Altered, match="was changed after it was signed"):
        trust.check(folder, "checkpoint")


# -- the key ----------------------------------------------------------------------------------------------------


def test_the_key_is_made_once_for_its_owner_alone(tmp_path, monkeypatch):
    monkeypatch.setenv("GATESWEEP_KEY_FILE", str(tmp_path / "new" / "key"))
    key = trust.read_key()
    assert trust.read_key() == key
    assert stat.S_IMODE((tmp_path / "new" / "key").stat().st_mode) == 0o600
    assert [path.name for path in (tmp_path / "new").iterdir()] == ["key"]
    monkeypatch.delenv("GATESWEEP_KEY_FILE")
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    assert trust.read_key() != key
    assert (tmp_path / "home/.config/gatesweep/key").exists()


@pytest.mark.parametrize(
    ("content", "mode", "told"),
    [("ab" * 32, 0o640, "with mode 0640: chmod 600"), ("short", 0o600, "must hold 64 hexadecimal digits")],
)
def test_a_key_that_is_none_or_that_others_read_is_refused(tmp_path, monkeypatch, content, mode, told):
    (tmp_path / "key").write_text(content)
    (tmp_path / "key").chmod(mode)
    monkeypatch.setenv("GATESWEEP_KEY_FILE", str(tmp_path / "key"))
    with pytest.raises(trust.Untrusted, match=told):
        trust.read_key()


def test_a_key_beside_what_it_signs_is_refused(tmp_path, monkeypatch):
    from orchestrator.cli.signing import check_key
    from orchestrator.sweep import UserError

    monkeypatch.setenv("GATESWEEP_KEY_FILE", str(tmp_path / "home" / "secrets" / "key"))
    with pytest.raises(UserError, match=r"lies in GATESWEEP_HOME .*, beside what it signs"):
        check_key(tmp_path / "home")
    assert not (tmp_path / "home").exists()


# -- vouching ---------------------------------------------------------------------------------------------------


def sign(*arguments):
    from orchestrator.cli.app import app

    return CliRunner().invoke(app, ["sign", *map(str, arguments)])


def test_the_user_vouches_for_an_earlier_versions_checkpoint(world, corpus, copied, tmp_path):
    from models.trainer import train

    manifest = json.loads((copied / "manifest.json").read_text())
    crcs = {
        name: {"bytes": one["bytes"], "crc32": zlib.crc32((copied / name).read_bytes())}
        for name, one in manifest["files"].items()
    }
    (copied / "manifest.json").write_text(json.dumps({"files": crcs}))
    done = sign(tmp_path)
    assert done.exit_code == 0, done.output
    assert f"signed {copied}" in done.output
    assert train(attempt_from(tmp_path, corpus, copied), world).outcome == "complete"
    assert "0 checkpoint(s) signed" in sign(copied).output


def test_a_damaged_one_is_not_signed(copied):
    from orchestrator.sweep import UserError

    unsigned(copied, "")
    before = (copied / "manifest.json").read_bytes()
    assert isinstance(sign(copied).exception, UserError)
    assert re.search("is damaged and was not signed", str(sign(copied).exception))
    assert (copied / "manifest.json").read_bytes() == before


# -- what we write ------------------------------------------------------------------------------------------------

HOLD_PICKLE = re.compile(r"^(\.metadata|common\.pt|__\d+_\d+\.distcp|[0-9a-f]{32}-GPTDataset-train-\w+_index\.npy)$")
"""Megatron's; each lies in a signed folder."""


def is_data(path):
    """Whether a file is in a form that no reader unpickles: text (JSON, logs), or raw numbers of an indexed dataset."""
    if path.suffix == ".bin":
        return path.stem in ("train", "validation", "slice")
    if path.suffix == ".idx":
        return path.read_bytes().startswith(b"MMIDIDX")
    return all(line.isprintable() for line in path.read_bytes().decode().replace("\t", " ").splitlines())


def test_no_file_of_ours_holds_a_pickle(finished):
    home, _ = finished
    files = [path for path in home.rglob("*") if path.is_file()]
    assert {".json", ".jsonl", ".txt", ".idx", ".bin", ".npy", ".pt"} <= {path.suffix for path in files}
    for path in files:
        if HOLD_PICKLE.match(path.name):
            assert path.name in json.loads((path.parent / "manifest.json").read_text())["files"], path
            assert "signature" in (path.parent / "manifest.json").read_text()
        else:
            assert is_data(path), path
