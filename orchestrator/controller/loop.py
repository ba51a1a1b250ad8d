"""The controller: places trials on gangs, follows them, and turns each end into a state."""

from __future__ import annotations

import dataclasses
import time
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType
from typing import Self

from models import run_dir
from models.run_dir import StepRecord
from orchestrator.controller.disk import DiskWatch
from orchestrator.controller.gang_pool import GangPool
from orchestrator.controller.launching import attempt_spec
from orchestrator.controller.lease_holder import acquire_lease
from orchestrator.controller.orders import Orders
from orchestrator.controller.provenance import data_hashes, provenance
from orchestrator.controller.resume import curve_until, recover_records, resume_point
from orchestrator.controller.running import RunningAttempt, eta_seconds, trial_name, up_to
from orchestrator.controller.selection import choose_rates
from orchestrator.controller.snapshot import Snapshot, View
from orchestrator.failures import DISK_FULL, HANG, PREEMPTED, Consequence, Ending, Wish, consequence
from orchestrator.gang import Cluster, Gang, GangEnd, GangShape
from orchestrator.plan import Confirmation, PlannedTrial, micro_batch_sizes
from orchestrator.search import Search
from orchestrator.store import STATES, FinishedIsFinal, Store, TrialRow, TrialTaken
from orchestrator.sweep import Sweep, UserError
from orchestrator.tracking import Mirror

POLL_SECONDS = 0.1
REFRESH_SECONDS = 2.0
"""How often the trials are read anew: others may cancel, reopen or, sharing them, run them."""
LEASE_SECONDS = 20.0
STOP_GRACE_SECONDS = 60.0
"""How long attempts that were told to stop may take to checkpoint."""


