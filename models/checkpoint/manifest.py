"""Whole or torn: the manifest of a checkpoint, with the size and checksum of every other file."""

from __future__ import annotations

import json
import os
import zlib
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from torch import distributed

MANIFEST = "manifest.json"
"""Size and CRC-32 of every other file of a checkpoint, by name."""
_BLOCK_BYTES = 1 << 22


class CheckpointError(Exception):
    """A checkpoint cannot be used: it is not there, not whole, or of another trial. The one before may be."""


def written_by(rank: int, folder: Path) -> list[Path]:
    """A rank's files of tensors; what is common to all ranks is rank 0's."""
    return [
        path
        for path in sorted(folder.iterdir())
        if (path.name.startswith(f"__{rank}_") if path.name.startswith("__") else rank == 0)
    ]


def checked(folder: Path, paths: Iterable[Path]) -> dict[str, dict[str, int]]:
    """Put the files on the disk for good, and return size and checksum by name."""
    found = {}
    for path in paths:
        sync(path)
        found[path.relative_to(folder).as_posix()] = {"bytes": path.stat().st_size, "crc32": _crc32(path)}
    return found


def _crc32(path: Path) -> int:
    value = 0
    with path.open("rb") as stream:
        while block := stream.read(_BLOCK_BYTES):
            value = zlib.crc32(block, value)
    return value


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


def write_manifest(folder: Path, files: dict[str, Any]) -> None:
    path = folder / MANIFEST
    path.write_text(json.dumps({"files": dict(sorted(files.items()))}, indent=1) + "\n")
    sync(path)
    sync(folder)


def looks_whole(path: Path) -> bool:
    """Whether every file of the manifest is there with its size: what can be told without reading gigabytes."""
    try:
        files = json.loads((path / MANIFEST).read_text())["files"]
        return all((path / name).stat().st_size == entry["bytes"] for name, entry in files.items())
    except (OSError, ValueError, KeyError, TypeError):
        return False


def verify(path: Path) -> None:
    """Compare every file with the manifest, each on one of the ranks, and raise on all what any has found."""
    if not path.is_dir():
        raise CheckpointError(f"checkpoint {path} does not exist")
    try:
        files = json.loads((path / MANIFEST).read_text())["files"]
    except FileNotFoundError:
        raise CheckpointError(
            f"checkpoint {path} has no {MANIFEST}: it is torn, or of a version that wrote none"
        ) from None
    except (ValueError, KeyError, TypeError) as failure:
        raise CheckpointError(f"checkpoint {path} is torn: {MANIFEST} is not readable ({failure})") from failure
    own = sorted(files)[distributed.get_rank() :: distributed.get_world_size()]
    wrong = gathered({name: fault for name in own if (fault := _fault(path / name, files[name]))})
    if wrong:
        told = "; ".join(f"{name} {fault}" for name, fault in sorted(wrong.items()))
        raise CheckpointError(f"checkpoint {path} is torn: {told}")


def _fault(path: Path, expected: dict[str, int]) -> str | None:
    if not path.is_file():
        return "is missing"
    if (size := path.stat().st_size) != expected["bytes"]:
        return f"has {size:,} bytes of {expected['bytes']:,}"
    if (found := _crc32(path)) != expected["crc32"]:
        return f"has the checksum {found:08x} instead of {expected['crc32']:08x}"
    return None
