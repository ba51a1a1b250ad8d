"""A sweep handed to a real Ray by Ray Jobs. Slow, since Ray starts twice over: ``make test-cluster`` runs it."""

from __future__ import annotations

import os
import subprocess
import sys
import urllib.error
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import psutil
import pytest
from services import free_ports, laptop
from sweep_runs import SWEEP, wait_for, write_sweep

from orchestrator.store import Store

pytestmark = [
    pytest.mark.cluster,
    pytest.mark.skipif(
        "GATESWEEP_CLUSTER_TESTS" not in os.environ, reason="starts a cluster; make test-cluster runs it"
    ),
]


@dataclass(frozen=True)
class Head:
    address: str
    home: Path
    token_file: Path


@pytest.fixture
def head(tmp_path: Path) -> Iterator[Head]:
    """A Ray of its own with a token, where packages are installed that can't even be imported."""
    for package in ("models", "orchestrator"):
        (tmp_path / "installed" / package).mkdir(parents=True)
        (tmp_path / "installed" / package / "__init__.py").write_text("raise ImportError('the installed one')\n")
    (tmp_path / "token").write_text("0123456789abcdef" * 4)
    names = ("port", "dashboard-port", "dashboard-agent-listen-port", "dashboard-agent-grpc-port")
    names += ("runtime-env-agent-port", "ray-client-server-port", "metrics-export-port")
    ports = dict(zip(names, free_ports(len(names)), strict=True))
    environment = {
        **{name: value for name, value in os.environ.items() if not name.startswith(("RAY_", "GATESWEEP_", "MLFLOW_"))},
        "PYTHONPATH": str(tmp_path / "installed"),
        "GATESWEEP_HOME": str(tmp_path / "shared"),
        "RAY_AUTH_MODE": "token",
        "RAY_AUTH_TOKEN_PATH": str(tmp_path / "token"),
        "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0",  # its own name for loopback
        "RAY_agent_register_timeout_ms": "300000",  # on a busy machine
    }
    command = [sys.executable, "-m", "ray.scripts.scripts", "start", "--head", "--block", "--disable-usage-stats"]
    # Unix sockets have short paths.
    command += ["--num-cpus=2", f"--temp-dir=/tmp/gatesweep-{os.getpid()}"]
    command += [f"--{name}={port}" for name, port in ports.items()]
    with (tmp_path / "ray.log").open("w") as log:
        process = subprocess.Popen(command, env=environment, stdout=log, stderr=log, cwd=tmp_path)
    address = f"http://127.0.0.1:{ports['dashboard-port']}"
    try:
        wait_for(lambda: process.poll() is not None or _asks_for_a_token(address), "Ray's dashboard")
        assert process.poll() is None, (tmp_path / "ray.log").read_text()
        yield Head(address, tmp_path / "shared", tmp_path / "token")
    finally:
        started = [psutil.Process(process.pid), *psutil.Process(process.pid).children(recursive=True)]
        process.terminate()
        process.wait()
        for one in psutil.wait_procs(started, timeout=10)[1]:
            one.kill()


def _asks_for_a_token(address: str) -> bool:
    try:
        urllib.request.urlopen(f"{address}/api/version", timeout=5)
    except urllib.error.HTTPError as error:
        return error.code == 401
    except OSError:
        return False
    raise AssertionError("the Jobs port let someone in without a token")


def test_a_submitted_sweep_ends_by_itself_with_the_version_that_was_sent(tmp_path: Path, head: Head):
    at = ("--address", head.address, "--token-file", str(head.token_file))
    one_arm_each = SWEEP.replace("train: {tokens: 5120", "train: {tokens: 2560")
    said = laptop(
        tmp_path, "submit", str(write_sweep(tmp_path / "sweeps", one_arm_each)), *at, "--python", sys.executable
    )
    assert "tiny: 2 trials, 2 new, 0 finished, 2 to run" in said
    wait_for(lambda: "SUCCEEDED" in laptop(tmp_path, "status", *at), "the job to end")
    with Store(f"sqlite:///{head.home / 'gatesweep.db'}") as store:
        trials = store.trials(store.sweep("tiny").id)
        assert [trial.state for trial in trials] == ["COMPLETE", "COMPLETE"]
    assert "complete  g1 seed=1" in laptop(tmp_path, "logs", "tiny", *at)
    assert list((head.home / "submitted").glob("tiny-*/corpus.jsonl"))
