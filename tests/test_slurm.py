"""The batch script on a real Slurm, whose daemons are started here.

Two nodes on this machine with stand-ins for Ray and gatesweep, where it is the script that is tried, with Slurm's
signals, requeues and steps; and two nodes with addresses of their own, where it is a sweep.
"""

from __future__ import annotations

import getpass
import os
import re
import shutil
import socket
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest
from hosts import SBIN, Hosts, why_not
from services import TREE, free_ports, laptop
from sweep_runs import LONG, curve_numbers, wait_for, write_sweep

from orchestrator.store import Store

PROGRAMS = ("munged", "slurmctld", "slurmd", "sbatch", "scontrol", "scancel")
NODES = ("here1", "here2")

CONF = """\
ClusterName=here
SlurmctldHost={control}
SlurmctldPort={ports[0]}
FirstJobId={first}
SlurmUser={user}
SlurmdUser={user}
AuthType=auth/munge
AuthInfo=socket={folder}/munge.socket
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool-%n
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd-%n.pid
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
MpiDefault=none
MessageTimeout=60
TCPTimeout=30
BatchStartTimeout=300
ReturnToService=2
NodeName=here1 NodeHostname={hosts[0]} Port={ports[1]} CPUs={cpus} State=UNKNOWN
NodeName=here2 NodeHostname={hosts[1]} Port={ports[2]} CPUs={cpus} State=UNKNOWN
PartitionName=main Nodes=ALL Default=YES MaxTime=INFINITE State=UP
"""

pytestmark = [
    pytest.mark.cluster,
    pytest.mark.skipif(
        "GATESWEEP_CLUSTER_TESTS" not in os.environ, reason="starts a Slurm of its own; make test-cluster"
    ),
    pytest.mark.skipif(
        not all(shutil.which(one, path=f"{os.environ['PATH']}:{SBIN}") for one in PROGRAMS),
        reason=f"needs {', '.join(PROGRAMS)} (Debian: slurm-wlm, munge)",
    ),
]


class Slurm:
    """The daemons, and the user's commands: on this host, or on ``hosts`` called here1 and here2, and both on here1."""

    def __init__(self, folder: Path, hosts: Hosts | None = None) -> None:
        self.folder, self._hosts = folder, hosts
        self.environment = {
            **{
                name: value
                for name, value in os.environ.items()
                if not name.startswith(("RAY_", "GATESWEEP_", "SLURM"))
            },
            "PATH": f"{folder}/bin:{Path(sys.executable).parent}:{os.environ['PATH']}:{SBIN}",
            "PYTHONPATH": f"{folder}/lib",
            "SLURM_CONF": str(folder / "slurm.conf"),
        }

    def _on(self, host: str, *command: str) -> list[str]:
        return list(command) if self._hosts is None else self._hosts[host].command(*command, cwd=TREE)

    def raise_daemons(self, stack: ExitStack) -> None:
        for name in ("state", "bin"):
            (self.folder / name).mkdir()
        hosts = [socket.gethostname()] * 2 if self._hosts is None else list(NODES)
        conf = {"control": hosts[0], "hosts": hosts, "ports": free_ports(3), "user": getpass.getuser()}
        # Ray's folder is called after the job.
        conf |= {"folder": self.folder, "cpus": os.cpu_count(), "first": os.getpid()}
        (self.folder / "slurm.conf").write_text(CONF.format(**conf))
        key = self.folder / "munge.key"
        key.write_bytes(os.urandom(128))
        key.chmod(0o400)
        places = [f"--{name}-file={self.folder}/munge.{name}" for name in ("key", "pid", "log", "seed")]
        self._start(
            stack, "here1", "munged", "--foreground", "--force", f"--socket={self.folder}/munge.socket", *places
        )
        wait_for((self.folder / "munge.socket").exists, "munge")
        self._start(stack, "here1", "slurmctld", "-D", "-c")
        for node in NODES:
            self._start(stack, node, "slurmd", "-D", "-N", node)
        wait_for(lambda: self.say("sinfo", "-h", "-t", "idle", "-o", "%D").strip() == "2", "two idle nodes")

    def _start(self, stack: ExitStack, host: str, *command: str) -> None:
        with (self.folder / f"{command[0]}.log").open("a") as log:
            daemon = subprocess.Popen(self._on(host, *command), env=self.environment, stdout=log, stderr=log)
        stack.callback(daemon.wait)
        stack.callback(daemon.kill if self._hosts else daemon.terminate)

    def say(self, *command: str) -> str:
        asked = self._on("here1", *command)
        done = subprocess.run(asked, env=self.environment, capture_output=True, text=True, cwd=TREE, check=False)
        assert done.returncode == 0 or command[0] == "sinfo", done.stdout + done.stderr
        return done.stdout

    def job(self, number: str, field: str) -> str:
        found = re.search(rf"\b{field}=(\S+)", self.say("scontrol", "show", "job", number))
        assert found, field
        return found[1]

    def is_requeued(self, number: str, restarts: int) -> bool:
        """Whether the job waits for its next start, and its nodes have ended the last one."""
        return self.job(number, "Restarts") == str(restarts) and self.job(number, "JobState") == "PENDING"

    def begin_again(self, number: str) -> None:
        """Slurm would wait for two minutes. A credential as old as the end of the last start, by the second, would be
        refused by the node: the job would fail with nothing said."""
        self.say("scontrol", "update", f"JobId={number}", "StartTime=now+2")