class SweepStopped(Exception):
    """The sweep was stopped cleanly before its end: interrupted, or out of budget. The next run goes on."""


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
    ) -> None:
        self.sweep, self.sweep_id, self.store, self.cluster = sweep, sweep_id, store, cluster
        self.confirmations = confirmations
        self.mirror, self.home, self.view = mirror, home, view
        resources = sweep.resources
        self.shape = GangShape(resources.layout, resources.cpus, resources.gpus)
        self.pool = GangPool(cluster, self.shape, store, sweep_id, view)
        self.running: list[RunningAttempt] = []
        trials = store.trials(sweep_id)
        known = {trial.fingerprint for trial in trials}
        may_come = [trial for one in confirmations for of_rate in one.by_lr.values() for trial in of_rate]
        cells: list[TrialRow | PlannedTrial] = [*trials, *(one for one in may_come if one.fingerprint not in known)]
        sizes = micro_batch_sizes([trial.config for trial in cells], resources)
        self.micro_batches = {trial.fingerprint: size for trial, size in zip(cells, sizes, strict=True)}
        self.search = Search(sweep.name, cells, sweep.prune.divergence)
        self.orders = Orders(store, sweep_id, resources)
        self.disk = DiskWatch(home)
        self.not_before: dict[str, float] = {}
        """When a trial that failed may be tried again, by fingerprint, in this process's monotonic time."""
        self.stop_requests: list[str] = []
        self.stopping: Wish | None = None
        self.stop_deadline = float("inf")
        self.trials: list[TrialRow] = []
        self.trials_read = -float("inf")

    # -- the lease ------------------------------------------------------------------------------------------

    def __enter__(self) -> Self:
        self.lease = acquire_lease(self.store, self.sweep.name, self.sweep_id, LEASE_SECONDS, self.view.tell)
        self.lease_renewed = self.started = time.monotonic()
        left = self.store.take_over(self.lease)
        self.store.cancel(self.sweep_id, self.orders.left_to_cancel(left))
        self._tell_left(left)
        self._tell_left(self.store.adopt_orphans(self.lease))
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.pool.dismiss_all()
        if kind is None or issubclass(kind, SweepStopped | UserError):
            self.store.release_lease(self.lease)

    # -- the loop -------------------------------------------------------------------------------------------

    def run(self) -> None:
        """Until every trial has ended. Raises SweepStopped after a clean stop."""
        while True:
            self._keep_lease()
            self._heed_requests()
            self._refresh()
            self._work()
            self._check_budget()
            self.view.tick(self._snapshot())
            if not self.running and (self.stopping or not self._unfinished()):
                break
            if time.monotonic() > self.stop_deadline:
                self._abandon()
            time.sleep(POLL_SECONDS)
        if self.stopping and self._unfinished():
            raise SweepStopped(self.stopping.reason)

    def _work(self) -> None:
        """Trials onto gangs, and what runs a bit further."""
        waiting = self._waiting()
        self.pool.start(len(waiting) + len(self.running), self.orders.max_gangs(self.shape))
        for gang, trial in zip(self.pool.idle(), waiting, strict=False):
            self._launch(gang, trial)
        for attempt in list(self.running):
            self._follow(attempt)

    def request_stop(self, reason: str) -> None:
        """Ask for a clean stop. A second call stops waiting for checkpoints.

        Safe to call from a signal handler, which may come between any two lines of the loop: it only leaves a note.
        """
        self.stop_requests.append(reason)

    def _heed_requests(self) -> None:
        while self.stop_requests:
            reason = self.stop_requests.pop(0)
            if self.stopping is None:
                self._stop_all(Wish("interrupted", "interrupted", reason))
            else:
                self.stop_deadline = 0.0

    def _keep_lease(self) -> None:
        if time.monotonic() - self.lease_renewed > LEASE_SECONDS / 5:
            self.store.renew_lease(self.lease, LEASE_SECONDS)
            self.lease_renewed = time.monotonic()
            # A trial that another sweep shares and ran would be waited for in vain once its controller is gone.
            self._tell_left(self.store.adopt_orphans(self.lease))

    def _tell_left(self, fingerprints: list[str]) -> None:
        self._refresh(now=bool(fingerprints))
        for trial in self.trials:
            if trial.fingerprint in fingerprints and trial.state == "WAITING":
                self.view.tell(f"resuming  {trial_name(trial)}: its controller is gone")

    def _waiting(self) -> list[TrialRow]:
        if self.stopping or self.disk.is_full(self.view.tell):
            return []
        now = time.monotonic()
        return [
            trial
            for trial in self.trials
            if trial.state == "WAITING" and self.not_before.get(trial.fingerprint, now) <= now
        ]

    def _unfinished(self) -> bool:
        """Read anew: what was retried waits again, and another sweep may still run a trial that is ours, too."""
        self._refresh(now=True)
        return any(trial.state in ("WAITING", "RUNNING") for trial in self.trials)

    def _refresh(self, now: bool = False) -> None:
        if now or time.monotonic() - self.trials_read > REFRESH_SECONDS:
            choose_rates(self.store, self.sweep.name, self.confirmations, self.view.tell)
            self.trials = self.store.trials(self.sweep_id)
            self.trials_read = time.monotonic()
            self._cancel(self.orders.to_cancel())

    def _cancel(self, fingerprints: set[str]) -> None:
        for attempt in self.running:
            if attempt.row.fingerprint in fingerprints and attempt.wish is None:
                attempt.wish = Wish("canceled", "canceled", "canceled by the user")
                attempt.gang.stop(attempt.row.token)

    def _note(self, trial: TrialRow, state: str) -> None:
        """What this controller has just written, without reading all trials anew: there may be thousands."""
        self.trials = [
            dataclasses.replace(one, state=state) if one.fingerprint == trial.fingerprint else one
            for one in self.trials
        ]

    def _check_budget(self) -> None:
        hours = self.sweep.budget.wall_hours
        if hours is not None and not self.stopping and time.monotonic() - self.started > hours * 3600:
            self._stop_all(Wish("budget", "budget", f"budget.wall_hours {hours:g} is used up"))

    def _stop_all(self, wish: Wish) -> None:
        self.stopping = wish
        self.stop_deadline = time.monotonic() + STOP_GRACE_SECONDS
        work = "running trials checkpoint and will be resumed" if self.running else "nothing runs yet"
        self.view.tell(f"stopping: {wish.reason}; {work}")
        for attempt in self.running:
            if attempt.wish is None:
                attempt.wish = wish
                attempt.gang.stop(attempt.row.token)

    def _abandon(self) -> None:
        """The grace is over: what still runs is killed, and resumes from its last checkpoint."""
        for attempt in list(self.running):
            self._end(attempt, GangEnd(summary=None, error="killed after the grace time"))

    # -- starting an attempt --------------------------------------------------------------------------------

    def _launch(self, gang: Gang, trial: TrialRow) -> None:
        directory = run_dir.trial_dir(self.home, trial.fingerprint)
        earlier = self.store.attempts(trial.fingerprint)
        resume = resume_point(directory, earlier)
        recover_records(self.store, self.lease, directory, earlier, resume.step)
        try:
            row = self.store.start_attempt(
                self.lease,
                trial.fingerprint,
                layout=self.shape.layout,
                provenance={**provenance(), **data_hashes(trial.config)},
                resume_step=resume.step,
                resumed_from=resume.attempt,
            )
        except TrialTaken:
            self._refresh(now=True)  # another sweep shares the trial and runs it now; its end is ours, too
            return
        self.store.set_hosts(self.lease, row, [member["host"] for member in gang.members])
        size = self.micro_batches[trial.fingerprint]
        spec = attempt_spec(self.sweep, self.shape, self.home, trial, row, resume, size)
        self.search.ask(trial.fingerprint, curve_until(self.store, trial.fingerprint, resume.step))
        attempt = RunningAttempt(trial, row, spec, gang)
        self.running.append(attempt)
        self._note(trial, "RUNNING")
        again = f", attempt {row.number} from step {resume.step}" if row.number > 1 else ""
        self.view.tell(f"started   {trial_name(trial)}{again}")
        try:
            run_dir.write_trial_config(directory, trial.config)
            run_dir.write_json(spec.attempt_dir / "attempt.json", spec)
        except OSError as error:
            self._end(attempt, GangEnd(summary=None, error=f"{type(error).__name__}: {error}"))
        else:
            gang.launch(spec)

    # -- following an attempt -------------------------------------------------------------------------------

    def _follow(self, attempt: RunningAttempt) -> None:
        end = attempt.gang.poll_end()
        progress = attempt.gang.progress()
        if progress is not None:
            attempt.note(progress)
        if end is not None or (progress is not None and progress[0] > attempt.offset):
            self._read(attempt)
        if end is None:
            end = self._hung(attempt)
        if end is not None:
            self._end(attempt, end)

    def _hung(self, attempt: RunningAttempt) -> GangEnd | None:
        """The end that is made of an attempt which does nothing any more. Where it stands is written down before."""
        silent, limit = attempt.silent_seconds(), attempt.patience_seconds(self.sweep.retry)
        if silent <= limit:
            return None
        attempt.gang.dump_stacks()
        reason = f"hung: nothing done for {silent:.0f} s after step {attempt.step}; stacks-rank*.txt say where"
        if attempt.wish is None:
            attempt.wish = Wish("hang", HANG, reason)
        return GangEnd(summary=None, error=reason)

    def _read(self, attempt: RunningAttempt) -> None:
        """New records: into the store, then past the search. Nothing after a divergence rule fired is kept."""
        records, attempt.offset = run_dir.read_records(attempt.spec.attempt_dir, attempt.offset)
        if attempt.wish is not None and attempt.wish.kind == "divergence":
            return
        stop = self.search.decide(attempt.trial.fingerprint, records)
        if stop is not None:
            records = up_to(stop, records)
            attempt.wish = Wish("divergence", stop.rule, stop.reason, stop.step)
            attempt.gang.stop(attempt.row.token)
        self.store.record(self.lease, attempt.row, records)
        for record in records:
            if isinstance(record, StepRecord):
                attempt.observe(record)

    def _end(self, attempt: RunningAttempt, end: GangEnd) -> None:
        trial, row = attempt.trial, attempt.row
        earlier = [one for one in self.store.attempts(trial.fingerprint) if trial.reopened_after < one.number]
        unsound = end.summary is None
        log_tail = run_dir.log_tail(attempt.spec.attempt_dir, end.rank) if unsound else ""
        result = consequence(
            Ending(end.summary, end.error, end.rank_died, attempt.wish, end.exit_code, log_tail),
            [one for one in earlier if one.number < row.number],
            self.sweep.retry,
        )
        self.running.remove(attempt)
        try:
            self.store.end_attempt(
                self.lease,
                row,
                state=result.state,
                cause=result.cause,
                reason=result.reason,
                end_step=result.end_step,
                summary=end.summary,
                log_tail=log_tail if unsound else None,
            )
        except FinishedIsFinal as taken:
            # This controller slept past its lease, and another sweep that shares the trial has taken it over.
            self.pool.lose(attempt.gang, f"{attempt.name} is no longer ours: {taken}")
            return
        self.not_before[trial.fingerprint] = time.monotonic() + result.delay_seconds
        if result.cause == DISK_FULL:
            self.disk.was_full()
        self._note(trial, result.state)
        self._tell_search(trial, result)
        self.view.tell(attempt.ended_line(result, self._final_loss(trial, result)))
        if unsound:
            # Whatever happened, the other ranks may hang in a collective and the process may be poisoned.
            self.pool.blame(attempt.gang, end.rank, result.host_faults, result.cause)
            self.pool.lose(attempt.gang, f"gang dismissed, after attempt {row.number} of {attempt.name}")
        elif result.cause == PREEMPTED:
            self.pool.lose(attempt.gang, f"gang dismissed: its host is being taken away ({result.reason})")
        self.mirror.nudge()

    def _tell_search(self, trial: TrialRow, result: Consequence) -> None:
        if result.state not in ("WAITING", "CANCELED"):
            loss = self._final_loss(trial, result)
            self.search.tell(trial.fingerprint, result.state, loss, result.cause, result.reason, result.end_step)

    def _final_loss(self, trial: TrialRow, result: Consequence) -> float | None:
        """The last validation on the slice, of a trial that completed."""
        if result.state != "COMPLETE":
            return None
        measured = [row for row in self.store.curve(trial.fingerprint).validations if row.split == "slice"]
        return measured[-1].loss_nats if measured else None

    # -- showing --------------------------------------------------------------------------------------------

    def _snapshot(self) -> Snapshot:
        counts = Counter(trial.state for trial in self.trials)
        lines = tuple(attempt.line() for attempt in self.running)
        return Snapshot(
            sweep=self.sweep.name,
            states={state: counts[state] for state in STATES if counts[state]},
            running=lines,
            gangs_starting=self.pool.num_starting,
            seconds=time.monotonic() - self.started,
            eta_seconds=eta_seconds(self.running, [trial for trial in self.trials if trial.state == "WAITING"]),
            stopping=self.stopping.reason if self.stopping else None,
        )
