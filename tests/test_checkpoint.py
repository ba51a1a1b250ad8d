"""Killed and resumed equals undisturbed, bit for bit; a checkpoint that has its name is whole."""

import functools
import json
import os
import re
import shutil
import signal
import threading
import time
from pathlib import Path

import numpy as np
import pytest
import ranks
from small_trials import (
    checkpoint_tensors,
    corpus_trial,
    everything,
    new_attempt,
    small_trial,
    summary_of,
    write_corpus,
)

from models import accounting, run_dir
from models.config import GateConfig, Layout
from models.presets import PRESETS

STEPS = 6

GATES = {
    "baseline": None,
    "sdpa": GateConfig(position="sdpa"),
    "sdpa-shared": GateConfig(position="sdpa", sharing="head_shared"),
    "value-headwise": GateConfig(position="value", granularity="headwise"),
    "key": GateConfig(position="key"),
    "query": GateConfig(position="query"),
    "dense": GateConfig(position="dense"),
    "sdpa-none": GateConfig(position="sdpa", input="none"),
    "value-none": GateConfig(position="value", input="none", granularity="headwise"),
    "dense-none": GateConfig(position="dense", input="none"),
    "constant": GateConfig(position="sdpa", input="constant", scale=0.5),
}
EXPERTS = {"experts": None, "experts-sdpa": GateConfig(position="sdpa")}
"""Gates of a model with a router in every layer."""


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    return write_corpus(tmp_path_factory.mktemp("corpus") / "corpus.jsonl")


def trial_of(corpus, kind):
    if kind in GATES:
        return corpus_trial(corpus, GATES[kind], STEPS)
    trial = corpus_trial(corpus, EXPERTS[kind], STEPS)
    return trial.model_copy(update={"model": PRESETS["cpu-moe-tiny"]})


def stop_after(num_steps):
    """``should_stop`` that says yes when it is asked for the ``num_steps``-th time."""
    asked = []
    return lambda: asked.append(None) or len(asked) == num_steps


def assert_same_tensors(ours, theirs):
    ours, theirs = checkpoint_tensors(ours), checkpoint_tensors(theirs)
    assert ours.keys() == theirs.keys()
    assert len(ours) > 30
    assert any("exp_avg_sq" in name for name in ours)
    for name, tensor in ours.items():
        np.testing.assert_array_equal(tensor, theirs[name], err_msg=name)


def resumed(home, trial, world, step, **spec):
    """A second attempt, from the first one's checkpoint of ``step`` to the end."""
    from models.trainer import train

    checkpoint = run_dir.checkpoint_path(new_attempt(home, trial).attempt_dir, step)
    second = new_attempt(home, trial, 2, resume_checkpoint=str(checkpoint), resume_step=step, **spec)
    assert train(second, world).outcome == "complete"
    return second


@pytest.mark.parametrize("kind", [*GATES, *EXPERTS])
def test_resumed_is_undisturbed_bit_for_bit(world, corpus, tmp_path, kind):
    """Metrics, and at the step before the last the weights and moments too. The process is warm: others ran in it."""
    from models.trainer import train

    trial, last = trial_of(corpus, kind), STEPS - 1
    whole = new_attempt(tmp_path / "whole", trial, checkpoint_every_steps=last)
    killed = new_attempt(tmp_path / "killed", trial, checkpoint_every_steps=3)
    assert train(whole, world).outcome == "complete"
    with pytest.raises(KeyboardInterrupt):
        train(killed, world, die_after(4))
    assert [step for step, _ in run_dir.complete_checkpoints(killed.attempt_dir)] == [3]
    assert run_dir.read_summary(killed.attempt_dir) is None
    again = resumed(tmp_path / "killed", trial, world, 3, checkpoint_every_steps=last)
    expected = everything(whole)
    assert everything(killed) == [record for record in expected if record["step"] <= 4]
    assert everything(again) == [record for record in expected if record["step"] > 3]
    assert_same_tensors(*(run_dir.checkpoint_path(spec.attempt_dir, last) for spec in (whole, again)))


