"""The page: the template filled in. Everything from outside is escaped by Jinja; only our own SVG and CSS go in as is.

The surprise: the page forbids itself scripts and every request (its content security policy), so that even a name that
slipped through could do nothing.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from orchestrator.report.figures import NOTHING, axes_text, loss_text, lr_text, plural, states_text
from orchestrator.report.formats import MEANS_VERSION
from orchestrator.report.html.material import Comparison, LadderShown, Material
from orchestrator.report.imported import IMPORTED_HEADINGS, IMPORTED_NOTE, imported_cells
from orchestrator.report.ladder import FORMULA_VERSION as LAWS_VERSION
from orchestrator.report.ladder_formats import LADDER_HEADINGS, flip_in_words, ladder_cells, ladder_notes
from orchestrator.report.mechanism import FORMULA_VERSION as MECHANISM_VERSION
from orchestrator.report.mechanism_formats import MECHANISM_HEADINGS, mechanism_cells
from orchestrator.report.pruning import audit_in_words
from orchestrator.report.terminal import row_cells
from orchestrator.report.tree import UNFINISHED, ArmRow, VerdictTable
from orchestrator.scaling import FORMULA_VERSION as RATE_VERSION
from orchestrator.scaling import OPTIMUM_VERSION
from orchestrator.store import RankDecision
from orchestrator.verdict import FORMULA_VERSION as VERDICT_VERSION

if TYPE_CHECKING:
    from jinja2 import Environment

VERDICT_HEADINGS = (
    "#", "arm", "best LR", "loss, nats", "bits/byte, perplexity", "difference [interval]", "parameters", "tokens/s",
    "trials", "diverges at LR", "verdict",
)  # fmt: skip
DECISION_HEADINGS = ("arm", "cell", "at", "mean loss by LR, nats", "stopped", "finished all the same")


def rendered(material: Material) -> str:
    """The whole document."""
    answer = material.results
    return _environment().get_template("page.html.jinja").render(
        answer=answer,
        written_at=f"{material.written_at:%Y-%m-%d %H:%M} UTC",
        states=states_text(answer.counts),
        num_open=sum(answer.counts.get(state, 0) for state in UNFINISHED),
        verdict_headings=VERDICT_HEADINGS,
        mechanism_headings=MECHANISM_HEADINGS,
        comparisons=[_comparison(one) for one in material.comparisons],
        ladder=None if material.ladder is None else _ladder(material.ladder),
        ladder_headings=LADDER_HEADINGS,
        rules=_rules(material),
        audit=None if answer.pruning is None else audit_in_words(answer.pruning),
        decision_headings=DECISION_HEADINGS,
        decisions=[_decision_cells(one) for one in material.decisions],
        origins=material.origins,
        imported_headings=IMPORTED_HEADINGS,
        imported=[{"cells": imported_cells(row), "is_baseline": False} for row in answer.imported],
        imported_note=IMPORTED_NOTE,
        formulas=", ".join(
            (MEANS_VERSION, RATE_VERSION, OPTIMUM_VERSION, VERDICT_VERSION, MECHANISM_VERSION,
             *(() if material.ladder is None else (LAWS_VERSION,)))
        ),
    )  # fmt: skip


def _environment() -> Environment:
    from jinja2 import Environment, PackageLoader, StrictUndefined

    return Environment(
        loader=PackageLoader("orchestrator.report.html", "."),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )


def _comparison(one: Comparison) -> Mapping[str, Any]:
    rates, cells = _states(one.table)
    return {
        "heading": one.heading,
        "rows": [
            {"cells": row_cells(row), "is_baseline": row.is_baseline, "tone": _tone(row)} for row in one.table.rows
        ],
        "notes": one.table.footnotes,
        "pictures": one.pictures,
        "not_drawn": ", ".join(one.not_drawn),
        "mechanism_rows": [
            {"cells": mechanism_cells(row, "\n"), "is_baseline": row.is_baseline} for row in one.mechanism.rows
        ],
        "is_probed": any(row.num_probed for row in one.mechanism.rows),
        "mechanism_notes": one.mechanism.footnotes,
        "inside": one.inside,
        "rates": [lr_text(lr) for lr in rates],
        "states": cells,
    }


def _ladder(shown: LadderShown) -> Mapping[str, Any]:
    ladder = shown.ladder
    return {
        "rows": [{"cells": cells, "is_baseline": cells[0] == ladder.baseline} for cells in ladder_cells(ladder)],
        "flips": [(flip_in_words(flip), flip.certain) for flip in ladder.flips],
        "notes": ladder_notes(ladder),
        "pictures": shown.pictures,
    }


def _tone(row: ArmRow) -> str:
    """The class of a verdict's cell; the words say the same."""
    word = row.decision.partition(",")[0]
    return word if word in ("better", "worse", "equivalent", "baseline") else "open"


def _states(table: VerdictTable) -> tuple[list[float], list[tuple[str, list[str]]]]:
    """States of the trials by arm, a column a learning rate."""
    rates = sorted({cell.lr for cell in table.states})
    counts = {(cell.arm, cell.lr): states_text(cell.counts, "\n") for cell in table.states}
    return rates, [(row.arm, [counts.get((row.arm, lr), NOTHING) for lr in rates]) for row in table.rows]


def _rules(material: Material) -> list[tuple[str, str]]:
    answer = material.results
    looks = answer.design.looks
    last = max((row.look for table in answer.tables for row in table.rows if row.look is not None), default=None)
    by_look = "" if last is None else f"{last} of {looks.declared} declared, seeds to the arms that are undecided"
    return [
        ("baseline", answer.baseline),
        ("margin", "none declared" if answer.margin_nats is None else f"{answer.margin_nats:g} nats"),
        ("level", f"{100 * answer.alpha:g} % over all comparisons of a table"),
        ("method", answer.design.method + (", paired by seed" if answer.design.paired else "")),
        ("looks", by_look or f"{looks.number} of {looks.declared} declared"),
        ("tail", f"validations in the last {100 * answer.tail:g} % of the schedule are averaged"),
        ("loss", "on the whole validation split" if answer.split == "full" else "on the validation slice"),
        ("trials", plural(len(answer.trials), "trial")),
    ]


def _decision_cells(one: RankDecision) -> tuple[str, ...]:
    def named(rates: tuple[float, ...]) -> str:
        return ", ".join(map(lr_text, rates)) or NOTHING

    losses = "\n".join(
        f"{lr_text(lr)}: {'diverged' if loss is None else loss_text(loss)}" for lr, loss in one.losses_nats.items()
    )
    return (
        one.arm,
        axes_text(one.axes) or NOTHING,
        f"{100 * one.fraction:g} %",
        losses,
        named(tuple(lr for lr in one.dropped if lr not in one.audited)),
        named(one.audited),
    )