@pytest.fixture
def slurm() -> Iterator[Slurm]:
    # A Unix socket's path is short.
    with tempfile.TemporaryDirectory(prefix="slurm", ignore_cleanup_errors=True) as folder, ExitStack() as stack:
        slurm = Slurm(Path(folder))
        slurm.raise_daemons(stack)
        yield slurm


STAND_INS = {
    "ray": """\
#!/bin/bash
case "$*" in *--head*) exec {python} -c '
import os, socket
listening = socket.create_server(("0.0.0.0", int(os.environ["PORT"])))
while True:
    listening.accept()[0].close()
';; esac
exec sleep 600
""",
    "gatesweep": """\
#!/bin/bash
[ -e "$GATESWEEP_HOME/checkpoint" ] && exit 0
trap 'touch "$GATESWEEP_HOME/checkpoint"; exit 130' TERM
touch "$GATESWEEP_HOME/training"
while true; do sleep 0.1; done
""",
    "python": '#!/bin/sh\nexec {python} "$@"\n',
}
RAY_STAND_IN = "def init(**_): pass\ndef nodes(): return [{'Alive': True}] * 2\n"
"""For the script's own part alone: the signal, the requeue, the nodes that end with it."""


def submit(slurm: Slurm, home: Path, *arguments: str) -> str:
    home.mkdir(exist_ok=True)
    slurm.environment["GATESWEEP_HOME"] = str(home)
    script = str(TREE / "infra" / "slurm" / "gatesweep.sbatch")
    sbatch = ("sbatch", "--parsable", "--nodes=2", "--cpus-per-task=1", f"--output={home}/job.log", script)
    return slurm.say(*sbatch, *arguments).strip()


def ended(slurm: Slurm, number: str) -> str:
    working = ("PENDING", "CONFIGURING", "RUNNING", "COMPLETING")
    return wait_for(lambda: state if (state := slurm.job(number, "JobState")) not in working else None, "the end")


@pytest.fixture
def stand_ins(slurm: Slurm) -> Slurm:
    for name, text in STAND_INS.items():
        program = slurm.folder / "bin" / name
        program.write_text(text.replace("{python}", sys.executable))
        program.chmod(0o755)
    (slurm.folder / "lib").mkdir()
    (slurm.folder / "lib" / "ray.py").write_text(RAY_STAND_IN)
    return slurm