@pytest.mark.parametrize("step", [1, 2, 4, 5])
def test_any_step_can_be_resumed(world, corpus, tmp_path, step):
    """Before, at and after a validation (step 3), and with nothing but the last step left."""
    from models.trainer import train

    trial = corpus_trial(corpus, GATES["sdpa-none"], STEPS)
    whole = new_attempt(tmp_path / "whole", trial)
    train(whole, world)
    train(new_attempt(tmp_path / "stopped", trial), world, stop_after(step))
    again = resumed(tmp_path / "stopped", trial, world, step)
    assert everything(again) == [record for record in everything(whole) if record["step"] > step]
    assert summary_of(again).resume_step == step


def die_after(num_steps, end=None):
    """``should_stop`` that ends the process's work, when it is asked for the ``num_steps``-th time."""
    asked = []

    def should_stop():
        asked.append(None)
        if len(asked) == num_steps:
            if end:
                end()
            raise KeyboardInterrupt
        return False

    return should_stop


def kill_after_writing(checkpoint):
    """The end of a process whose background has just made ``checkpoint`` visible."""
    while not checkpoint.exists():
        time.sleep(0.01)
    os.kill(os.getpid(), signal.SIGKILL)


def killed_by_a_signal(rank, folder, home, trial):
    from models.trainer import World, train

    spec = new_attempt(home, trial, checkpoint_every_steps=2)
    end = functools.partial(kill_after_writing, run_dir.checkpoint_path(spec.attempt_dir, 4))
    train(spec, World.join(rank, Layout(), "cpu", f"file://{folder}/meet"), die_after(5, end))


def test_a_cold_process_killed_and_a_warm_one_that_goes_on_are_an_undisturbed_run(world, corpus, tmp_path):
    from models.trainer import train

    trial = corpus_trial(corpus, GATES["sdpa"], STEPS)
    _, codes, logs = ranks.outcomes(killed_by_a_signal, 1, tmp_path / "killed", trial)
    assert codes == [-signal.SIGKILL], logs[0][-4000:]
    first = new_attempt(tmp_path / "killed", trial)
    assert [step for step, _ in run_dir.complete_checkpoints(first.attempt_dir)] == [4, 2]
    second = resumed(tmp_path / "killed", trial, world, 4)
    undisturbed = new_attempt(tmp_path / "whole", trial)
    train(undisturbed, world)
    joined = [record for record in everything(first) if record["step"] <= 4] + everything(second)
    assert joined == everything(undisturbed)


# -- folders --------------------------------------------------------------------------------------------------


def test_a_stop_leaves_a_checkpoint_of_its_step(world, corpus, tmp_path):
    from models.trainer import train

    spec = new_attempt(tmp_path, corpus_trial(corpus, steps=STEPS))
    summary = train(spec, world, stop_after(2))
    assert (summary.outcome, summary.step) == ("stopped", 2)
    assert [step for step, _ in run_dir.complete_checkpoints(spec.attempt_dir)] == [2]
    assert summary_of(spec) == summary


def test_a_step_is_saved_once_when_a_stop_and_a_checkpoint_fall_together(world, corpus, tmp_path, monkeypatch):
    """Saving it again would take away, for a moment, a checkpoint that was already there to be named."""
    from models import checkpoint
    from models.trainer import train

    saved, save = [], checkpoint.Saver.save
    monkeypatch.setattr(
        checkpoint.Saver, "save", lambda saver, step, *state: saved.append(step) or save(saver, step, *state)
    )
    spec = new_attempt(tmp_path, corpus_trial(corpus, steps=STEPS), checkpoint_every_steps=2)
    assert train(spec, world, stop_after(2)).outcome == "stopped"
    assert saved == [2]


def test_a_checkpoint_is_written_while_training_goes_on_and_is_of_its_step(world, corpus, tmp_path, monkeypatch):
    """The writer is held up until the step after the next one: no byte of those steps is in it."""
    from models.checkpoint import saving
    from models.trainer import train

    trial, stand_by = corpus_trial(corpus, GATES["sdpa"], STEPS), threading.Event()
    whole = new_attempt(tmp_path / "whole", trial)
    train(whole, world, stop_after(2))
    written = saving._write_common
    monkeypatch.setattr(saving, "_write_common", lambda *given: stand_by.wait(60) and written(*given))
    seen = []

    def look():
        seen.append([step for step, _ in run_dir.complete_checkpoints(spec.attempt_dir)])
        if len(seen) == 4:
            stand_by.set()
        return False

    spec = new_attempt(tmp_path, trial, checkpoint_every_steps=2, keep_checkpoints=3, final_checkpoint=True)
    train(spec, world, look)
    assert seen[:4] == [[], [], [], []]
    assert [step for step, _ in run_dir.complete_checkpoints(spec.attempt_dir)] == [6, 4, 2]
    assert_same_tensors(*(run_dir.checkpoint_path(one.attempt_dir, 2) for one in (whole, spec)))


