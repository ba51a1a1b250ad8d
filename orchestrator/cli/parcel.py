"""What a submitted sweep takes along: this very version of both packages, the sweep file, and the files beside it.

    models/  orchestrator/     as they run here; on the cluster they come before what is installed there
    sweep/...                  the sweep file and the files that it names relative to itself, laid as they are here
    parcel.json                (Parcel) what to run, and the hash that driver and ranks must find

The parcel lies where everyone who reaches the cluster can read it: no environment and no credential goes into it.
"""

from __future__ import annotations

import hashlib
import importlib
import os
import re
import shutil
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from pydantic import BaseModel, ConfigDict

from models import run_dir
from orchestrator.controller.provenance import PARCEL
from orchestrator.plan import Plan
from orchestrator.sweep import UserError

PACKAGES = ("models", "orchestrator")
MOST_FILE_BYTES = 64 * 1024 * 1024
_CREDENTIAL = re.compile(r"://[^/@\s]*:[^/@\s]+@")


class Parcel(BaseModel):
    """What the driver on the cluster is told."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    sweep: str
    sweep_file: str
    """Inside the folder ``sweep``."""
    overrides: tuple[str, ...]
    source_hash: str
    commit: str | None
    dirty: bool | None
    """Of the tree that was sent, where it is a git checkout."""


def pack(
    plan: Plan, overrides: Sequence[str], provenance: Mapping[str, object], folder: Path, home: str | None
) -> Parcel:
    """Lay the parcel into ``folder``; UserError for what must not or cannot be sent."""
    refuse_credentials(overrides)
    sweep_file = Path(plan.sweep.path).resolve()
    beside = _files_beside(plan, home)
    refuse_credentials([sweep_file.read_text()], str(plan.sweep.path))
    root = Path(os.path.commonpath([path.parent for path in (sweep_file, *beside)]))
    for path in (sweep_file, *beside):
        target = folder / "sweep" / path.relative_to(root)
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copytree(path, target) if path.is_dir() else shutil.copyfile(path, target)
    for package in PACKAGES:
        source = Path(str(importlib.import_module(package).__file__)).parent
        shutil.copytree(source, folder / package, ignore=shutil.ignore_patterns("__pycache__"))
    parcel = Parcel.model_validate(
        {
            "sweep": plan.sweep.name,
            "sweep_file": str(sweep_file.relative_to(root)),
            "overrides": overrides,
            **{name: provenance[name] for name in ("source_hash", "commit", "dirty")},
        }
    )
    run_dir.write_json(folder / PARCEL, parcel)
    return parcel


def refuse_credentials(texts: Sequence[str], place: str | None = None) -> None:
    """UserError for a URL with a password among what everyone on the cluster can read."""
    for text in texts:
        found = _CREDENTIAL.search(text)
        if found:
            where = place or f"{text[: found.start()]}://..."
            raise UserError(
                f"{where}: a URL with a password would be readable by everyone who can list Ray's jobs; allowed: the "
                "variable GATESWEEP_STORE in the cluster's own environment, or --store-file with a file that lies there"
            )


def unpack_sweep(parcel_dir: Path, parcel: Parcel, home: Path) -> Path:
    """Copy the sweep's files onto the shared path, where every rank can read them; the sweep file's path there.

    The folder is named by what it holds: the same submission finds it in place.
    """
    source = parcel_dir / "sweep"
    digest = hashlib.sha256()
    for path in sorted(path for path in source.rglob("*") if path.is_file()):
        digest.update(f"{path.relative_to(source)}\0{path.stat().st_size}\0".encode() + path.read_bytes())
    target = home / "submitted" / f"{parcel.sweep}-{digest.hexdigest()[:12]}"
    if not target.exists():
        target.parent.mkdir(parents=True, exist_ok=True)
        aside = target.with_name(f".{target.name}.{os.getpid()}")
        shutil.copytree(source, aside)
        try:
            aside.rename(target)
        except OSError:
            shutil.rmtree(aside)  # another driver was first
    return target / parcel.sweep_file


def _files_beside(plan: Plan, home: str | None) -> list[Path]:
    """Files named relative to the sweep file. What has an absolute path belongs to the cluster, and is looked for
    there."""
    files = []
    for name, path in plan.named_files.items():
        if Path(name).expanduser().is_absolute():
            continue
        files.append(path)
        pattern = path.with_name(f"{path.name}.json")
        if path.suffix == ".tiktoken" and pattern.exists():
            files.append(pattern)
    sizes = {path: sum(one.stat().st_size for one in _walk(path)) for path in files}
    if sum(sizes.values()) > MOST_FILE_BYTES:
        largest = max(sizes, key=lambda path: sizes[path])
        raise UserError(
            f"{plan.sweep.path}: the files beside it have {sum(sizes.values()):,} bytes, {largest} alone "
            f"{sizes[largest]:,}; allowed: at most {MOST_FILE_BYTES:,} are sent along. Copy it onto the path that the "
            f"cluster shares ({home or 'its GATESWEEP_HOME'}) and name it in the sweep by its absolute path there"
        )
    return files


def _walk(path: Path) -> Iterator[Path]:
    yield from (one for one in path.rglob("*") if one.is_file()) if path.is_dir() else (path,)
