"""Hosts on this machine: each has an address, a name and processes of its own, and a cable to a switch that can be cut.

Namespaces of the kernel, held by processes that end with this one: whatever happens to a test, nothing is left behind.
The file system is shared, like a cluster's home; the addresses are those that RFC 5737 keeps for examples.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import tempfile
from pathlib import Path
from typing import Self

import psutil
from sweep_runs import wait_for

NETWORK = "198.51.100"
PROGRAMS = ("unshare", "nsenter", "setpriv", "ip", "mount", "hostname")
SBIN = "/usr/sbin:/sbin"
_OWN = ["--net", "--uts", "--mount", "--pid"]
_HOLD = """
mount --bind "$1" /etc/hosts && mount -t tmpfs own "$2" && hostname "$3" && ip link set lo up && touch "$4" || exit 1
while :; do sleep 3600; done
"""
"""The first process of a host: its end is the end of all others there."""


def why_not() -> str | None:
    """What stands in the way of hosts here; None when nothing does."""
    path = f"{os.environ.get('PATH', '')}:{SBIN}"
    missing = [one for one in PROGRAMS if shutil.which(one, path=path) is None]
    if missing:
        return f"needs {', '.join(missing)} (Debian: util-linux, iproute2, mount, hostname)"
    made = "ip link add name one type bridge && ip link add name two type veth peer name three && mount -t tmpfs x /mnt"
    asked = ["unshare", *_OWN, "--fork", "--mount-proc", "sh", "-c", made]
    done = subprocess.run(asked, env={**os.environ, "PATH": path}, capture_output=True, text=True, check=False)
    return f"namespaces are not allowed here: {done.stderr.strip()}" if done.returncode else None


class Host:
    """``command`` says how a command is run there; its processes are seen from here, too, under other numbers."""

    def __init__(self, name: str, address: str, holder: psutil.Process) -> None:
        self.name, self.address, self.holder = name, address, holder

    def command(self, *command: str, cwd: Path | None = None) -> list[str]:
        where = [] if cwd is None else ["env", "-C", str(cwd)]
        return ["nsenter", f"--target={self.holder.pid}", *_OWN, *where, *command]


class Hosts:
    """The hosts by their names, and the switch between them. A context: at its end they are gone with all they ran."""

    def __init__(self, folder: Path, *names: str) -> None:
        self._folder = folder
        self.own = Path(tempfile.mkdtemp(prefix="gsh"))  # Unix sockets have short paths
        """A folder that is another one on each host; all else is shared."""
        addresses = {name: f"{NETWORK}.{number}" for number, name in enumerate(names, start=1)}
        lines = ["127.0.0.1 localhost", *(f"{address} {name}" for name, address in addresses.items())]
        (folder / "hosts").write_text("\n".join(lines) + "\n")
        self._started: list[subprocess.Popen[bytes]] = []
        self.by_name: dict[str, Host] = {}
        try:
            self._switch = self._hold("switch")
            self._ip(self._switch, "link", "add", "switch", "type", "bridge")
            self._ip(self._switch, "link", "set", "switch", "up")
            for name, address in addresses.items():
                host = self.by_name[name] = Host(name, address, self._hold(name))
                ends = ("eth0", "netns", str(host.holder.pid), "type", "veth", "peer", "name", name)
                self._ip(self._switch, "link", "add", *ends)
                self._ip(self._switch, "link", "set", name, "master", "switch", "up")
                self._ip(host.holder, "address", "add", f"{address}/24", "dev", "eth0")
                self._ip(host.holder, "link", "set", "eth0", "up")
        except BaseException:
            self.close()
            raise

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def __getitem__(self, name: str) -> Host:
        return self.by_name[name]

    def _hold(self, name: str) -> psutil.Process:
        ready = self._folder / f"{name}-is-up"
        own = ["setpriv", "--pdeathsig=KILL", "unshare", *_OWN, "--fork", "--kill-child", "--mount-proc"]
        command = [*own, "sh", "-c", _HOLD, "sh", str(self._folder / "hosts"), str(self.own), name, str(ready)]
        with (self._folder / f"{name}.log").open("w") as log:
            started = subprocess.Popen(command, env=_environment(), stdout=log, stderr=log)
        self._started.append(started)
        wait_for(lambda: ready.exists() or started.poll() is not None, f"host {name}")
        assert started.poll() is None, (self._folder / f"{name}.log").read_text()
        (holder,) = psutil.Process(started.pid).children()
        return holder

    def _ip(self, holder: psutil.Process, *command: str) -> None:
        asked = ["nsenter", f"--target={holder.pid}", "--net", "ip", *command]
        done = subprocess.run(asked, env=_environment(), capture_output=True, text=True, check=False)
        assert done.returncode == 0, f"{' '.join(asked)}: {done.stderr}"

    def cut(self, name: str) -> None:
        """Pull the host's cable at the switch: what is sent is lost, and nobody is told."""
        self._ip(self._switch, "link", "set", name, "down")

    def heal(self, name: str) -> None:
        self._ip(self._switch, "link", "set", name, "up")

    def close(self) -> None:
        for one in reversed(self._started):
            one.kill()
            one.wait()
        shutil.rmtree(self.own, ignore_errors=True)


def _environment() -> dict[str, str]:
    return {**os.environ, "PATH": f"{os.environ.get('PATH', '')}:{SBIN}"}
