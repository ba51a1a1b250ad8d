"""Where a trial's numbers come from: commit, tree, packages, host. Stored with every attempt."""

from __future__ import annotations

import functools
import importlib.metadata
import json
import platform
import socket
import subprocess
from pathlib import Path
from typing import Any

import models
from models.config import TrialConfig
from orchestrator.gang import source_hash

PARCEL = "parcel.json"
"""Beside the packages of a submitted sweep: what is to be run, and the commit that it was sent from."""
PACKAGES = ("gatesweep", "torch", "megatron-core", "transformer-engine", "ray", "optuna", "numpy")


@functools.cache
def provenance() -> dict[str, Any]:
    """Of this process; gathered once. A part that cannot be known is None, never a guess."""
    sent = _sent()
    return {
        "source_hash": source_hash(),
        "commit": sent.get("commit") or _git("rev-parse", "HEAD"),
        "dirty": sent.get("dirty", _is_dirty()),
        "packages": {name: _version(name) for name in PACKAGES},
        "python": platform.python_version(),
        "driver_host": socket.gethostname(),
    }


def data_hashes(config: TrialConfig) -> dict[str, str]:
    """Of what the trial reads; beside its provenance."""
    return {"corpus_sha256": config.data.corpus_sha256, "tokenizer_sha256": config.data.tokenizer_sha256}


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _sent() -> dict[str, Any]:
    """What ``gatesweep submit`` noted of the tree that it sent, where this code is what was sent."""
    path = Path(str(models.__file__)).parent.parent / PARCEL
    found: dict[str, Any] = json.loads(path.read_text()) if path.exists() else {}
    return found


def _is_dirty() -> bool | None:
    status = _git("status", "--porcelain", "--untracked-files=no")
    return None if status is None else bool(status)


def _git(*arguments: str) -> str | None:
    """Of the tree that the code was loaded from; None when that is no git checkout of it."""
    tree = Path(str(models.__file__)).parent.parent
    if not (tree / ".git").exists():
        return None
    try:
        done = subprocess.run(["git", "-C", str(tree), *arguments], capture_output=True, text=True, timeout=20)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() if done.returncode == 0 else None
