"""A sweep by one denominator for a terminal, CSV and JSON. Unrounded in CSV and JSON."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.console import Console, ConsoleOptions, RenderResult
from rich.table import Table
from rich.text import Text

from orchestrator import verdict
from orchestrator.report.denominators import BUDGET_AXES, UNITS, EqualResults, EqualRow, EqualTable
from orchestrator.report.figures import NOTHING, axes_text, axis_text, delta_text, interval_text, loss_text, wrapped
from orchestrator.report.formats import derived_value
from orchestrator.scaling import DENOMINATORS_VERSION, TOLERANCE

EQUAL_HEADINGS = ("arm", "tokens", "FLOPs", "parameters", "seconds", "loss (nats)", "difference", "verdict")


@dataclass(frozen=True)
class EqualView:
    """Prints ``found``; in a narrow terminal cells are folded, not cut."""

    found: EqualResults

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        yield Text.assemble((self.found.sweep, "bold"), f": {self.found.question}")
        yield Text(f"at equal {UNITS[self.found.denominator]}; amounts as multiples of the baseline's")
        for table in self.found.tables:
            yield Text("")
            if table.axes:
                yield Text(axes_text(dict(table.axes)), style="bold")
            grid = Table(box=SIMPLE_HEAD, show_edge=False, pad_edge=False, header_style="bold")
            for index, heading in enumerate(EQUAL_HEADINGS):
                side = "right" if 0 < index < len(EQUAL_HEADINGS) - 1 else "left"
                grid.add_column(Text(heading), justify=side, overflow="fold")  # type: ignore[arg-type]
            for row in table.rows:
                style = "bold" if row.is_baseline else "dim" if row.decision is None else ""
                grid.add_row(*(Text(cell, style=style) for cell in _cells(row, table)))
            yield grid
        yield Text("")
        for note in equal_notes(self.found):
            yield Text("\n".join(wrapped(note, options.max_width)), style="dim")


def _cells(row: EqualRow, table: EqualTable) -> tuple[str, ...]:
    ratios = row.ratios
    amounts = (None,) * 4 if ratios is None else (ratios.tokens, ratios.flops, ratios.parameters, ratios.seconds)
    own = [f" ({name} {axis_text(value)})" for name, value in row.axes if (name, value) not in table.axes]
    interval = interval_text(row.low_nats, row.high_nats)
    return (
        row.arm + "".join(own),
        *(NOTHING if one is None else f"{one:.3f}" for one in amounts),
        loss_text(row.loss_nats),
        f"{delta_text(row.delta_nats)} {interval}".strip(),
        row.words + ("*" if row.exploratory else ""),
    )


def equal_notes(found: EqualResults) -> list[str]:
    match = (
        " or half a step of the FFN width that match may set" if found.denominator in ("parameters", "flops") else ""
    )
    notes = [
        f"equal: within {TOLERANCE:.0%}{match}. Intervals: {100 * (1 - found.alpha):g} %, simultaneous over all arms "
        "of a table, those without a verdict included"
    ]
    rows = [row for table in found.tables for row in table.rows]
    if any(row.decision is None and row.words.startswith("descriptive") for row in rows):
        notes.append(
            "descriptive: amounts differ, so both validation curves were read where the smaller amount ends. While "
            "the learning rate falls, a loss on the way is not that of a shorter schedule: no decision is made of it"
        )
    if found.denominator in ("flops", "wall-clock") and any(_elsewhere(row, table) for table in found.tables
                                                           for row in table.rows):  # fmt: skip
        notes.append(f"an arm with another {' or '.join(BUDGET_AXES)} beside its name is compared at that budget")
    if found.denominator == "wall-clock":
        notes.append(
            "seconds: of the training steps alone, at the speed of the trial's last attempt; trials beside others "
            "on a host share its memory and cores with them"
        )
    if any(row.exploratory for row in rows):
        notes.append("* exploratory, as in the verdict table: `gatesweep results` says why")
    return notes


def _elsewhere(row: EqualRow, table: EqualTable) -> bool:
    return row.axes != table.axes


def equal_to_csv(found: EqualResults) -> str:
    """A line an arm and table."""
    lines = [
        {"sweep": found.sweep, "denominator": found.denominator, **dict(table.axes), **_line(row)}
        for table in found.tables
        for row in table.rows
    ]
    stream = io.StringIO()
    names = list(dict.fromkeys(name for line in lines for name in line))
    writer = csv.DictWriter(stream, names, lineterminator="\n")
    writer.writeheader()
    writer.writerows(lines)
    return stream.getvalue()


def _line(row: EqualRow) -> dict[str, Any]:
    line = {name: value for name, value in asdict(row).items() if name not in ("axes", "amounts", "ratios", "trials")}
    for what, amounts in (("", row.amounts), ("_ratio", row.ratios)):
        for name in ("tokens", "flops", "parameters", "seconds"):
            line[f"{name}{what}"] = None if amounts is None else getattr(amounts, name)
    return line


def equal_to_json(found: EqualResults) -> str:
    """Every derived value with its formula's version and the fingerprints of the trials that it came from."""
    content = {
        "sweep": found.sweep,
        "question": found.question,
        "baseline": found.baseline,
        "denominator": found.denominator,
        "alpha": found.alpha,
        "tables": [{"axes": dict(table.axes), "rows": list(_json_rows(table))} for table in found.tables],
        "notes": equal_notes(found),
    }
    return json.dumps(content, indent=2, allow_nan=False, ensure_ascii=False) + "\n"


def _json_rows(table: EqualTable) -> Iterator[dict[str, Any]]:
    base = next(row for row in table.rows if row.is_baseline)
    for row in table.rows:
        both = tuple(dict.fromkeys((*row.trials, *base.trials)))
        judged = {name: getattr(row, name) for name in ("low_nats", "high_nats", "decision")}
        yield {
            "arm": row.arm,
            "axes": dict(row.axes),
            "best_lr": row.best_lr,
            "amounts": None if row.amounts is None else asdict(row.amounts),
            "ratios": derived_value(None if row.ratios is None else asdict(row.ratios), DENOMINATORS_VERSION, both),
            "loss_nats": derived_value(row.loss_nats, DENOMINATORS_VERSION, row.trials),
            "share": row.share,
            "delta_nats": derived_value(row.delta_nats, DENOMINATORS_VERSION, both),
            "verdict": row.words,
            "exploratory": row.exploratory,
            **{name: derived_value(value, verdict.FORMULA_VERSION, table.trials) for name, value in judged.items()},
        }
