"""Gangs on a real Ray. One cluster for the session; gangs are shared where a test leaves them well."""

# ruff: noqa: F811 (fixtures are imported by name)

from __future__ import annotations

import contextlib
import os
import signal
import time
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest
from sweep_runs import LONG, PATIENCE_SECONDS, attempt_spec, cluster, plan_of, wait_for, written_numbers  # noqa: F401

from models.config import Layout, TrialConfig
from models.run_dir import AttemptSpec, StepRecord, complete_checkpoints, read_records, read_summary, stacks_path
from orchestrator.doctor import nodes
from orchestrator.gang import UNITS, Cluster, Gang, GangEnd, GangShape, GangState, gangs, source_hash
from orchestrator.sweep import UserError

ONE_RANK = GangShape(Layout(), cpus_per_rank=1, gpus_per_rank=0)
TWO_RANKS = GangShape(Layout(tensor=2), cpus_per_rank=1, gpus_per_rank=0)


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("home")


@pytest.fixture(scope="module")
def configs(home: Path) -> list[TrialConfig]:
    """Baseline and gated arm, 20 steps each."""
    return [trial.config for trial in plan_of(home).trials]


@pytest.fixture(scope="module")
def long_config(home: Path) -> TrialConfig:
    return plan_of(home, LONG).trials[0].config


@contextlib.contextmanager
def started(cluster: Cluster, shape: GangShape) -> Iterator[Gang]:
    gang = cluster.start_gang(shape, num_threads=1)
    try:

        def is_idle() -> bool:
            error = gang.poll_start()
            assert error is None, error
            return gang.state is GangState.IDLE

        wait_for(is_idle, "a gang to start")
        yield gang
    finally:
        gang.dismiss()


@pytest.fixture(scope="module")
def gang(cluster: Cluster) -> Iterator[Gang]:
    """A gang of one rank that serves one test after the other."""
    with started(cluster, ONE_RANK) as one:
        yield one


def end_of(gang: Gang) -> GangEnd:
    end = wait_for(gang.poll_end, "an attempt to end")
    if end.landing is None:
        return end
    gang.free()
    return wait_for(end.landing.poll, "a last checkpoint to stand")


def until_it_trains(gang: Gang) -> None:
    wait_for(lambda: (gang.progress() or (0, 0))[0] > 0, "a first record")


def losses(spec: AttemptSpec) -> list[float]:
    records = read_records(spec.attempt_dir)[0]
    return [record.loss_nats or float("nan") for record in records if isinstance(record, StepRecord)]


def test_the_nodes_of_the_cluster_are_told_with_what_is_free(cluster: Cluster):
    (before,) = cluster.rooms()
    assert before.total[0] >= 2 * UNITS
    with started(cluster, TWO_RANKS) as gang:
        assert {member["node_id"] for member in gang.members} == {before.id}

        def is_told() -> bool:
            (now,) = cluster.rooms()
            return before.available[0] - now.available[0] == 2 * UNITS

        wait_for(is_told, "the nodes to tell what the gang took")


def test_a_gang_starts_on_the_node_that_it_is_given_and_waits_for_no_other(cluster: Cluster):
    (node,) = cluster.nodes()
    barred = cluster.start_gang(ONE_RANK, num_threads=1, nodes=["0" * len(node.id)])
    free = cluster.start_gang(ONE_RANK, num_threads=1, nodes=[node.id])
    try:
        wait_for(lambda: free.poll_start() is None and free.state is gangs.GangState.IDLE, "the gang that may start")
        assert free.members[0]["node_id"] == node.id
        assert free.is_placed()
        assert barred.poll_start() is None
        assert not barred.is_placed()
        assert barred.state is gangs.GangState.STARTING
    finally:
        barred.dismiss()
        free.dismiss()


