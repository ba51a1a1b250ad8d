"""The columns of the paper's Table 4: what goes on inside each arm's models, at the arm's best learning rate.

The surprise: a probe counts only if it was taken at the end of the schedule, of a complete trial. What a model looked
like half-way says little about where it ended.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean, stdev
from typing import TYPE_CHECKING, Any

from orchestrator.report.figures import plural
from orchestrator.report.results import results
from orchestrator.report.tree import ArmRow, Results, Split, VerdictTable
from orchestrator.spikes import THRESHOLD_NATS, WARMUP_FRACTION, WINDOW_STEPS, loss_spikes
from orchestrator.store import mean_or_none

if TYPE_CHECKING:
    from orchestrator.store import LayerRow, Store

FORMULA_VERSION = "mechanism-1"
"""Mean over layers at the end of the schedule, then mean and SD (n - 1) over seeds. Raised when that changes."""


@dataclass(frozen=True)
class TrialMechanism:
    """What one complete trial's last probe saw, as means over layers; without a probe at the end only the spikes."""

    fingerprint: str
    num_loss_spikes: int
    first_token_attention: float | None = None
    max_activation: float | None = None
    gate_scores: Mapping[str, float | None] | None = None
    """By position; None without a probe."""


@dataclass(frozen=True)
class Spread:
    """Mean and SD over seeds; no mean when a seed's number is missing, no SD below two seeds."""

    mean: float | None
    sd: float | None
    trials: tuple[str, ...]
    values: tuple[float, ...] = ()
    """A number a trial, in their order; empty when one is missing."""

    @classmethod
    def of(cls, values: Sequence[float | None], trials: Sequence[TrialMechanism]) -> Spread:
        known = [value for value in values if value is not None]
        whole = bool(known) and len(known) == len(values)
        return cls(
            mean=fmean(known) if whole else None,
            sd=stdev(known) if whole and len(known) > 1 else None,
            trials=tuple(trial.fingerprint for trial in trials),
            values=tuple(known) if whole else (),
        )


@dataclass(frozen=True)
class ArmMechanism:
    """One arm, over the seeds at its best learning rate."""

    arm: str
    is_baseline: bool
    best_lr: float | None
    loss_nats: float | None
    loss_sd_nats: float | None
    gate_scores: Mapping[str, Spread]
    """By position; empty without a gate that has scores (``input: constant`` has none)."""
    max_activation: Spread
    first_token_attention: Spread
    num_loss_spikes: Spread
    num_seeds: int
    num_probed: int


@dataclass(frozen=True)
class MechanismTable:
    axes: tuple[tuple[str, Any], ...]
    rows: tuple[ArmMechanism, ...]
    footnotes: tuple[str, ...]


@dataclass(frozen=True)
class Mechanism:
    """A sweep's tables, split by axes as its verdicts are."""

    sweep: str
    question: str
    split: Split
    tables: tuple[MechanismTable, ...]


def mechanism(store: Store, sweep_name: str) -> Mechanism:
    """Table 4 of a stored sweep, as its trials stand now. UserError when there is no such sweep."""
    return mechanism_behind(store, results(store, sweep_name))


def mechanism_behind(store: Store, answer: Results) -> Mechanism:
    """The same of results that were read before."""
    settings = store.sweep(answer.sweep).settings.get("diagnostics")
    num_steps = {row.fingerprint: row.config.train.num_steps for row in store.trials(store.sweep(answer.sweep).id)}
    at_best = [fingerprint for table in answer.tables for row in table.rows for fingerprint in row.trials_best]
    seen = {fingerprint: _trial(store, fingerprint, num_steps[fingerprint]) for fingerprint in at_best}
    tables = tuple(_table(table, answer, seen, settings) for table in answer.tables)
    return Mechanism(answer.sweep, answer.question, answer.split, tables)


def _trial(store: Store, fingerprint: str, num_steps: int) -> TrialMechanism:
    curve = store.curve(fingerprint).steps
    spikes = len(loss_spikes(((row.step, row.loss_nats) for row in curve), num_steps))
    last = store.layers(fingerprint, after=num_steps - 1)
    if not last:
        return TrialMechanism(fingerprint, spikes)
    return TrialMechanism(
        fingerprint,
        spikes,
        first_token_attention=mean_or_none([row.first_token_attention for row in last]),
        max_activation=mean_or_none([row.max_activation for row in last]),
        gate_scores={position: _score(last, position) for position in last[0].gates},
    )


def _score(layers: Sequence[LayerRow], position: str) -> float | None:
    return mean_or_none([row.gates[position]["mean"] for row in layers])


def _table(
    table: VerdictTable, answer: Results, seen: Mapping[str, TrialMechanism], settings: Mapping[str, Any] | None
) -> MechanismTable:
    rows = tuple(_row(row, [seen[fingerprint] for fingerprint in row.trials_best]) for row in table.rows)
    return MechanismTable(table.axes, rows, tuple(_footnotes(rows, answer, seen, settings)))


def _row(row: ArmRow, trials: Sequence[TrialMechanism]) -> ArmMechanism:
    probed = [trial for trial in trials if trial.gate_scores is not None]
    positions = dict.fromkeys(position for trial in probed for position in trial.gate_scores or ())
    return ArmMechanism(
        arm=row.arm,
        is_baseline=row.is_baseline,
        best_lr=row.best_lr,
        loss_nats=row.loss_nats,
        loss_sd_nats=row.loss_sd_nats,
        gate_scores={
            position: Spread.of([(trial.gate_scores or {}).get(position) for trial in probed], probed)
            for position in positions
        },
        max_activation=Spread.of([trial.max_activation for trial in probed], probed),
        first_token_attention=Spread.of([trial.first_token_attention for trial in probed], probed),
        num_loss_spikes=Spread.of([trial.num_loss_spikes for trial in trials], trials),
        num_seeds=len(trials),
        num_probed=len(probed),
    )


def _footnotes(
    rows: Sequence[ArmMechanism],
    answer: Results,
    seen: Mapping[str, TrialMechanism],
    settings: Mapping[str, Any] | None,
) -> list[str]:
    if not any(row.num_seeds for row in rows):
        return ["no arm has a learning rate with all its seeds complete"]
    notes = []
    if any(row.num_probed for row in rows):
        number = settings["sequences"] if settings else None
        windows = "windows" if number is None else "window" if number == 1 else plural(number, "window")
        reused = any(trial.trained_in for trial in answer.trials if trial.fingerprint in seen)
        elsewhere = "; of trials of another sweep as many as that one said" if reused else ""
        notes.append(
            "gate score, M-Act (largest absolute value in the residual stream after a layer) and F-Attn (attention on "
            "the first token, by the queries after it): means over layers after the last step, over the first "
            f"{windows} of the validation slice{elsewhere}"
        )
    lacking = [f"{row.arm} ({row.num_seeds - row.num_probed} of {row.num_seeds})" for row in rows if _lacks(row)]
    if lacking:
        notes.append(f"without a probe after the last step, and left out of those means: {', '.join(lacking)}")
    notes.append(
        f"loss spikes a trial: training steps more than {THRESHOLD_NATS:g} nats above the median of the {WINDOW_STEPS} "
        f"steps before, after {100 * WARMUP_FRACTION:g} % of the schedule"
    )
    where = "whole validation split" if answer.split == "full" else "validation slice"
    notes.append(f"at each arm's best learning rate, mean and SD over its seeds; loss on the {where}")
    return notes


def _lacks(row: ArmMechanism) -> bool:
    return row.num_probed < row.num_seeds