def test_the_signal_before_the_time_limit_requeues_and_another_does_not(stand_ins: Slurm, tmp_path: Path):
    first, second = tmp_path / "first", tmp_path / "second"
    number = submit(stand_ins, first, "x.yaml")
    wait_for((first / "training").exists, "the driver")
    (folder,) = first.glob("slurm/*")
    assert (folder / "token").stat().st_size > 32
    assert folder.stat().st_mode & 0o077 == 0
    stand_ins.say("scancel", "--batch", "--signal=USR1", number)  # as Slurm does before the time limit
    wait_for(lambda: stand_ins.is_requeued(number, 1), "a requeue")
    assert (first / "checkpoint").exists()
    assert not list(first.glob("slurm/*")), "the token goes with its Ray"
    stand_ins.begin_again(number)
    assert ended(stand_ins, number) == "COMPLETED", (first / "job.log").read_text()
    assert f"job {number}, start 2: ended with code 0" in (first / "job.log").read_text()

    number = submit(stand_ins, second, "x.yaml")
    wait_for((second / "training").exists, "the driver")
    stand_ins.say("scancel", "--batch", "--signal=TERM", number)
    assert ended(stand_ins, number) == "FAILED"
    assert stand_ins.job(number, "ExitCode") == "130:0"
    assert stand_ins.job(number, "Restarts") == "0"
    assert (second / "checkpoint").exists()


REAL = """\
#!/bin/sh
exec {python} -c "from orchestrator.cli import main; main()" "$@"
"""


@pytest.fixture
def apart(tmp_path: Path) -> Iterator[Slurm]:
    """Nodes with addresses of their own, for a real Ray."""
    if reason := why_not():
        pytest.skip(reason)
    (tmp_path / "hosts").mkdir()
    with (
        tempfile.TemporaryDirectory(prefix="slurm", ignore_cleanup_errors=True) as folder,
        Hosts(tmp_path / "hosts", *NODES) as hosts,
        ExitStack() as stack,
    ):
        slurm = Slurm(Path(folder), hosts)
        slurm.environment |= {
            "PYTHONPATH": str(TREE),
            "OMP_NUM_THREADS": "1",
            "RAY_agent_register_timeout_ms": "300000",
        }
        slurm.raise_daemons(stack)
        program = slurm.folder / "bin" / "gatesweep"
        program.write_text(REAL.replace("{python}", sys.executable))
        program.chmod(0o755)
        yield slurm
    for folder_of_ray in Path("/tmp").glob(f"ray-{os.getpid()}"):
        shutil.rmtree(folder_of_ray, ignore_errors=True)


def curves(home: Path) -> dict[str, Any]:
    """Every trial's numbers, of a sweep that is done."""
    with Store(f"sqlite:///{home / 'gatesweep.db'}") as store:
        trials = store.trials(store.sweep("tiny").id)
        assert [one.state for one in trials] == ["COMPLETE", "COMPLETE"]
        return {one.fingerprint: curve_numbers(store, one.fingerprint) for one in trials}


def test_a_sweep_over_two_nodes_is_stopped_by_the_time_limit_and_ends_with_a_laptops_numbers(
    apart: Slurm, tmp_path: Path
):
    sweep, home = str(write_sweep(tmp_path / "sweep")), tmp_path / "shared"
    number = submit(apart, home, sweep, *LONG)
    wait_for(lambda: list(home.glob("trials/*/attempts/001-*/checkpoints/step_*")), "a checkpoint")
    apart.say("scancel", "--batch", "--signal=USR1", number)  # as Slurm does before the time limit
    wait_for(lambda: apart.is_requeued(number, 1), "a requeue")
    with Store(f"sqlite:///{home / 'gatesweep.db'}") as store:
        first = [one for trial in store.trials(store.sweep("tiny").id) for one in store.attempts(trial.fingerprint)]
    assert {one.cause for one in first} == {"interrupted"}
    apart.begin_again(number)
    assert ended(apart, number) == "COMPLETED", (home / "job.log").read_text()
    laptop(tmp_path, "run", sweep, *LONG)
    assert curves(home) == curves(tmp_path / "laptop")