def test_a_trial_that_is_measured_is_complete_when_its_last_checkpoint_stands(world, corpus, tmp_path, monkeypatch):
    """Meanwhile the next one trains in the same process; and its numbers are those of a cold one."""
    from models.checkpoint import saving
    from models.trainer import start, train

    trial, stand_by = corpus_trial(corpus, steps=STEPS), threading.Event()
    first = new_attempt(tmp_path / "first", trial, final_checkpoint=True)
    written = saving._write_common
    monkeypatch.setattr(saving, "_write_common", lambda *given: stand_by.wait(60) and written(*given))
    landing = start(first, world).landed
    second = new_attempt(tmp_path / "second", trial)
    next_one = start(second, world).landed
    assert not landing.done()
    assert run_dir.read_summary(first.attempt_dir) is None
    assert not list(run_dir.complete_checkpoints(first.attempt_dir))
    stand_by.set()
    assert landing.result() == summary_of(first)
    assert next_one.result() == summary_of(second)
    assert [step for step, _ in run_dir.complete_checkpoints(first.attempt_dir)] == [STEPS]
    assert everything(first) == everything(second)
    assert run_dir.log_path(first.attempt_dir, 0).read_text().count("ended complete") == 1
    train(new_attempt(tmp_path / "third", trial), world)  # the writer is in order


def test_a_last_checkpoint_that_cannot_be_written_makes_its_own_trial_an_error(world, corpus, tmp_path, monkeypatch):
    """Not the next one, which trains on in the same process."""
    from models.checkpoint import saving
    from models.trainer import start, train

    def full(*_):
        raise OSError(28, "No space left on device")

    trial = corpus_trial(corpus, steps=STEPS)
    with monkeypatch.context() as patch:
        patch.setattr(saving, "_write_common", full)
        first = new_attempt(tmp_path / "first", trial, final_checkpoint=True)
        landing = start(first, world).landed
        world.writer.wait()
    second = new_attempt(tmp_path / "second", trial, final_checkpoint=True)
    assert train(second, world).outcome == "complete"
    with pytest.raises(OSError, match=r"could not be written: .*No space left on device"):
        landing.result()
    assert summary_of(first).outcome == "error"
    assert "No space left on device" in run_dir.log_path(first.attempt_dir, 0).read_text()
    assert "No space left" not in run_dir.log_path(second.attempt_dir, 0).read_text()


def test_a_failed_write_ends_the_attempt_soon(world, corpus, tmp_path, monkeypatch):
    from models.checkpoint import saving
    from models.trainer import train

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(saving, "_write_common", full)
    spec = new_attempt(tmp_path, corpus_trial(corpus, steps=40), checkpoint_every_steps=2)
    with pytest.raises(OSError, match="could not be written"):
        train(spec, world, lambda: world.writer.wait() is None)
    assert summary_of(spec).step <= 4


def part_that_fails(rank, folder, home, trial):
    """What each of two ranks raises when the second one's disk is full."""
    from models.checkpoint import saving
    from models.trainer import World, train

    layout = Layout(tensor=2)
    written = saving.written_by
    if rank == 1:

        def full(*_):
            raise OSError(28, "No space left on device")

        saving.written_by = full
    spec = new_attempt(home, trial, layout=layout, final_checkpoint=True)
    world = World.join(rank, layout, "cpu", f"file://{folder}/meet")
    try:
        train(spec, world)
    except OSError as failure:
        told = str(failure)
    saving.written_by = written
    again = new_attempt(home, trial, 2, layout=layout, final_checkpoint=True)
    assert train(again, world).outcome == "complete"
    world.leave()
    return told


def test_a_part_that_cannot_be_written_is_told_by_every_rank_that_waits_for_it(corpus, tmp_path):
    trial = corpus_trial(corpus, steps=3)
    first, second = ranks.run(part_that_fails, 2, tmp_path, trial)
    assert first.startswith(f"checkpoint {new_attempt(tmp_path, trial).attempt_dir}/checkpoints/step_00000003 could ")
    assert "rank 1: " in first
    assert "No space left on device" in first
    assert "No space left on device" in second
    assert summary_of(new_attempt(tmp_path, trial)).outcome == "error"
    again = new_attempt(tmp_path, trial, 2).attempt_dir
    assert [step for step, _ in run_dir.complete_checkpoints(again)] == [3]


