"""Ray's head is gone: nothing that gangs seem to do then is booked against their trials, and the controller leaves.

Without its head a cluster ends itself after a minute, this process included. Ranks can still be called until then: they
are told to checkpoint. What they don't manage stays open in the store, for the next controller to adopt or to free.
A head that has kept its state comes back as the same cluster, and the sweep goes on. One that has not is another
cluster at the same address, which ends what is left of the old one: there is nothing to be waited for.
"""

from __future__ import annotations

from collections.abc import Callable

from orchestrator.controller.running import RunningAttempt
from orchestrator.controller.sweep_run import SweepRun
from orchestrator.failures import Wish
from orchestrator.gang import Cluster

LOOK_SECONDS = 1.0
PATIENCE_SECONDS = 15.0
"""A head that is restarted with its state kept is back by then."""
CHECKPOINT_SECONDS = 20.0
HEAD_DOWN, HEAD_BACK, CLUSTER_LOST = "head_down", "head_back", "cluster_lost"
"""Events of the sweep: ``status`` tells them."""


class ClusterLost(Exception):
    """Ray's head is gone, or another one is in its place. The next run goes on once there is a cluster again."""


class ClusterWatch:
    """``follow`` books the ends of attempts, of those that have one."""

    def __init__(self, cluster: Cluster, run: SweepRun, follow: Callable[[list[RunningAttempt]], None]) -> None:
        self._cluster, self._run, self._follow = cluster, run, follow
        self._looked_at = -float("inf")

    def is_there(self) -> bool:
        """Whether our head answers now, not another: asked before an end is booked that may be the cluster's."""
        return self._cluster.answering() == self._cluster.identity

    def look(self) -> None:
        """Now and then, before Ray is asked for anything: its own calls would wait for the head until it ends us.

        Raises ClusterLost once the head has been away for too long, or has come back without what it knew.
        """
        clock = self._run.clock
        if clock.monotonic() - self._looked_at < LOOK_SECONDS:
            return
        self._looked_at = clock.monotonic()
        if self._cluster.is_reachable():
            return
        said = "Ray's head does not answer; training goes on while it can"
        self._run.view.tell(f"PAUSED    {said}")
        self._event(HEAD_DOWN, said)
        if not self._wait_until(lambda: self._cluster.answering() is not None, PATIENCE_SECONDS):
            self._leave("Ray's head does not answer any more")
        if not self.is_there():
            self._leave("Ray's head was restarted and has forgotten its cluster")
        self._run.view.tell("goes on   Ray's head is back")
        seconds = clock.monotonic() - self._looked_at
        self._event(HEAD_BACK, f"Ray's head is back after {seconds:.0f} s; nothing was lost")

    def _leave(self, why: str) -> None:
        for attempt in self._run.running:
            attempt.ask_to_stop(Wish("interrupted", "interrupted", "Ray's head went away"))
        self._wait_until(self._have_all_ended, CHECKPOINT_SECONDS)
        left = len(self._run.running)
        said = f"; {left} attempt(s) could not be told to stop" if left else ""
        why = f"{why}{said}; no trial is lost, nothing is charged"
        self._event(CLUSTER_LOST, why)
        raise ClusterLost(why)

    def _event(self, kind: str, message: str) -> None:
        self._run.store.add_event(self._run.sweep_id, kind, message)

    def _have_all_ended(self) -> bool:
        self._follow(list(self._run.running))
        return not self._run.running

    def _wait_until(self, condition: Callable[[], bool], seconds: float) -> bool:
        clock = self._run.clock
        deadline = clock.monotonic() + seconds
        while not condition():
            if clock.monotonic() >= deadline:
                return False
            self._run.pool.keep_lease()
            clock.sleep(LOOK_SECONDS / 2)
        return True
