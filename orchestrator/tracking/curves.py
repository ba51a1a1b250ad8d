"""What a pass sends of the trials themselves: points first, then parameters, tags and states, then notices."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

from orchestrator.store import GATED, AttemptRow, TrialRow
from orchestrator.sweep import NOTICE_KINDS
from orchestrator.tracking import run_content
from orchestrator.tracking.books import Books
from orchestrator.tracking.memory import Cursor, has_begun
from orchestrator.tracking.mlflow_runs import METRICS_PER_BATCH
from orchestrator.tracking.shown_points import Packet, packets


class OutOfTime(Exception):
    """The pass was told to stop before it was done."""


@dataclass
class Sent:
    """What one pass sent: trials with any news, and metric points."""

    trials: set[str] = field(default_factory=set)
    num_points: int = 0

    @property
    def num_trials(self) -> int:
        return len(self.trials)


class CurvesPass:
    def __init__(self, books: Books, out_of_time: Callable[[], bool]) -> None:
        self._books, self._store, self._memory = books, books.store, books.memory
        self._out_of_time = out_of_time
        self._num_running = sum(row.state == "RUNNING" for row in books.rows)
        self._attempts: dict[str, list[AttemptRow]] = {}
        self._sent = Sent()

    def run(self, is_due: Callable[[], bool], rest_seconds: float) -> Sent:
        """``is_due``: the next points are; what is no point waits then. ``rest_seconds``: a running trial whose points
        were sent less than this ago has none worth a call yet."""
        submitted_at = self._books.sweep.updated_at
        begun = [row for row in self._books.rows if has_begun(row) and not self._memory.is_settled(row, submitted_at)]
        served = [row for row in begun if not self._memory.may_rest(row, rest_seconds)]
        for row in served:
            self._send_points(row)
        self._books.write()
        for row in begun:
            if self._send_facts(row) and is_due():
                break
        self._send_notices()
        self._books.write()
        return self._sent

    def _check_time(self) -> None:
        if self._out_of_time():
            raise OutOfTime

    def _is_over(self, row: TrialRow, cursor: Cursor) -> bool:
        """It has ended, and MLflow was told everything but for its artifacts."""
        return row.state in run_content.STATUS and cursor.get("told") == self._told(row, cursor)

    def _tags(self, row: TrialRow, cursor: Cursor) -> dict[str, str]:
        return run_content.trial_tags(self._books.sweep, row, cursor.get("stride", 0))

    def _told(self, row: TrialRow, cursor: Cursor) -> str:
        return run_content.digest(self._tags(row, cursor))

    # Points

    def _send_points(self, row: TrialRow) -> None:
        cursor = self._books.cursor(row)
        if self._is_over(row, cursor):
            return
        news = self._packets(row, cursor)
        if news or self._books.run_id(row) is None or cursor.get("told") != self._told(row, cursor):
            self._check_time()
            run_id = self._books.live_run(row)
            if run_id is None:
                cursor = self._books.new_cursor()
                news = self._packets(row, cursor)
                run_id, cursor = self._new_run(row, cursor, news)
            for packet in news:
                self._check_time()
                if packet.points:
                    self._sent.trials.add(row.fingerprint)
                    self._books.runs().log_points(run_id, packet.points)
                    self._sent.num_points += len(packet.points)
                cursor |= packet.cursor
                self._books.note(row, cursor)
        self._memory.serve(row)

    def _packets(self, row: TrialRow, cursor: Cursor) -> list[Packet]:
        after = (cursor["attempt"], cursor["step"]) if "step" in cursor else None
        curve = self._store.curve(row.fingerprint, after)
        started_ms = {attempt.number: _ms(attempt.started_at.timestamp()) for attempt in self._attempts_of(row)}
        layers = self._store.layers(row.fingerprint, cursor.get("probed", 0))
        given = (curve, layers, row.config, started_ms, cursor, METRICS_PER_BATCH)
        return packets(*given, num_running=self._num_running, has_ended=row.state in run_content.STATUS)

    def _new_run(self, row: TrialRow, cursor: Cursor, news: list[Packet]) -> tuple[str, Cursor]:
        tags = self._tags(row, news[-1].cursor if news else cursor)
        attempts = self._attempts_of(row)
        start_ms = _ms(attempts[0].started_at.timestamp()) if attempts else None
        run_id, has_tags = self._books.new_run(row, tags, start_ms)
        self._sent.trials.add(row.fingerprint)
        if has_tags and row.state not in run_content.STATUS:  # a new run is running
            cursor |= {"told": run_content.digest(tags), "status": "RUNNING"}
        self._books.note(row, cursor)
        return run_id, cursor

    def _attempts_of(self, row: TrialRow) -> list[AttemptRow]:
        if row.fingerprint not in self._attempts:
            self._attempts[row.fingerprint] = self._store.attempts(row.fingerprint)
        return self._attempts[row.fingerprint]

    # Facts

    def _send_facts(self, row: TrialRow) -> bool:
        """Parameters, tags and state; whether there was anything to send."""
        cursor, run_id = self._books.cursor(row), self._books.run_id(row)
        tags = self._tags(row, cursor)
        told = run_content.digest(tags)
        if run_id is None or (cursor.get("told") == told and cursor.get("parameters")):
            return False
        self._check_time()
        run_id = self._books.live_run(row)
        if run_id is None:  # the next pass makes it anew
            self._memory.run_ids[row.fingerprint] = None
            return True
        self._sent.trials.add(row.fingerprint)
        if not cursor.get("parameters"):
            self._books.runs().log_parameters(run_id, run_content.parameters(row.config))
            cursor["parameters"] = True
            self._books.note(row, cursor)
        if cursor.get("told") != told:
            self._books.runs().set_tags(run_id, tags)
            status = run_content.STATUS.get(row.state, "RUNNING")
            if cursor.get("status") != status or status != "RUNNING":
                self._books.runs().set_status(run_id, status, _ended_ms(self._attempts_of(row)))
            self._books.note(row, cursor | {"told": told, "status": status})
        return True

    def _send_notices(self) -> None:
        """The last one of each kind, and what gates decided, as tags of the sweep's run."""
        books = self._books
        found = [self._store.events(books.sweep.id, kind=kind, last=1) for kind in (*NOTICE_KINDS, GATED)]
        last = [event for events in found for event in events]
        cursor = books.new_cursor() | {"notices": max((event.id for event in last), default=0)}
        if not last or books.sweep.mirror_cursor == cursor:
            return
        self._check_time()
        runs = books.runs()
        notices = run_content.notice_tags([event for event in last if event.kind != GATED])
        runs.set_tags(runs.sweep_run_id, notices | run_content.gate_tags(books.sweep))
        books.note_sweep(cursor)


def _ms(seconds: float) -> int:
    return round(seconds * 1000)


def _ended_ms(attempts: list[AttemptRow]) -> int | None:
    ended = attempts[-1].ended_at if attempts else None
    return None if ended is None else _ms(ended.timestamp())