def test_a_rank_that_is_gone_holds_up_nobody_for_ever(world, tmp_path, monkeypatch):
    """Rank 0's thread waits for its part, and stops when the attempt has failed."""
    from torch.distributed import HashStore

    from models.checkpoint import Saver

    saver = Saver(tmp_path / "attempts" / "001-test", 1, world.writer)
    saver._num_ranks, saver._store = 2, HashStore()
    waiting = world.writer.submit(lambda: saver._parts_of_others(tmp_path))
    saver.abandon(0.0)
    with pytest.raises(TimeoutError, match="rank 1 has not written its part"):
        waiting.result()


def test_a_torn_one_is_none_of_those_that_are_kept(world, corpus, tmp_path):
    from models.retention import prune_attempt
    from models.trainer import train

    spec = new_attempt(tmp_path, corpus_trial(corpus, steps=STEPS), checkpoint_every_steps=1, keep_checkpoints=5)
    train(spec, world)

    def steps():
        return [step for step, _ in run_dir.complete_checkpoints(spec.attempt_dir)]

    assert steps() == [5, 4, 3, 2, 1]
    cut(run_dir.checkpoint_path(spec.attempt_dir, 5) / FILES["tensors"])
    (run_dir.checkpoint_path(spec.attempt_dir, 3) / "manifest.json").unlink()
    prune_attempt(spec.attempt_dir, keep=3)
    assert steps() == [5, 4, 3, 2, 1]
    prune_attempt(spec.attempt_dir, keep=2)
    assert steps() == [5, 4, 3, 2]
    resumed_from = str(run_dir.checkpoint_path(spec.attempt_dir, 2))
    new_attempt(tmp_path, corpus_trial(corpus, steps=STEPS), 2, resume_checkpoint=resumed_from, resume_step=2)
    prune_attempt(spec.attempt_dir, keep=1)
    assert steps() == [5, 4, 2]
    assert not list((spec.attempt_dir / "checkpoints").glob(".*"))
    cut(run_dir.checkpoint_path(spec.attempt_dir, 4) / FILES["tensors"])
    cut(run_dir.checkpoint_path(spec.attempt_dir, 2) / FILES["tensors"])
    prune_attempt(spec.attempt_dir, keep=1)
    assert steps() == [5, 4, 2]


def test_only_the_newest_are_kept(world, corpus, tmp_path):
    from models.trainer import train

    for keep, expected in ((1, [5]), (3, [5, 4, 3])):
        spec = new_attempt(
            tmp_path / str(keep), corpus_trial(corpus, steps=STEPS), checkpoint_every_steps=1, keep_checkpoints=keep
        )
        train(spec, world)
        assert [step for step, _ in run_dir.complete_checkpoints(spec.attempt_dir)] == expected
        assert len(list((spec.attempt_dir / "checkpoints").iterdir())) == keep


def test_a_half_written_folder_is_not_taken_for_a_checkpoint(world, corpus, tmp_path, monkeypatch):
    """The writer dies inside the checkpoint of step 3: step 2's stands, and the next attempt is not disturbed."""
    from models.checkpoint import saving
    from models.trainer import train

    trial = corpus_trial(corpus, steps=STEPS)
    spec = new_attempt(tmp_path, trial, checkpoint_every_steps=1)
    written = saving._write_common
    calls = []

    def die_in_the_third(common, folder):
        calls.append(folder)
        written(common, folder)
        if len(calls) == 3:
            next(Path(folder).glob("*.distcp")).write_bytes(b"half")
            raise OSError("No space left on device")

    monkeypatch.setattr(saving, "_write_common", die_in_the_third)
    with pytest.raises(OSError, match="No space left on device"):
        train(spec, world)
    assert len(list((spec.attempt_dir / "checkpoints").iterdir())) == 3
    assert [step for step, _ in run_dir.complete_checkpoints(spec.attempt_dir)] == [2, 1]
    told = f"OSError: checkpoint {calls[-1].parent}/step_00000003 could not be written: No space left on device"
    assert summary_of(spec).error == told


