"""Which checkpoint of a trial stands for it: the furthest that belongs to its history."""

import json

from small_trials import new_attempt, small_trial

from models.retention import prune_trial
from models.run_dir import checkpoint_path, complete_checkpoints, latest_checkpoint, trial_dir


def attempt(home, number, *steps, resume_step=0):
    """An attempt with complete checkpoints at ``steps``."""
    spec = new_attempt(home, small_trial(), number=number, resume_step=resume_step)
    for step in steps:
        checkpoint_path(spec.attempt_dir, step).mkdir(parents=True)
    return spec


def latest(home):
    return latest_checkpoint(trial_dir(home, small_trial().fingerprint()))


def test_a_trial_without_attempts_or_checkpoints_has_none(tmp_path):
    assert latest(tmp_path) is None
    attempt(tmp_path, 1)
    assert latest(tmp_path) is None


def test_the_furthest_checkpoint_is_the_newest_attempts(tmp_path):
    attempt(tmp_path, 1, 4, 8)
    third = attempt(tmp_path, 3, 8, 12, resume_step=4)
    attempt(tmp_path, 2, 4)
    assert latest(tmp_path) == (12, checkpoint_path(third.attempt_dir, 12))


def test_what_was_written_after_a_successor_branched_off_is_nobodys_history(tmp_path):
    first = attempt(tmp_path, 1, 4, 8, 20)
    attempt(tmp_path, 2, resume_step=8)
    assert latest(tmp_path) == (8, checkpoint_path(first.attempt_dir, 8))


def test_a_checkpoint_without_its_name_and_an_attempt_without_its_spec_do_not_count(tmp_path):
    spec = attempt(tmp_path, 1, 4)
    (spec.attempt_dir / "checkpoints" / ".step_00000008").mkdir()
    stray = spec.attempt_dir.with_name("002-stray")
    checkpoint_path(stray, 12).mkdir(parents=True)
    assert latest(tmp_path) == (4, checkpoint_path(spec.attempt_dir, 4))


def manifest(path, size):
    (path / "tensors").write_bytes(b"1234")
    (path / "manifest.json").write_text(json.dumps({"files": {"tensors": {"bytes": size}}}))


def test_of_a_complete_trial_the_furthest_whole_checkpoints_stay_over_all_attempts(tmp_path):
    """Not the torn one, not what was written after a successor had branched off, and never the last whole one."""
    first, second = attempt(tmp_path, 1, 4, 8, 12), attempt(tmp_path, 2, 12, 16, resume_step=8)
    paths = {(spec.number, step): path for spec in (first, second) for step, path in complete(spec)}
    for path in paths.values():
        manifest(path, 4)
    manifest(paths[2, 16], 5)
    trial = first.attempt_dir.parents[1]
    prune_trial(trial, keep=4)
    assert all(path.exists() for path in paths.values())
    prune_trial(trial, keep=2)
    assert {place for place, path in paths.items() if path.exists()} == {(2, 12), (1, 8)}
    manifest(paths[2, 12], 5)
    prune_trial(trial, keep=2)
    assert paths[1, 8].exists()


def complete(spec):
    return list(complete_checkpoints(spec.attempt_dir))
