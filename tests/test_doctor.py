"""What doctor finds, check by check; the children that load torch are real, Ray is not."""

from __future__ import annotations

import contextlib
import http.server
import importlib.metadata
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from models import trust
from orchestrator import cli, doctor
from orchestrator.doctor import Finding, Level, machine, nodes, services
from orchestrator.gang import Node
from orchestrator.store import Store

SOUND = {
    "torch": {"version": "2.13", "error": None},
    "megatron.core": {"version": "0.16.1", "error": None},
    "cuda": "13.0",
    "gpus": [{"name": "H100", "free_bytes": 70e9, "total_bytes": 80e9, "error": None}],
    "transformer_engine": {"version": "2.9", "error": None},
}
DRIVER = {"name": "H100", "driver_version": "600", "ecc.errors.uncorrected.volatile.total": "0"}


def levels(findings: Iterator[Finding] | list[Finding]) -> dict[str, Level]:
    return {one.check: one.level for one in findings}


def test_packages_out_of_range_or_missing_are_named(monkeypatch: pytest.MonkeyPatch):
    wanted = ["ray[default]>=99", "no-such-package", "numpy>=1.26", 'optuna>=99; extra == "more"']
    monkeypatch.setattr(importlib.metadata, "requires", lambda _: wanted)
    [found] = machine.check_packages()
    assert found.level is Level.PROBLEM
    assert found.said == f"ray {importlib.metadata.version('ray')}, allowed >=99; no-such-package is missing"
    assert "pip install" in found.mend


def test_torch_and_megatron_of_this_environment_load_and_its_processes_meet():
    described = machine.child_answer(machine.start_child("describe"))
    found = levels(machine.check_torch(described))
    assert (found["torch"], found["megatron.core"]) == (Level.OK, Level.OK)
    [collective] = machine.check_collectives(2, "cpu")
    assert collective.level is Level.OK, collective
    assert collective.said.startswith("2 processes: ")


def test_a_child_that_fails_is_a_finding_with_its_last_words():
    answer = machine.child_answer(machine.start_child("no-such-verb"))
    assert "invalid choice" in answer["error"]
    assert levels(machine.check_torch(answer)) == {"torch": Level.PROBLEM}
    found = machine.collective_finding("2 nodes", "cuda", [{"gigabytes_per_second": 9.0}, answer])
    assert (found.check, found.level) == ("all-reduce by NCCL", Level.PROBLEM)
    assert "NCCL_SOCKET_IFNAME" in found.mend


def test_transformer_engine_says_why_it_cannot_be_used():
    broken = SOUND | {"transformer_engine": {"version": None, "error": "OSError: libcudnn.so.9 is missing"}}
    found = {one.check: one for one in machine.check_torch(broken)}["transformer engine"]
    assert (found.level, found.said) == (Level.WARNING, "OSError: libcudnn.so.9 is missing")
    assert levels(machine.check_torch(SOUND))["transformer engine"] is Level.OK


@pytest.mark.parametrize(
    ("change", "driver", "level"),
    [
        ({}, DRIVER, Level.OK),
        ({"error": "a product of ones came out wrong"}, DRIVER, Level.PROBLEM),
        ({}, DRIVER | {"ecc.errors.uncorrected.volatile.total": "3"}, Level.PROBLEM),
        ({}, DRIVER | {"ecc.errors.uncorrected.volatile.total": "[N/A]"}, Level.OK),
    ],
)
def test_a_gpu_that_miscomputes_or_counts_errors_is_a_problem(change: dict, driver: dict, level: Level):
    described = SOUND | {"gpus": [SOUND["gpus"][0] | change]}
    assert levels(machine.check_gpus(described, [driver])) == {"gpu 0": level}


def test_a_cpu_build_of_torch_beside_a_gpu_is_a_problem():
    [found] = machine.check_gpus(SOUND | {"gpus": [], "cuda": None}, [DRIVER])
    assert (found.level, "CPU build" in found.said, "CUDA build" in found.mend) == (Level.PROBLEM, True, True)
    assert levels(machine.check_gpus(SOUND | {"gpus": []}, [])) == {"gpus": Level.OK}


