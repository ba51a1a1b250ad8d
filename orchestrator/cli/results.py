"""``gatesweep results``: what a sweep says, as a table or for other programs."""

from __future__ import annotations

import dataclasses
import os
import sys
from collections.abc import Callable, Mapping, Sequence
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console

from orchestrator import report
from orchestrator.cli.copies import copies_place, publish
from orchestrator.cli.home import Home, existing_store
from orchestrator.copies import is_url
from orchestrator.report import Results
from orchestrator.sweep import UserError


class TableFormat(StrEnum):
    TABLE = "table"
    CSV = "csv"
    JSON = "json"
    PARQUET = "parquet"
    LATEX = "latex"
    MARKDOWN = "markdown"


class AgainstWhat(StrEnum):
    PAPER = "paper"


class EqualBy(StrEnum):
    TOKENS = "tokens"
    FLOPS = "flops"
    PARAMETERS = "parameters"
    WALL_CLOCK = "wall-clock"


class LadderAlong(StrEnum):
    COMPUTE = "compute"
    PARAMETERS = "parameters"
    TOKENS = "tokens"


Renderers = Mapping[TableFormat, Callable[[Any], str | bytes]]

# Loaded when one is asked for.
_VERDICTS: Renderers = {
    TableFormat.CSV: lambda found: report.to_csv(found),
    TableFormat.JSON: lambda found: report.to_json(found),
    TableFormat.PARQUET: lambda found: report.to_parquet(found),
    TableFormat.LATEX: lambda found: report.to_latex(found),
    TableFormat.MARKDOWN: lambda found: report.to_markdown(found),
}
_MECHANISM: Renderers = {
    TableFormat.CSV: lambda found: report.mechanism_to_csv(found),
    TableFormat.JSON: lambda found: report.mechanism_to_json(found),
    TableFormat.MARKDOWN: lambda found: report.mechanism_to_markdown(found),
}
_AGAINST: Renderers = {
    TableFormat.JSON: lambda found: report.against_to_json(found),
    TableFormat.MARKDOWN: lambda found: report.against_to_markdown(found),
}

_LADDER: Renderers = {
    TableFormat.CSV: lambda found: report.ladder_to_csv(found),
    TableFormat.JSON: lambda found: report.ladder_to_json(found),
}

_EQUAL: Renderers = {
    TableFormat.CSV: lambda found: report.equal_to_csv(found),
    TableFormat.JSON: lambda found: report.equal_to_json(found),
}

_EXPLANATION: Renderers = {TableFormat.JSON: lambda found: report.explanation_to_json(found)}


def register(app: typer.Typer, console: Console) -> None:
    """Add the verb to ``app``; it prints on ``console``."""

    @app.command("report")
    def write_report(
        sweep: Annotated[str, typer.Argument(help="The sweep's name.", show_default=False)],
        out: Annotated[
            str | None,
            typer.Option(
                help="The folder, or s3://... by URL; default: reports/SWEEP in the home.", show_default=False
            ),
        ] = None,
    ) -> None:
        """A sweep as one HTML file that needs no network, and its pictures as PNG beside it."""
        with existing_store() as store:
            if out is not None and is_url(out):
                made = publish(out, "--out", report.REPORT_FILE, lambda to: report.write_report(store, sweep, to))
            else:
                folder = Home.of().directory / "reports" / sweep if out is None else Path(out)
                made = [str(path) for path in report.write_report(store, sweep, folder)]
        console.print(made[0], soft_wrap=True, highlight=False, markup=False)
        console.print(f"and {len(made) - 1} PNG beside it", highlight=False)
        if out is None and (place := copies_place(Home.of())) is not None:
            page, *pictures = (Path(path).name for path in made)
            place.put_folder(folder, pictures, f"reports/{sweep}", last=page)
            console.print(f"copied to {place.at(f'reports/{sweep}')}", soft_wrap=True, highlight=False, markup=False)

    @app.command()
    def results(
        sweep: Annotated[str, typer.Argument(help="The sweep's name.", show_default=False)],
        format: Annotated[TableFormat, typer.Option("--format")] = TableFormat.TABLE,
        where: Annotated[
            list[str] | None,
            typer.Option(help="Show only KEY=VALUE: an arm, or an axis by name. Computes nothing anew. May repeat."),
        ] = None,
        out: Annotated[Path | None, typer.Option(help="A file to write instead of printing.")] = None,
        diagnostics: Annotated[
            bool,
            typer.Option("--diagnostics", help="Instead: gate score, M-Act, F-Attn and loss spikes of each arm."),
        ] = False,
        against: Annotated[
            AgainstWhat | None,
            typer.Option("--against", help="Instead: the paper's claims beside the measured effects, each marked."),
        ] = None,
        explain: Annotated[
            str | None,
            typer.Option("--explain", help="Instead: an arm's row with its formulas, and the trials behind it."),
        ] = None,
        ladder: Annotated[
            bool,
            typer.Option("--ladder", help="Instead: scaling laws, speed-ups and rank flips over the sweep's sizes."),
        ] = False,
        along: Annotated[
            LadderAlong | None, typer.Option(help="What a size is in --ladder; by default compute.", show_default=False)
        ] = None,
        denominator: Annotated[
            EqualBy | None,
            typer.Option(
                help="Instead: arms at equal amounts of this; verdicts where amounts are equal.", show_default=False
            ),
        ] = None,
    ) -> None:
        """The verdict table of a sweep."""
        instead = [
            name
            for name, asked in (
                ("--diagnostics", diagnostics),
                ("--against", against),
                ("--explain", explain),
                ("--ladder", ladder),
                ("--denominator", denominator),
            )
            if asked
        ]
        if along is not None and not ladder:
            raise UserError(f"results: --along {along.value} without --ladder; allowed: with it")
        if len(instead) + bool(where) > 1:
            raise UserError(f"results: {', '.join(instead)}{' with --where' if where else ''}; allowed: one of them")
        with existing_store() as store:
            if against is not None:
                found: Any = report.against_paper(store, sweep)
                view: Any = report.AgainstView(found)
                renderers, what = _AGAINST, "--against paper"
            elif explain is not None:
                found = report.explain(report.results(store, sweep), explain)
                view, renderers, what = report.ExplanationView(found), _EXPLANATION, "--explain"
            elif ladder:
                found = report.ladder(store, sweep, (along or LadderAlong.COMPUTE).value)
                view, renderers, what = report.LadderView(found), _LADDER, "--ladder"
            elif denominator is not None:
                found = report.at_equal(store, sweep, denominator.value)
                view, renderers, what = report.EqualView(found), _EQUAL, "--denominator"
            elif diagnostics:
                found = report.mechanism(store, sweep)
                view, renderers, what = report.MechanismView(found), _MECHANISM, "--diagnostics"
            else:
                found = narrowed(report.results(store, sweep), where or ())
                view, renderers, what = report.ResultsView(found), _VERDICTS, ""
        if format is not TableFormat.TABLE:
            _write(_rendered(found, renderers, format, what), out)
        elif out is None:
            console.print(view)
        else:
            printed = Console(width=console.width, color_system=None, force_terminal=False)
            with printed.capture() as text:
                printed.print(view)
            _write(text.get(), out)


