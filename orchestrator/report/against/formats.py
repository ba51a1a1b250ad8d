"""The published claims beside the measured effects: for a terminal, as Markdown and as JSON."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.console import Console, ConsoleOptions, RenderResult
from rich.table import Table
from rich.text import Text

from orchestrator.report.against.marks import FORMULA_VERSION, Against, AgainstTable, Finding, counted
from orchestrator.report.figures import NOTHING, axes_text, plural, wrapped
from orchestrator.report.footnotes import EXPLORATORY_MARK
from orchestrator.report.formats import derived_value, markdown_line, markdown_text

_HEADINGS = ("claim", "source", "published", "measured [interval]", "seeds", "mark")
_STYLES = {"held": "green", "not held": "red", "undecided": "yellow", "not measured": "dim"}


@dataclass(frozen=True)
class AgainstView:
    """Prints ``against``; in a narrow terminal cells are folded, not cut."""

    against: Against

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        yield Text.assemble((self.against.sweep, "bold"), f": {self.against.question}")
        if not self.against.tables:
            yield Text("no trials yet")
        for table in self.against.tables:
            yield Text("")
            if table.axes:
                yield Text(axes_text(dict(table.axes)), style="bold")
            yield _grid(table)
        yield Text("")
        for note in footnotes(self.against):
            yield Text("\n".join(wrapped(note, options.max_width)), style="dim")


def _grid(table: AgainstTable) -> Table:
    grid = Table(box=SIMPLE_HEAD, show_edge=False, pad_edge=False, header_style="bold")
    for index, heading in enumerate(_HEADINGS):
        grid.add_column(Text(heading), justify="right" if index in (2, 4) else "left", overflow="fold")
    for finding in table.findings:
        *cells, mark = (Text(cell) for cell in _cells(finding))
        mark.stylize(_STYLES[finding.mark])
        grid.add_row(*cells, mark)
    return grid


def _cells(finding: Finding) -> tuple[str, ...]:
    claim = finding.claim
    note = f" ({claim.note})" if claim.note and claim.measure != "benchmarks" else ""
    told = finding.mark in ("undecided", "not measured") or claim.measure == "divergence"
    why = f": {finding.reason}" if told else ""
    return (
        f"{claim.measure}: {claim.arm} {claim.direction} than {claim.reference}{note}",
        claim.source,
        _number(claim.published_effect, finding),
        f"{_number(finding.effect, finding)} {_interval(finding)}".rstrip(),
        NOTHING if finding.num_seeds is None else f"{finding.num_seeds[0]}, {finding.num_seeds[1]}",
        finding.mark + (EXPLORATORY_MARK if finding.exploratory else "") + why,
    )


def _number(value: float | None, finding: Finding) -> str:
    if value is None:
        return NOTHING
    return f"{value:+.4f}" if finding.claim.measure == "loss" else f"{value:+.3g}"


def _interval(finding: Finding) -> str:
    if finding.low is None or finding.high is None:
        return ""
    return f"[{_number(finding.low, finding)}, {_number(finding.high, finding)}]"


def footnotes(against: Against) -> Iterator[str]:
    """What must be said with any of the marks."""
    yield ", ".join(f"{number} {mark}" for mark, number in counted(against).items())
    yield (
        "effects are arm minus reference: losses in nats a token, published ones as the logarithm of the ratio of "
        "perplexities on the paper's own text; each of ours at the arm's own best learning rate, theirs at one"
    )
    yield (
        "the paper's runs have one seed and 15 B or 1.7 B parameters: a mark says whether this sweep shows the "
        "claimed direction at its own size and data, and nothing about the paper's size"
    )
    yield (
        f"held: the interval at {against.alpha:g} lies on the claimed side of 0; not held: on the other side, or "
        "inside the margin; intervals that are not against the baseline's loss share alpha over their references"
    )
    if any(finding.exploratory for table in against.tables for finding in table.findings):
        yield f"{EXPLORATORY_MARK} exploratory, as in the verdict table"
    if against.num_elsewhere:
        yield f"not measured, too: {plural(against.num_elsewhere, 'claim')} about arms that this sweep does not have"


def against_to_markdown(against: Against) -> str:
    """Tables and footnotes as GitHub shows them."""
    lines = [f"**{markdown_text(against.sweep)}**: {markdown_text(against.question)}", ""]
    for table in against.tables:
        if table.axes:
            lines += [markdown_text(axes_text(dict(table.axes))), ""]
        lines += [markdown_line(_HEADINGS), "|---|---|---:|---|---:|---|"]
        lines += [markdown_line(_cells(finding)) for finding in table.findings]
        lines.append("")
    lines += [f"- {markdown_text(note)}" for note in footnotes(against)]
    return "\n".join(lines) + "\n"


def against_to_json(against: Against) -> str:
    """Every effect with its formula's version and the fingerprints of the trials that it came from."""
    content = {
        "sweep": against.sweep,
        "question": against.question,
        "alpha": against.alpha,
        "margin_nats": against.margin_nats,
        "counts": counted(against),
        "tables": [
            {"axes": dict(table.axes), "claims": [_json(finding) for finding in table.findings]}
            for table in against.tables
        ],
        "num_claims_elsewhere": against.num_elsewhere,
        "footnotes": list(footnotes(against)),
    }
    return json.dumps(content, indent=2, allow_nan=False, ensure_ascii=False) + "\n"


def _json(finding: Finding) -> dict[str, Any]:
    claim = asdict(finding.claim)
    measured = {
        name: derived_value(getattr(finding, name), FORMULA_VERSION, finding.trials)
        for name in ("effect", "low", "high")
    }
    return {
        **claim,
        "published_effect": finding.claim.published_effect,
        "mark": finding.mark,
        "reason": finding.reason,
        "num_seeds": finding.num_seeds,
        "exploratory": finding.exploratory,
        **measured,
    }
