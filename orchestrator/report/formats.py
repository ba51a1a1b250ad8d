"""Results for other programs and for documents: CSV, JSON, Markdown. Unrounded, save in Markdown.

In JSON every derived value carries its formula's version and the fingerprints of the trials that it came from.
"""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Mapping
from dataclasses import asdict
from typing import Any

from orchestrator import scaling, verdict
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
)
from orchestrator.report.imported import IMPORTED_HEADINGS, IMPORTED_NOTE, imported_cells
from orchestrator.report.terminal import diverged_text, speed_text, verdict_text
from orchestrator.report.tree import STATES, ArmRow, Results, VerdictTable

MEANS_VERSION = "means-2"
"""A trial's mean over the tail of its schedule; mean, SD (n - 1) and median over trials; ranks by mean loss. Raised
whenever a change alters one."""

_FORMULAS = {
    "rank": (MEANS_VERSION, "table"),
    "best_lr": (scaling.FORMULA_VERSION, "trials"),
    "edge": (scaling.FORMULA_VERSION, "trials"),
    "num_finite_lrs": (scaling.FORMULA_VERSION, "trials"),
    "optimum": (scaling.OPTIMUM_VERSION, "table"),
    "diverged_lr": (scaling.FORMULA_VERSION, "trials"),
    "diverged_lr_num_diverged": (scaling.FORMULA_VERSION, "trials"),
    "diverged_lr_num_seeds": (scaling.FORMULA_VERSION, "trials"),
    "diverged_lr_low": (scaling.FORMULA_VERSION, "trials"),
    "diverged_lr_high": (scaling.FORMULA_VERSION, "trials"),
    "loss_nats": (MEANS_VERSION, "trials_best"),
    "loss_sd_nats": (MEANS_VERSION, "trials_best"),
    "bits_per_byte": (MEANS_VERSION, "trials_best"),
    "perplexity": (MEANS_VERSION, "trials_best"),
    "tokens_per_second": (MEANS_VERSION, "trials_complete"),
    "flops_per_second": (MEANS_VERSION, "trials_complete"),
    "utilisation": (MEANS_VERSION, "trials_complete"),
    "delta_nats": (verdict.FORMULA_VERSION, "baseline"),
    "low_nats": (verdict.FORMULA_VERSION, "compared"),
    "high_nats": (verdict.FORMULA_VERSION, "compared"),
    "delta_sds": (verdict.FORMULA_VERSION, "compared"),
    "decision": (verdict.FORMULA_VERSION, "compared"),
    "verdict": (verdict.FORMULA_VERSION, "compared"),
    "more_seeds": (verdict.FORMULA_VERSION, "compared"),
    "look": (verdict.SEQUENCE_VERSION, "compared"),
}
"""Each derived field of a row: its formula, and which trials it is computed from."""

_GIVEN = ("arm", "is_baseline", "losses_nats", "exploratory", "num_parameters", "training_flops", "num_missing", "gate")


def to_json(results: Results) -> str:
    """The whole tree; trials are listed once, at the end, and named by fingerprint elsewhere."""
    content = {
        "sweep": results.sweep,
        "question": results.question,
        "baseline": results.baseline,
        "alpha": results.alpha,
        "margin_nats": results.margin_nats,
        "design": asdict(results.design),
        "tail": results.tail,
        "validation_split": results.split,
        "counts": dict(results.counts),
        "tables": [_json_table(table) for table in results.tables],
        "pruning": _json_pruning(results),
        "looks": [{**asdict(one), "at": one.at.isoformat()} for one in results.allotments],
        "gates": [{**asdict(one), "at": one.at.isoformat()} for one in results.passages],
        "imported": [asdict(one) for one in results.imported],
        "trials": [trial._asdict() for trial in results.trials],
    }
    return json.dumps(content, indent=2, allow_nan=False, ensure_ascii=False) + "\n"


def _json_pruning(results: Results) -> dict[str, Any] | None:
    found = results.pruning
    if found is None:
        return None
    more = {"false_rate": found.false_rate, "share_saved": found.share_saved, "formula": scaling.AUDIT_VERSION}
    return {**asdict(found), **more}


def _json_table(table: VerdictTable) -> dict[str, Any]:
    floor = table.noise_floor
    pooled = {} if floor is None else {"sd_nats": floor.sd_nats, "degrees_of_freedom": floor.degrees_of_freedom}
    return {
        "axes": dict(table.axes),
        "rows": [_json_row(table, row) for row in table.rows],
        "noise_floor": {
            name: derived_value(value, verdict.FORMULA_VERSION, table.trials_compared) for name, value in pooled.items()
        },
        "critical_value": derived_value(table.critical_value, verdict.FORMULA_VERSION, table.trials_compared),
        "num_compared": table.num_compared,
        "method": table.method,
        "variances_p": derived_value(table.variances_p, verdict.FORMULA_VERSION, table.trials_compared),
        "states": [asdict(cell) for cell in table.states],
        "footnotes": list(table.footnotes),
    }


def _json_row(table: VerdictTable, row: ArmRow) -> dict[str, Any]:
    given = {name: getattr(row, name) for name in _GIVEN}
    derived = {name: derived_value(*one) for name, one in derivations(table, row).items()}
    return {**given, "counts": dict(row.counts), **derived}


