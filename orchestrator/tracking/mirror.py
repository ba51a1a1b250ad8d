"""One pass of the mirror: what the store has and MLflow has not is sent.

It may be killed anywhere and run again. A cursor a trial is kept in the store and moves after MLflow has taken the
points; a run that was created but not noted is found again by its tags. Runs that MLflow has lost are made anew.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from models.redaction import redacted
from orchestrator.store import GATED, AttemptRow, Store, StoreOutage, SweepRow, TrialRow
from orchestrator.sweep import NOTICE_KINDS
from orchestrator.tracking import run_content
from orchestrator.tracking.layer_plots import layer_plots
from orchestrator.tracking.loss_plot import loss_plot
from orchestrator.tracking.memory import Cursor, Memory
from orchestrator.tracking.server import open_client, sqlite_path

if TYPE_CHECKING:
    from mlflow import MlflowClient

EXPERIMENT = "gatesweep"

_METRICS_PER_BATCH = 1_000
_PARAMS_PER_BATCH = 100


class TrackingError(Exception):
    """MLflow did not take what it was sent. Nothing is lost: the next pass goes on from there."""


class OutOfTime(Exception):
    """The pass was told to stop before it was done."""


@dataclass
class Sent:
    """What one pass sent: trials with any news, and metric points."""

    num_trials: int = 0
    num_points: int = 0


def mirror(
    store: Store,
    sweep_id: int,
    tracking_uri: str,
    artifact_location: str | None = None,
    *,
    memory: Memory | None = None,
    out_of_time: Callable[[], bool] = lambda: False,
    rebuild: bool = False,
) -> Sent:
    """Bring a sweep's runs up to what the store holds; raises only TrackingError, OutOfTime and StoreOutage.

    ``artifact_location`` is used when the experiment is first made; None leaves it to the tracking server.
    ``memory`` lasts over the passes of one process. ``rebuild`` forgets the runs and sends everything anew.
    With nothing to send MLflow is not even imported.
    """
    memory = memory or Memory()
    try:
        one_pass = _Pass(store, sweep_id, tracking_uri, artifact_location, memory)
        return one_pass.run(out_of_time, rebuild)
    except (OutOfTime, StoreOutage):
        raise
    except Exception as error:
        memory.forget()
        cause = _root_cause(error)
        reason = redacted(f"{type(cause).__name__}: {cause}").partition("\n")[0]
        raise TrackingError(f"MLflow at {redacted(tracking_uri)} can't be written: {reason[:500]}") from error


def _root_cause(error: BaseException) -> BaseException:
    """Below MLflow's and urllib3's wrappings: "Connection refused" says it best."""
    while (inner := error.__cause__ or error.__context__) is not None:
        error = inner
    return error


class _Pass:
    def __init__(
        self, store: Store, sweep_id: int, tracking_uri: str, artifact_location: str | None, memory: Memory
    ) -> None:
        self._store, self._uri, self._artifact_location = store, tracking_uri, artifact_location
        self._sweep: SweepRow = next(row for row in store.sweeps() if row.id == sweep_id)
        self._memory = memory
        self._rows: list[TrialRow] = memory.read(store, sweep_id)
        self._run_ids, self._cursors = memory.run_ids, memory.cursors
        self._place = run_content.digest(tracking_uri)
        self._opened: _Parent | None = None
        self._sent = Sent()

    def run(self, out_of_time: Callable[[], bool], rebuild: bool) -> Sent:
        path = sqlite_path(self._uri)
        if rebuild or (path is not None and not path.exists()):
            self._forget()
        self._out_of_time = out_of_time
        begun = [
            row for row in self._rows if (row.state != "WAITING" or row.num_attempts) and not self._is_settled(row)
        ]
        for row in begun:
            self._send_trial(row)
        self._send_notices()
        for row in begun:  # afterwards: an artifact store that is down must not hold up the metrics
            self._send_artifacts(row)
        if self._opened is not None:
            self._opened.send_artifacts()
        return self._sent

    def _is_settled(self, row: TrialRow) -> bool:
        return self._memory.is_settled(row, self._sweep.updated_at)

    def _check_time(self) -> None:
        if self._out_of_time():
            raise OutOfTime

    def _send_notices(self) -> None:
        """The last one of each kind, and what gates decided, as tags of the sweep's run."""
        found = [self._store.events(self._sweep.id, kind=kind, last=1) for kind in (*NOTICE_KINDS, GATED)]
        last = [event for events in found for event in events]
        cursor = {"place": self._place, "notices": max((event.id for event in last), default=0)}
        if not last or self._sweep.mirror_cursor == cursor:
            return
        self._check_time()
        parent = self._parent()
        notices = run_content.notice_tags([event for event in last if event.kind != GATED])
        parent.set_tags(parent.run_id, notices | run_content.gate_tags(self._sweep))
        self._store.set_mirror_cursor(self._sweep.id, None, cursor)
        self._sweep = replace(self._sweep, mirror_cursor=cursor)

    # One trial

    def _send_trial(self, row: TrialRow) -> None:
        cursor = self._cursor(row)
        tags = run_content.trial_tags(self._sweep, row)
        told = run_content.digest(tags)
        if row.state in run_content.STATUS and cursor.get("told") == told:
            return
        attempts = self._store.attempts(row.fingerprint)
        packets = self._packets(row, attempts, cursor)
        if not packets and cursor.get("told") == told:
            return
        self._check_time()
        parent = self._parent()
        run_id, is_known = self._run_id(parent, row, tags, attempts)
        if not is_known:
            cursor = {"place": self._place}
            packets = self._packets(row, attempts, cursor)
        self._sent.num_trials += 1
        self._send_parameters(parent.client, run_id, row, cursor)
        for packet in packets:
            self._check_time()
            parent.log_points(run_id, packet.points)
            self._sent.num_points += len(packet.points)
            cursor |= packet.cursor
            self._note(row, cursor)
        if cursor.get("told") != told:
            parent.set_tags(run_id, tags)
            parent.set_status(run_id, run_content.STATUS.get(row.state, "RUNNING"), _ended_ms(attempts))
            self._note(row, cursor | {"told": told})

    def _packets(self, row: TrialRow, attempts: list[AttemptRow], cursor: Cursor) -> list[run_content.Packet]:
        after = (cursor["attempt"], cursor["step"]) if "step" in cursor else None
        curve = self._store.curve(row.fingerprint, after)
        started_ms = {attempt.number: round(attempt.started_at.timestamp() * 1000) for attempt in attempts}
        layers = self._store.layers(row.fingerprint, cursor.get("probed", 0))
        return run_content.packets(curve, layers, row.config, started_ms, cursor, _METRICS_PER_BATCH)

    def _send_parameters(self, client: MlflowClient, run_id: str, row: TrialRow, cursor: Cursor) -> None:
        if cursor.get("parameters"):
            return
        from mlflow.entities import Param

        params = [Param(key, value) for key, value in run_content.parameters(row.config).items()]
        for start in range(0, len(params), _PARAMS_PER_BATCH):
            client.log_batch(run_id, params=params[start : start + _PARAMS_PER_BATCH], synchronous=True)
        cursor["parameters"] = True
        self._note(row, cursor)

    def _send_artifacts(self, row: TrialRow) -> None:
        cursor = self._cursor(row)
        told = cursor.get("told")
        if row.state not in run_content.STATUS or told is None:
            return
        if cursor.get("artifacts") == told:
            self._memory.settle(row, self._sweep.updated_at)
            return
        self._check_time()
        client, run_id = self._parent().client, self._run_ids[row.fingerprint]
        if run_id is None:  # the runs were lost between the two rounds: the next pass makes them anew
            return
        client.log_text(run_id, row.config.model_dump_json(indent=2) + "\n", "config.json")
        figure = loss_plot(self._store.curve(row.fingerprint), run_content.trial_name(row))
        if figure is not None:
            client.log_figure(run_id, figure, "loss.png")
        for name, figure in layer_plots(self._store.layers(row.fingerprint), run_content.trial_name(row)).items():
            client.log_figure(run_id, figure, f"diagnostics/{name}")
        self._note(row, cursor | {"artifacts": told})

    # Cursors and runs

    def _cursor(self, row: TrialRow) -> Cursor:
        """The trial's cursor at this place; another tracking URI begins from nothing."""
        cursor = self._noted(row)
        return dict(cursor) if cursor.get("place") == self._place else {"place": self._place}

    def _noted(self, row: TrialRow) -> Cursor:
        if row.fingerprint not in self._cursors:
            self._cursors[row.fingerprint] = self._store.mirror_cursor(self._sweep.id, row.fingerprint) or {}
        return self._cursors[row.fingerprint]

    def _note(self, row: TrialRow, cursor: Cursor) -> None:
        self._store.set_mirror_cursor(self._sweep.id, row.fingerprint, cursor)
        self._cursors[row.fingerprint] = dict(cursor)

    def _forget(self) -> None:
        self._memory.forget()
        if self._sweep.mlflow_run_id is not None:
            self._store.set_mlflow_run(self._sweep.id, None, None)
            self._sweep = replace(self._sweep, mlflow_run_id=None)
        if self._sweep.mirror_cursor is not None:
            self._store.set_mirror_cursor(self._sweep.id, None, None)
            self._sweep = replace(self._sweep, mirror_cursor=None)
        for row in self._rows:
            if self._run_ids[row.fingerprint] is not None or self._noted(row):
                self._store.set_mlflow_run(self._sweep.id, row.fingerprint, None)
                self._store.set_mirror_cursor(self._sweep.id, row.fingerprint, None)
            self._cursors[row.fingerprint] = {}
            self._run_ids[row.fingerprint] = None

    def _parent(self) -> _Parent:
        """The sweep's own run, opened at the first need and brought up to date before any of its trials.

        So it is never older than a trial's cursor, and a killed pass leaves nothing undone that the next one would
        not notice.
        """
        if self._opened is None:
            parent = _Parent(open_client(self._uri), self._sweep, self._artifact_location)
            if not parent.find(self._sweep.mlflow_run_id):
                if self._sweep.mlflow_run_id is not None:
                    self._forget()
                parent.find_or_create()
                self._store.set_mlflow_run(self._sweep.id, None, parent.run_id)
            parent.set_tags(parent.run_id, run_content.sweep_tags(self._sweep, self._rows))
            parent.set_status(parent.run_id, run_content.sweep_status(self._rows), None)
            self._opened = parent
        return self._opened

    def _run_id(
        self, parent: _Parent, row: TrialRow, tags: dict[str, str], attempts: list[AttemptRow]
    ) -> tuple[str, bool]:
        """The trial's run, and whether it is the one that its cursor speaks of."""
        known = self._run_ids[row.fingerprint]
        if known is not None and self._memory.was_active(known):
            return known, True
        if known is not None and parent.is_active(known):
            self._memory.saw_active(known)
            return known, True
        name = run_content.trial_name(row)
        start_ms = round(attempts[0].started_at.timestamp() * 1000) if attempts else None
        run_id = parent.find_or_create_child(row.fingerprint, name, tags, start_ms)
        self._store.set_mlflow_run(self._sweep.id, row.fingerprint, run_id)
        self._run_ids[row.fingerprint] = run_id
        return run_id, False