def test_an_end_is_news_that_is_not_slept_over(cluster: Cluster, gang: Gang, home: Path, configs: list[TrialConfig]):
    gang.launch(attempt_spec(home, configs[0], "news", number=9))
    assert wait_for(lambda: cluster.wait([gang], 60.0), "an end") == [gang]
    assert gang.poll_end() is not None
    gang.free()
    assert cluster.wait([gang], 0.01) == []


def test_a_warm_gang_gives_the_numbers_of_a_cold_one_bit_for_bit(
    gang: Gang, cluster: Cluster, home: Path, configs: list[TrialConfig]
):
    first, second = configs
    before = gang.num_attempts
    for config in (first, second):
        gang.launch(attempt_spec(home, config, "warm"))
        end = end_of(gang)
        assert (end.summary and end.summary.outcome, end.error, end.rank_died) == ("complete", None, False)
    assert (gang.num_attempts, gang.state) == (before + 2, GangState.IDLE)
    with started(cluster, ONE_RANK) as cold:
        assert cold.members[0]["pid"] != gang.members[0]["pid"]
        cold.launch(attempt_spec(home, second, "cold", number=2))
        end_of(cold)
    warm_numbers = written_numbers(attempt_spec(home, second, "warm"))
    assert len(warm_numbers) == 20 + 2 + 4  # steps, validations, probes
    assert warm_numbers == written_numbers(attempt_spec(home, second, "cold", number=2))


def test_ranks_take_the_next_attempt_while_the_last_checkpoint_of_one_is_written(
    gang: Gang, home: Path, configs: list[TrialConfig]
):
    first = attempt_spec(home, configs[0], "first", number=8, final_checkpoint=True)
    second = attempt_spec(home, configs[1], "second", number=8, final_checkpoint=True)
    gang.launch(first)
    end = wait_for(gang.poll_end, "an attempt to be measured")
    assert end.landing is not None
    assert gang.state is GangState.BUSY
    gang.free()
    gang.launch(second)
    landed = wait_for(end.landing.poll, "a last checkpoint to stand")
    assert landed == GangEnd(end.summary)
    assert [step for step, _ in complete_checkpoints(first.attempt_dir)] == [20]
    assert read_summary(first.attempt_dir) == end.summary
    assert end_of(gang).summary == read_summary(second.attempt_dir)
    assert not gang.is_landing


def test_what_a_rank_is_doing_can_be_asked_while_it_trains(gang: Gang, home: Path, configs: list[TrialConfig]):
    spec = attempt_spec(home, configs[0], "watched", number=7)
    gang.launch(spec)
    wait_for(lambda: (gang.progress() or (0, 0))[1] > 0, "a first micro-batch")
    gang.dump_stacks()
    stacks = stacks_path(spec.attempt_dir, 0).read_text()
    assert "in dump_stacks" in stacks
    assert "models/trainer/attempt.py" in stacks
    end_of(gang)


def test_only_its_own_token_stops_an_attempt(
    gang: Gang, home: Path, configs: list[TrialConfig], long_config: TrialConfig
):
    gang.launch(attempt_spec(home, configs[0], "untouched", number=3))
    gang.stop("long ago")
    gang.stop("")
    end = end_of(gang)
    assert end.summary is not None
    assert end.summary.outcome == "complete"

    spec = attempt_spec(home, long_config, "stopped")
    gang.launch(spec)
    until_it_trains(gang)
    gang.stop("long ago")
    gang.stop(spec.token)
    end = end_of(gang)
    assert end.summary is not None
    assert end.summary.outcome == "stopped"
    assert end.summary.step < long_config.train.num_steps
    assert [step for step, _ in complete_checkpoints(spec.attempt_dir)] == [end.summary.step]
    assert gang.state is GangState.IDLE


def test_a_stop_that_comes_before_the_attempt_has_begun_is_not_lost(gang: Gang, home: Path, long_config: TrialConfig):
    spec = attempt_spec(home, long_config, "early", number=2)
    gang.stop(spec.token)
    gang.launch(spec)
    end = end_of(gang)
    assert end.summary is not None
    assert (end.summary.outcome, end.summary.step) == ("stopped", 1)


