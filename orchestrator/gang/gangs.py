"""A gang in the driver: its ranks, and at most one attempt."""

from __future__ import annotations

import enum
import secrets
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

import ray
from ray.util.placement_group import (
    PlacementGroup,
    placement_group,
    placement_group_table,
    remove_placement_group,
)
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

from models import trust
from models.run_dir import AttemptSpec, Summary
from orchestrator.gang.ending import RAISED, blame, death, exit_code, words
from orchestrator.gang.lease_file import GangLease
from orchestrator.gang.orphan import group_name, rank_name
from orchestrator.gang.ranks import RankActor
from orchestrator.gang.shapes import GangShape

STACKS_SECONDS = 10.0
DEATH_NEWS_SECONDS = 5.0
"""How long a gang with a failed rank is given to show a dead one: the survivors' broken collectives are told first."""


class GangState(enum.Enum):
    STARTING = "starting"
    IDLE = "idle"
    BUSY = "busy"
    DEAD = "dead"


@dataclass(frozen=True)
class GangEnd:
    """How a gang's attempt ended: by its own account, or by an error that Ray saw."""

    summary: Summary | None
    error: str | None = None
    """Class and message of what Ray or the training raised."""
    rank_died: bool = False
    """A rank is gone or out of reach (killed, out of memory, its node lost), as opposed to an exception in it."""
    rank: int = 0
    """Whose error it is, and whose log tells more."""
    exit_code: int | None = None
    """Of a rank that ended its process by itself."""
    landing: Landing | None = None
    """Of an attempt that is complete but for its last checkpoint; the gang can be set ``free`` for the next one."""
    held_seconds: float | None = None
    """How long the attempt held its hosts, where that is known better than by when its end was seen."""


class Landing:
    """The last checkpoint of an attempt, while its ranks write it: until it stands, the attempt has not ended."""

    def __init__(self, summary: Summary, landed: Sequence[Any]) -> None:
        self.summary, self._landed = summary, list(landed)

    def poll(self) -> GangEnd | None:
        """None while it is in the writing. An error leaves the ranks sound, unless one of them died."""
        done, waiting = ray.wait(self._landed, num_returns=len(self._landed), timeout=0)
        errors = _errors({self._landed.index(one): _answer(one) for one in done})
        if errors:
            return _failed(*min(errors, key=lambda one: blame(one[1])))
        return None if waiting else GangEnd(self.summary)


