"""Verdict tables for a terminal: a table where it fits, a block an arm where it does not. No number is ever cut.

All text goes in as ``Text``: an interval in brackets, or a name, would otherwise be read as Rich's markup.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from rich.box import SIMPLE_HEAD
from rich.console import Console, ConsoleOptions, Group, RenderableType, RenderResult
from rich.table import Table
from rich.text import Text

from orchestrator.report.figures import (
    NOTHING,
    axes_text,
    count_text,
    delta_text,
    interval_text,
    loss_text,
    lr_text,
    perplexity_text,
    spread_text,
    states_text,
    wrapped,
)
from orchestrator.report.footnotes import EXPLORATORY_MARK
from orchestrator.report.imported import IMPORTED_HEADINGS, IMPORTED_NOTE, imported_cells
from orchestrator.report.tree import ArmRow, ImportedRow, Results, VerdictTable

_HEADINGS = (
    "#", "arm", "best\nLR", "loss\nnats", "bits/byte\nperplexity", "difference\n[interval]", "params", "tokens\n/s",
    "trials", "diverges\nat LR", "verdict",
)  # fmt: skip
_RIGHT = {0, 2, 3, 4, 5, 6, 7}
_ARM, _VERDICT = 1, len(_HEADINGS) - 1
_GAP = 2

_STYLES = {
    "better": "green",
    "better, within the margin": "green",
    "worse": "red",
    "worse, within the margin": "red",
    "no result": "yellow",
    "no interval": "yellow",
}


@dataclass(frozen=True)
class ResultsView:
    """Prints ``results``, as wide as the console allows."""

    results: Results

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        yield Text.assemble((self.results.sweep, "bold"), f": {self.results.question}")
        if not self.results.tables:
            yield Text("no trials yet")
        for table in self.results.tables:
            yield from self._table(table, options.max_width)
        if self.results.imported:
            yield Text("")
            yield _imported(self.results.imported, options.max_width)
            yield Text("\n".join(wrapped(IMPORTED_NOTE, options.max_width)), style="dim")

    def _table(self, table: VerdictTable, width: int) -> Iterator[RenderableType]:
        yield Text("")
        if table.axes:
            yield Text(axes_text(dict(table.axes)), style="bold")
        cells = [row_cells(row) for row in table.rows]
        yield _grid(table, cells) if _least_width(cells) <= width else _blocks(table, width)
        yield Text("")
        for note in table.footnotes:
            yield Text("\n".join(wrapped(note, width)), style="dim")


def _imported(rows: Sequence[ImportedRow], width: int) -> RenderableType:
    """A table where it fits, else a line a name."""
    cells = [imported_cells(row) for row in rows]
    widths = [max(map(len, column)) for column in zip(IMPORTED_HEADINGS, *cells, strict=True)]
    if sum(widths) + _GAP * (len(widths) - 1) > width:
        named = [", ".join(f"{head} {cell}" for head, cell in zip(IMPORTED_HEADINGS, of, strict=True)) for of in cells]
        return Text("\n".join(line for one in named for line in wrapped(one, width)))
    table = Table(box=SIMPLE_HEAD, show_edge=False, pad_edge=False, padding=(0, _GAP - 1, 0, 0))
    for heading in IMPORTED_HEADINGS:
        table.add_column(Text(heading, style="bold"), no_wrap=True)
    for of in cells:
        table.add_row(*map(Text, of))
    return table


def to_text(results: Results, width: int = 120) -> str:
    """What a terminal of ``width`` columns shows, without colours or trailing blanks."""
    from io import StringIO

    stream = StringIO()
    Console(file=stream, width=width, color_system=None, force_terminal=False).print(ResultsView(results))
    return "\n".join(line.rstrip() for line in stream.getvalue().splitlines()) + "\n"


def row_cells(row: ArmRow) -> tuple[str, ...]:
    """A row's cells in the order of the headings; spreads, intervals and states on lines of their own."""
    return (
        NOTHING if row.rank is None else str(row.rank),
        row.arm,
        lr_text(row.best_lr),
        _lines(loss_text(row.loss_nats), spread_text(row.loss_sd_nats)),
        _lines(loss_text(row.bits_per_byte), "" if row.perplexity is None else perplexity_text(row.perplexity)),
        _lines(delta_text(row.delta_nats), interval_text(row.low_nats, row.high_nats)),
        count_text(row.num_parameters),
        speed_text(row, "\n"),
        states_text(row.counts, "\n"),
        diverged_text(row, "\n"),
        verdict_text(row),
    )