def _rendered(found: Any, renderers: Renderers, format: TableFormat, what: str) -> str | bytes:
    if format not in renderers:
        raise UserError(f"results {what}: got --format {format.value}; allowed: table, {', '.join(renderers)}")
    return renderers[format](found)


def _write(content: str | bytes, out: Path | None) -> None:
    data = content.encode() if isinstance(content, str) else content
    if out is None:
        if isinstance(content, bytes) and sys.stdout.isatty():
            raise UserError("results: parquet is no text for a terminal; name a file with --out")
        sys.stdout.flush()
        sys.stdout.buffer.write(data)
        return
    beside = out.with_name(f".{out.name}.{os.getpid()}")
    try:
        beside.write_bytes(data)
        beside.replace(out)
    except OSError as error:
        beside.unlink(missing_ok=True)
        raise UserError(f"--out {out}: {error.strerror}") from error


def narrowed(found: Results, where: Sequence[str]) -> Results:
    """The tables and rows that match every condition; the baseline's row stays. Numbers are those of the whole table.

    UserError for a key or a value that no table has.
    """
    for condition in where:
        key, equals, wanted = (part.strip() for part in condition.partition("="))
        axes = list(dict.fromkeys(name for table in found.tables for name, _ in table.axes))
        name = next((axis for axis in axes if key in (axis, axis.rpartition(".")[2])), key)
        if not equals or name not in ("arm", *axes):
            raise UserError(f"--where {condition}: allowed: KEY=VALUE with a key of {', '.join(('arm', *axes))}")
        values = {_said(value) for table in found.tables for axis, value in table.axes if axis == name}
        if name == "arm":
            values = {row.arm for table in found.tables for row in table.rows}
        if _said(wanted) not in values:
            raise UserError(f"--where {condition}: no such value; allowed: {', '.join(sorted(values))}")
        found = dataclasses.replace(found, tables=tuple(_matching(found, name, _said(wanted))))
    return found


def _matching(found: Results, name: str, wanted: str) -> list[report.VerdictTable]:
    if name != "arm":
        return [table for table in found.tables if _said(dict(table.axes).get(name)) == wanted]
    kept = []
    for table in found.tables:
        rows = tuple(row for row in table.rows if row.is_baseline or row.arm == wanted)
        hidden = len(table.rows) - len(rows)
        note = (f"--where: {hidden} further arm(s) of the same comparison are not shown",) if hidden else ()
        kept.append(dataclasses.replace(table, rows=rows, footnotes=(*table.footnotes, *note)))
    return kept


def _said(value: object) -> str:
    """Numbers by value: 1e-3 is 0.001."""
    try:
        return f"{float(str(value)):g}"
    except ValueError:
        return str(value)
