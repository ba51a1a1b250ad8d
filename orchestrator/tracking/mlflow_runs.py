"""A sweep's runs in MLflow, and the calls that they need: one run for the sweep, and below it one a trial."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from orchestrator.store import SweepRow
from orchestrator.tracking import run_content
from orchestrator.tracking.shown_points import Point

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from mlflow.entities import Metric, Param

EXPERIMENT = "gatesweep"

METRICS_PER_BATCH = 1_000
_ROWS_PER_BATCH = 100
"""Of parameters, and of tags."""


class MlflowRuns:
    def __init__(self, client: MlflowClient, sweep: SweepRow, artifact_location: str | None) -> None:
        self.client = client
        self.sweep = sweep
        self._experiment_id = self._experiment(artifact_location)
        self.sweep_run_id = ""
        self._told: tuple[dict[str, str], str] | None = None
        self._told_settings: str | None = None

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

    # The sweep's own run

    def find(self, run_id: str | None) -> bool:
        if run_id is None or not self.is_active(run_id):
            return False
        self.sweep_run_id = run_id
        return True

    def find_or_create(self) -> None:
        key = run_content.sweep_key(self.sweep)
        tags = {"gatesweep.key": key, "gatesweep.kind": "sweep", "mlflow.runName": self.sweep.name}
        self.sweep_run_id = self._adopt(
            f"tags.`gatesweep.key` = '{key}' and tags.`gatesweep.kind` = 'sweep'"
        ) or self._create(tags, round(self.sweep.created_at.timestamp() * 1000))

    def tell(self, tags: dict[str, str], status: str) -> None:
        """The sweep's tags and status, as far as it was not told the same before."""
        known_tags, known_status = self._told or ({}, "")
        changed = {key: value for key, value in tags.items() if known_tags.get(key) != value}
        if changed:
            self.set_tags(self.sweep_run_id, changed)
        if status != known_status:
            self.set_status(self.sweep_run_id, status, None)
        self._told = tags, status

    def send_settings(self) -> None:
        """The sweep's file and what became of it, once a submission; a tag remembers which."""
        told = run_content.digest(self.sweep.text, self.sweep.settings)
        if self._told_settings == told:
            return
        if self.client.get_run(self.sweep_run_id).data.tags.get("gatesweep.settings") != told:
            self.client.log_text(self.sweep_run_id, self.sweep.text, "sweep.yaml")
            self.client.log_dict(self.sweep_run_id, self.sweep.settings, "sweep-resolved.json")
            self.client.set_tag(self.sweep_run_id, "gatesweep.settings", told)
        self._told_settings = told

    # A trial's run

    def find_child(self, fingerprint: str) -> str | None:
        return self._adopt(
            f"tags.`mlflow.parentRunId` = '{self.sweep_run_id}' and tags.`fingerprint` = '{fingerprint}'"
        )

    def create_child(self, name: str, tags: dict[str, str], start_ms: int | None) -> str:
        kind = {"mlflow.parentRunId": self.sweep_run_id, "mlflow.runName": name, "gatesweep.kind": "trial"}
        return self._create(tags | kind, start_ms)

    def _adopt(self, filter_string: str) -> str | None:
        runs = self.client.search_runs([self._experiment_id], filter_string, max_results=1)
        return str(runs[0].info.run_id) if runs else None

    def _create(self, tags: dict[str, str], start_ms: int | None) -> str:
        tags = tags | {"mlflow.source.name": "gatesweep"}
        return str(self.client.create_run(self._experiment_id, start_ms, tags).info.run_id)

    def log_points(self, run_id: str, points: Sequence[Point]) -> None:
        """All of them or none; at most METRICS_PER_BATCH."""
        self.client.log_batch(run_id, metrics=_metrics(points), synchronous=True)

    def log_parameters(self, run_id: str, parameters: dict[str, str]) -> None:
        from mlflow.entities import Param

        rows: list[Param] = [Param(key, value) for key, value in parameters.items()]
        for start in range(0, len(rows), _ROWS_PER_BATCH):
            self.client.log_batch(run_id, params=rows[start : start + _ROWS_PER_BATCH], synchronous=True)

    def set_tags(self, run_id: str, tags: dict[str, str]) -> None:
        from mlflow.entities import RunTag

        rows = [RunTag(key, value) for key, value in tags.items()]
        for start in range(0, len(rows), _ROWS_PER_BATCH):
            self.client.log_batch(run_id, tags=rows[start : start + _ROWS_PER_BATCH], synchronous=True)

    def set_status(self, run_id: str, status: str, ended_ms: int | None) -> None:
        if status == "RUNNING":
            self.client.update_run(run_id, status)
        else:
            self.client.set_terminated(run_id, status, ended_ms)


def _metrics(points: Sequence[Point]) -> list[Metric]:
    from mlflow.entities import Metric

    return [Metric(point.key, point.value, point.timestamp_ms, point.step) for point in points]
