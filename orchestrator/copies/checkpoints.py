"""A trial's last checkpoint, copied: files first, its signed manifest last, and a note of it in the run dir."""

from __future__ import annotations

from pathlib import Path

from pydantic import BaseModel, ConfigDict, ValidationError

from models import run_dir, trust
from orchestrator.copies.place import Place

NOTE = "copied.json"


class _Note(BaseModel):
    """Which checkpoint of the trial is where."""

    model_config = ConfigDict(frozen=True)

    url: str
    checkpoint: str
    """Relative to the run dir."""


def has_copy(trial_dir: Path, place: Place) -> bool:
    """Whether the trial's last checkpoint was copied there, by the note; also when the trial has none to copy."""
    found = run_dir.latest_checkpoint(trial_dir)
    return found is None or _read_note(trial_dir) == _note(trial_dir, found[1], place)


def copy_checkpoint(trial_dir: Path, place: Place) -> bool:
    """Copy the trial's last checkpoint; False when there is none, or it is there already.

    Raises CopyError when the place did not take it, and trust.Altered or trust.Untrusted for one that is torn or not
    ours, of which nothing is copied. Cut short anywhere, it is no copy: the manifest is missing there.
    """
    found = run_dir.latest_checkpoint(trial_dir)
    if found is None or has_copy(trial_dir, place):
        return False
    checkpoint = found[1]
    trust.check(checkpoint, "checkpoint")
    files = trust.signed_files(checkpoint, "checkpoint")
    attempt_dir = checkpoint.parents[1]
    folder = f"trials/{trial_dir.name}"
    attempt = f"{folder}/attempts/{attempt_dir.name}"
    target = f"{attempt}/checkpoints/{checkpoint.name}"
    there = place.read(f"{target}/{trust.MANIFEST}")
    is_new = there != (checkpoint / trust.MANIFEST).read_bytes()
    if is_new:
        if there is not None:  # of a folder that was signed anew: until the end of this it would vouch for a mixture
            place.remove(f"{target}/{trust.MANIFEST}")
        place.put(trial_dir / "config.json", f"{folder}/config.json")
        place.put(attempt_dir / "attempt.json", f"{attempt}/attempt.json")
        place.put_folder(checkpoint, sorted(files), target, last=trust.MANIFEST)
    run_dir.write_json(trial_dir / NOTE, _note(trial_dir, checkpoint, place))
    return is_new


def noted_url(trial_dir: Path) -> str | None:
    """Where the trial's checkpoint was copied last, by the note."""
    note = _read_note(trial_dir)
    return None if note is None else note.url


def _note(trial_dir: Path, checkpoint: Path, place: Place) -> _Note:
    return _Note(url=place.url, checkpoint=checkpoint.relative_to(trial_dir).as_posix())


def _read_note(trial_dir: Path) -> _Note | None:
    try:
        return _Note.model_validate_json((trial_dir / NOTE).read_text())
    except (OSError, ValidationError):
        return None
