"""Every host of a Ray cluster by itself, and what lies between them: packages, shared path, clocks, network.

The functions that run on nodes are sent by name: a node with other packages answers with an error, which is a finding.
"""

from __future__ import annotations

import dataclasses
import os
import socket
import time
from pathlib import Path
from typing import Any
from uuid import uuid4

from models import trust
from orchestrator.doctor.finding import Finding, Level
from orchestrator.doctor.machine import child_answer, collective_finding, examine, start_child
from orchestrator.doctor.services import check_ports, skew_finding
from orchestrator.gang import Cluster, Node, source_hash

OTHER_VERSION = "install this version on every node, or use gatesweep submit, which takes it along"


def examine_nodes(cluster: Cluster, home: Path) -> list[Finding]:
    """Host by host, then between them."""
    nodes = cluster.nodes()
    answers = cluster.on_nodes([(node, _on_node, (str(home),)) for node in nodes])
    findings, sound = [], []
    for node, answer in zip(nodes, answers, strict=True):
        if isinstance(answer, Exception):
            findings.append(Finding("packages", Level.PROBLEM, str(answer), OTHER_VERSION, node.host))
            continue
        sound.append(node)
        their_hash, of_node = answer
        if their_hash != source_hash():
            said = f"models and orchestrator have hash {their_hash}, here {source_hash()}"
            findings.append(Finding("packages", Level.PROBLEM, said, OTHER_VERSION, node.host))
        findings += [dataclasses.replace(one, host=node.host) for one in of_node]
    findings += _clocks(cluster, sound)
    findings.append(_shared(cluster, sound, home))
    findings.append(_keys(cluster, sound))
    if len(sound) > 1:
        gpus = all(any(one.check == "gpu 0" and one.host == node.host for one in findings) for node in sound)
        findings.append(_between(cluster, sound, "cuda" if gpus else "cpu"))
    return findings


def _on_node(home: str) -> tuple[str, list[Finding]]:
    return source_hash(), [*examine(Path(home)), *check_ports()]


def _keys(cluster: Cluster, nodes: list[Node]) -> Finding:
    """Whether a controller on another node could resume what is signed here. Told by a digest of each key, no more."""
    answers = cluster.on_nodes([(node, _key_id, ()) for node in nodes])
    nodes_of: dict[str, list[str]] = {}
    for node, answer in zip(nodes, answers, strict=True):
        said = f"unusable ({answer})" if isinstance(answer, Exception) else answer or "none yet"
        nodes_of.setdefault(said, []).append(node.host)
    told = "; ".join(f"{', '.join(hosts)}: {said}" for said, hosts in nodes_of.items())
    if len(nodes_of) < 2 and not any(isinstance(answer, Exception) for answer in answers):
        return Finding("signing key", Level.OK, f"the same on {len(nodes)} node(s): {next(iter(nodes_of), 'none')}")
    mend = f"copy one key to every node where a controller may run (mode 600), or name it by {trust.KEY_FILE_VARIABLE}"
    return Finding("signing key", Level.WARNING, f"{told}; a controller refuses what another key signed", mend)


def _key_id() -> str | None:
    """None without a key; none is made for the question."""
    return trust.key_id() if trust.key_path().exists() else None


def _clocks(cluster: Cluster, nodes: list[Node]) -> list[Finding]:
    """Against ours, half the way of the answer allowed for. Asked twice: the first question may start a process."""
    findings = []
    for node in nodes:
        for _ in range(2):
            before = time.time()
            [theirs] = cluster.on_nodes([(node, _now, ())])
            ours = (before + time.time()) / 2
        if not isinstance(theirs, Exception):
            findings.append(skew_finding("its clock", theirs - ours, node.host))
    return findings


def _now() -> float:
    return time.time()


def _shared(cluster: Cluster, nodes: list[Node], home: Path) -> Finding:
    """A file written by each node, read by all of them and by this host."""
    folder = home / f".doctor-{uuid4().hex}"
    mend = "mount one file system at this path on every node, or name another by GATESWEEP_HOME"
    try:
        written = cluster.on_nodes([(node, _write_mark, (str(folder), node.id)) for node in nodes])
        read = cluster.on_nodes([(node, _read_marks, (str(folder),)) for node in nodes])
        wanted = {node.id for node in nodes}
        lacking = [node.host for node, seen in zip(nodes, read, strict=True) if not wanted <= _names(seen)]
        failed = [f"{node.host}: {one}" for node, one in zip(nodes, written, strict=True) if isinstance(one, Exception)]
        here = _names(_read_marks(str(folder)))
    finally:
        cluster.on_nodes([(node, _remove_marks, (str(folder),)) for node in nodes])
        _remove_marks(str(folder))
    if failed:
        return Finding("shared path", Level.PROBLEM, f"{home} can't be written: {'; '.join(failed)}", mend)
    if lacking:
        said = f"{home}: {', '.join(lacking)} can't see the files that the other nodes wrote"
        return Finding("shared path", Level.PROBLEM, said, mend)
    if not wanted <= here:
        said = f"{home} is one path for all {len(nodes)} node(s), but not for this host; logs and exports need it"
        return Finding("shared path", Level.WARNING, said, mend)
    return Finding("shared path", Level.OK, f"{home}: what each of {len(nodes)} node(s) wrote, all of them read")


def _names(seen: Any) -> set[str]:
    return set() if isinstance(seen, Exception) else set(seen)


def _write_mark(folder: str, name: str) -> None:
    path = Path(folder)
    path.mkdir(parents=True, exist_ok=True)
    with (path / name).open("w") as stream:
        stream.write(name)
        stream.flush()
        os.fsync(stream.fileno())


def _read_marks(folder: str) -> list[str]:
    """Names of the marks whose content is right."""
    path = Path(folder)
    return [mark.name for mark in path.iterdir() if mark.read_text() == mark.name] if path.is_dir() else []


def _remove_marks(folder: str) -> None:
    path = Path(folder)
    for mark in list(path.iterdir()) if path.is_dir() else []:
        mark.unlink(missing_ok=True)
    if path.is_dir():
        path.rmdir()


def _between(cluster: Cluster, nodes: list[Node], device: str) -> Finding:
    """An all-reduce with a rank on each node, as the ranks of a gang that is spread over them meet."""
    [port] = cluster.on_nodes([(nodes[0], _free_port, ())])
    meet = f"tcp://{nodes[0].address}:{port}"
    calls = [(node, _rank, (rank, len(nodes), meet, device)) for rank, node in enumerate(nodes)]
    answers = [{"error": str(one)} if isinstance(one, Exception) else one for one in cluster.on_nodes(calls)]
    return collective_finding(f"{len(nodes)} nodes", device, answers)


def _rank(rank: int, ranks: int, meet: str, device: str) -> dict[str, Any]:
    options = ["--rank", str(rank), "--ranks", str(ranks), "--meet", meet, "--device", device]
    return child_answer(start_child("allreduce", *options))


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("", 0))
        return int(probe.getsockname()[1])
