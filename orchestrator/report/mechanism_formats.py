"""Table 4 for a terminal, CSV, JSON and Markdown. Unrounded in CSV and JSON."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.console import Console, ConsoleOptions, RenderResult
from rich.table import Table
from rich.text import Text

from orchestrator import spikes
from orchestrator.report.figures import NOTHING, axes_text, loss_text, lr_text, spread_text, wrapped
from orchestrator.report.formats import MEANS_VERSION, derived_value, markdown_line, markdown_text
from orchestrator.report.mechanism import FORMULA_VERSION, ArmMechanism, Mechanism, MechanismTable, Spread

MECHANISM_HEADINGS = ("arm", "best LR", "gate score", "M-Act", "F-Attn", "loss spikes", "loss (nats)")


@dataclass(frozen=True)
class MechanismView:
    """Prints ``mechanism``; in a narrow terminal cells are folded, not cut."""

    mechanism: Mechanism

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        yield Text.assemble((self.mechanism.sweep, "bold"), f": {self.mechanism.question}")
        if not self.mechanism.tables:
            yield Text("no trials yet")
        for table in self.mechanism.tables:
            yield Text("")
            if table.axes:
                yield Text(axes_text(dict(table.axes)), style="bold")
            yield _grid(table)
            yield Text("")
            for note in table.footnotes:
                yield Text("\n".join(wrapped(note, options.max_width)), style="dim")


def _grid(table: MechanismTable) -> Table:
    grid = Table(box=SIMPLE_HEAD, show_edge=False, pad_edge=False, header_style="bold")
    for index, heading in enumerate(MECHANISM_HEADINGS):
        grid.add_column(Text(heading), justify="right" if index else "left", overflow="fold")
    for row in table.rows:
        first, *others = (Text(cell) for cell in mechanism_cells(row, "\n"))
        first.stylize("bold" if row.is_baseline else "")
        grid.add_row(first, *others)
    return grid


def mechanism_cells(row: ArmMechanism, separator: str) -> tuple[str, ...]:
    return (
        row.arm,
        lr_text(row.best_lr),
        _scores(row, separator),
        _few_digits(row.max_activation),
        _four_decimals(row.first_token_attention),
        _few_digits(row.num_loss_spikes),
        f"{loss_text(row.loss_nats)} {spread_text(row.loss_sd_nats)}".rstrip(),
    )


def _scores(row: ArmMechanism, separator: str) -> str:
    """The place is named where there are several."""
    scores = {position: _four_decimals(spread) for position, spread in row.gate_scores.items()}
    if len(scores) == 1:
        return next(iter(scores.values()))
    return separator.join(f"{position} {text}" for position, text in scores.items()) or NOTHING


def _four_decimals(spread: Spread) -> str:
    return f"{loss_text(spread.mean)} {spread_text(spread.sd)}".rstrip()


def _few_digits(spread: Spread) -> str:
    if spread.mean is None:
        return NOTHING
    return _short(spread.mean, 4) + ("" if spread.sd is None else f" ±{_short(spread.sd, 2)}")


def _short(value: float, digits: int) -> str:
    return f"{value:,.0f}" if abs(value) >= 10**digits or value == int(value) else f"{value:#.{digits}g}".rstrip(".")


def mechanism_to_markdown(mechanism: Mechanism) -> str:
    """Tables and footnotes as GitHub shows them."""
    lines = [f"**{markdown_text(mechanism.sweep)}**: {markdown_text(mechanism.question)}", ""]
    for table in mechanism.tables:
        if table.axes:
            lines += [markdown_text(axes_text(dict(table.axes))), ""]
        lines += [markdown_line(MECHANISM_HEADINGS), "|---|" + "---:|" * (len(MECHANISM_HEADINGS) - 1)]
        lines += [markdown_line(mechanism_cells(row, ", ")) for row in table.rows]
        lines += ["", *(f"- {markdown_text(note)}" for note in table.footnotes), ""]
    return "\n".join(lines)


def _spreads(row: ArmMechanism) -> Iterator[tuple[str, Spread, str]]:
    """(name, what, formula) of all that was measured."""
    for position, spread in row.gate_scores.items():
        yield f"gate_score_{position}", spread, FORMULA_VERSION
    yield "max_activation", row.max_activation, FORMULA_VERSION
    yield "first_token_attention", row.first_token_attention, FORMULA_VERSION
    yield "num_loss_spikes", row.num_loss_spikes, f"{spikes.FORMULA_VERSION}, {FORMULA_VERSION}"


def mechanism_to_csv(mechanism: Mechanism) -> str:
    """A line an arm and table; SDs beside means, a column a gate's position, a missing number an empty field."""
    lines = [
        {"sweep": mechanism.sweep, **dict(table.axes), **_csv_row(row)}
        for table in mechanism.tables
        for row in table.rows
    ]
    names = list(dict.fromkeys(name for line in lines for name in line))
    last = sorted((name for name in names if name.startswith("gate_score_")), key=names.index)
    stream = io.StringIO()
    writer = csv.DictWriter(stream, [*(name for name in names if name not in last), *last], lineterminator="\n")
    writer.writeheader()
    writer.writerows(lines)
    return stream.getvalue()


def _csv_row(row: ArmMechanism) -> dict[str, Any]:
    measured = {
        key: value
        for name, spread, _ in _spreads(row)
        for key, value in ((name, spread.mean), (f"{name}_sd", spread.sd))
    }
    given = ("arm", "best_lr", "num_seeds", "num_probed", "loss_nats", "loss_sd_nats")
    return {**{name: getattr(row, name) for name in given}, **measured}


def mechanism_to_json(mechanism: Mechanism) -> str:
    """Every derived value with its formula's version and the fingerprints of the trials that it came from."""
    content = {
        "sweep": mechanism.sweep,
        "question": mechanism.question,
        "validation_split": mechanism.split,
        "tables": [
            {
                "axes": dict(table.axes),
                "rows": [_json_row(row) for row in table.rows],
                "footnotes": list(table.footnotes),
            }
            for table in mechanism.tables
        ],
    }
    return json.dumps(content, indent=2, allow_nan=False, ensure_ascii=False) + "\n"


def _json_row(row: ArmMechanism) -> dict[str, Any]:
    at_best = row.num_loss_spikes.trials
    measured = {
        key: derived_value(value, formula, spread.trials)
        for name, spread, formula in _spreads(row)
        for key, value in ((name, spread.mean), (f"{name}_sd", spread.sd))
    }
    return {
        "arm": row.arm,
        "is_baseline": row.is_baseline,
        "best_lr": row.best_lr,
        "num_seeds": row.num_seeds,
        "num_probed": row.num_probed,
        "loss_nats": derived_value(row.loss_nats, MEANS_VERSION, at_best),
        "loss_sd_nats": derived_value(row.loss_sd_nats, MEANS_VERSION, at_best),
        **measured,
    }