def test_a_killed_rank_is_told_in_one_line_that_names_its_process(
    cluster: Cluster, home: Path, long_config: TrialConfig
):
    with started(cluster, ONE_RANK) as gang:
        gang.launch(attempt_spec(home, long_config, "killed", number=3))
        until_it_trains(gang)
        pid = gang.members[0]["pid"]
        os.kill(pid, signal.SIGKILL)
        end = end_of(gang)
    assert (end.summary, end.rank_died) == (None, True)
    assert end.error is not None
    assert "\n" not in end.error
    assert len(end.error) < 300
    assert f"process {pid} of a rank" in end.error
    assert "died" in end.error


class _Told:
    """A gang of two ranks whose answers a test writes: an error, a summary, or None while there is none."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.answers: list[object] = [None, None]
        self.gang = object.__new__(Gang)
        self.gang.state, self.gang._trains, self.gang._failed_since = GangState.BUSY, [0, 1], None
        self.now = 100.0
        monkeypatch.setattr(gangs.ray, "wait", self._wait)
        monkeypatch.setattr(gangs.ray, "get", self._get)
        monkeypatch.setattr(gangs.time, "monotonic", lambda: self.now)

    def _wait(self, trains: list[int], num_returns: int, timeout: float) -> tuple[list[int], list[int]]:
        done = [rank for rank in trains if self.answers[rank] is not None]
        return done, [rank for rank in trains if rank not in done]

    def _get(self, rank: int) -> object:
        answer = self.answers[rank]
        if isinstance(answer, Exception):
            raise answer
        return answer


BROKEN = RuntimeError(
    "[/pytorch/third_party/gloo/gloo/transport/tcp/pair.cc:537] Read error: Connection reset by peer."
)
DEATH = gangs.ray.exceptions.RayActorError(error_msg="The actor died.\n\tpid: 4711\n\tip: 10.0.0.2\n")


@pytest.mark.parametrize("dead_rank", [0, 1])
def test_a_death_counts_and_not_the_collective_that_it_broke(monkeypatch: pytest.MonkeyPatch, dead_rank: int):
    told = _Told(monkeypatch)
    told.answers[1 - dead_rank] = BROKEN
    assert told.gang.poll_end() is None  # the survivor is told first: there may be more to come
    told.answers[dead_rank] = DEATH
    end = told.gang.poll_end()
    assert end is not None
    assert (end.rank_died, end.rank) == (True, dead_rank)
    assert end.error is not None
    assert "process 4711 of a rank at 10.0.0.2" in end.error


def test_an_error_in_one_rank_ends_a_gang_whose_others_hang_in_a_collective(monkeypatch: pytest.MonkeyPatch):
    told = _Told(monkeypatch)
    told.answers[1] = ValueError("a mistake of the user's")
    assert told.gang.poll_end() is None
    told.now += gangs.DEATH_NEWS_SECONDS + 0.1
    end = told.gang.poll_end()
    assert end == GangEnd(None, "ValueError: a mistake of the user's", rank_died=False, rank=1)


def test_an_error_tells_more_than_the_collective_that_it_broke(monkeypatch: pytest.MonkeyPatch):
    told = _Told(monkeypatch)
    told.answers = [BROKEN, ValueError("a mistake of the user's")]
    assert told.gang.poll_end() == GangEnd(None, "ValueError: a mistake of the user's", rank_died=False, rank=1)


def test_a_broken_collective_alone_is_the_machines_fault(monkeypatch: pytest.MonkeyPatch):
    """A node that is out of reach: its death is known long after its connections broke."""
    told = _Told(monkeypatch)
    told.answers[0] = BROKEN
    told.gang.poll_end()
    told.now += gangs.DEATH_NEWS_SECONDS + 0.1
    end = told.gang.poll_end()
    assert end is not None
    assert end.rank_died


def test_a_ray_that_is_not_there_is_told_at_once():
    with pytest.raises(UserError, match=r"no Ray cluster at '127\.0\.0\.1:1': .*refused"):
        Cluster("127.0.0.1:1")
    with pytest.raises(UserError, match=r"no Ray cluster at 'ray://127\.0\.0\.1:1'"):
        Cluster("ray://127.0.0.1:1")


def test_a_local_ray_listens_on_loopback_alone(gang: Gang):
    """The driver, Ray's own processes and the ranks: what another host could connect to is open to all who reach it."""
    here = psutil.Process()
    listening = [
        (process.name(), connection.laddr.ip)
        for process in (here, *here.children(recursive=True))
        for connection in process.net_connections("inet")
        if connection.status == psutil.CONN_LISTEN
    ]
    assert len(listening) > 5
    assert gang.members[0]["pid"] in {process.pid for process in here.children(recursive=True)}
    is_loopback = [ip.removeprefix("::ffff:").startswith("127.") or ip == "::1" for _, ip in listening]
    assert all(is_loopback), [one for one, loopback in zip(listening, is_loopback, strict=True) if not loopback]


