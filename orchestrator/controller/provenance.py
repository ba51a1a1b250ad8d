"""Where a trial's numbers come from: commit, tree, packages, host. Stored with every attempt."""

from __future__ import annotations

import functools
import importlib.metadata
import platform
import socket
import subprocess
from pathlib import Path
from typing import Any

import models
from models.config import TrialConfig
from orchestrator.gang import source_hash

PACKAGES = ("gatesweep", "torch", "megatron-core", "transformer-engine", "ray", "optuna", "numpy")


@functools.cache
def provenance() -> dict[str, Any]:
    """Of this process; gathered once. A part that cannot be known is None, never a guess."""
    return {
        "source_hash": source_hash(),
        "commit": _git("rev-parse", "HEAD"),
        "dirty": _is_dirty(),
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
