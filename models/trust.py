"""Folders whose files can run code when they are opened: whose they are, and whether they are as they were written.

Megatron's checkpoints (``.metadata``, ``common.pt``, bytes in ``.distcp``) and its index caches (``.npy``, read with
``allow_pickle``) are or may be pickles. Who writes one closes the folder with ``seal``: manifest.json holds size and
SHA-256 of every file, and an HMAC-SHA256 over them by a key that never lies on the path that is shared. Who opens one
asks ``signed_files`` and compares. A checksum alone would protect from a disk, not from a neighbour.
"""

from __future__ import annotations

import hashlib
import hmac
import json
import os
import secrets
import stat
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from models.redaction import hide

MANIFEST = "manifest.json"

KEY_FILE_VARIABLE = "GATESWEEP_KEY_FILE"
_KEY_BYTES = 32
_OTHERS_MAY_WRITE = stat.S_IWGRP | stat.S_IWOTH

Purpose = Literal["checkpoint", "indices"]
"""Signed too: a folder of one kind never passes for one of another."""


class Untrusted(Exception):
    """Nothing proves that the files are ours, so they were not opened. Never passed over: a person has to look."""


class Altered(Exception):
    """The folder is not as it was sealed: a disk, a copy cut short, or a hand. Nothing of it was opened."""