def test_a_missing_or_wrong_checkpoint_is_named(world, corpus, tmp_path):
    from models.checkpoint import CheckpointError
    from models.trainer import train

    trial = corpus_trial(corpus, steps=STEPS)
    gone = new_attempt(tmp_path, trial, 1, resume_checkpoint=str(tmp_path / "gone"), resume_step=3)
    with pytest.raises(CheckpointError, match=f"checkpoint {tmp_path}/gone does not exist"):
        train(gone, world)
    stopped = new_attempt(tmp_path, trial, 2)
    train(stopped, world, stop_after(2))
    path = run_dir.checkpoint_path(stopped.attempt_dir, 2)
    wrong = new_attempt(tmp_path, trial, 3, resume_checkpoint=str(path), resume_step=3)
    with pytest.raises(CheckpointError, match="holds step 2, expected 3"):
        train(wrong, world)


# -- layouts --------------------------------------------------------------------------------------------------


PIECES = [
    (Layout(tensor=2), GATES["sdpa"], "cpu-tiny"),
    (Layout(pipeline=2), GATES["sdpa"], "cpu-tiny"),
    (Layout(expert=2, data=2), GATES["sdpa"], "cpu-moe-tiny"),
]


def whole_trial(gate, preset, seed):
    return small_trial(gate, PRESETS[preset], seed=seed)


def saved_in_pieces(rank, folder, home):
    """The initial weights, which do not depend on the layout, as each layout saves them."""
    from models import checkpoint, device, layer_specs
    from models.trainer import World
    from models.trainer.optimizer import wrap

    for number, (layout, gate, preset) in enumerate(PIECES):
        world = World.join(rank, layout, "cpu", f"file://{folder}/meet{number}")
        with device.on("cpu"):
            trial = whole_trial(gate, preset, seed=1)
            device.seed_everything(trial.seed, "cpu")
            chunks, optimizer = wrap(trial, layer_specs.build_chunks(trial, layout, "cpu"), "cpu")
            saver = checkpoint.Saver(home / str(number), 1, world.writer)
            saver.save(3, chunks, optimizer)
            saver.wait()
        world.leave()


def test_the_weights_alone_are_read_whole_from_any_layout(world, tmp_path):
    import torch

    from models import checkpoint, device, layer_specs

    ranks.run(saved_in_pieces, 2, tmp_path)
    for number, (_, gate, preset) in enumerate(PIECES):
        models = []
        for seed in (1, 2):
            device.seed_everything(seed, "cpu")
            with device.on("cpu"):
                models.append(layer_specs.build_model(whole_trial(gate, preset, seed), Layout(), "cpu"))
        expected, loaded = models
        assert not torch.equal(*(next(model.parameters()) for model in models))
        path = run_dir.checkpoint_path(tmp_path / str(number), 3)
        checkpoint.load_weights(path, loaded)
        for (name, one), (_, other) in zip(expected.named_parameters(), loaded.named_parameters(), strict=True):
            assert torch.equal(one, other), (number, name)
    with pytest.raises(checkpoint.CheckpointError, match="nowhere does not exist"):
        checkpoint.load_weights(tmp_path / "nowhere", loaded)


# -- torn -----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def whole(world, corpus, tmp_path_factory):
    """A checkpoint of step 2; each test takes a copy."""
    from models.trainer import train

    spec = new_attempt(tmp_path_factory.mktemp("whole"), corpus_trial(corpus, steps=STEPS))
    train(spec, world, stop_after(2))
    return run_dir.checkpoint_path(spec.attempt_dir, 2)


def cut(path):
    with path.open("r+b") as stream:
        stream.truncate(path.stat().st_size - 1)


def flip_a_bit(path):
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


FILES = {"tensors": "__0_0.distcp", "index": ".metadata", "common": "common.pt", "backend": "metadata.json"}
TORN = {
    "missing": (Path.unlink, "{file} is missing"),
    "cut": (cut, r"{file} has [\d,]+ bytes of [\d,]+"),
    "a flipped bit": (flip_a_bit, "{file} has the SHA-256 [0-9a-f]{{16}}... instead of [0-9a-f]{{16}}..."),
}