class Gang:
    """A placement group, its ranks, and at most one attempt."""

    def __init__(
        self,
        shape: GangShape,
        num_threads: int,
        driver_hash: str,
        nodes: Sequence[str] = (),
        meetings: Path | None = None,
        lease: GangLease | None = None,
    ) -> None:
        """``nodes``: Ray's id of the node of each bundle; without, Ray chooses by the shape's placement. ``meetings``:
        a folder for ranks that are all on this host; torch's store listens on every interface.

        With a lease the gang outlives this process, until the lease is over; without, it dies with it.
        """
        layout, gang_id = shape.layout, secrets.token_hex(4)
        group = placement_group(
            [shape.bundle] * shape.num_bundles,
            strategy="PACK" if nodes else shape.placement.upper(),
            name=group_name(gang_id),
            lifetime="detached" if lease else None,
            bundle_label_selector=[{"ray.io/node-id": f"in({node})"} for node in nodes] or None,
        )
        self._hold(shape, gang_id, group, GangState.STARTING)
        self.is_detached = lease is not None
        self._ranks = [self._rank(rank, num_threads, lease) for rank in range(layout.world_size)]
        meeting: Any = self._ranks[0].rendezvous.remote() if meetings is None else f"file://{meetings}/{gang_id}"
        self._joins = [rank.join.remote(meeting, driver_hash, trust.read_key()) for rank in self._ranks]

    @classmethod
    def adopted(
        cls,
        shape: GangShape,
        gang_id: str,
        group: PlacementGroup,
        ranks: Sequence[Any],
        members: Sequence[dict[str, Any]],
        token: str,
    ) -> Self:
        """A gang that another process started, which runs attempt ``token``, or ran it last."""
        gang = cls.__new__(cls)
        gang._hold(shape, gang_id, group, GangState.BUSY)
        gang.is_detached = True
        gang._ranks, gang._joins = list(ranks), []
        gang.members, gang.num_attempts = list(members), 1
        gang._token = token
        gang._trains = [rank.follow.options(concurrency_group="follow").remote(token) for rank in ranks]
        return gang

    def _hold(self, shape: GangShape, gang_id: str, group: PlacementGroup, state: GangState) -> None:
        self.shape, self.gang_id, self._group, self.state = shape, gang_id, group, state
        self._trains: list[Any] = []
        self._seen: set[Any] = set()
        self._progress: Any = None
        self._token = ""
        self._landing: Landing | None = None
        self._failed_since: float | None = None
        self.members: list[dict[str, Any]] = []
        """Host, pid and Ray's node_id of every rank, once it is up."""
        self.num_attempts = 0

    def _rank(self, rank: int, num_threads: int, lease: GangLease | None) -> Any:
        lasting = {"name": rank_name(self.gang_id, rank), "lifetime": "detached"} if lease else {}
        return RankActor.options(
            **lasting,
            num_cpus=self.shape.cpus_per_rank,
            num_gpus=self.shape.gpus_per_rank,
            max_restarts=0,
            scheduling_strategy=PlacementGroupSchedulingStrategy(
                placement_group=self._group, placement_group_bundle_index=rank // self.shape.ranks_per_bundle
            ),
            runtime_env={"env_vars": {"OMP_NUM_THREADS": str(num_threads)}},
        ).remote(rank, self.shape.layout.model_dump_json(), self.shape.device, num_threads, self.gang_id, lease)

    def is_placed(self) -> bool:
        """Whether the cluster has given the gang its room."""
        return str(placement_group_table(self._group)["state"]) == "CREATED"

    def awaited(self) -> list[Any]:
        """Ray's references that have not been seen done: one of them done is news."""
        if self.state is GangState.DEAD:
            return []
        asked = self._joins if self.state is GangState.STARTING else self._trains
        return [one for one in asked if one not in self._seen]

    def poll_start(self) -> str | None:
        """IDLE once every rank is up; the error that kept the gang from starting, if one did."""
        if self.state is not GangState.STARTING:
            return None
        done, waiting = ray.wait(self._joins, num_returns=len(self._joins), timeout=0)
        self._seen = set(done)
        try:
            # A rank that failed is worth telling before the others have given up waiting for it.
            ray.get(done)
            if not waiting:
                self.members = ray.get(self._joins)
                self.state = GangState.IDLE
        except Exception as error:
            return words(error)
        return None

    def launch(self, spec: AttemptSpec) -> None:
        assert self.state is GangState.IDLE, self.state
        self._trains = [rank.train.remote(spec.model_dump_json()) for rank in self._ranks]
        self._seen = set()
        self._progress = self._failed_since = None
        self._token = spec.token
        self.num_attempts += 1
        self.state = GangState.BUSY

    def progress(self) -> tuple[int, int] | None:
        """Bytes of metrics and micro-batches that rank 0 has reported, None when there is no new answer."""
        if self._progress is None:
            self._progress = self._ranks[0].progress.options(concurrency_group="control").remote()
            return None
        done, _ = ray.wait([self._progress], timeout=0)
        if not done:
            return None
        answer, self._progress = self._progress, None
        try:
            num_bytes, num_beats = ray.get(answer)
            return int(num_bytes), int(num_beats)
        except ray.exceptions.RayError:
            return None  # the rank is gone: poll_end tells

    def dump_stacks(self) -> None:
        """Have every rank write what it is doing into the attempt's folder; one that can't answer in time does not."""
        asked = [rank.dump_stacks.options(concurrency_group="control").remote() for rank in self._ranks]
        ray.wait(asked, num_returns=len(asked), timeout=STACKS_SECONDS)

    def stop(self, token: str) -> None:
        self._ranks[0].stop.options(concurrency_group="control").remote(token)

    def renew(self, lease: GangLease | None = None) -> None:
        """Tell every rank that its controller lives; with ``lease``, where it shows that from now on."""
        for rank in self._ranks:
            rank.renew.options(concurrency_group="control").remote(lease)

    def poll_end(self) -> GangEnd | None:
        """The attempt's end, None while it runs. The gang is IDLE after a good end, to be dismissed after a bad one.

        One that is complete lands first: it ends when its ``landing`` says so, and the gang waits to be set free.
        """
        done, waiting = ray.wait(self._trains, num_returns=len(self._trains), timeout=0)
        self._seen = set(done)
        answers = {self._trains.index(train): _answer(train) for train in done}
        errors = _errors(answers)
        if errors:
            # The most telling one: a death, then what a rank raised, then a collective that broke for its sake.
            rank, error = min(errors, key=lambda one: blame(one[1]))
            self._failed_since = self._failed_since or time.monotonic()
            is_death = isinstance(error, ray.exceptions.RayActorError)
            if waiting and not is_death and time.monotonic() - self._failed_since < DEATH_NEWS_SECONDS:
                return None
            return _failed(rank, error)
        if waiting:
            return None
        summary = Summary.model_validate_json(answers[0])
        if summary.outcome != "complete":
            self.free()
            return GangEnd(summary)
        landed = [rank.landed.options(concurrency_group="landing").remote(self._token) for rank in self._ranks]
        self._landing = Landing(summary, landed)
        return GangEnd(summary, landing=self._landing)

    def free(self) -> None:
        """Ready for the next attempt."""
        self._trains, self.state = [], GangState.IDLE

    @property
    def is_landing(self) -> bool:
        """Whether the ranks write a checkpoint that an attempt's end waits for."""
        return self._landing is not None and self._landing.poll() is None

    def dismiss(self) -> None:
        """Kill every rank and give the resources back."""
        self.state = GangState.DEAD
        for rank in self._ranks:
            ray.kill(rank, no_restart=True)
        remove_placement_group(self._group)


def _errors(answers: Mapping[int, Any]) -> list[tuple[int, Exception]]:
    return [(rank, answer) for rank, answer in answers.items() if isinstance(answer, Exception)]


def _failed(rank: int, error: Exception) -> GangEnd:
    said = death(error) if isinstance(error, ray.exceptions.RayActorError) else words(error)
    died = blame(error) != RAISED
    return GangEnd(summary=None, error=said, rank_died=died, rank=rank, exit_code=exit_code(said))


def _answer(train: Any) -> Any:
    """What a rank that is done returned or raised."""
    try:
        return ray.get(train)
    except Exception as error:
        return error