def test_disk_room_is_held_against_what_checkpoints_need(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(machine, "LOW_DISK_BYTES", 0)
    monkeypatch.setattr(machine, "NO_DISK_BYTES", 0)
    assert levels(machine.check_room(tmp_path / "not" / "yet"))["disk"] is Level.OK
    monkeypatch.setattr(machine, "NO_DISK_BYTES", 1e18)
    assert levels(machine.check_room(tmp_path))["disk"] is Level.PROBLEM


def test_the_store_answers_or_says_why_not(tmp_path: Path):
    url = f"sqlite:///{tmp_path / 'gatesweep.db'}"
    [absent] = doctor.check_store(url)
    assert "not there yet" in absent.said
    assert not (tmp_path / "gatesweep.db").exists()
    Store(url).close()
    [there] = doctor.check_store(url)
    assert (there.level, "answers in" in there.said) == (Level.OK, True)
    [wrong] = doctor.check_store("mysql://me:hush-hush@db/x")
    assert wrong.level is Level.PROBLEM


class Healthy(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        self.send_response(200 if self.path == "/health" else 404)
        self.end_headers()

    def log_message(self, *_: Any) -> None:
        pass


@contextlib.contextmanager
def tracking_server() -> Iterator[str]:
    server = http.server.HTTPServer(("127.0.0.1", 0), Healthy)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    server.server_close()
    thread.join()


def test_a_tracking_server_is_asked_and_its_password_not_shown():
    with tracking_server() as uri:
        [found] = doctor.check_tracking(uri)
        assert (found.level, "answers in" in found.said) == (Level.OK, True)
    [gone] = doctor.check_tracking(uri)
    assert gone.level is Level.WARNING
    [secret] = doctor.check_tracking("http://me:hush-hush@127.0.0.1:9")
    assert "hush-hush" not in str(secret)
    assert levels(doctor.check_tracking("sqlite:///x.db")) == {"tracking": Level.OK}


@pytest.mark.parametrize(
    ("listening", "token", "found"),
    [
        ([("127.0.0.1", 8265), ("::1", 5000), ("::ffff:127.0.0.1", 6379)], False, {"ports": Level.OK}),
        ([("0.0.0.0", 8265)], False, {"port 8265": Level.PROBLEM}),
        ([("::", 8265), ("10.0.0.1", 6379)], True, {"port 8265": Level.OK, "port 6379": Level.OK}),
        ([("127.0.0.1", 8265), ("10.0.0.1", 10001)], False, {"port 10001": Level.PROBLEM}),
        ([("0.0.0.0", 5000), ("0.0.0.0", 22)], True, {"port 5000": Level.WARNING}),
    ],
)
def test_ports_open_to_others_are_flagged(listening: list[tuple[str, int]], token: bool, found: dict[str, Level]):
    assert levels(doctor.check_ports(listening, lambda _: token)) == found


class FakeCluster:
    """Nodes whose functions run here; ``of_node`` may put another answer in a function's place."""

    def __init__(self, *hosts: str, of_node: Callable[[str, str, tuple[Any, ...]], Any] = lambda *_: None) -> None:
        self.hosts, self.of_node = hosts, of_node

    def nodes(self) -> list[Node]:
        return [Node(f"id-{host}", host, "127.0.0.1") for host in self.hosts]

    def on_nodes(self, calls: list[tuple[Node, Callable[..., Any], tuple[Any, ...]]]) -> list[Any]:
        answers = []
        for node, function, arguments in calls:
            other = self.of_node(node.host, function.__name__, arguments)
            answers.append(function(*arguments) if other is None else other)
        return answers


def examined(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, of_node: Callable[..., Any]) -> dict[str, Finding]:
    """Of nodes a and b, by host and check."""
    monkeypatch.setattr(nodes, "examine", lambda _home: iter([Finding("disk", Level.OK, "room")]))
    monkeypatch.setattr(nodes, "check_ports", lambda: iter(()))
    monkeypatch.setattr(nodes, "_rank", lambda *_: {"gigabytes_per_second": 2.5})
    found = nodes.examine_nodes(FakeCluster("a", "b", of_node=of_node), tmp_path)  # type: ignore[arg-type]
    assert not list(tmp_path.iterdir())
    return {f"{one.host}: {one.check}": one for one in found}


def test_every_node_is_examined_and_what_lies_between_them(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    found = examined(tmp_path, monkeypatch, lambda *_: None)
    assert {one.level for one in found.values()} == {Level.OK}
    between = [": shared path", ": signing key", ": all-reduce by gloo"]
    assert list(found) == ["a: disk", "b: disk", "a: clock", "b: clock", *between]
    assert found[": all-reduce by gloo"].said == "2 nodes: 2.50 GB/s"


def test_a_node_with_other_packages_is_a_problem(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    other = {"a": ("0123", []), "b": ModuleNotFoundError("No module named orchestrator.doctor")}
    found = examined(tmp_path, monkeypatch, lambda host, name, _: other[host] if name == "_on_node" else None)
    assert "hash 0123" in found["a: packages"].said
    assert found["b: packages"].level is Level.PROBLEM
    assert "gatesweep submit" in found["b: packages"].mend
    assert "b: clock" not in found


def test_a_path_that_a_node_does_not_share_is_a_problem(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Node b writes and reads a disk of its own."""
    own_disk: set[str] = set()

    def of_node(host: str, name: str, arguments: tuple[Any, ...]) -> Any:
        if host == "b" and name == "_write_mark":
            own_disk.add(arguments[1])
            return "written"
        return list(own_disk) if host == "b" and name == "_read_marks" else None

    found = examined(tmp_path, monkeypatch, of_node)[": shared path"]
    assert (found.level, "a, b can't see the files" in found.said) == (Level.PROBLEM, True)


@pytest.mark.parametrize("of_b", ["89abcdef", trust.Untrusted("others can read it")])
def test_nodes_with_other_signing_keys_are_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, of_b: object):
    """b's answer is another digest, or none, as its key can't be used; the key itself is never asked for."""
    answers = {"a": "01234567", "b": of_b}
    found = examined(tmp_path, monkeypatch, lambda host, name, _: answers[host] if name == "_key_id" else None)
    key = found[": signing key"]
    assert (key.level, trust.KEY_FILE_VARIABLE in key.mend) == (Level.WARNING, True)
    assert "a: 01234567" in key.said
    assert str(of_b) in key.said
    same = examined(tmp_path, monkeypatch, lambda _, name, __: "01234567" if name == "_key_id" else None)
    assert same[": signing key"].level is Level.OK


def test_a_question_for_the_signing_key_makes_none(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv(trust.KEY_FILE_VARIABLE, str(tmp_path / "key"))
    assert nodes._key_id() is None
    key = trust.read_key()
    assert nodes._key_id() == trust.key_id() != key[:8]


def test_a_clock_that_is_off_is_a_warning(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    found = examined(tmp_path, monkeypatch, lambda host, name, _: 1.0 if (host, name) == ("a", "_now") else None)
    assert (found["a: clock"].level, found["b: clock"].level) == (Level.WARNING, Level.OK)


@pytest.mark.parametrize(("level", "code"), [(Level.OK, 0), (Level.WARNING, 0), (Level.PROBLEM, 2)])
def test_the_exit_code_tells_a_problem(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    level: Level,
    code: int,
):
    monkeypatch.setenv("GATESWEEP_HOME", str(tmp_path))
    monkeypatch.setattr(services, "_listening", list)
    monkeypatch.setattr(doctor, "examine", lambda _home: iter([Finding("disk", level, "3 GB free", "tidy up")]))
    monkeypatch.setattr(sys, "argv", ["gatesweep", "doctor"])
    with contextlib.suppress(SystemExit) if code == 0 else pytest.raises(SystemExit, match=str(code)):
        cli.main()
    said = capsys.readouterr().out
    assert f"{level.name.lower():<8} disk" in said
    assert "mend: tidy up" in said
