"""What another controller left behind when it died: its gangs are followed on, and what has no gang is tried again.

A gang on a cluster that outlives its driver trains on for ``resources.grace_seconds``. Whoever takes the sweep over
finds it by the name that the store keeps with the attempt, and reads the attempt's records from its beginning: those
that the store has already stay, and the search decides as it had decided. An attempt that ended meanwhile has left its
summary. Nothing is lost when this controller dies in the middle, too: the next one does the same again.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from models import run_dir
from models.run_dir import AttemptSpec, Summary
from orchestrator.controller.orders import Orders
from orchestrator.controller.resume import attempt_dir, curve_until
from orchestrator.controller.running import RunningAttempt, trial_name
from orchestrator.controller.sweep_run import SweepRun
from orchestrator.failures import Wish
from orchestrator.gang import Gang, GangEnd, GangShape, GangState, LeaseFile, Wanted, is_broken_collective
from orchestrator.store import AttemptRow, TrialRow, TrialTaken


@dataclass
class EndedByItself:
    """Stands for the gang of an attempt that ended while no controller looked, and is gone by now."""

    shape: GangShape
    summary: Summary
    state: GangState = GangState.DEAD
    gang_id: str = ""
    members: list[dict[str, Any]] = field(default_factory=list)

    def poll_end(self) -> GangEnd:
        if self.summary.outcome == "error":
            error = self.summary.error or ""
            died = is_broken_collective(error)  # nobody saw which rank, and the account is that of one that outlived it
            return GangEnd(summary=None, error=error, rank_died=died, held_seconds=self.summary.seconds)
        return GangEnd(self.summary, held_seconds=self.summary.seconds)

    def progress(self) -> None:
        return None

    def stop(self, token: str) -> None:
        """It has."""

    def dismiss(self) -> None:
        """Nothing is left of it."""


def gang_facts(gang: Gang) -> dict[str, Any]:
    """What an attempt's provenance keeps of its gang, so that it can be found; nothing if it dies with its driver."""
    if not gang.is_detached:
        return {}
    shape = gang.shape
    asked = {"cpus_per_rank": shape.cpus_per_rank, "gpus_per_rank": shape.gpus_per_rank, "placement": shape.placement}
    return {"gang": {"id": gang.gang_id, **asked}}


def take_over(run: SweepRun, orders: Orders) -> None:
    """At the start of a controller: all that the sweep's last one left, gangs without an attempt included."""
    lease_file = run.pool.lease_file
    named = lease_file.left_behind() if lease_file else []
    adopt_orphans(run, orders)
    if lease_file:
        run.pool.keep_lease()
        run.pool.cluster.end_gangs(set(named) - {gang.gang_id for gang in run.pool.gangs})
        lease_file.remove_earlier()


def adopt_orphans(run: SweepRun, orders: Orders) -> None:
    """Every attempt whose controller is gone is followed from now on, or freed. Cheap when there is none."""
    followed = {attempt.row.token for attempt in run.running}
    left = [row for row in run.store.orphans(run.lease) if row.token not in followed]
    if not left:
        return
    run.trials.read()
    trials = {trial.fingerprint: trial for trial in run.trials.rows}
    gangs = _find_gangs(run, [row for row in left if row.fingerprint in trials])
    lost = []
    for row in left:
        trial = trials.get(row.fingerprint)
        if trial is None or not _adopt(run, trial, row, gangs.get(row.token, "it died with its controller")):
            lost.append(row)
    freed = run.store.free(run.lease, lost)
    run.store.cancel(run.sweep_id, orders.left_to_cancel(freed))
    _heed_cancels(run, orders)
    run.trials.read()
    _tell_freed(run, freed, {row.fingerprint: gangs.get(row.token) for row in lost})


def _find_gangs(run: SweepRun, rows: list[AttemptRow]) -> dict[str, Gang | str]:
    """By token."""
    wanted = []
    for row in rows:
        facts = row.provenance.get("gang")
        if facts and run.pool.lease_file:
            asked = (facts["cpus_per_rank"], facts["gpus_per_rank"], facts.get("placement", "pack"))
            shape = GangShape(row.layout, *asked)
            wanted.append(Wanted(facts["id"], shape, row.token))
    found = run.pool.cluster.find_gangs(wanted) if wanted else []
    return {one.token: gang for one, gang in zip(wanted, found, strict=True)}


def _adopt(run: SweepRun, trial: TrialRow, row: AttemptRow, gang: Gang | str) -> bool:
    """Whether the attempt is followed from now on."""
    folder = attempt_dir(run_dir.trial_dir(run.home, trial.fingerprint), row)
    try:
        spec = run_dir.read_attempt_spec(folder)
        summary = run_dir.read_summary(folder)
    except (OSError, ValueError):
        return False  # killed before it had said what it wanted
    follower: Any = gang
    if isinstance(gang, str):
        if summary is None:
            return False
        follower = EndedByItself(GangShape(row.layout, 0, 0), summary)
    said = f"attempt {row.number} goes on" if summary is None else f"attempt {row.number} has ended meanwhile"
    try:
        row = run.store.adopt(run.lease, row, f"{said}: a controller has followed one that is gone")
    except TrialTaken:
        return True  # another sweep that shares the trial has been faster
    if not isinstance(gang, str):
        assert run.pool.lease_file is not None
        gang.renew(run.pool.lease_file.lease)
        run.pool.adopt(gang)
    _begin_to_follow(run, RunningAttempt(trial, row, spec, follower, run.clock.monotonic()), spec, summary)
    run.view.tell(f"adopted   {trial_name(trial)}: {said}")
    return True


def _begin_to_follow(run: SweepRun, attempt: RunningAttempt, spec: AttemptSpec, summary: Summary | None) -> None:
    if summary is not None and summary.outcome == "stopped" and summary.error is None:
        attempt.wish = Wish("interrupted", "interrupted", "it was told to stop, and its controller died before it did")
    run.search.ask(attempt.trial.fingerprint, curve_until(run.store, attempt.trial.fingerprint, spec.resume_step))
    run.running.append(attempt)


def _heed_cancels(run: SweepRun, orders: Orders) -> None:
    """What the dead controller was asked to cancel, and the gang may not have heard."""
    running = {attempt.trial.fingerprint: attempt for attempt in run.running}
    for fingerprint in orders.left_to_cancel(running):
        running[fingerprint].ask_to_stop(Wish("canceled", "canceled", "canceled by the user"))


def _tell_freed(run: SweepRun, freed: list[str], why: dict[str, Gang | str | None]) -> None:
    for trial in run.trials.rows:
        if trial.fingerprint in freed and trial.state == "WAITING":
            said = why.get(trial.fingerprint)
            run.view.tell(f"resuming  {trial_name(trial)}: its controller is gone{f', {said}' if said else ''}")


def new_lease_file(run: SweepRun) -> LeaseFile | None:
    """Where this controller's gangs look for it; None when they die with it."""
    if not run.pool.cluster.outlives_driver:
        return None
    born = run.store.sweep(run.sweep.name).created_at
    return LeaseFile(
        run.home,
        f"{run.sweep.name} {born.isoformat()}",
        run.lease.token,
        run.sweep.resources.grace_seconds,
        run.clock.monotonic,
    )
