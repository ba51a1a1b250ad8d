"""Where the numbers of one arm's row come from: formula, source, and the trials with what was read of each.

With the formulas' sources a reader can compute the row again without this program, from the numbers printed here.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.console import Console, ConsoleOptions, RenderResult
from rich.table import Table
from rich.text import Text

from orchestrator import scaling, verdict
from orchestrator.report.figures import NOTHING, axes_text, lr_text, plural, wrapped
from orchestrator.report.formats import MEANS_VERSION, derivations
from orchestrator.report.tree import Results, VerdictTable
from orchestrator.sweep import UserError

FORMULAS = {
    MEANS_VERSION: (
        "a trial's loss: the mean of its validations in the tail of the schedule; over trials mean, SD (n - 1), median "
        "of speeds; perplexity exp(loss); ranks by mean loss",
        "report/tables.py",
    ),
    scaling.FORMULA_VERSION: (
        "the learning rate with the lowest mean loss among those at which every seed is complete; the chance to "
        "diverge with its interval by Clopper and Pearson (Biometrika 26, 1934)",
        "scaling/grid.py",
    ),
    scaling.OPTIMUM_VERSION: (
        "the minimum of a parabola in log LR through the rates around the best one, its interval by Fieller "
        "(J. R. Stat. Soc. B 16, 1954)",
        "scaling/optimum.py",
    ),
    verdict.SEQUENCE_VERSION: (
        "looks: seeds go to the arms that are undecided; each interval at the level that O'Brien and Fleming's "
        "spending leaves its look, repeated confidence intervals (Jennison and Turnbull, J. R. Stat. Soc. B 51, 1989); "
        "the estimate of an arm settled early is biased away from 0",
        "verdict/look_sequence.py",
    ),
    verdict.FORMULA_VERSION: (
        "difference of means; simultaneous intervals by Dunnett (JASA 50, 1955), or Welch's with Bonferroni, or of "
        "pairs, as declared; alpha spent over looks by Lan and DeMets (Biometrika 70, 1983); the decision is read from "
        "the interval and the margin",
        "verdict/",
    ),
}
"""By version: what is computed, and the place in orchestrator/ where it is written down."""

_NOT_EXPLAINED = ("num_finite_lrs", "diverged_lr_num_diverged", "diverged_lr_num_seeds")


@dataclass(frozen=True)
class Explained:
    name: str
    value: Any
    formula: str
    trials: tuple[str, ...]


@dataclass(frozen=True)
class ReadTrial:
    """What was read of a trial that a value of the row rests on."""

    fingerprint: str
    arm: str
    lr: float
    seed: int
    state: str
    loss_nats: float | None
    bits_per_byte: float | None
    tokens_per_second: float | None
    num_tail_points: int
    num_attempts: int
    trained_in: str | None


@dataclass(frozen=True)
class Explanation:
    """One arm's row of one table."""

    sweep: str
    arm: str
    axes: tuple[tuple[str, Any], ...]
    settings: dict[str, Any]
    """What the values hang on beside the trials: as frozen at the first submission."""
    values: tuple[Explained, ...]
    trials: tuple[ReadTrial, ...]
    looks: tuple[str, ...] = ()
    """What each look, and the gate before a rung, decided for the arm, oldest first, as it was noted then."""


def explain(results: Results, arm: str) -> list[Explanation]:
    """The arm's row in every table. UserError for an arm that the sweep has not."""
    arms = list(dict.fromkeys(row.arm for table in results.tables for row in table.rows))
    if arm not in arms:
        raise UserError(f"--explain {arm}: no such arm in {results.sweep}; allowed: {', '.join(arms)}")
    return [_explanation(results, table, arm) for table in results.tables]