def verdict_text(row: ArmRow) -> str:
    at = "" if row.look is None or row.is_baseline else f" (look {row.look})"
    return row.verdict + at + (EXPLORATORY_MARK if row.exploratory else "")


def speed_text(row: ArmRow, separator: str = " ", unit: str = "") -> str:
    """Tokens a second, and the utilisation where it is known."""
    speed = count_text(row.tokens_per_second) + unit
    return speed if row.utilisation is None else f"{speed}{separator}{row.utilisation:.1%} MFU"


def diverged_text(row: ArmRow, separator: str = " ") -> str:
    if row.diverged_lr is None:
        return NOTHING
    return f"{lr_text(row.diverged_lr)}{separator}({row.diverged_lr_num_diverged} of {row.diverged_lr_num_seeds})"


def _lines(*lines: str) -> str:
    return "\n".join(line for line in lines if line)


def _widest(text: str) -> int:
    return max(len(line) for line in text.split("\n"))


def _columns(cells: list[tuple[str, ...]]) -> list[list[str]]:
    return [[heading, *(row[index] for row in cells)] for index, heading in enumerate(_HEADINGS)]


def _least_width(cells: list[tuple[str, ...]]) -> int:
    """Only a verdict may wrap, and only between words."""
    columns = _columns(cells)
    widths = [max(map(_widest, column)) for column in columns[:-1]]
    verdict = max(len(word) for text in columns[_VERDICT] for word in text.split())
    return sum(widths) + verdict + _GAP * len(widths)


def _grid(table: VerdictTable, cells: list[tuple[str, ...]]) -> Table:
    grid = Table(box=SIMPLE_HEAD, show_edge=False, pad_edge=False, padding=(0, _GAP - 1, 0, 0), header_style="bold")
    for index, column in enumerate(_columns(cells)):
        is_verdict = index == _VERDICT
        grid.add_column(
            Text(_HEADINGS[index]),
            justify="right" if index in _RIGHT else "left",
            no_wrap=not is_verdict,
            min_width=None if is_verdict else max(map(_widest, column)),
        )
    for row, texts in zip(table.rows, cells, strict=True):
        styled = [Text(text) for text in texts]
        styled[_ARM].stylize("bold" if row.is_baseline else "")
        styled[_VERDICT].stylize(_STYLES.get(row.decision, ""))
        grid.add_row(*styled)
    return grid


def _blocks(table: VerdictTable, width: int) -> Group:
    blocks: list[Text] = []
    for row in table.rows:
        blocks.append(Text(row.arm, style="bold"))
        lines = [line for name, value in _facts(row) for line in wrapped(f"  {name:<13}{value}", width, 15)]
        blocks.append(Text("\n".join(lines)))
    return Group(*blocks)


def _facts(row: ArmRow) -> Iterator[tuple[str, str]]:
    yield "verdict", verdict_text(row)
    yield "rank", NOTHING if row.rank is None else str(row.rank)
    yield "best LR", lr_text(row.best_lr)
    yield (
        "loss",
        f"{loss_text(row.loss_nats)} {spread_text(row.loss_sd_nats)} nats, {loss_text(row.bits_per_byte)} bits/byte, "
        f"perplexity {perplexity_text(row.perplexity)}",
    )
    if not row.is_baseline:
        yield "difference", f"{delta_text(row.delta_nats)} {interval_text(row.low_nats, row.high_nats)}".rstrip()
    yield "size, speed", f"{count_text(row.num_parameters)} parameters, {speed_text(row, ', ', ' tokens/s')}"
    yield "trials", states_text(row.counts)
    yield "diverges at", f"LR {diverged_text(row)}" if row.diverged_lr is not None else NOTHING
