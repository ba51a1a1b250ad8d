"""Arms against the baseline at equal tokens, FLOPs, parameters or wall-clock.

A verdict is given only between trials that ended their schedules with equal amounts: since the sweep matched them, gave
each arm a budget of its own, or has budgets on an axis of which two fit. The surprise: everything else describes. Where
amounts differ, both curves are read where the smaller one ends, and as the larger one's learning rate had not come down
there, that reading flatters the smaller; no decision is made of it.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean
from typing import TYPE_CHECKING, Any

from orchestrator.plan import match_residual
from orchestrator.report.results import layout_text, results
from orchestrator.report.tree import ArmRow, Results, VerdictTable
from orchestrator.scaling import TOLERANCE, Denominator, are_equal, read_at, shares_of_schedule
from orchestrator.sweep import MatchConfig, ResourcesConfig
from orchestrator.verdict import Sample, compare

if TYPE_CHECKING:
    from models.config import TrialConfig
    from orchestrator.store import Store, SweepRow, TrialRow

_Cell = tuple[tuple[tuple[str, Any], ...], ArmRow]
"""An arm's row, and the values of the axes where it stands."""
BUDGET_AXES = ("train.tokens",)
"""Values of these may differ between an arm and the baseline where that makes their FLOPs or their seconds equal."""
UNITS: Mapping[Denominator, str] = {
    "tokens": "training tokens", "flops": "training FLOPs", "parameters": "parameters", "wall-clock": "seconds",
}  # fmt: skip


@dataclass(frozen=True)
class Amounts:
    """Of one trial on average over those of a row. ``seconds``: of its training steps, at its last attempt's speed."""

    tokens: float
    flops: float
    parameters: float
    seconds: float | None

    def of(self, denominator: Denominator) -> float | None:
        return self.seconds if denominator == "wall-clock" else float(getattr(self, denominator))


@dataclass(frozen=True)
class EqualRow:
    """An arm beside the baseline of a table. ``decision`` is None where the row only describes; ``words`` say why."""

    arm: str
    is_baseline: bool
    axes: tuple[tuple[str, Any], ...]
    """Of the arm's cell: its budget may be another one than the table's."""
    best_lr: float | None
    amounts: Amounts | None
    ratios: Amounts | None
    """The same over the baseline's."""
    loss_nats: float | None
    delta_nats: float | None
    low_nats: float | None
    high_nats: float | None
    decision: str | None
    words: str
    exploratory: bool
    share: float | None
    """Of the arm's own schedule, at which its loss was read; None where there is none."""
    trials: tuple[str, ...]


@dataclass(frozen=True)
class EqualTable:
    axes: tuple[tuple[str, Any], ...]
    rows: tuple[EqualRow, ...]
    trials: tuple[str, ...]
    """Fingerprints behind the pooled variance and so behind every interval."""


@dataclass(frozen=True)
class EqualResults:
    sweep: str
    question: str
    baseline: str
    denominator: Denominator
    alpha: float
    tables: tuple[EqualTable, ...]


def at_equal(store: Store, sweep_name: str, denominator: Denominator) -> EqualResults:
    """The tables of a stored sweep by one denominator. UserError when there is no such sweep."""
    sweep = store.sweep(sweep_name)
    answer = results(store, sweep_name)
    judge = _Judge(store, sweep, answer, denominator)
    tables = tuple(judge.table(table) for table in answer.tables)
    return EqualResults(answer.sweep, answer.question, answer.baseline, denominator, answer.alpha, tables)


@dataclass(frozen=True)
class _Judged:
    """A verdict on an arm; ``decision`` is None where none is made."""

    delta_nats: float | None
    low_nats: float | None
    high_nats: float | None
    decision: str | None
    words: str


