"""A copied checkpoint, brought back to where it lay. Only one that this key signed is taken, and only whole.

The signature is judged before anything but the manifest is read, so that its names of files are ours, too.
"""

from __future__ import annotations

import os
import re
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from pydantic import ValidationError

from models import run_dir, trust
from models.config import TrialConfig
from models.retention import remove
from models.run_dir import AttemptSpec
from orchestrator.copies.place import Place
from orchestrator.sweep import UserError

_ATTEMPT = re.compile(r"\d{3,}-\w+")
_STEP = re.compile(r"step_(\d{8,})")
NAMED = 4
"""Trials that a message lists when a prefix fits several."""


@dataclass(frozen=True)
class Fetched:
    checkpoint: Path
    step: int
    num_bytes: int
    """0: it was here already."""


def fetch(home: Path, name: str, place: Place, tell: Callable[[str], None] = lambda _: None) -> Fetched:
    """Bring the furthest copied checkpoint of the trial whose fingerprint begins with ``name`` into ``home``.

    UserError when there is none, or several trials fit, or it is not what this key signed; CopyError when the place is
    not reached. Nothing half fetched is left under a checkpoint's name.
    """
    fingerprint = _the_trial(place, name)
    step, attempt, copied = _furthest(place, fingerprint)
    config, spec = _trial_of(place, fingerprint), _attempt_of(place, fingerprint, attempt)
    trial_dir = run_dir.trial_dir(home, fingerprint)
    attempt_dir = trial_dir / "attempts" / attempt
    target = attempt_dir / "checkpoints" / copied.rpartition("/")[2]
    if target.exists() and _is_sound(target):
        return Fetched(target, step, 0)
    tell(f"{place.at(copied)} is fetched")
    aside = target.with_name(f".{target.name}.fetched.{os.getpid()}")
    try:
        num_bytes = _download(place, copied, aside)
        if not (trial_dir / "config.json").exists():
            run_dir.write_trial_config(trial_dir, config)
        if not (attempt_dir / "attempt.json").exists():
            run_dir.write_json(attempt_dir / "attempt.json", spec)
        if target.exists():
            remove(target)
        aside.rename(target)
        _sync(target.parent)
    finally:
        shutil.rmtree(aside, ignore_errors=True)
    return Fetched(target, step, num_bytes)


# -- what is there --------------------------------------------------------------------------------------------


def _the_trial(place: Place, name: str) -> str:
    found = [one for one in place.names("trials") if one.startswith(name)] if name else []
    if len(found) == 1:
        return found[0]
    if not found:
        raise UserError(f"fetch: no trial in {place.at('trials')} begins with {name!r}")
    names = ", ".join(found[:NAMED]) + (", ..." if len(found) > NAMED else "")
    raise UserError(f"fetch: {len(found)} trials in {place.at('trials')} begin with {name!r}: {names}")


def _furthest(place: Place, fingerprint: str) -> tuple[int, str, str]:
    """(step, attempt, folder) of the copy with the most steps; of equal ones the newest attempt's. Unfinished ones,
    which have no manifest, are passed over."""
    found = []
    for attempt in place.names(f"trials/{fingerprint}/attempts"):
        folder = f"trials/{fingerprint}/attempts/{attempt}/checkpoints"
        steps = place.names(folder) if _ATTEMPT.fullmatch(attempt) else []
        found += [(int(match[1]), attempt, f"{folder}/{one}") for one in steps if (match := _STEP.fullmatch(one))]
    for one in sorted(found, reverse=True):
        if trust.MANIFEST in place.names(one[2]):
            return one
    raise UserError(f"fetch: {place.at(f'trials/{fingerprint}')} holds no whole checkpoint; gatesweep run copies it")


def _trial_of(place: Place, fingerprint: str) -> TrialConfig:
    """The trial's config: its fingerprint says whether it is the one."""
    name = f"trials/{fingerprint}/config.json"
    content = place.read(name)
    try:
        config = TrialConfig.model_validate_json(content or b"")
    except ValidationError as error:
        raise UserError(f"fetch: {place.at(name)} is no trial's config: {error.errors()[0]['msg']}") from None
    if config.fingerprint() != fingerprint:
        raise UserError(f"fetch: {place.at(name)} is the config of another trial, {config.fingerprint()}")
    return config


def _attempt_of(place: Place, fingerprint: str, attempt: str) -> AttemptSpec:
    name = f"trials/{fingerprint}/attempts/{attempt}/attempt.json"
    try:
        spec = AttemptSpec.model_validate_json(place.read(name) or b"")
    except ValidationError as error:
        raise UserError(f"fetch: {place.at(name)} is no attempt: {error.errors()[0]['msg']}") from None
    if (spec.fingerprint, spec.attempt_dir.name) != (fingerprint, attempt):
        raise UserError(f"fetch: {place.at(name)} is another attempt, {spec.attempt_dir.name} of {spec.fingerprint}")
    return spec


# -- here -----------------------------------------------------------------------------------------------------


def _is_sound(checkpoint: Path) -> bool:
    try:
        trust.check(checkpoint, "checkpoint")
    except (trust.Untrusted, trust.Altered):
        return False
    return True


def _download(place: Place, copied: str, aside: Path) -> int:
    """Into ``aside``, checked against its signed manifest and synced; the bytes. UserError when it is not ours."""
    try:
        aside.mkdir(parents=True, mode=0o700)
        place.get(f"{copied}/{trust.MANIFEST}", aside / trust.MANIFEST)
        files = trust.signed_files(aside, "checkpoint")
        for name in files:
            path = aside / name
            path.parent.mkdir(parents=True, exist_ok=True)
            place.get(f"{copied}/{name}", path)
            _sync(path)
        trust.check(aside, "checkpoint")
        _sync(aside / trust.MANIFEST)
        _sync(aside)
        aside.chmod(0o755)
    except trust.Untrusted as refusal:
        raise UserError(
            f"fetch: {place.at(copied)} was not taken: {refusal}. {trust.KEY_FILE_VARIABLE} names the right key"
        ) from None
    except trust.Altered as fault:
        raise UserError(f"fetch: {place.at(copied)} was not taken, it is not what was signed: {fault}") from None
    except OSError as error:
        raise UserError(f"fetch: {error.filename or aside}: {error.strerror or error}") from error
    return sum(one.bytes for one in files.values())


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
