"""Several Ray nodes on this machine, the command as a child process: it is killed, a node is, and no number changes.

They take about three minutes and run by ``make test-cluster``; for every day there is tests/chaos.
"""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
from ray.cluster_utils import Cluster as RayNodes
from sweep_runs import wait_for
from test_recovery import LEARNS, Home, finish, gatesweep, shorten_lease, until_steps

from models import run_dir
from orchestrator.controller.resume import attempt_dir

pytestmark = [
    pytest.mark.cluster,
    pytest.mark.skipif("GATESWEEP_CLUSTER_TESTS" not in os.environ, reason="takes minutes: make test-cluster"),
]

SWEEP = """\
name: tiny
question: does it survive?
base:
  model: {preset: cpu-tiny}
  data: {corpus: corpus.jsonl, sequence_length: 64, validation: {slice_bytes: 1024, points: 2}}
  train: {tokens: 51200, batch_tokens: 256}
baseline: baseline
arms:
  baseline: {}
axes:
  train.lr: [3e-3, 2e-3]
seeds: [1]
checkpoint: {every_steps: 20}
"""
"""200 steps, some seconds."""
STAGES = ("resources.layout.pipeline=2", "resources.micro_batch_sequences=2", "axes.train.lr=[3e-3]")
"""A gang of two ranks. A node has one CPU, so they are on two."""

LEFT = """\
import sys, ray
ray.init(address=sys.argv[1], namespace="gatesweep", logging_level="ERROR", log_to_driver=False)
groups = [one["state"] for one in ray.util.placement_group_table().values()]
print(len(ray.util.list_named_actors()), sum(state != "REMOVED" for state in groups))
"""


NODE_STARTS_ALLOWED_TO_FAIL = 5
"""Ray gives a node 30 seconds to start, which a busy machine may need."""


@pytest.fixture(scope="module")
def nodes() -> Iterator[RayNodes]:
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    memory = {"object_store_memory": 80 * 2**20}
    cluster = start(lambda: RayNodes(True, head_node_args={"num_cpus": 0, "include_dashboard": False, **memory}))
    for _ in range(2):
        start(lambda: cluster.add_node(num_cpus=1, **memory))
    yield cluster
    cluster.shutdown()


def start(node: Callable[[], Any]) -> Any:
    for _ in range(NODE_STARTS_ALLOWED_TO_FAIL):
        with contextlib.suppress(Exception):
            return node()
    return node()


def run_on(nodes: RayNodes, home: Home, overrides: Sequence[str] = ()) -> subprocess.Popen[str]:
    return gatesweep(home.folder, "run", "tiny.yaml", "--address", nodes.address, *overrides)


def until_done(process: subprocess.Popen[str]) -> str:
    code, out, err = finish(process)
    assert code == 0, (out, err)
    return out


def kill(process: subprocess.Popen[str], home: Home) -> None:
    os.kill(process.pid, signal.SIGKILL)
    process.communicate()
    shorten_lease(home)


def left_behind(nodes: RayNodes) -> str:
    """Named actors and placement groups on the cluster."""
    done = subprocess.run([sys.executable, "-c", LEFT, nodes.address], capture_output=True, text=True, check=True)
    return done.stdout.strip()


def attempts_of(home: Home, word: str) -> list[Any]:
    return home.store.attempts(home.trial(word).fingerprint)


@pytest.fixture(scope="module")
def calm_stages(nodes: RayNodes, tmp_path_factory: pytest.TempPathFactory) -> Any:
    home = Home(tmp_path_factory.mktemp("calm"), SWEEP, STAGES)
    until_done(run_on(nodes, home, STAGES))
    return home.result(LEARNS)


def test_a_gang_on_two_nodes_outlives_its_killed_controller_and_is_adopted(
    nodes: RayNodes, tmp_path: Path, calm_stages: Any
):
    home = Home(tmp_path, SWEEP, STAGES)
    home.store.add(home.plan)
    first = run_on(nodes, home, STAGES)
    until_steps(home, 30, first)
    kill(first, home)
    out = until_done(run_on(nodes, home, STAGES))
    assert "adopted   baseline lr=0.003 seed=1: attempt 1" in out
    assert [one.cause for one in attempts_of(home, LEARNS)] == ["complete"]
    assert home.result(LEARNS) == calm_stages
    assert left_behind(nodes) == "0 0"
    home.store.close()


def test_a_gang_that_nobody_adopts_checkpoints_and_goes_away_with_all_it_held(
    nodes: RayNodes, tmp_path: Path, calm_stages: Any
):
    overrides = (*STAGES, "resources.grace_seconds=10")
    home = Home(tmp_path, SWEEP, overrides)
    home.store.add(home.plan)
    first = run_on(nodes, home, overrides)
    until_steps(home, 30, first)
    kill(first, home)
    (attempt,) = attempts_of(home, LEARNS)
    folder = attempt_dir(run_dir.trial_dir(home.folder / "runs", attempt.fingerprint), attempt)
    summary = wait_for(lambda: run_dir.read_summary(folder), "the gang's own end")
    wait_for(lambda: left_behind(nodes) == "0 0", "the gang to be gone")
    until_done(run_on(nodes, home, overrides))
    causes = [one.cause for one in attempts_of(home, LEARNS)]
    assert causes == (["complete"] if summary.outcome == "complete" else ["controller_lost", "complete"])
    assert home.result(LEARNS) == calm_stages
    home.store.close()


def test_a_node_that_is_killed_in_the_middle_costs_its_trial_an_attempt_and_no_bit(
    nodes: RayNodes, tmp_path: Path, tmp_path_factory: pytest.TempPathFactory
):
    calm, home = Home(tmp_path_factory.mktemp("calm"), SWEEP), Home(tmp_path, SWEEP)
    until_done(run_on(nodes, calm))
    home.store.add(home.plan)
    process = run_on(nodes, home)
    until_steps(home, 30, process)
    nodes.remove_node(nodes.list_all_nodes()[-1], allow_graceful=False)
    until_done(process)
    for word in (LEARNS, "lr=0.002"):
        assert home.result(word) == calm.result(word)
    causes = sorted(str([one.cause for one in attempts_of(home, word)]) for word in (LEARNS, "lr=0.002"))
    assert causes[0] == "['complete']"
    assert causes[1] in ("['node_lost', 'complete']", "['rank_died', 'complete']")
    home.store.close()
    calm.store.close()