class _Judge:
    """What the tables of a sweep share."""

    def __init__(self, store: Store, sweep: SweepRow, answer: Results, denominator: Denominator) -> None:
        self.store, self.answer, self.denominator = store, answer, denominator
        self.trials: dict[str, TrialRow] = {row.fingerprint: row for row in store.trials(sweep.id)}
        self.speeds = {one.fingerprint: one.tokens_per_second for one in answer.trials}
        self.is_sequential = bool(sweep.verdict.get("allocate"))
        """Its intervals are those of a sequence of looks at one cell's seeds."""
        self.match = MatchConfig.model_validate(sweep.settings.get("match") or {})
        self.resources = ResourcesConfig.model_validate(sweep.settings.get("resources") or {})

    def table(self, table: VerdictTable) -> EqualTable:
        base = next(row for row in table.rows if row.is_baseline)
        chosen = {row.arm: self._cell(row, base, table) for row in table.rows}
        moved = any(axes != table.axes for axes, _ in chosen.values())
        judged = self._judged_anew(table, chosen) if moved else _own_verdicts(table)
        rows = [self._row(*chosen[row.arm], base, one) for row, one in zip(table.rows, judged, strict=True)]
        anew = tuple(one for _, row in chosen.values() if len(row.losses_nats) > 1 for one in row.trials_best)
        return EqualTable(table.axes, tuple(rows), anew if moved else table.trials_compared)

    def _judged_anew(self, table: VerdictTable, chosen: Mapping[str, _Cell]) -> list[_Judged]:
        """Where a cell of another budget takes part; over as many arms as the table has."""
        base = next(row.arm for row in table.rows if row.is_baseline)
        samples = [self._sample(chosen[row.arm][1]) for row in table.rows]
        found = compare(samples, base, self.answer.margin_nats, self.answer.alpha, self.answer.design)
        return [_Judged(one.delta_nats, one.low_nats, one.high_nats, one.decision, one.words) for one in found.verdicts]

    def _cell(self, row: ArmRow, base: ArmRow, table: VerdictTable) -> _Cell:
        """The arm's cell in this table, or at another budget if it fits better; always that of the table else."""
        candidates = [(table.axes, row)]
        if self.denominator in ("flops", "wall-clock") and not row.is_baseline and not self.is_sequential:
            candidates += [
                (other.axes, one)
                for other in self.answer.tables
                if other is not table and _but_budget(other.axes) == _but_budget(table.axes)
                for one in other.rows
                if one.arm == row.arm
            ]
        aim = self._amounts(base)

        def miss(candidate: tuple[Any, ArmRow]) -> float:
            amounts = self._amounts(candidate[1])
            own, wanted = (None if one is None else one.of(self.denominator) for one in (amounts, aim))
            return math.inf if own is None or wanted is None else abs(math.log(own / wanted))

        best = min(candidates, key=miss)
        own = self._amounts(best[1])
        fits = own is not None and aim is not None and self._equal(best[1], own, base, aim)
        return best if fits else candidates[0]

    def _equal(self, row: ArmRow, own: Amounts, base: ArmRow, aim: Amounts) -> bool:
        amount, wanted = own.of(self.denominator), aim.of(self.denominator)
        if amount is None or wanted is None:
            return False
        return are_equal(amount, wanted, max(TOLERANCE, self._residual(row), self._residual(base)))

    def _residual(self, row: ArmRow) -> float:
        """Of a match by this denominator, which misses by up to half a step of the FFN width."""
        if self.match.by != self.denominator or not row.trials_best:
            return 0.0
        return match_residual(self._config(row.trials_best[0]), self.match, self.resources)

    def _config(self, fingerprint: str) -> TrialConfig:
        return self.trials[fingerprint].config

    def _amounts(self, row: ArmRow) -> Amounts | None:
        if not row.losses_nats or not row.trials_best:
            return None
        found = [self.trials[fingerprint] for fingerprint in row.trials_best]
        tokens = [float(one.config.train.num_steps * one.config.train.batch_tokens) for one in found]
        speeds = [self.speeds.get(one.fingerprint) for one in found]
        seconds = [number / speed for number, speed in zip(tokens, speeds, strict=True) if speed]
        return Amounts(
            fmean(tokens),
            fmean(float(one.training_flops) for one in found),
            fmean(float(one.num_parameters) for one in found),
            fmean(seconds) if len(seconds) == len(found) else None,
        )

    def _sample(self, row: ArmRow) -> Sample:
        if not row.losses_nats:
            return Sample(row.arm, (), row.verdict.removeprefix("no result: "))
        seeds = tuple(self.trials[fingerprint].seed for fingerprint in row.trials_best)
        return Sample(row.arm, row.losses_nats, seeds=seeds)

    def _row(self, axes: tuple[tuple[str, Any], ...], row: ArmRow, base: ArmRow, judged: _Judged) -> EqualRow:
        own, aim = self._amounts(row), self._amounts(base)
        loss, delta, share, words = row.loss_nats, judged.delta_nats, 1.0 if row.losses_nats else None, judged.words
        low, high, decision = judged.low_nats, judged.high_nats, judged.decision
        if own is not None and aim is not None and not row.is_baseline:
            problem = self._problem(row, own, base, aim)
            if problem.startswith("refused"):
                loss = delta = share = None
            elif problem:
                loss, delta, share = self._described(row, own, base, aim)
                at = "" if share is None or share == 1.0 else f"; read at {share:.0%} of its schedule"
                problem = f"descriptive: {problem}{at}"
            if problem:
                words, decision, low, high = problem, None, None, None
        return EqualRow(
            arm=row.arm,
            is_baseline=row.is_baseline,
            axes=axes,
            best_lr=row.best_lr,
            amounts=own,
            ratios=None if own is None or aim is None else _over(own, aim),
            loss_nats=loss,
            delta_nats=delta,
            low_nats=low,
            high_nats=high,
            decision=decision,
            words=words,
            exploratory=row.exploratory and decision is not None,
            share=share,
            trials=row.trials_best,
        )

    def _problem(self, row: ArmRow, own: Amounts, base: ArmRow, aim: Amounts) -> str:
        """Why there is no verdict; "" if there is one."""
        amount, wanted = own.of(self.denominator), aim.of(self.denominator)
        if self.denominator == "wall-clock":
            places = self._places(row), self._places(base)
            if places[0] != places[1] or len(places[0]) != 1:
                return f"refused: {_said(places[0])}, the baseline {_said(places[1])}"
        if amount is None or wanted is None:
            return "refused: the speed of a trial is not known"
        if not self._equal(row, own, base, aim):
            return f"{amount / wanted:.3f} times the baseline's {UNITS[self.denominator]}"
        if self.denominator == "parameters" and not are_equal(own.tokens, aim.tokens):
            return f"equal parameters, but {own.tokens / aim.tokens:.3f} times the baseline's tokens"
        return ""

    def _described(
        self, row: ArmRow, own: Amounts, base: ArmRow, aim: Amounts
    ) -> tuple[float | None, float | None, float | None]:
        """Loss, difference, and the share of the arm's schedule at which it was read. On the slice, off the curves."""
        amount, wanted = own.of(self.denominator), aim.of(self.denominator)
        assert amount is not None
        assert wanted is not None
        shares = (1.0, 1.0) if self.denominator == "parameters" else shares_of_schedule(amount, wanted)
        loss, other = (read_at(self._curves(one), share) for one, share in zip((row, base), shares, strict=True))
        return loss, None if loss is None or other is None else loss - other, shares[0]

    def _curves(self, row: ArmRow) -> list[list[tuple[float, float | None]]]:
        after_all = (2**31, 2**31)
        return [
            [(one.fraction, one.loss_nats) for one in self.store.curve(trial, after_all).validations if _on_slice(one)]
            for trial in row.trials_best
        ]

    def _places(self, row: ArmRow) -> set[str]:
        """Where the trials were trained: hosts, devices, layout, back end of every attempt."""
        return {
            f"on {', '.join(sorted(set(one.hosts))) or 'an unknown host'} ({_devices(one.gpus, one.cpus)}, "
            f"{layout_text(one.layout.model_dump())}{_backend(one.provenance)})"
            for fingerprint in row.trials_best
            for one in self.store.attempts(fingerprint)
        }


def _own_verdicts(table: VerdictTable) -> list[_Judged]:
    return [_Judged(row.delta_nats, row.low_nats, row.high_nats, row.decision, row.verdict) for row in table.rows]


def _on_slice(validation: Any) -> bool:
    return bool(validation.split == "slice")


def _devices(gpus: float | None, cpus: float | None) -> str:
    return f"{gpus:g} GPUs" if gpus else "unknown devices" if cpus is None else f"{cpus:g} CPUs"


def _backend(provenance: Mapping[str, Any]) -> str:
    return f", {provenance['backend']}" if provenance.get("backend") else ""


def _said(places: set[str]) -> str:
    return " and ".join(sorted(places)) or "nowhere"


def _over(own: Amounts, aim: Amounts) -> Amounts:
    seconds = None if own.seconds is None or aim.seconds is None else own.seconds / aim.seconds
    return Amounts(own.tokens / aim.tokens, own.flops / aim.flops, own.parameters / aim.parameters, seconds)


def _but_budget(axes: Sequence[tuple[str, Any]]) -> list[tuple[str, Any]]:
    return [(name, value) for name, value in axes if name not in BUDGET_AXES]
