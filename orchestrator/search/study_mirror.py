"""A copy of the study for optuna-dashboard, written from the store, off the critical path."""

from __future__ import annotations

import re
import threading
from collections.abc import Callable, Mapping

import optuna
from optuna.distributions import BaseDistribution, check_distribution_compatibility
from optuna.trial import FrozenTrial

from orchestrator.search.points import TOLD, distributions, outcome, parameters, told
from orchestrator.store import Store, TrialRow

COPIED_REPORTS = 50
"""In the copy for optuna-dashboard, where a report costs a millisecond."""


class MirrorError(Exception):
    """Optuna's copy could not be written. It holds nothing that the store does not: try again later."""


class StudyMirror:
    """Copies a sweep's finished trials from the store to Optuna's storage, under the sweep's name.

    For optuna-dashboard only; nothing reads it back. Idempotent and rebuildable: delete the database, and the next
    ``update`` writes it anew. Not in the database of MLflow: both keep a table ``alembic_version``.
    """

    def __init__(self, store: Store, sweep_id: int, sweep_name: str, url: str) -> None:
        self._store, self._sweep_id, self._sweep_name, self._url = store, sweep_id, sweep_name, url
        self._lock = threading.Lock()
        self._study: optuna.study.Study | None = None
        self._space: dict[str, BaseDistribution] = {}
        self._written: set[tuple[str, str, int]] = set()
        self._waiting: list[TrialRow] = []

    def update(self, is_due: Callable[[], bool] = lambda: False) -> int:
        """Write what is missing and return how many trials that were; raises only ``MirrorError``.

        ``is_due``: something else is; asked after each trial, and the rest waits for the next call.
        """
        optuna.logging.set_verbosity(optuna.logging.WARNING)
        with self._lock:
            try:
                return self._update(is_due)
            except Exception as error:
                self._study, self._waiting = None, []
                place = re.sub(r"(://[^:/@]*):[^@]*@", r"\1:***@", self._url)
                raise MirrorError(
                    f"Optuna's copy at {place} was not written: {type(error).__name__}: {error}"
                ) from error

    def _update(self, is_due: Callable[[], bool]) -> int:
        if not self._waiting:
            self._waiting = self._missing()
        num_written = 0
        while self._waiting and self._study is not None:
            row = self._waiting.pop(0)
            self._study.add_trial(self._copy(row, self._space))
            self._written.add(_key(row))
            num_written += 1
            if is_due():
                break
        return num_written

    def _missing(self) -> list[TrialRow]:
        """The finished trials that the copy lacks; it is opened where there are any."""
        rows = self._store.trials(self._sweep_id)
        finished = [row for row in rows if row.state in TOLD]
        if all(_key(row) in self._written for row in finished):
            return []
        space = distributions(rows)
        # Confirming trials bring seeds that the study did not know: then it is written anew.
        if self._study is None or space != self._space:
            self._study, self._space = self._open(space), space
        return [row for row in finished if _key(row) not in self._written]

    def _open(self, space: dict[str, BaseDistribution]) -> optuna.study.Study:
        """The study with its trials noted as written; dropped and begun anew where the sweep's cells have changed."""
        storage = optuna.storages.RDBStorage(self._url)
        study = optuna.create_study(
            storage=storage, study_name=self._sweep_name, direction="minimize", load_if_exists=True
        )
        trials = study.get_trials(deepcopy=False)
        if any(not _same_space(trial, space) for trial in trials):
            optuna.delete_study(study_name=self._sweep_name, storage=storage)
            study = optuna.create_study(storage=storage, study_name=self._sweep_name, direction="minimize")
            trials = []
        self._written = {
            (str(t.user_attrs["fingerprint"]), str(t.user_attrs["state"]), int(t.user_attrs["num_attempts"]))
            for t in trials
        }
        return study

    def _copy(self, row: TrialRow, space: dict[str, BaseDistribution]) -> FrozenTrial:
        curve = self._store.curve(row.fingerprint)
        values = [v.loss_nats for v in curve.validations if v.split == "slice" and v.fraction >= 1]
        state, value = told(row.state, values[-1] if values else None)
        reports: dict[int, float] = {}
        part = -1
        for step in curve.steps:
            if step.loss_nats is not None and int(step.fraction * COPIED_REPORTS) > part:
                part = int(step.fraction * COPIED_REPORTS)
                reports[step.step] = step.loss_nats
        fixed = parameters(row, space)
        return optuna.trial.create_trial(
            state=state,
            value=value,
            params=fixed,
            distributions={name: space[name] for name in fixed},
            user_attrs={
                "fingerprint": row.fingerprint,
                "num_attempts": row.num_attempts,
                **outcome(row.state, row.cause, row.reason, row.end_step),
            },
            intermediate_values=reports,
        )


def _key(row: TrialRow) -> tuple[str, str, int]:
    """A trial that was rerun is a new Optuna trial: finished is final there."""
    return row.fingerprint, row.state, row.num_attempts


def _same_space(trial: FrozenTrial, space: Mapping[str, BaseDistribution]) -> bool:
    """Whether Optuna takes ``space`` beside this trial: it refuses other choices or another scale for a parameter."""
    for name, distribution in trial.distributions.items():
        try:
            check_distribution_compatibility(distribution, space[name])
        except (KeyError, ValueError):
            return False
    return True
