"""A sweep over hosts with addresses of their own, one of which is cut off in the middle and comes back.

Ray's head and the controller are on one host, a worker on another, PostgreSQL and MLflow on a third. The home, which
real hosts would share over the network, too, stays there: the worse case, since a gang that was given up can write on.
"""

from __future__ import annotations

import os
import secrets
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Self

import pytest
from hosts import Host, Hosts, why_not
from services import LOST_AFTER, MINIMAL_RAY, Rank, Service, is_begun, ranks_of, ray_environment
from store_backends import PostgresServer, why_no_server
from sweep_runs import curve_numbers, wait_for, write_sweep

from models import run_dir
from orchestrator.failures.causes import counted_as
from orchestrator.store import AttemptRow, Store

pytestmark = [
    pytest.mark.cluster,
    pytest.mark.skipif(
        "GATESWEEP_CLUSTER_TESTS" not in os.environ, reason="starts a cluster over hosts of its own; make test-cluster"
    ),
]

SWEEP = """\
name: apart
question: does it survive?
base:
  model: {preset: cpu-tiny}
  data: {corpus: corpus.jsonl, sequence_length: 64, validation: {slice_bytes: 1024, points: 2}}
  train: {tokens: 204800, batch_tokens: 256, lr: 3e-3}
baseline: baseline
arms:
  baseline: {}
  pair: {gate: {position: sdpa}}
seeds: [1]
controls: []
resources:
  cpus: 2
  grace_seconds: 20
  by: [{where: {arm: pair}, cpus: 1, layout: {data: 2}, placement: strict_spread}]
checkpoint: {every_steps: 40}
retry: {infrastructure: 5, backoff_seconds: 0}
"""
CPUS = {"head": 1, "worker": 3}
"""The pair has a rank on each, and the baseline has room on the worker alone."""


class Site:
    """What runs on the hosts, and ends with them."""

    def __init__(self, folder: Path, hosts: Hosts, cpus: Mapping[str, int], lost_after: Mapping[str, int]) -> None:
        self.folder, self.hosts, self._lost_after, self._num_services = folder, hosts, lost_after, 0
        (folder / "token").write_text(secrets.token_hex(32))
        services = hosts["services"]
        self.postgres = PostgresServer(services.command(), services.address)
        self.tracker = self._start_tracker(services)
        self.nodes = {
            "head": self._start_ray("head", cpus["head"], "--head", "--port=6379", "--include-dashboard=false")
        }
        self._cpus = cpus["worker"]
        self.start_worker()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.postgres.stop()

    def service(self, host: str, *command: str, **environment: str) -> Service:
        self._num_services += 1
        known = ray_environment(self.folder / "token", self._lost_after, **environment)
        there = self.hosts[host].command(sys.executable, *command, cwd=self.folder)
        return Service(there, self.folder / f"{host}-{self._num_services}.log", known, self.folder)

    def _start_ray(self, host: str, cpus: int, *own: str) -> Service:
        where = [f"--node-ip-address={self.hosts[host].address}", f"--num-cpus={cpus}", *own]
        small = ["--disable-usage-stats", "--object-store-memory=80000000", "--include-log-monitor=false"]
        node = self.service(host, "-c", MINIMAL_RAY, "start", "--block", *small, *where)
        wait_for(lambda: is_begun(node) or node.is_dead, f"Ray on {host}")
        assert not node.is_dead, node.log.read_text()
        return node

    def start_worker(self) -> None:
        self.nodes["worker"] = self._start_ray("worker", self._cpus, "--address=head:6379")

    def _start_tracker(self, host: Host) -> Service:
        where = [f"--backend-store-uri=sqlite:///{self.folder}/mlflow.db", f"--artifacts-destination={self.folder}/art"]
        where += [f"--host={host.address}", "--port=5000", "--workers=1", "--allowed-hosts=services:5000"]
        return self.service(host.name, "-m", "mlflow", "server", *where, MLFLOW_SERVER_ENABLE_JOB_EXECUTION="false")

    def gatesweep(self, home: Path, store_url: str, *arguments: str) -> Service:
        """The command on the head."""
        return self.service(
            "head",
            "-c",
            "from orchestrator.cli import main; main()",
            *arguments,
            GATESWEEP_HOME=str(home),
            GATESWEEP_STORE=self.postgres.over_network(store_url),
            GATESWEEP_MLFLOW="http://services:5000",
        )

    def said(self, home: Path, store_url: str, *arguments: str) -> str:
        service = self.gatesweep(home, store_url, *arguments)
        service.process.wait()
        assert service.process.returncode == 0, service.log.read_text()
        return service.log.read_text()

    def ranks(self, home: Path, host: str) -> list[Rank]:
        return ranks_of([self.nodes[host]], home)


