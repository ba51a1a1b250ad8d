"""One host: its packages, GPUs, disk and collectives. Runs here, and on every node of a cluster."""

from __future__ import annotations

import importlib.metadata
import json
import os
import platform
import resource
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import models
from orchestrator.doctor.finding import Finding, Level

CHILD_SECONDS = 300.0
LOW_DISK_BYTES, NO_DISK_BYTES = 20 * 10**9, 2 * 10**9
LOW_SHM_BYTES = 10**9
LOW_OPEN_FILES = 4096
SMI_FIELDS = ("name", "driver_version", "temperature.gpu", "ecc.errors.uncorrected.volatile.total")


def examine(home: Path) -> Iterator[Finding]:
    """All that one host can tell by itself. Takes some seconds: torch is loaded in children."""
    yield from check_packages()
    yield from check_room(home)
    described = child_answer(start_child("describe"))
    yield from check_torch(described)
    yield from check_gpus(described, _nvidia_smi())
    yield from check_collectives(2, "cuda" if len(described.get("gpus", ())) > 1 else "cpu")


def check_packages() -> Iterator[Finding]:
    """Every requirement of this package that applies here is installed and in its range."""
    from packaging.requirements import Requirement

    python = platform.python_version()
    try:
        wanted = [Requirement(line) for line in importlib.metadata.requires("gatesweep") or ()]
    except importlib.metadata.PackageNotFoundError:
        mend = "pip install . in the repository"
        yield Finding("packages", Level.WARNING, f"Python {python}; gatesweep itself is not installed", mend)
        return
    wrong = []
    for one in wanted:
        if one.marker is None or one.marker.evaluate({"extra": ""}):
            installed = _version(one.name)
            if installed is None:
                wrong.append(f"{one.name} is missing")
            elif not one.specifier.contains(installed, prereleases=True):
                wrong.append(f"{one.name} {installed}, allowed {one.specifier}")
    if wrong:
        mend = "pip install --constraint constraints.txt ."
        yield Finding("packages", Level.PROBLEM, "; ".join(wrong), mend)
    else:
        shown = ", ".join(f"{name} {_version(name)}" for name in ("torch", "megatron-core", "ray", "mlflow", "optuna"))
        yield Finding("packages", Level.OK, f"Python {python}, {shown}")


def check_torch(described: Mapping[str, Any]) -> Iterator[Finding]:
    """That torch and Megatron load, and Transformer Engine where there is a GPU for it."""
    if "error" in described:
        yield Finding("torch", Level.PROBLEM, described["error"], "pip install --constraint constraints.txt .")
        return
    for name in ("torch", "megatron.core"):
        if described[name]["error"] is None:
            yield Finding(name, Level.OK, f"{described[name]['version']} loads")
        else:
            mend = "pip install --constraint constraints.txt ."
            yield Finding(name, Level.PROBLEM, described[name]["error"], mend)
    engine = described["transformer_engine"]
    if engine is None:
        yield Finding("transformer engine", Level.OK, "not looked for: no GPU")
    elif engine["error"] is None:
        yield Finding("transformer engine", Level.OK, f"{engine['version']} loads")
    else:
        mend = "pip install --no-build-isolation '.[gpu]'; without it Megatron's own layers are taken, and no FP8"
        yield Finding("transformer engine", Level.WARNING, engine["error"], mend)


def check_gpus(described: Mapping[str, Any], seen: list[dict[str, str]]) -> Iterator[Finding]:
    """``seen``: the driver's account. GPUs that torch can't use, that miscompute, or that count memory errors."""
    usable = described.get("gpus", [])
    if not seen and not usable:
        yield Finding("gpus", Level.OK, "none; gangs run on CPUs")
        return
    if len(usable) < len(seen):
        why = "this torch is a CPU build" if described.get("cuda") is None else "torch can't use them"
        mend = "install the CUDA build of torch that fits the driver" if described.get("cuda") is None else "nvidia-smi"
        yield Finding("gpus", Level.PROBLEM, f"{len(seen)} there, {len(usable)} usable: {why}", mend)
    for index, gpu in enumerate(usable):
        driver = seen[index] if index < len(seen) else {}
        errors = driver.get("ecc.errors.uncorrected.volatile.total", "0")
        name = f"gpu {index}"
        if gpu["error"] is not None:
            yield Finding(name, Level.PROBLEM, f"{gpu['name']}: {gpu['error']}", "reset it, or take the host out")
        elif errors.isdigit() and int(errors) > 0:
            yield Finding(name, Level.PROBLEM, f"{gpu['name']}: {errors} uncorrected memory errors", "nvidia-smi -r")
        else:
            free = f"{gpu['free_bytes'] / 1e9:.0f} of {gpu['total_bytes'] / 1e9:.0f} GB free"
            yield Finding(name, Level.OK, f"{gpu['name']}, {free}, driver {driver.get('driver_version', 'unknown')}")


