"""The batch script on a real Slurm, whose daemons are started here: two nodes on this machine.

Ray and gatesweep are stand-ins: it is the script that is tried, with Slurm's signals, requeues and steps.
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

import pytest
from sweep_runs import wait_for
from test_cluster_jobs import free_ports

TREE = Path(__file__).parent.parent
PROGRAMS = ("munged", "slurmctld", "slurmd", "sbatch", "scontrol", "scancel")
SBIN = "/usr/sbin:/sbin"

CONF = """\
ClusterName=here
SlurmctldHost={host}
SlurmctldPort={ports[0]}
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
NodeName=here1 NodeHostname={host} Port={ports[1]} CPUs={cpus} State=UNKNOWN
NodeName=here2 NodeHostname={host} Port={ports[2]} CPUs={cpus} State=UNKNOWN
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
    """The daemons, and the user's commands."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
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

    def raise_daemons(self, stack: ExitStack) -> None:
        for name in ("state", "bin"):
            (self.folder / name).mkdir()
        conf = {"host": socket.gethostname(), "ports": free_ports(3), "user": getpass.getuser()}
        (self.folder / "slurm.conf").write_text(CONF.format(folder=self.folder, cpus=os.cpu_count(), **conf))
        key = self.folder / "munge.key"
        key.write_bytes(os.urandom(128))
        key.chmod(0o400)
        places = [f"--{name}-file={self.folder}/munge.{name}" for name in ("key", "pid", "log", "seed")]
        munge = ["munged", "--foreground", "--force", f"--socket={self.folder}/munge.socket", *places]
        for command in (munge, ["slurmctld", "-D", "-c"], *(["slurmd", "-D", "-N", f"here{i}"] for i in (1, 2))):
            if command[0] == "slurmctld":
                wait_for((self.folder / "munge.socket").exists, "munge")
            log = stack.enter_context((self.folder / f"{command[0]}.log").open("a"))
            daemon = subprocess.Popen(command, env=self.environment, stdout=log, stderr=log)
            stack.callback(daemon.wait)
            stack.callback(daemon.terminate)
        wait_for(lambda: self.say("sinfo", "-h", "-t", "idle", "-o", "%D").strip() == "2", "two idle nodes")

    def say(self, *command: str) -> str:
        done = subprocess.run(command, env=self.environment, capture_output=True, text=True, cwd=TREE, check=False)
        assert done.returncode == 0 or command[0] == "sinfo", done.stdout + done.stderr
        return done.stdout

    def job(self, number: str, field: str) -> str:
        found = re.search(rf"\b{field}=(\S+)", self.say("scontrol", "show", "job", number))
        assert found, field
        return found[1]


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
    wait_for(
        lambda: stand_ins.job(number, "Restarts") == "1" and stand_ins.job(number, "JobState") == "PENDING", "a requeue"
    )
    assert (first / "checkpoint").exists()
    assert not list(first.glob("slurm/*")), "the token goes with its Ray"
    stand_ins.say("scontrol", "update", f"JobId={number}", "StartTime=now")
    assert ended(stand_ins, number) == "COMPLETED", (first / "job.log").read_text()
    assert f"job {number}, start 2: ended with code 0" in (first / "job.log").read_text()

    number = submit(stand_ins, second, "x.yaml")
    wait_for((second / "training").exists, "the driver")
    stand_ins.say("scancel", "--batch", "--signal=TERM", number)
    assert ended(stand_ins, number) == "FAILED"
    assert stand_ins.job(number, "ExitCode") == "130:0"
    assert stand_ins.job(number, "Restarts") == "0"
    assert (second / "checkpoint").exists()