def _explanation(results: Results, table: VerdictTable, arm: str) -> Explanation:
    row = next(row for row in table.rows if row.arm == arm)
    values = tuple(
        Explained(name, value, formula, trials)
        for name, (value, formula, trials) in derivations(table, row).items()
        if name not in _NOT_EXPLAINED
    )
    wanted = {fingerprint for value in values if value.value is not None for fingerprint in value.trials}
    on_all = results.split == "full"
    trials = tuple(
        ReadTrial(
            fingerprint=one.fingerprint,
            arm=one.arm,
            lr=one.lr,
            seed=one.seed,
            state=one.state,
            loss_nats=one.full_loss_nats if on_all else one.slice_loss_nats,
            bits_per_byte=one.full_bits_per_byte if on_all else one.slice_bits_per_byte,
            tokens_per_second=one.tokens_per_second,
            num_tail_points=one.num_tail_points,
            num_attempts=one.num_attempts,
            trained_in=one.trained_in,
        )
        for one in results.trials
        if one.fingerprint in wanted
    )
    settings = {
        "baseline": results.baseline,
        "validation_split": results.split,
        "tail": results.tail,
        "margin_nats": results.margin_nats,
        "alpha": results.alpha,
        "method": table.method,
        "paired": results.design.paired,
        "looks": results.design.looks.declared,
        "noise_floor_nats": None if table.noise_floor is None else table.noise_floor.sd_nats,
        "degrees_of_freedom": None if table.noise_floor is None else table.noise_floor.degrees_of_freedom,
        "critical_value": table.critical_value,
        "num_compared": table.num_compared,
    }
    mine = [one for one in results.allotments if all(dict(table.axes).get(k) == v for k, v in one.axes.items())]
    looks = tuple(f"{one.at:%Y-%m-%d %H:%M} UTC: {one.reasons[arm]}" for one in mine if arm in one.reasons)
    gates = [one for one in results.passages if one.arm == arm and dict(one.axes) == dict(table.axes)]
    looks += tuple(
        f"{one.at:%Y-%m-%d %H:%M} UTC: {'goes on' if one.is_through else 'does not go on'} to this rung: {one.reason}"
        for one in gates
    )
    return Explanation(results.sweep, arm, table.axes, settings, values, trials, looks)


@dataclass(frozen=True)
class ExplanationView:
    """Prints explanations: values, formulas, trials."""

    explanations: list[Explanation]

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        for one in self.explanations:
            axes = f", {axes_text(dict(one.axes))}" if one.axes else ""
            yield Text(f"{one.sweep}: {one.arm}{axes}", style="bold")
            yield _values(one)
            yield _trials(one)
            for look in one.looks:
                yield Text("\n".join(wrapped(look, options.max_width)))
            settings = ", ".join(f"{name} {_shown(value)}" for name, value in one.settings.items())
            yield Text("\n".join(wrapped(f"with {settings}", options.max_width)), style="dim")
            for version in dict.fromkeys(value.formula for value in one.values):
                what, where = FORMULAS[version]
                yield Text(
                    "\n".join(wrapped(f"{version} (orchestrator/{where}): {what}", options.max_width)), style="dim"
                )


def _values(one: Explanation) -> Table:
    grid = _grid("value", "", "formula", "from")
    for value in one.values:
        if value.value is not None:
            grid.add_row(
                *map(Text, (value.name, _shown(value.value), value.formula, plural(len(value.trials), "trial")))
            )
    return grid


def _trials(one: Explanation) -> Table:
    grid = _grid("trial", "arm", "LR", "seed", "state", "loss (nats)", "attempts", "trained in")
    for trial in one.trials:
        loss = NOTHING if trial.loss_nats is None else f"{trial.loss_nats:.6f}"
        cells = (trial.fingerprint, trial.arm, lr_text(trial.lr), str(trial.seed), trial.state.lower(), loss)
        grid.add_row(*map(Text, (*cells, str(trial.num_attempts), trial.trained_in or one.sweep)))
    return grid


def _grid(*headings: str) -> Table:
    grid = Table(box=SIMPLE_HEAD, show_edge=False, pad_edge=False, header_style="bold")
    for heading in headings:
        grid.add_column(Text(heading), overflow="fold")
    return grid


def _shown(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:.6g}"
    if isinstance(value, dict):
        return ", ".join(f"{name} {_shown(inner)}" for name, inner in value.items())
    return NOTHING if value is None else str(value)


def explanation_to_json(explanations: list[Explanation]) -> str:
    """Unrounded, with the formulas' words."""
    content = {
        "rows": [asdict(one) for one in explanations],
        "formulas": {version: {"what": what, "where": where} for version, (what, where) in _used(explanations)},
    }
    return json.dumps(content, indent=2, allow_nan=False, ensure_ascii=False, default=str) + "\n"


def _used(explanations: list[Explanation]) -> Iterator[tuple[str, tuple[str, str]]]:
    versions = {value.formula for one in explanations for value in one.values}
    return ((version, words) for version, words in FORMULAS.items() if version in versions)