def test_what_runs_on_a_node_answers_and_an_error_is_an_answer_too(cluster: Cluster):
    [node] = cluster.nodes()
    then, error = cluster.on_nodes([(node, nodes._now, ()), (node, nodes._read_marks, (7,))])
    assert abs(time.time() - then) < PATIENCE_SECONDS
    assert str(error).startswith("TypeError: ")


def test_ranks_that_run_other_code_than_the_driver_are_refused(cluster: Cluster):
    gang = Gang(ONE_RANK, 1, driver_hash="0123456789abcdef")
    try:
        error = wait_for(gang.poll_start, "the gang to refuse")
    finally:
        gang.dismiss()
    assert "rank 0" in error
    assert "runs other code than the driver" in error
    assert source_hash() in error
    assert "0123456789abcdef" in error


def test_two_tensor_parallel_ranks_train_as_one_and_end_as_one(
    gang: Gang, cluster: Cluster, home: Path, configs: list[TrialConfig], long_config: TrialConfig
):
    """One gang for both halves: it costs some seconds to start."""
    gated = configs[1]
    single = attempt_spec(home, gated, "single", number=4)
    gang.launch(single)
    end_of(gang)
    gang.dismiss()  # its core is needed; this is the module's last test

    with started(cluster, TWO_RANKS) as pair:
        assert len(pair.members) == 2
        double = attempt_spec(home, gated, "double", number=5, layout=TWO_RANKS.layout)
        pair.launch(double)
        end = end_of(pair)
        assert end.summary is not None
        assert end.summary.outcome == "complete"
        assert losses(double) == pytest.approx(losses(single), rel=1e-4)

        pair.launch(attempt_spec(home, long_config, "torn", number=6, layout=TWO_RANKS.layout))
        until_it_trains(pair)
        os.kill(pair.members[1]["pid"], signal.SIGKILL)
        end = end_of(pair)
        # Rank 0 is alive and its collective broke, perhaps before the death was known: still the machine's fault.
        assert (end.summary, end.rank_died) == (None, True)
        assert end.error is not None
        assert f"process {pair.members[1]['pid']} of a rank" in end.error
    assert pair.state is GangState.DEAD


def test_rooms_are_the_last_known_ones_and_ray_is_not_asked_while_its_head_is_away(
    cluster: Cluster, monkeypatch: pytest.MonkeyPatch
):
    known = cluster.rooms()
    monkeypatch.setattr(cluster, "is_reachable", lambda: False)
    monkeypatch.setattr("ray.nodes", lambda: pytest.fail("it would wait for the head"))
    assert known
    assert cluster.rooms() == known
    assert cluster.answering() is None
    monkeypatch.undo()
    assert cluster.answering() == cluster.identity
