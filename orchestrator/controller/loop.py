"""The controller: places trials on gangs, follows them, and turns each end into a state. One page; each step of it is
a module of its own."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from types import TracebackType
from typing import Self

from orchestrator.controller.adoption import adopt_orphans, new_lease_file, take_over
from orchestrator.controller.allocation import confirm
from orchestrator.controller.announcing import Announcer
from orchestrator.controller.branching import Branching
from orchestrator.controller.budget import BudgetWatch
from orchestrator.controller.clock import Clock
from orchestrator.controller.cluster_watch import ClusterLost, ClusterWatch
from orchestrator.controller.disk import DiskWatch
from orchestrator.controller.ends import end_attempt
from orchestrator.controller.following import follow
from orchestrator.controller.gang_pool import GangPool
from orchestrator.controller.growing import Grown, grow_rates
from orchestrator.controller.known_trials import KnownTrials
from orchestrator.controller.launching import launch
from orchestrator.controller.lease_holder import acquire_lease
from orchestrator.controller.orders import Orders
from orchestrator.controller.outage import OutageWatch
from orchestrator.controller.promotion import promote_arms
from orchestrator.controller.pruning import RankPruning
from orchestrator.controller.running import RunningAttempt, eta_seconds
from orchestrator.controller.schedule import Schedule
from orchestrator.controller.sharing import Sharing
from orchestrator.controller.snapshot import Snapshot, View
from orchestrator.controller.stopping import Stopping
from orchestrator.controller.sweep_run import SweepRun
from orchestrator.copies import Copier
from orchestrator.failures import Wish
from orchestrator.gang import Cluster, Gang, GangEnd, GangShape, GangState
from orchestrator.notices import Webhook
from orchestrator.plan import Confirmation, Plan, PlannedTrial, RateGroup, micro_batch_sizes
from orchestrator.search import Search
from orchestrator.store import STATES, Lease, Store, TrialRow
from orchestrator.sweep import Sweep, UserError
from orchestrator.tracking import Mirror

POLL_SECONDS = 0.1
"""How long the loop waits for news at most."""
SECONDS_A_POLL = 0.001
"""So much of the loop's time goes to a running attempt without news, all in all a core's at the worst."""
REFRESH_SECONDS = 2.0
"""How often the trials are read anew: others may cancel, reopen or, sharing them, run them."""
LEASE_SECONDS = 20.0
NO_LEASE_YET = -1


class SweepStopped(Exception):
    """The sweep was stopped cleanly before its end: interrupted, or out of budget. The next run goes on."""


class BudgetUsedUp(SweepStopped):
    """Nothing may run until the budget is extended."""


class Controller:
    """Runs one sweep to its end. A context manager: it holds the sweep's lease and its gangs.

    Raises UserError when another controller holds the lease, or the cluster cannot hold a gang.
    """

    def __init__(
        self,
        sweep: Sweep,
        sweep_id: int,
        store: Store,
        cluster: Cluster,
        mirror: Mirror,
        home: Path,
        view: View,
        confirmations: Sequence[Confirmation] = (),
        clock: Clock | None = None,
        webhook: Webhook | None = None,
        plan: Plan | None = None,
        json_logs: bool = False,
        copier: Copier | None = None,
    ) -> None:
        self.confirmations, self.clock = confirmations, clock or Clock()
        self.outage = OutageWatch(store, sweep_id, self.clock, view)
        store = self.outage.store  # from here on nobody else's: it waits where the given one would fail
        self.sweep, self.sweep_id, self.store, self.view = sweep, sweep_id, store, view
        self.cluster, self.plan, self.open_groups = cluster, plan, tuple[RateGroup, ...]()
        """The plan is only needed by what joins while it runs: learning rates, and rungs behind gates."""
        cells = _cells(store, sweep_id, confirmations, plan)
        own = [sweep.resources.of(one.arm, one.axes) for one in cells]
        sizes = micro_batch_sizes([(one.config, resources) for one, resources in zip(cells, own, strict=True)])
        pool = GangPool(cluster, (GangShape.of(one) for one in own), sweep.resources, store, sweep_id, view, self.clock)
        self.sweep_run = SweepRun(
            sweep=sweep,
            sweep_id=sweep_id,
            lease=Lease(sweep_id, NO_LEASE_YET),
            store=store,
            mirror=mirror,
            home=home,
            view=view,
            clock=self.clock,
            pool=pool,
            search=Search(sweep.name, cells, sweep.prune.divergence),
            trials=KnownTrials(
                store, sweep_id, self.clock, lambda trial: GangShape.of(sweep.resources.of(trial.arm, trial.axes))
            ),
            pace=pool.pace,
            disk=DiskWatch(home),
            announcer=Announcer(sweep, sweep_id, store, view, webhook),
            micro_batches={trial.fingerprint: size for trial, size in zip(cells, sizes, strict=True)},
            copier=copier,
            json_logs=json_logs,
        )
        self.trials, self.pool = self.sweep_run.trials, pool
        self.schedule = Schedule(pool, self.trials, self.running, self.clock, view.tell)
        self.news: list[Gang] = []
        self.shown_at = self.shared_at = -float("inf")
        self.orders = Orders(store, sweep_id, sweep.resources, sweep.priority)
        self.sharing = Sharing(store, sweep.name, cluster.identity, pool, self.trials, self.orders)
        self.pruning = RankPruning(self.sweep_run)
        self.branching = Branching(self.sweep_run)
        self.stopping = Stopping()
        self.cluster_watch = ClusterWatch(cluster, self.sweep_run, self._follow)
        self.outage.is_hurried = lambda: self.stopping.is_hurried

    @property
    def running(self) -> list[RunningAttempt]:
        return self.sweep_run.running

    # -- the lease ------------------------------------------------------------------------------------------

    def __enter__(self) -> Self:
        self.lease = acquire_lease(self.store, self.sweep.name, self.sweep_id, LEASE_SECONDS, self.view.tell)
        self.sweep_run.lease = self.lease
        self.outage.renew_lease = lambda: self.store.renew_lease(self.lease, LEASE_SECONDS)
        self.outage.meanwhile = self._while_the_store_is_away
        self.lease_renewed = self.started = self.clock.monotonic()
        self.budget = BudgetWatch(self.store, self.sweep_id, self.sweep.budget, self.orders, self.started)
        self.pool.lease_file = new_lease_file(self.sweep_run)
        take_over(self.sweep_run, self.orders)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        is_clean = kind is None or issubclass(kind, SweepStopped | UserError)
        has_cluster = kind is not ClusterLost
        if has_cluster and (is_clean or not self.pool.lease_file):
            self.pool.dismiss_all()
        # Otherwise the gangs train on: they belong to whoever took the sweep over, or takes it over next.
        if is_clean or not has_cluster:
            self.store.release_lease(self.lease)

    def _keep_lease(self) -> None:
        self.pool.keep_lease()
        if self.clock.monotonic() - self.lease_renewed > LEASE_SECONDS / 5:
            self.store.renew_lease(self.lease, LEASE_SECONDS)
            self.lease_renewed = self.clock.monotonic()
            # A trial that another sweep shares and ran would be waited for in vain once its controller is gone.
            adopt_orphans(self.sweep_run, self.orders)

    def _while_the_store_is_away(self) -> None:
        """What needs no store: the gangs are heard, so that none of them seems to hang afterwards, and hear of us."""
        self.pool.keep_lease()
        for attempt in self.running:
            if (progress := attempt.gang.progress()) is not None:
                attempt.note(progress, self.clock.monotonic())
        self.view.tick(self._snapshot())

    # -- the loop -------------------------------------------------------------------------------------------

    def run(self) -> None:
        """Until every trial has ended. Raises SweepStopped after a clean stop, ClusterLost when Ray's head is gone."""
        while True:
            self._keep_lease()
            self.cluster_watch.look()
            self.stopping.heed_requests(self.sweep_run)
            self._refresh()
            self._check_budget()
            self._work()
            self._show()
            if not self.running and (self.stopping or not self._unfinished()):
                break
            if self.stopping.is_overdue(self.sweep_run):
                self._abandon()
            self._wait()
        if self.stopping.wish and self._unfinished():
            kind = BudgetUsedUp if self.stopping.wish.kind == "budget" else SweepStopped
            raise kind(self.stopping.reason)
        self.sweep_run.announcer.sweep_done(self.trials.rows)
        self.sweep_run.mirror.nudge()

    def request_stop(self, reason: str) -> None:
        """Ask for a clean stop. A second call stops waiting for checkpoints. Safe to call from a signal handler."""
        self.stopping.request(reason)

    def _work(self) -> None:
        """What runs a bit further, and trials onto gangs: those that have ended make room at once."""
        self._follow(self._to_follow(), self._refill)
        self.pool.follow_starts()
        self._share()
        caps = self.sharing.caps(self.orders.caps())
        self.pool.heed_caps(*caps)
        self.pruning.work()
        self.branching.work()
        self.trials.wake()
        self._start_trials(caps)

    def _refill(self) -> None:
        """Before the next end is booked: of gangs that end together none waits for what is written of the others, and
        from then on they end one after the other."""
        if not self.pruning.is_declared:
            caps = self.sharing.caps(self.orders.caps())
            self.pool.heed_caps(*caps)
            self.branching.work()
            self._start_trials(caps)

    def _start_trials(self, caps: tuple[float, float]) -> None:
        if not self.stopping and not self.sweep_run.disk.is_full(self.view.tell):
            queues = self.pruning.queues() if self.pruning.is_declared else self.trials.queues
            for gang, trial in self.schedule.turn(queues, caps):
                self._launch(gang, trial)

    def _share(self) -> None:
        """What we hold and want, told now and then, and what we may hold beside others."""
        now = self.clock.monotonic()
        if now - self.shared_at >= REFRESH_SECONDS:
            self.shared_at = now
            starts_more = not self.stopping and not self.sweep_run.disk.is_full(self.view.tell)
            self.sharing.refresh(self.lease, starts_more, self.view.tell)

    def _to_follow(self) -> list[RunningAttempt]:
        """Those with news, and each now and then: with thousands at work, less often."""
        due = self.clock.monotonic() - self._poll_seconds()
        news = {id(gang) for gang in self.news}
        return [one for one in self.running if one.followed_at <= due or id(one.gang) in news]

    def _poll_seconds(self) -> float:
        return max(POLL_SECONDS, SECONDS_A_POLL * len(self.running)) if POLL_SECONDS else 0.0

    def _wait(self) -> None:
        gangs = [gang for gang in self.pool.gangs if gang.state in (GangState.STARTING, GangState.BUSY)]
        self.news = self.cluster.wait(gangs, self._poll_seconds())

    def _launch(self, gang: Gang, trial: TrialRow) -> None:
        launched = launch(self.sweep_run, self.branching, gang, trial)
        if launched is None:
            self._refresh(now=True)  # another sweep shares the trial and runs it now; its end is ours, too
        elif launched[1] is not None:
            end_attempt(self.sweep_run, launched[0], launched[1])

    def _follow(self, attempts: list[RunningAttempt], after_each_end: Callable[[], None] = lambda: None) -> None:
        for attempt, end in follow(self.sweep_run, attempts):
            if end.summary is None and not self.cluster_watch.is_there():
                continue  # gangs that die with their cluster are not to blame: the next look tells
            end_attempt(self.sweep_run, attempt, end)
            self.branching.tidy(attempt.trial)
            after_each_end()

    def _abandon(self) -> None:
        for attempt in list(self.running):
            end_attempt(self.sweep_run, attempt, GangEnd(summary=None, error="killed after the grace time"))

    def _unfinished(self) -> bool:
        """Read anew: what was retried waits again, and another sweep may still run a trial that is ours, too."""
        self._refresh(now=True)
        return self.trials.are_unfinished

    def _refresh(self, now: bool = False) -> None:
        if now or self.clock.monotonic() - self.trials.read_at > REFRESH_SECONDS:
            self.trials.read(everything=self._grow())
            while self._confirm() or self._promote():
                self._grow()
                self.trials.read(everything=True)
            self.pool.read_nodes()
            self._cancel(self.orders.to_cancel())

    def _grow(self) -> bool:
        if self.plan is None or self.sweep.growing_rates is None:
            return False
        grown = grow_rates(self.store, self.plan, self.view.tell)
        self._take(grown)
        return True

    def _confirm(self) -> bool:
        known = self.trials.by_fingerprint
        return confirm(self.store, self.sweep, self.confirmations, self.view.tell, known) > 0

    def _promote(self) -> bool:
        if self.plan is None or not self.plan.held:
            return False
        grown = Grown(self.plan, self.open_groups)
        plan = promote_arms(self.store, grown, self.view.tell, self.trials.by_fingerprint)
        self._take(Grown(plan, self.open_groups))
        return plan is not grown.plan

    def _take(self, grown: Grown) -> None:
        self.plan, self.open_groups, self.confirmations = grown.plan, grown.open_groups, grown.confirmations
        self.sweep_run.add([*grown.plan.trials, *grown.plan.confirming])

    def _cancel(self, fingerprints: set[str]) -> None:
        for attempt in self.running:
            if attempt.row.fingerprint in fingerprints:
                attempt.ask_to_stop(Wish("canceled", "canceled", "canceled by the user"))

    def _check_budget(self) -> None:
        self.budget.count(self.running, self.clock.monotonic())
        reason = self.budget.used_up(self.sweep_run.announcer.budget)
        if reason is not None and not self.stopping:
            self.stopping.stop_all(self.sweep_run, Wish("budget", "budget", reason))

    def _show(self) -> None:
        now = self.clock.monotonic()
        if not self.running or now - self.shown_at >= self._poll_seconds():
            self.shown_at = now
            self.view.tick(self._snapshot())

    def _snapshot(self) -> Snapshot:
        counts = self.trials.counts
        return Snapshot(
            sweep=self.sweep.name,
            states={state: counts[state] for state in STATES if counts[state]},
            running=tuple(attempt.line() for attempt in self.running),
            gangs_starting=self.pool.num_starting,
            seconds=self.clock.monotonic() - self.started,
            eta_seconds=eta_seconds(self.running, self.trials.steps_waiting),
            stopping=self.stopping.reason,
        )


def _cells(
    store: Store, sweep_id: int, confirmations: Sequence[Confirmation], plan: Plan | None
) -> list[TrialRow | PlannedTrial]:
    """The trials of a sweep, and those that may come."""
    trials = store.trials(sweep_id)
    may_come = [trial for one in confirmations for trial in one.may_come]
    held = () if plan is None else plan.held
    may_come += [trial for one in held for trial in one.trials]
    may_come += [trial for one in held for each in one.confirmations for trial in each.may_come]
    known = {trial.fingerprint for trial in trials}
    return [*trials, *(one for one in may_come if one.fingerprint not in known)]