def check_room(home: Path) -> Iterator[Finding]:
    """Room for checkpoints, shared memory for Ray, and open files for metrics and sockets."""
    place = next(path for path in (home, *home.parents) if path.exists())
    free = shutil.disk_usage(place).free
    level = Level.PROBLEM if free < NO_DISK_BYTES else Level.WARNING if free < LOW_DISK_BYTES else Level.OK
    mend = "" if level is Level.OK else "checkpoint: {keep: 1, final: false} in the sweep, or another GATESWEEP_HOME"
    yield Finding("disk", level, f"{free / 1e9:.1f} GB free at {place}", mend)
    if not os.access(place, os.W_OK):
        yield Finding("home", Level.PROBLEM, f"{place} can't be written", "another GATESWEEP_HOME, or its permissions")
    shm = Path("/dev/shm")
    if shm.exists():
        size = shutil.disk_usage(shm).total
        level = Level.WARNING if size < LOW_SHM_BYTES else Level.OK
        mend = "" if level is Level.OK else "--shm-size of the container: Ray falls back to the disk"
        yield Finding("shared memory", level, f"{size / 1e9:.1f} GB", mend)
    limit = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
    level = Level.WARNING if 0 <= limit < LOW_OPEN_FILES else Level.OK
    yield Finding("open files", level, f"at most {limit:,}", "" if level is Level.OK else "ulimit -n 65536")


def check_collectives(num_ranks: int, device: str) -> Iterator[Finding]:
    """An all-reduce between processes of this host, by gloo or, with several GPUs, NCCL."""
    with tempfile.TemporaryDirectory(prefix="gatesweep-doctor-") as folder:
        options = ["--ranks", str(num_ranks), "--meet", f"file://{folder}/meet", "--device", device]
        ranks = [start_child("allreduce", "--rank", str(rank), *options) for rank in range(num_ranks)]
        answers = [child_answer(rank) for rank in ranks]
    yield collective_finding(f"{num_ranks} processes", device, answers)


def collective_finding(between: str, device: str, answers: list[dict[str, Any]]) -> Finding:
    name = f"all-reduce by {'NCCL' if device == 'cuda' else 'gloo'}"
    errors = [str(one["error"]) for one in answers if "error" in one]
    if errors:
        mend = "name the interface: GLOO_SOCKET_IFNAME or NCCL_SOCKET_IFNAME; and let ports through between the nodes"
        return Finding(name, Level.PROBLEM, f"{between}: {errors[0]}", mend)
    slowest = min(one["gigabytes_per_second"] for one in answers)
    return Finding(name, Level.OK, f"{between}: {slowest:.2f} GB/s")


def start_child(*arguments: str) -> subprocess.Popen[str]:
    """``python -m models.verbs.machine``; of this program's own models, whatever the working folder holds."""
    path = os.pathsep.join([str(Path(models.__file__).parents[1]), *filter(None, [os.environ.get("PYTHONPATH")])])
    command = [sys.executable, "-P", "-W", "ignore", "-m", "models.verbs.machine", *arguments]
    return subprocess.Popen(
        command, env={**os.environ, "PYTHONPATH": path}, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )


def child_answer(child: subprocess.Popen[str]) -> dict[str, Any]:
    """What it printed; ``{"error": ...}`` when it failed or took too long."""
    try:
        out, err = child.communicate(timeout=CHILD_SECONDS)
    except subprocess.TimeoutExpired:
        child.kill()
        child.communicate()
        return {"error": f"no answer in {CHILD_SECONDS:.0f} s"}
    if child.returncode:
        lines = err.strip().splitlines() or ["it said nothing"]
        return {"error": f"exit code {child.returncode}: {lines[-1][:300]}"}
    answer: dict[str, Any] = json.loads(out.strip().splitlines()[-1])
    return answer


def _nvidia_smi() -> list[dict[str, str]]:
    """The driver's list of GPUs; empty where there is none."""
    command = ["nvidia-smi", f"--query-gpu={','.join(SMI_FIELDS)}", "--format=csv,noheader,nounits"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=30, check=True)
    except (OSError, subprocess.SubprocessError):
        return []
    rows = [line.split(",") for line in done.stdout.splitlines() if line.strip()]
    return [dict(zip(SMI_FIELDS, (value.strip() for value in row), strict=False)) for row in rows]


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None
