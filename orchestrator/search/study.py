"""The in-memory study of a sweep: ask, decide, tell.

The cells are enumerated by the plan, so nothing is sampled: every ask is an enqueued fixed point, and the sampler
refuses to be asked.
"""

from __future__ import annotations

import threading
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, NoReturn

import optuna
from optuna.distributions import BaseDistribution, FloatDistribution
from optuna.trial import FrozenTrial

from models.run_dir import Record, StepRecord
from orchestrator.search.divergence import DivergenceRule, Stop
from orchestrator.search.points import TOLD, PlannedCell, distributions, outcome, parameters, told
from orchestrator.sweep import DivergenceConfig

REPORTS_PER_TRIAL = 200
"""InMemoryStorage copies a trial's reports at every report: reporting each of 100 k steps would be quadratic."""


class DivergencePruner(optuna.pruners.BasePruner):
    """Optuna's pruner over ``DivergenceRule``.

    Optuna's own pruners look at the best value reported so far and miss a late NaN; and reports are thinned. So the
    rules see every record here, and ``prune`` only answers what they found.
    """

    def __init__(self, config: DivergenceConfig) -> None:
        self._config = config
        self._rules: dict[int, DivergenceRule] = {}

    def watch(self, number: int) -> DivergenceRule:
        """A fresh rule for the trial of this Optuna number; it replaces the one before."""
        self._rules[number] = DivergenceRule(self._config)
        return self._rules[number]

    def forget(self, number: int) -> None:
        self._rules.pop(number, None)

    def prune(self, study: optuna.study.Study, trial: FrozenTrial) -> bool:
        rule = self._rules.get(trial.number)
        return rule is not None and rule.stop is not None


class NothingIsSampled(optuna.samplers.BaseSampler):
    """Refuses to choose a value. GridSampler loses cells when trials are retried or enqueued."""

    def infer_relative_search_space(self, study: optuna.study.Study, trial: FrozenTrial) -> dict[str, BaseDistribution]:
        return {}

    def sample_relative(
        self, study: optuna.study.Study, trial: FrozenTrial, search_space: dict[str, BaseDistribution]
    ) -> dict[str, Any]:
        return {}

    def sample_independent(
        self, study: optuna.study.Study, trial: FrozenTrial, param_name: str, param_distribution: BaseDistribution
    ) -> NoReturn:
        raise RuntimeError(f"parameter {param_name} has no fixed value: the plan enumerates every cell")


@dataclass
class _Watched:
    trial: optuna.trial.Trial
    rule: DivergenceRule
    last_report: int = -1
    """Index of the last of ``REPORTS_PER_TRIAL`` parts of the schedule that was reported."""


class Search:
    """One in-memory study a sweep. Every method may be called from any thread."""

    def __init__(self, sweep_name: str, trials: Sequence[PlannedCell], divergence: DivergenceConfig) -> None:
        optuna.logging.set_verbosity(optuna.logging.WARNING)
        self._lock = threading.RLock()
        self._pruner = DivergencePruner(divergence)
        self._cells = {trial.fingerprint: trial for trial in trials}
        self._distributions = distributions(trials)
        self._running: dict[str, _Watched] = {}
        self.study = optuna.create_study(
            study_name=sweep_name,
            storage=optuna.storages.InMemoryStorage(),
            sampler=NothingIsSampled(),
            pruner=self._pruner,
            direction="minimize",
        )

    def add(self, trials: Sequence[PlannedCell]) -> None:
        """Trials that joined the sweep. They may widen a numeric axis; arms and seeds are those that were known."""
        with self._lock:
            self._cells |= {trial.fingerprint: trial for trial in trials}
            for name, wider in distributions(list(self._cells.values())).items():
                known = self._distributions[name]
                if isinstance(known, FloatDistribution) and isinstance(wider, FloatDistribution):
                    # Optuna takes another range for a parameter, but no other scale.
                    self._distributions[name] = FloatDistribution(wider.low, wider.high, log=known.log)

    def ask(self, fingerprint: str, curve: Iterable[Record] = ()) -> None:
        """Begin a trial, or resume it after a retry: the same Optuna trial, judged anew on ``curve``.

        ``curve`` is what the trial has shown up to its resume step (the store's curve, cut there). A trial told
        as finished and asked again was rerun: it becomes a new Optuna trial, since finished is final.
        """
        with self._lock:
            watched = self._running.get(fingerprint)
            if watched is None:
                watched = self._running[fingerprint] = self._begin(self._cell(fingerprint))
            else:
                watched.rule = self._pruner.watch(watched.trial.number)
            self._observe(watched, curve)

    def decide(self, fingerprint: str, records: Iterable[Record]) -> Stop | None:
        """Look at the next records of a trial; the first reason to stop it stays its reason."""
        with self._lock:
            watched = self._running.get(fingerprint)
            if watched is None:
                raise ValueError(f"trial {fingerprint} is not running: ask comes before decide, and tell ends both")
            self._observe(watched, records)
            if watched.rule.stop is None:  # Optuna copies the whole trial before it asks the pruner
                return None
            return watched.rule.stop if watched.trial.should_prune() else None

    def tell(
        self,
        fingerprint: str,
        state: str,
        value: float | None = None,
        cause: str | None = None,
        reason: str | None = None,
        step: int | None = None,
    ) -> None:
        """End a trial. ``value`` is the final validation loss in nats, used only for COMPLETE.

        Optuna knows no DIVERGED: it is told as PRUNED, with the state as an attribute. A missing or non-finite value
        is never told: such a trial is FAIL in Optuna, whatever its state.
        """
        if state not in TOLD:
            raise ValueError(f"state {state} of trial {fingerprint} cannot be told; allowed: {', '.join(TOLD)}")
        with self._lock:
            if fingerprint not in self._running:
                self.ask(fingerprint)
            watched = self._running.pop(fingerprint)
            for key, content in outcome(state, cause, reason, step).items():
                watched.trial.set_user_attr(key, content)
            optuna_state, told_value = told(state, value)
            self.study.tell(watched.trial, told_value, state=optuna_state)
            self._pruner.forget(watched.trial.number)

    def _begin(self, cell: PlannedCell) -> _Watched:
        fixed = parameters(cell, self._distributions)
        self.study.enqueue_trial(fixed, user_attrs={"fingerprint": cell.fingerprint})
        trial = self.study.ask({name: self._distributions[name] for name in fixed})
        return _Watched(trial, self._pruner.watch(trial.number))

    def _observe(self, watched: _Watched, records: Iterable[Record]) -> None:
        for record in records:
            watched.rule.observe(record)
            if watched.rule.stop is not None:
                return
            if isinstance(record, StepRecord) and record.loss_nats is not None:
                part = int(record.fraction * REPORTS_PER_TRIAL)
                if part > watched.last_report:
                    watched.last_report = part
                    watched.trial.report(record.loss_nats, record.step)

    def _cell(self, fingerprint: str) -> PlannedCell:
        if fingerprint not in self._cells:
            raise ValueError(f"trial {fingerprint} is not one of the {len(self._cells)} trials of this sweep")
        return self._cells[fingerprint]