@pytest.mark.parametrize("file", FILES)
@pytest.mark.parametrize("how", TORN)
def test_a_torn_checkpoint_is_told_by_path_and_fault(world, corpus, whole, tmp_path, file, how):
    from models.checkpoint import CheckpointError
    from models.trainer import train

    tear, fault = TORN[how]
    copy = shutil.copytree(whole, tmp_path / "step_00000002")
    tear(copy / FILES[file])
    trial = corpus_trial(corpus, steps=STEPS)
    spec = new_attempt(tmp_path, trial, 2, resume_checkpoint=str(copy), resume_step=2)
    told = re.escape(f"checkpoint {copy} is torn: ") + fault.format(file=re.escape(FILES[file]))
    with pytest.raises(CheckpointError, match=f"^{told}$"):
        train(spec, world)
    assert summary_of(spec).error.startswith("CheckpointError: ")


def test_every_file_is_in_the_manifest(whole):
    listed = json.loads((whole / "manifest.json").read_text())["files"]
    assert {*listed, "manifest.json"} == {path.name for path in whole.iterdir()}
    assert set(FILES.values()) == set(listed)


def test_a_checkpoint_takes_what_the_plan_says(whole, corpus):
    """Beside weights and moments there are names, the random state and the manifest."""
    told = accounting.checkpoint_bytes(corpus_trial(corpus, steps=STEPS))
    listed = json.loads((whole / "manifest.json").read_text())["files"]
    assert 0 < sum(entry["bytes"] for entry in listed.values()) - told < 500_000


@pytest.mark.parametrize(
    ("manifest", "told"),
    [
        (None, "is torn: manifest.json is missing"),
        ('{"files": {"__0_0.d', "is torn: manifest.json is not readable"),
        ("{}", "is torn: manifest.json is not readable"),
    ],
)
def test_a_checkpoint_without_a_readable_manifest_is_refused(world, corpus, whole, tmp_path, manifest, told):
    """Also one of a version before there were manifests: nothing tells whether it is whole."""
    from models.checkpoint import CheckpointError
    from models.trainer import train

    copy = shutil.copytree(whole, tmp_path / "step_00000002")
    (copy / "manifest.json").unlink()
    if manifest is not None:
        (copy / "manifest.json").write_text(manifest)
    trial = corpus_trial(corpus, steps=STEPS)
    spec = new_attempt(tmp_path, trial, 2, resume_checkpoint=str(copy), resume_step=2)
    with pytest.raises(CheckpointError, match=re.escape(told)):
        train(spec, world)


def test_another_trials_checkpoint_is_refused(world, corpus, whole, tmp_path):
    """Here one without the gate's weights, which are asked for."""
    from models.checkpoint import CheckpointError
    from models.trainer import train

    trial = corpus_trial(corpus, GATES["dense"], STEPS)
    spec = new_attempt(tmp_path, trial, resume_checkpoint=str(whole), resume_step=2)
    with pytest.raises(CheckpointError, match="does not hold this trial's model"):
        train(spec, world)


def test_all_is_on_the_disk_before_the_checkpoint_has_its_name(world, corpus, tmp_path, monkeypatch):
    from models.checkpoint import manifest, saving
    from models.trainer import train

    spec = new_attempt(tmp_path, corpus_trial(corpus, steps=STEPS))
    events = []
    sync, rename = manifest.sync, os.replace

    def renamed(old, new):
        if Path(new).parent.name == "checkpoints":
            events.append("rename")
        rename(old, new)

    for module in (manifest, saving):
        monkeypatch.setattr(module, "sync", lambda path: events.append(path.name) or sync(path))
    monkeypatch.setattr(saving.os, "replace", renamed)
    train(spec, world, stop_after(2))
    before, after = events[: events.index("rename")], events[events.index("rename") + 1 :]
    assert set(before[:-2]) == {*FILES.values(), "metrics.jsonl"}
    assert before[-2:] == ["manifest.json", ".step_00000002"]
    assert after == ["checkpoints"]


def test_a_full_disk_is_an_error_that_handlers_see(world, corpus, tmp_path, monkeypatch):
    """torch raises what a writer met as a BaseException, which would end the rank without its summary."""
    from torch.distributed.checkpoint import filesystem

    from models.trainer import train

    def full(*_, **__):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(filesystem.FileSystem, "create_stream", full)
    spec = new_attempt(tmp_path, corpus_trial(corpus, steps=STEPS), checkpoint_every_steps=1)
    with pytest.raises(OSError, match=r"could not be written: .*No space left on device"):
        train(spec, world)
    assert summary_of(spec).error.startswith("OSError: checkpoint ")
    assert not list(run_dir.complete_checkpoints(spec.attempt_dir))