class _Parent:
    """A sweep's run in MLflow, and the calls that it and its children need."""

    def __init__(self, client: MlflowClient, sweep: SweepRow, artifact_location: str | None) -> None:
        self.client = client
        self._sweep = sweep
        self._experiment_id = self._experiment(artifact_location)
        self.run_id = ""

    def _experiment(self, artifact_location: str | None) -> str:
        found = self.client.get_experiment_by_name(EXPERIMENT)
        if found is None:
            tags = {"mlflow.experimentKind": "custom_model_development"}
            return str(self.client.create_experiment(EXPERIMENT, artifact_location, tags))
        if found.lifecycle_stage == "deleted":
            self.client.restore_experiment(found.experiment_id)
        return str(found.experiment_id)

    def is_active(self, run_id: str) -> bool:
        """Whether a run is there and was not deleted in the UI."""
        from mlflow.exceptions import MlflowException

        try:
            return str(self.client.get_run(run_id).info.lifecycle_stage) == "active"
        except MlflowException as error:
            if error.error_code == "RESOURCE_DOES_NOT_EXIST":
                return False
            raise

    def find(self, run_id: str | None) -> bool:
        if run_id is None or not self.is_active(run_id):
            return False
        self.run_id = run_id
        return True

    def find_or_create(self) -> None:
        key = run_content.sweep_key(self._sweep)
        tags = {"gatesweep.key": key, "gatesweep.kind": "sweep", "mlflow.runName": self._sweep.name}
        self.run_id = self._adopt(
            f"tags.`gatesweep.key` = '{key}' and tags.`gatesweep.kind` = 'sweep'"
        ) or self._create(tags, round(self._sweep.created_at.timestamp() * 1000))

    def find_or_create_child(self, fingerprint: str, name: str, tags: dict[str, str], start_ms: int | None) -> str:
        tags = tags | {"mlflow.parentRunId": self.run_id, "mlflow.runName": name, "gatesweep.kind": "trial"}
        found = self._adopt(f"tags.`mlflow.parentRunId` = '{self.run_id}' and tags.`fingerprint` = '{fingerprint}'")
        return found or self._create(tags, start_ms)

    def _adopt(self, filter_string: str) -> str | None:
        runs = self.client.search_runs([self._experiment_id], filter_string, max_results=1)
        return str(runs[0].info.run_id) if runs else None

    def _create(self, tags: dict[str, str], start_ms: int | None) -> str:
        tags = tags | {"mlflow.source.name": "gatesweep"}
        return str(self.client.create_run(self._experiment_id, start_ms, tags).info.run_id)

    def log_points(self, run_id: str, points: list[run_content.Point]) -> None:
        from mlflow.entities import Metric

        metrics = [Metric(point.key, point.value, point.timestamp_ms, point.step) for point in points]
        self.client.log_batch(run_id, metrics=metrics, synchronous=True)

    def set_tags(self, run_id: str, tags: dict[str, str]) -> None:
        from mlflow.entities import RunTag

        rows = [RunTag(key, value) for key, value in tags.items()]
        for start in range(0, len(rows), _PARAMS_PER_BATCH):
            self.client.log_batch(run_id, tags=rows[start : start + _PARAMS_PER_BATCH], synchronous=True)

    def set_status(self, run_id: str, status: str, ended_ms: int | None) -> None:
        if status == "RUNNING":
            self.client.update_run(run_id, status)
        else:
            self.client.set_terminated(run_id, status, ended_ms)

    def send_artifacts(self) -> None:
        """The sweep's file and what became of it, once a submission; a tag remembers which."""
        told = run_content.digest(self._sweep.text, self._sweep.settings)
        if self.client.get_run(self.run_id).data.tags.get("gatesweep.settings") == told:
            return
        self.client.log_text(self.run_id, self._sweep.text, "sweep.yaml")
        self.client.log_dict(self.run_id, self._sweep.settings, "sweep-resolved.json")
        self.client.set_tag(self.run_id, "gatesweep.settings", told)


def _ended_ms(attempts: list[AttemptRow]) -> int | None:
    ended = attempts[-1].ended_at if attempts else None
    return None if ended is None else round(ended.timestamp() * 1000)
