"""The store's face: each method is one transaction. Threads may share a Store; processes open their own."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from datetime import datetime
from typing import TYPE_CHECKING, Any, Concatenate, ParamSpec, Self, TypeVar

from sqlalchemy import Connection, Engine
from sqlalchemy.exc import DBAPIError

from models.config import Layout
from models.redaction import hide
from models.run_dir import Record, Summary
from orchestrator.store import (
    allotted,
    attempts,
    ended,
    foreign_curves,
    mirrored,
    orphans,
    outcomes,
    promoted,
    query,
    ranking,
    reader,
    shared_steps,
    sharing,
    spending,
    submission,
)
from orchestrator.store import lease as leases
from orchestrator.store import running as running_rows
from orchestrator.store.engine import make_engine, parse_url, reading, writing
from orchestrator.store.migrate import migrate
from orchestrator.store.outage import Patience, as_outage
from orchestrator.store.promoted import GatePassage
from orchestrator.store.query import View
from orchestrator.store.rows import (
    Added,
    AttemptRow,
    BudgetLine,
    Curve,
    Demand,
    EventRow,
    FailedRow,
    FinishedIsFinal,
    Imported,
    LayerRow,
    Lease,
    Outcome,
    RankDecision,
    Reused,
    RunningRow,
    Spent,
    StoreError,
    SweepRow,
    TailRow,
    TrialRow,
    TrialTaken,
)
from orchestrator.sweep import UserError

if TYPE_CHECKING:
    import pandas as pd

    from orchestrator.plan import Confirmation, GrownRate, Plan, PlannedTrial

P = ParamSpec("P")
R = TypeVar("R")


class Store:
    """The memory of all sweeps, in SQLite or Postgres; a context manager.

    Opening brings the database to this code's schema, or raises UserError when it can't be opened, is newer, or
    lies on a network file system. Writes of a controller take its lease and raise LeaseLost once it is void.
    """

    def __init__(self, url: str, reader_url: str | None = None) -> None:
        """``reader_url``: the same Postgres by a role that can only read, for free queries."""
        parsed = parse_url(url)
        hide(parsed.password)
        self.url = parsed.render_as_string(hide_password=True)
        self._engine = make_engine(parsed)
        self._reader_url = reader_url
        self._patience: Patience | None = None
        self._num_waits = 0
        migrate(self._engine)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        self._engine.dispose()

    def patient(self, patience: Patience) -> Self:
        """The same store for one thread that waits for the database: each call is made again until it is done.

        Without patience a call raises StoreOutage.
        """
        patient = copy.copy(self)
        patient._patience = patience
        return patient

    def _read(self, function: Callable[Concatenate[Connection, P], R], *args: P.args, **kwargs: P.kwargs) -> R:
        return self._done(reading, lambda connection: function(connection, *args, **kwargs))

    def _write(self, function: Callable[Concatenate[Connection, P], R], *args: P.args, **kwargs: P.kwargs) -> R:
        return self._done(writing, lambda connection: function(connection, *args, **kwargs))

    def _done(
        self, transaction: Callable[[Engine], AbstractContextManager[Connection]], work: Callable[[Connection], R]
    ) -> R:
        waits = self._num_waits
        while True:
            try:
                with transaction(self._engine) as connection:
                    result = work(connection)
                break
            except DBAPIError as error:
                outage = as_outage(error, self.url)
                if outage is None:
                    raise
                if self._patience is None:
                    raise outage from error
                self._num_waits += 1
                self._patience.wait(outage)
            except StoreError:  # an answer, too
                self._answered(waits)
                raise
        self._answered(waits)
        return result

    def _answered(self, waits: int) -> None:
        if self._patience is not None and self._num_waits > waits:
            self._patience.over()

    # Sweeps and trials

    def add(self, plan: Plan) -> Added:
        """Store a plan: known trials are kept, missing ones wait, those no longer planned are not current.

        Of the known ones, those that were pruned elsewhere, or that this sweep prunes no more, wait again."""
        return self._write(_add, plan)

    def choose(self, sweep_id: int, confirmation: Confirmation, lr: float) -> float:
        """Add an arm's confirming trials at ``lr``, or at the rate that the same trials chose before; returns it."""
        return self._write(submission.choose, sweep_id, confirmation, lr)

    def grown_rates(self, sweep_id: int) -> list[GrownRate]:
        """Learning rates that joined the sweep while it ran, in that order."""
        return self._read(submission.grown_rates, sweep_id)

    def grow(self, sweep_id: int, rate: GrownRate, trials: Sequence[PlannedTrial]) -> None:
        """Add a learning rate with its trials; nothing when it is there."""
        self._write(submission.grow, sweep_id, rate, trials)

    def allot(
        self,
        sweep_id: int,
        axes: Mapping[str, Any],
        look: int,
        trials: Sequence[PlannedTrial],
        reasons: Mapping[str, str],
        formula: str,
    ) -> bool:
        """Note what a look decided, with the confirming trials that it gave; False when that was noted before."""
        return self._write(allotted.allot, sweep_id, axes, look, trials, reasons, formula)

    def promote(self, sweep_id: int, decided: Sequence[GatePassage], trials: Sequence[PlannedTrial]) -> bool:
        """Note what a gate decided and add the trials that it lets through; False when it was decided before."""
        return self._write(promoted.promote, sweep_id, decided, trials)

    def promote_anyway(self, sweep_id: int, keys: Sequence[str]) -> list[GatePassage]:
        """Arms go on although a gate holds them back, by ``GatePassage.key``; returns those. Trials are added by the
        next ``add``, or by the sweep's controller."""
        return self._write(promoted.promote_anyway, sweep_id, keys)

    def join(self, sweep_id: int, trials: Sequence[PlannedTrial]) -> None:
        """Trials become the sweep's, beside those that it has."""
        self._write(submission.join_trials, sweep_id, trials)

    def sweeps(self) -> list[SweepRow]:
        return self._read(reader.sweeps)

    def sweep(self, name: str) -> SweepRow:
        """UserError, with the nearest name, when there is none."""
        return self._read(reader.sweep, name)

    def trials(self, sweep_id: int) -> list[TrialRow]:
        """The sweep's current trials, by position."""
        return self._read(reader.trials, sweep_id)

    def trial_changes(self, sweep_id: int, since: datetime) -> list[dict[str, Any]]:
        """The fields of TrialRow that can change, with the fingerprint, of the trials that were written since, by the
        writers' clocks. Arm and position only change with a new submission."""
        return self._read(reader.trial_changes, sweep_id, since)

    def outcomes(self, sweep_id: int, tail: float) -> list[Outcome]:
        """The sweep's current trials by position with what was measured of them, fast: what its tables are made of."""
        return self._read(outcomes.outcomes, sweep_id, tail)

    def outcome_columns(self, sweep_id: int, tail: float) -> dict[str, Sequence[Any]]:
        """The same by field of Outcome, a value a trial."""
        return self._read(outcomes.outcome_columns, sweep_id, tail)

    def num_by_state(self, sweep_id: int | None = None) -> dict[int, dict[str, int]]:
        """By sweep, or of one alone, how many of its current trials are in which state."""
        return self._read(outcomes.num_by_state, sweep_id)

    def failed(self, sweep_id: int, limit: int) -> list[FailedRow]:
        """The first trials of the sweep that FAILED, by position."""
        return self._read(outcomes.failed, sweep_id, limit)

    def reopen(self, sweep_id: int, fingerprints: Sequence[str]) -> int:
        """FAILED and CANCELED trials wait again; returns how many."""
        return self._write(attempts.reopen, sweep_id, fingerprints)

    def cancel(self, sweep_id: int, fingerprints: Sequence[str]) -> int:
        """WAITING trials become CANCELED, for every sweep that shares them; returns how many."""
        return self._write(attempts.cancel, sweep_id, fingerprints)

    # The lease

    def acquire_lease(self, sweep_id: int, holder: str, seconds: float) -> Lease:
        """The right to write for a sweep; raises LeaseHeld while someone else has it."""
        return self._write(leases.acquire, sweep_id, holder, seconds)

    def renew_lease(self, lease: Lease, seconds: float) -> None:
        self._write(leases.renew, lease, seconds)

    def release_lease(self, lease: Lease) -> None:
        self._write(leases.release, lease)

    def lease_holder(self, sweep_id: int) -> tuple[str, float] | None:
        """(holder, seconds left) while a lease is in force."""
        return self._read(leases.holder, sweep_id)

    def running(self, sweep_id: int) -> list[RunningRow]:
        """What the sweep's controller runs now, each with its newest step, in execution order."""
        return self._read(running_rows.running, sweep_id)

    # Sharing a cluster

    def publish_demand(self, lease: Lease, demand: Demand) -> None:
        """What the holder of a lease holds and wants; forgotten with the lease."""
        self._write(leases.publish_demand, lease, demand)

    def demands(self) -> list[Demand]:
        """Of all sweeps whose lease is in force."""
        return self._read(leases.demands)

    # Budgets

    def spent(self, sweep_id: int) -> Spent:
        """Hours used up over all runs until now."""
        return self._read(spending.spent, sweep_id)

    def budget(self, sweep_id: int) -> list[BudgetLine]:
        """The budgets that the last submission declared, with what was added to them and what is used up."""
        return self._read(spending.budget, sweep_id)

    def pace(self, sweep_id: int) -> tuple[float, float, float, int]:
        """(FLOPs, GPU-hours, CPU-hours, number) of the sweep's complete trials, whoever ran them."""
        return self._read(spending.pace, sweep_id)

    def ended_by_cause(self, sweep_id: int) -> dict[str, int]:
        """Attempts of this sweep's controllers by what ended them; ``complete`` where no cause was given."""
        return self._read(spending.ended_by_cause, sweep_id)

    # Attempts

    def orphans(self, lease: Lease) -> list[AttemptRow]:
        """Open attempts that this sweep's last controller left, and shared ones of sweeps whose lease has run out."""
        return self._write(orphans.find, lease)

    def adopt(self, lease: Lease, orphan: AttemptRow, message: str) -> AttemptRow:
        """The attempt goes on, followed under this lease; TrialTaken when another controller was faster."""
        return self._write(orphans.adopt, lease, orphan, message)

    def free(self, lease: Lease, left: Sequence[AttemptRow]) -> list[str]:
        """The orphans are over and their trials go back to WAITING; returns those."""
        return self._write(orphans.free, lease, left)

    def attempts(self, fingerprint: str) -> list[AttemptRow]:
        """Oldest first."""
        return self._read(reader.attempts, fingerprint)

    def start_attempt(
        self,
        lease: Lease,
        fingerprint: str,
        *,
        layout: Layout,
        provenance: Mapping[str, Any],
        resume_step: int = 0,
        resumed_from: int | None = None,
        branched_from: str | None = None,
        cpus: float | None = None,
        gpus: float | None = None,
        hosts: Sequence[str] = (),
        num_earlier: int | None = None,
    ) -> AttemptRow:
        """Claim a WAITING trial; TrialTaken when it is not (another sweep's controller may run it), or when it has had
        more attempts than the ``num_earlier`` that the caller has seen.

        ``branched_from``: the trial that it leaves at ``resume_step``, whose records up to there become its own.
        ``cpus`` and ``gpus`` are what its whole gang holds: what budgets are charged.
        """
        given = (layout, provenance, resume_step, resumed_from, branched_from, cpus, gpus, hosts, num_earlier)
        waits = self._num_waits
        try:
            return self._write(attempts.start, lease, fingerprint, *given)
        except TrialTaken:
            # By this very call, perhaps: the connection may have been lost after the commit.
            own = self._read(attempts.open_attempt, lease, fingerprint) if self._num_waits > waits else None
            if own is None:
                raise
            return own

    def record(self, lease: Lease, attempt: AttemptRow, records: Sequence[Record]) -> None:
        """Keep records, in bulk; those already there stay."""
        self.record_all(lease, [(attempt, records)])

    def record_all(self, lease: Lease, batch: Sequence[tuple[AttemptRow, Sequence[Record]]]) -> None:
        """The same for several attempts, in one transaction."""
        if any(records for _, records in batch):
            self._write(attempts.record, lease, batch)

    def end_attempt(
        self,
        lease: Lease,
        attempt: AttemptRow,
        *,
        state: str,
        cause: str,
        reason: str,
        end_step: int | None = None,
        summary: Summary | None = None,
        log_tail: str | None = None,
        held_seconds: float | None = None,
    ) -> None:
        """Close the attempt and move the trial; FinishedIsFinal when it has already ended, or moved to another sweep.

        ``held_seconds``: how long it held its hosts; None: until now.
        """
        told, waits = (state, cause, reason, end_step, summary, log_tail, held_seconds), self._num_waits
        try:
            self._write(attempts.end, lease, attempt, *told)
        except FinishedIsFinal:
            # Likewise.
            if self._num_waits == waits or not self._read(attempts.has_ended, attempt, cause, reason):
                raise

    # Pruning by rank

    def rank_decisions(self, sweep_id: int) -> list[RankDecision]:
        """Oldest first."""
        return self._read(ranking.decisions, sweep_id)

    def add_rank_decision(self, lease: Lease, decision: RankDecision, words: str) -> None:
        """Keep a decision, and ``words`` of it as an event; before anything is stopped for it."""
        self._write(ranking.add_decision, lease, decision, words)

    def prune(self, lease: Lease, fingerprints: Sequence[str], reason: str) -> list[str]:
        """WAITING trials become PRUNED; returns those that did."""
        return self._write(ranking.prune, lease, fingerprints, reason)

    # What sweeps share

    def trained_elsewhere(self, name: str, fingerprints: Sequence[str]) -> dict[str, str]:
        """Of these trials, those that only other sweeps than ``name`` have trained: by fingerprint, which one."""
        return self._read(sharing.trained_elsewhere, name, fingerprints)

    def states(self, fingerprints: Sequence[str]) -> dict[str, str]:
        """Of those trials that the store knows, whatever sweep they belong to."""
        return self._read(sharing.states, fingerprints)

    def reused(self, sweep_id: int) -> list[Reused]:
        """The sweep's trials that another one trained last, each with its drift."""
        return self._read(sharing.reused, sweep_id)

    def comparisons(self, sweep_id: int) -> dict[str, int]:
        """By sweep, the arms that are compared with this sweep's baseline trials; this sweep's own among them."""
        return self._read(sharing.comparisons, sweep_id)

    # Events, curves, mirrors

    def add_event(
        self,
        sweep_id: int | None,
        kind: str,
        message: str,
        fingerprint: str | None = None,
        attempt: int | None = None,
        at: datetime | None = None,
    ) -> None:
        """``at``: when it happened; None: now."""
        self._write(submission.add_event, sweep_id, kind, message, fingerprint, attempt, at)

    def events(
        self, sweep_id: int | None = None, after: int = 0, *, kind: str | None = None, last: int | None = None
    ) -> list[EventRow]:
        """Events with an id above ``after``, oldest first; only those of one kind, or the ``last`` so many."""
        return self._read(reader.events, sweep_id, after, kind, last)

    def curve(self, fingerprint: str, after: tuple[int, int] | None = None) -> Curve:
        """A trial's history by the reader's rule. ``after`` = (attempt, step) gives only newer steps; validations
        are few, and always all there."""
        return self._read(reader.curve, fingerprint, after)

    def num_steps(self, fingerprint: str, until: int) -> int:
        """How many steps up to ``until`` a trial's curve has."""
        return self._read(shared_steps.num_steps, fingerprint, until)

    def layers(self, fingerprint: str, after: int = 0) -> list[LayerRow]:
        """What the probes after step ``after`` saw inside a trial, a row a step and layer, by the reader's rule."""
        return self._read(reader.layers, fingerprint, after)

    def tails(self, sweep_id: int, tail: float) -> list[TailRow]:
        """Of every complete trial, a row a split: the mean over the last ``tail`` (0 to 1) of the schedule."""
        return self._read(reader.tails, sweep_id, tail)

    def imported(self, sweep_id: int) -> list[Imported]:
        """Curves from elsewhere that were put beside the sweep, oldest first."""
        return self._read(foreign_curves.imported, sweep_id)

    def put_imported(self, sweep: SweepRow, given: Imported) -> None:
        """Whole or not at all; UserError when its name is taken."""
        self._write(foreign_curves.put, sweep, given)

    def remove_imported(self, sweep: SweepRow, name: str) -> int:
        """How many curves went; UserError when there are none."""
        return self._write(foreign_curves.remove, sweep, name)

    # The mirror to MLflow

    def mlflow_run(self, sweep_id: int, fingerprint: str) -> str | None:
        """The trial's run in this sweep, if it has one by now."""
        return self._read(mirrored.run_of, sweep_id, fingerprint)

    def set_mlflow_run(self, sweep_id: int, fingerprint: str | None, run_id: str | None) -> None:
        """The sweep's parent run when ``fingerprint`` is None, else the trial's run in this sweep."""
        self._write(mirrored.set_run, sweep_id, fingerprint, run_id)

    def mirror_cursor(self, sweep_id: int, fingerprint: str) -> dict[str, Any] | None:
        """What the mirror last noted about a trial; the store does not look inside."""
        return self._read(mirrored.cursor, sweep_id, fingerprint)

    def set_mirror_cursor(self, sweep_id: int, fingerprint: str | None, cursor: Mapping[str, Any] | None) -> None:
        """Of a trial, or of the sweep itself when ``fingerprint`` is None."""
        self._write(mirrored.set_cursor, sweep_id, fingerprint, cursor)

    def set_mirror_cursors(self, sweep_id: int, cursors: Mapping[str, Mapping[str, Any]]) -> None:
        """Of many trials, by fingerprint, in one transaction."""
        self._write(mirrored.set_cursors, sweep_id, cursors)

    # SQL and notebooks

    def query(
        self, sql: str, timeout_seconds: float = query.TIMEOUT_SECONDS, max_rows: int | None = None
    ) -> pd.DataFrame:
        """One reading statement, on its own read-only connection; mistakes and refusals are UserErrors.

        ``attrs["is_cut"]`` of the frame says whether ``max_rows`` left something out.
        """
        if self._reader_url is None or self._engine.dialect.name == "sqlite":
            return query.to_frame(query.run(self._engine, sql, (), timeout_seconds, max_rows), max_rows)
        reader_engine = make_engine(parse_url(self._reader_url))
        try:
            query.check_reader(reader_engine)
            return query.to_frame(query.run(reader_engine, sql, (), timeout_seconds, max_rows), max_rows)
        finally:
            reader_engine.dispose()

    def frame(self, view: View, sweep: str | None = None) -> pd.DataFrame:
        """A view as a DataFrame, of one sweep or all, with a column an axis (``train.lr``)."""
        if view not in query.VIEW_ORDER:
            raise UserError(f"no view {view!r}; allowed: {', '.join(query.VIEW_ORDER)}")
        if sweep is not None:
            self.sweep(sweep)
        return query.view_frame(self._engine, view, sweep)


def _add(connection: Connection, plan: Plan) -> Added:
    name = plan.sweep.name
    plan = plan.promoted(promoted.let_through(connection, name)).grown(submission.grown_rates_of(connection, name))
    added = submission.add_plan(connection, plan)
    ranking.reopen_pruned(connection, added.sweep_id, plan.sweep.model_dump(mode="json", include={"prune"}))
    if added.num_known:
        ended.keep_missing(connection, added.sweep_id)
    return added
