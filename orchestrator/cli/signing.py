"""The key that signs checkpoints, and the verb by which a user vouches for files that it did not sign."""

from __future__ import annotations

import json
import zlib
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console

from models import trust
from orchestrator.sweep import UserError

_BLOCK_BYTES = 1 << 22


def register(app: typer.Typer, console: Console) -> None:
    """Add the verb to ``app``; it prints on ``console``."""

    @app.command()
    def sign(
        path: Annotated[Path, typer.Argument(help="A checkpoint's folder, or one with checkpoints in it.")],
    ) -> None:
        """Sign checkpoints that you know to be good: an earlier version's, or another user's that you copied.

        To open a checkpoint can run code that is in it: what you sign, you trust.
        """
        signed = [folder for folder in _checkpoints(path) if _sign(folder)]
        for folder in signed:
            console.print(f"signed {folder}", markup=False, highlight=False, soft_wrap=True)
        console.print(f"{len(signed)} checkpoint(s) signed with key {trust.key_id()}", highlight=False)


def check_key(shared: Path) -> None:
    """UserError when the key can't be used, or lies where others who share the runs could read or replace it."""
    path = trust.key_path()
    if shared.resolve() in path.resolve().parents:
        raise UserError(
            f"the key {path} lies in GATESWEEP_HOME {shared}, beside what it signs; name a file elsewhere with "
            f"{trust.KEY_FILE_VARIABLE}"
        )
    try:
        trust.read_key()
    except (trust.Untrusted, OSError) as error:
        raise UserError(f"checkpoints can't be signed: {error}") from error


def _checkpoints(path: Path) -> list[Path]:
    if not path.is_dir():
        raise UserError(f"sign: {path} is no folder")
    found = sorted({file.parent for file in path.rglob("common.pt") if not file.parent.name.startswith(".")})
    if not found:
        raise UserError(f"sign: {path} is no checkpoint and holds none (a checkpoint has a common.pt)")
    return found


def _sign(folder: Path) -> bool:
    """False when it is signed already. A torn one is not signed: the sizes and CRC-32 that it may come with hold."""
    try:
        trust.check(folder, "checkpoint")
    except trust.Untrusted:
        pass
    except trust.Altered as fault:
        raise UserError(f"sign: {folder} is damaged and was not signed: {fault}") from None
    else:
        return False
    for name, expected in _listed(folder).items():
        _refuse_damaged(folder / name, expected)
    try:
        trust.seal(folder, "checkpoint")
        trust.check(folder, "checkpoint")
    except (trust.Untrusted, OSError) as error:
        raise UserError(f"sign: {error}") from error
    return True


def _listed(folder: Path) -> dict[str, dict[str, Any]]:
    files: dict[str, dict[str, Any]] = json.loads((folder / trust.MANIFEST).read_text()).get("files", {})
    return files


def _refuse_damaged(path: Path, expected: dict[str, Any]) -> None:
    """By the manifest of an earlier version (size, CRC-32), or of another key (size, SHA-256)."""
    fault = None
    if "sha256" in expected:
        fault = trust.content_fault(path, trust.FileSeal.model_validate(expected))
    elif not path.is_file() or path.stat().st_size != expected.get("bytes") or _crc32(path) != expected.get("crc32"):
        fault = "is not what its manifest says"
    if fault:
        raise UserError(f"sign: {path.parent} is damaged and was not signed: {path.name} {fault}")


def _crc32(path: Path) -> int:
    value = 0
    with path.open("rb") as stream:
        while block := stream.read(_BLOCK_BYTES):
            value = zlib.crc32(block, value)
    return value