def derivations(table: VerdictTable, row: ArmRow) -> dict[str, tuple[object, str, tuple[str, ...]]]:
    """Of every derived field of a row: its value, its formula's version, and the trials that it is computed from."""
    at_baseline = next(other.trials_best for other in table.rows if other.is_baseline)
    inputs = {
        "trials": row.trials,
        "trials_best": row.trials_best,
        "trials_complete": row.trials_complete,
        "baseline": tuple(dict.fromkeys((*at_baseline, *row.trials_best))),
        "compared": tuple(dict.fromkeys((*table.trials_compared, *at_baseline, *row.trials_best))),
        "table": tuple(fingerprint for other in table.rows for fingerprint in other.trials),
    }
    return {name: (_plain(row, name), formula, inputs[which]) for name, (formula, which) in _FORMULAS.items()}


def _plain(row: ArmRow, name: str) -> object:
    return asdict(row.optimum) if name == "optimum" and row.optimum is not None else getattr(row, name)


def derived_value(value: object, formula: str, trials: tuple[str, ...]) -> dict[str, Any]:
    return {"value": value, "formula": formula, "trials": list(trials)}


def to_csv(results: Results) -> str:
    """A line an arm and table. Axes come first, under their dotted names; a missing number is an empty field. Curves
    from elsewhere come last: their ``decision`` is ``imported, unverified``, and they have no interval."""
    axes = list(dict.fromkeys(name for table in results.tables for name, _ in table.axes))
    fields = [name for name in (*_GIVEN, *_FORMULAS) if name != "losses_nats"]
    stream = io.StringIO()
    writer = csv.DictWriter(
        stream,
        ["sweep", *axes, *fields, *(f"num_{state.lower()}" for state in STATES), "validation_split"],
        lineterminator="\n",
    )
    writer.writeheader()
    for table in results.tables:
        for row in table.rows:
            counts = {f"num_{state.lower()}": row.counts.get(state, 0) for state in STATES}
            own = {name: _plain(row, name) for name in fields}
            line = {"sweep": results.sweep, **dict(table.axes), **own, **counts, "validation_split": results.split}
            writer.writerow({name: _csv_field(value) for name, value in line.items()})
    for one in results.imported:
        marks = {"sweep": results.sweep, "arm": one.name, "decision": one.status, "verdict": one.status}
        numbers = {"loss_nats": one.loss_nats, "loss_sd_nats": one.loss_sd_nats, "delta_nats": one.delta_nats}
        writer.writerow({**marks, **numbers, "is_baseline": "false", "validation_split": f"imported {one.split}"})
    return stream.getvalue()


def _csv_field(value: object) -> object:
    if isinstance(value, bool):
        return "true" if value else "false"
    return json.dumps(value) if isinstance(value, list | tuple | Mapping) else value


_HEADINGS = (
    "#", "arm", "best LR", "loss (nats)", "bits/byte", "perplexity", "difference [interval]", "parameters", "tokens/s",
    "trials", "diverges at LR", "verdict",
)  # fmt: skip


def to_markdown(results: Results) -> str:
    """Tables and footnotes as GitHub shows them."""
    lines = [f"**{markdown_text(results.sweep)}**: {markdown_text(results.question)}", ""]
    for table in results.tables:
        if table.axes:
            lines += [markdown_text(axes_text(dict(table.axes))), ""]
        lines.append(markdown_line(_HEADINGS))
        lines.append("|---|---|" + "---:|" * 7 + "---|---|---|")
        lines += [markdown_line(_markdown_cells(row)) for row in table.rows]
        lines += ["", *(f"- {markdown_text(note)}" for note in table.footnotes), ""]
    if results.imported:
        lines += [markdown_line(IMPORTED_HEADINGS), "|---" * len(IMPORTED_HEADINGS) + "|"]
        lines += [markdown_line(imported_cells(row)) for row in results.imported]
        lines += ["", f"- {markdown_text(IMPORTED_NOTE)}", ""]
    return "\n".join(lines)


def _markdown_cells(row: ArmRow) -> tuple[str, ...]:
    return (
        NOTHING if row.rank is None else str(row.rank),
        row.arm,
        lr_text(row.best_lr),
        f"{loss_text(row.loss_nats)} {spread_text(row.loss_sd_nats)}".rstrip(),
        loss_text(row.bits_per_byte),
        perplexity_text(row.perplexity),
        f"{delta_text(row.delta_nats)} {interval_text(row.low_nats, row.high_nats)}".rstrip(),
        count_text(row.num_parameters),
        speed_text(row),
        states_text(row.counts),
        diverged_text(row),
        verdict_text(row),
    )


def markdown_line(cells: tuple[str, ...]) -> str:
    return "| " + " | ".join(markdown_text(cell) for cell in cells) + " |"


def markdown_text(text: str) -> str:
    """As plain text: what Markdown would read as a table's edge, emphasis, a link or HTML is escaped."""
    for mark in ("\\", "|", "*", "_", "`", "[", "]", "<", ">"):
        text = text.replace(mark, "\\" + mark)
    return text.replace("\n", " ")