@pytest.fixture
def site(tmp_path: Path) -> Iterator[Site]:
    if reason := why_not():
        pytest.skip(reason)
    if no_server := why_no_server():
        pytest.skip(no_server)
    with Hosts(tmp_path, "head", "worker", "services") as hosts, Site(tmp_path, hosts, CPUS, LOST_AFTER) as site:
        yield site


def numbers(store: Store) -> dict[str, Any]:
    trials = store.trials(store.sweep("apart").id)
    assert [one.state for one in trials] == ["COMPLETE", "COMPLETE"]
    return {one.fingerprint: curve_numbers(store, one.fingerprint) for one in trials}


def attempts(store: Store) -> list[AttemptRow]:
    return [one for trial in store.trials(store.sweep("apart").id) for one in store.attempts(trial.fingerprint)]


def has_trained(ranks: list[Rank]) -> bool:
    """The pair's rank and the baseline's, and both have a checkpoint to go on from."""
    folders = {one.attempt_dir for one in ranks}
    return len(folders) == 2 and all(any(run_dir.complete_checkpoints(one)) for one in folders)


@pytest.mark.timeout(0)
def test_a_host_is_cut_off_and_comes_back_and_no_number_changes(site: Site, tmp_path: Path):
    sweep, calm, home = str(write_sweep(tmp_path / "sweep", SWEEP)), tmp_path / "calm", tmp_path / "runs"
    undisturbed, disturbed = site.postgres.new_schema(), site.postgres.new_schema()
    site.said(calm, undisturbed, "run", sweep, "--address", "head:6379")
    controller = site.gatesweep(home, disturbed, "run", sweep, "--address", "head:6379")
    wait_for(lambda: controller.is_dead or has_trained(site.ranks(home, "worker")), "ranks at work on both hosts")
    assert not controller.is_dead, controller.log.read_text()
    cut_off = site.ranks(home, "worker")
    assert len(site.ranks(home, "head")) == 1
    site.hosts.cut("worker")
    with Store(disturbed) as store:
        wait_for(lambda: all(one.ended_at for one in attempts(store)), "the end of both attempts")
        assert {(one.number, counted_as(one.cause)) for one in attempts(store)} == {(1, "infrastructure")}
        assert "gang_lost" in site.said(home, disturbed, "status")
        # Nobody reaches the worker. Of the baseline's only rank it is the file on the shared path that stops it.
        wait_for(lambda: not any(one.process.is_running() for one in cut_off), "the end of what was cut off")
        (alone,) = [one.attempt_dir for one in cut_off if one.number == 0]
        summary = run_dir.read_summary(alone)
        assert summary is not None
        assert (summary.outcome, summary.error) == ("stopped", "its controller has given this gang up")
        site.hosts.heal("worker")
        wait_for(lambda: site.nodes["worker"].is_dead, "the end of the worker's Ray, which had been given up")
        site.start_worker()
        controller.process.wait()
        assert controller.process.returncode == 0, controller.log.read_text()
        assert sorted(one.number for one in attempts(store)) == [1, 1, 2, 2]
        with Store(undisturbed) as before:
            assert numbers(store) == numbers(before)