class FileSeal(BaseModel):
    """What a file was when its folder was sealed."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    bytes: int = Field(ge=0)
    sha256: str


_MEND = "Opening it can run code: sign it if you know where it comes from (gatesweep sign PATH), or remove the folder"

Files = Mapping[str, FileSeal]
"""By name relative to the folder."""


# -- the key --------------------------------------------------------------------------------------------------


def key_path() -> Path:
    """``GATESWEEP_KEY_FILE``, or ``~/.config/gatesweep/key``."""
    named = os.environ.get(KEY_FILE_VARIABLE)
    return Path(named).expanduser() if named else Path.home() / ".config" / "gatesweep" / "key"


def read_key() -> str:
    """The key, hexadecimal, made at its first use; Untrusted when others can read it."""
    path = key_path()
    if not path.exists():
        _make_key(path)
    found = path.stat()
    if found.st_uid != os.geteuid() or found.st_mode & 0o077:
        raise Untrusted(
            f"the key {path} must belong to this user (uid {os.geteuid()}) and be read by nobody else; it belongs to "
            f"uid {found.st_uid} with mode {stat.S_IMODE(found.st_mode):04o}: chmod 600 {path}, or have a new one made"
        )
    text = path.read_text().strip()
    if len(text) != 2 * _KEY_BYTES or set(text) - set("0123456789abcdef"):
        raise Untrusted(f"the key {path} must hold {2 * _KEY_BYTES} hexadecimal digits (openssl rand -hex 32)")
    hide(text)
    return text


def _make_key(path: Path) -> None:
    """Whole under its name or not at all; of two makers the first one's stays."""
    path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
    aside = path.with_name(f".{path.name}.{secrets.token_hex(8)}")
    descriptor = os.open(aside, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    try:
        with os.fdopen(descriptor, "w") as stream:
            stream.write(secrets.token_hex(_KEY_BYTES) + "\n")
            stream.flush()
            os.fsync(stream.fileno())
        try:
            os.link(aside, path)
        except FileExistsError:
            return
    finally:
        aside.unlink()


_given: str | None = None


def use_key(key: str) -> None:
    """The key of this process, instead of a file's: a rank gets the driver's."""
    global _given
    hide(key)
    _given = key


def _key() -> bytes:
    return bytes.fromhex(_given or read_key())


def key_id() -> str:
    """What may be told of the key, to see that two are not the same one."""
    return hashlib.sha256(b"gatesweep key id" + _key()).hexdigest()[:8]


# -- sealing and checking -------------------------------------------------------------------------------------


def sealed_file(path: Path) -> FileSeal:
    """Size and SHA-256 of a file, which nobody but its owner may write from now on."""
    mode = path.stat().st_mode
    if mode & _OTHERS_MAY_WRITE:
        path.chmod(stat.S_IMODE(mode) & ~_OTHERS_MAY_WRITE)
    with path.open("rb") as stream:
        digest = hashlib.file_digest(stream, "sha256").hexdigest()
    return FileSeal(bytes=path.stat().st_size, sha256=digest)


def seal(folder: Path, purpose: Purpose, files: Files | None = None) -> None:
    """Write the signed manifest; ``files`` None: all that are there. The caller syncs and renames."""
    if files is None:
        paths = sorted(path for path in folder.rglob("*") if path.is_file() and path.name != MANIFEST)
        files = {path.relative_to(folder).as_posix(): sealed_file(path) for path in paths}
    content = {name: one.model_dump() for name, one in sorted(files.items())}
    manifest = {"files": content, "key_id": key_id(), "signature": _signature(content, purpose)}
    folder.chmod(stat.S_IMODE(folder.stat().st_mode) & ~_OTHERS_MAY_WRITE)
    path = folder / MANIFEST
    path.write_text(json.dumps(manifest, indent=1) + "\n")
    sealed_file(path)


def _signature(files: Mapping[str, Mapping[str, object]], purpose: Purpose) -> str:
    text = json.dumps(["gatesweep 1", purpose, files], sort_keys=True, separators=(",", ":"))
    return hmac.new(_key(), text.encode(), hashlib.sha256).hexdigest()


class _Manifest(BaseModel):
    files: dict[str, FileSeal]
    key_id: str
    signature: str


def signed_files(folder: Path, purpose: Purpose) -> Files:
    """What the folder must hold; nothing of it is opened but the manifest. Sizes and owners of its files are checked.

    Raises Untrusted when it is not this user's, others may write to it, or this key did not sign it; Altered when the
    manifest is torn or was changed. What the files hold is compared by ``content_fault``.
    """
    _refuse_foreign(folder, [folder])
    manifest = _read_manifest(folder, purpose)
    _refuse_foreign(folder, [folder / name for name in manifest.files if (folder / name).exists()])
    return manifest.files


def _read_manifest(folder: Path, purpose: Purpose) -> _Manifest:
    path = folder / MANIFEST
    try:
        text = path.read_text()
        found = json.loads(text)
    except FileNotFoundError:
        raise Altered(f"{MANIFEST} is missing") from None
    except ValueError as failure:
        raise Altered(f"{MANIFEST} is not readable ({failure})") from failure
    _refuse_foreign(folder, [path])
    if isinstance(found, dict) and found.get("files") and "signature" not in found:
        raise Untrusted(f"{folder} is not signed: an earlier version wrote it, or somebody else. {_MEND}")
    try:
        manifest = _Manifest.model_validate(found)
    except ValidationError as failure:
        raise Altered(f"{MANIFEST} is not readable ({failure.errors()[0]['msg']})") from failure
    if manifest.key_id != key_id():
        raise Untrusted(f"{folder} was signed with another key ({manifest.key_id}) than this one ({key_id()}). {_MEND}")
    content = {name: one.model_dump() for name, one in manifest.files.items()}
    if not hmac.compare_digest(manifest.signature, _signature(content, purpose)):
        raise Altered(f"{MANIFEST} was changed after it was signed")
    return manifest


def _refuse_foreign(folder: Path, paths: Iterable[Path]) -> None:
    """Untrusted unless every path is this user's own, no link, and writable by nobody else."""
    for path in paths:
        found = path.lstat() if path != folder else path.stat()
        if found.st_uid != os.geteuid():
            raise Untrusted(
                f"{path} belongs to uid {found.st_uid}, not to this user (uid {os.geteuid()}). Opening it can run "
                "code: if you know where it comes from, copy the folder as this user and sign the copy with "
                "`gatesweep sign PATH`"
            )
        if not (stat.S_ISREG(found.st_mode) or stat.S_ISDIR(found.st_mode)):
            raise Untrusted(f"{path} must be a plain file: a link can lead anywhere. Remove it, or copy what it names")
        if found.st_mode & _OTHERS_MAY_WRITE:
            raise Untrusted(
                f"{path} can be written by others (mode {stat.S_IMODE(found.st_mode):04o}), and opening it can run "
                f"code: chmod -R go-w {folder}, once you know that nobody did"
            )


def content_fault(path: Path, expected: FileSeal) -> str | None:
    """How a file differs from what was signed; None: not at all."""
    if not path.is_file():
        return "is missing"
    if (size := path.stat().st_size) != expected.bytes:
        return f"has {size:,} bytes of {expected.bytes:,}"
    with path.open("rb") as stream:
        found = hashlib.file_digest(stream, "sha256").hexdigest()
    if found != expected.sha256:
        return f"has the SHA-256 {found[:16]}... instead of {expected.sha256[:16]}..."
    return None


def check(folder: Path, purpose: Purpose) -> None:
    """The whole test, by one process: Untrusted or Altered unless the folder is what this key signed."""
    files = signed_files(folder, purpose)
    faults = [f"{name} {fault}" for name, one in files.items() if (fault := content_fault(folder / name, one))]
    if faults:
        raise Altered("; ".join(faults))
