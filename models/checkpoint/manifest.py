"""Whole or torn, ours or not: the manifest of a checkpoint, with size and SHA-256 of every other file, signed.

A checkpoint holds pickles: to open it can run code. What may be opened is decided in ``models.trust``.
"""

from __future__ import annotations

import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from torch import distributed

from models import trust


class CheckpointError(Exception):
    """A checkpoint cannot be used: it is not there, not whole, or of another trial. The one before may be."""


class UntrustedCheckpoint(CheckpointError):
    """Nothing proves that it is ours, so it was not opened. Not passed over for the one before: a person must look."""


def written_by(rank: int, folder: Path) -> list[Path]:
    """A rank's files of tensors; what is common to all ranks is rank 0's."""
    return [
        path
        for path in sorted(folder.iterdir())
        if (path.name.startswith(f"__{rank}_") if path.name.startswith("__") else rank == 0)
    ]


def checked(folder: Path, paths: Iterable[Path]) -> dict[str, dict[str, Any]]:
    """Put the files on the disk for good, and return size and checksum by name."""
    found = {}
    for path in paths:
        sync(path)
        found[path.relative_to(folder).as_posix()] = trust.sealed_file(path).model_dump()
    return found


def sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def gathered(own: dict[str, Any]) -> dict[str, Any]:
    """The entries of all ranks, on all."""
    everyone: list[Any] = [None] * distributed.get_world_size()
    distributed.all_gather_object(everyone, own)
    return {name: entry for entries in everyone for name, entry in entries.items()}


def write_manifest(folder: Path, files: dict[str, dict[str, Any]]) -> None:
    trust.seal(folder, "checkpoint", {name: trust.FileSeal(**entry) for name, entry in files.items()})
    sync(folder / trust.MANIFEST)
    sync(folder)


def verify(path: Path) -> None:
    """Rank 0 judges the signature, each rank compares a part of the files, and all raise what any has found."""
    if not path.is_dir():
        raise CheckpointError(f"checkpoint {path} does not exist")
    signed = gathered(_signed(path) if distributed.get_rank() == 0 else {})
    if "untrusted" in signed:
        raise UntrustedCheckpoint(f"checkpoint {path} was not opened: {signed['untrusted']}")
    if "altered" in signed:
        raise CheckpointError(f"checkpoint {path} is torn: {signed['altered']}")
    files: trust.Files = signed["files"]
    own = sorted(files)[distributed.get_rank() :: distributed.get_world_size()]
    wrong = gathered({name: fault for name in own if (fault := trust.content_fault(path / name, files[name]))})
    if wrong:
        told = "; ".join(f"{name} {fault}" for name, fault in sorted(wrong.items()))
        raise CheckpointError(f"checkpoint {path} is torn: {told}")


def _signed(path: Path) -> dict[str, Any]:
    try:
        return {"files": trust.signed_files(path, "checkpoint")}
    except trust.Untrusted as refusal:
        return {"untrusted": str(refusal)}
    except trust.Altered as fault:
        return {"altered": str(fault)}
