"""Tables out of the store: results with their verdicts, plans, status. Everything printed here was computed below."""

from importlib import import_module
from typing import TYPE_CHECKING

from orchestrator.report.differences import DifferencesView, TrialDifferences, differences, differences_to_json
from orchestrator.report.ladder import Ladder, ladder
from orchestrator.report.listings import plan_table, status_table
from orchestrator.report.mechanism import Mechanism, mechanism
from orchestrator.report.results import results
from orchestrator.report.spending import Standing, budget_forecast, budget_lines, disk_lines, price_lines
from orchestrator.report.tables import tabulate
from orchestrator.report.terminal import ResultsView, to_text
from orchestrator.report.tree import ArmRow, Results, SweepHeading, TrialResult, VerdictTable
from orchestrator.report.watching import watch_frame

if TYPE_CHECKING:
    from orchestrator.report.against import Against, AgainstView, against_paper, against_to_json, against_to_markdown
    from orchestrator.report.denominator_formats import EqualView, equal_to_csv, equal_to_json
    from orchestrator.report.denominators import EqualResults, at_equal
    from orchestrator.report.explanation import Explanation, ExplanationView, explain, explanation_to_json
    from orchestrator.report.formats import to_csv, to_json, to_markdown
    from orchestrator.report.html import REPORT_FILE, write_report
    from orchestrator.report.ladder_formats import LadderView, ladder_to_csv, ladder_to_json
    from orchestrator.report.measured import measured_table
    from orchestrator.report.mechanism_formats import (
        MechanismView,
        mechanism_to_csv,
        mechanism_to_json,
        mechanism_to_markdown,
    )
    from orchestrator.report.paper_form import to_latex, to_parquet

_LATER = {
    "against": ("Against", "AgainstView", "against_paper", "against_to_json", "against_to_markdown"),
    "denominator_formats": ("EqualView", "equal_to_csv", "equal_to_json"),
    "denominators": ("EqualResults", "at_equal"),
    "explanation": ("Explanation", "ExplanationView", "explain", "explanation_to_json"),
    "formats": ("to_csv", "to_json", "to_markdown"),
    "html": ("REPORT_FILE", "write_report"),
    "ladder_formats": ("LadderView", "ladder_to_csv", "ladder_to_json"),
    "measured": ("measured_table",),
    "mechanism_formats": ("MechanismView", "mechanism_to_csv", "mechanism_to_json", "mechanism_to_markdown"),
    "paper_form": ("to_latex", "to_parquet"),
}
"""By module, names that are loaded when they are asked for: a table in the terminal needs none of them."""
_MODULE_OF = {name: module for module, names in _LATER.items() for name in names}

if not TYPE_CHECKING:  # as it would know every name

    def __getattr__(name: str) -> object:
        if name not in _MODULE_OF:
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
        return getattr(import_module(f"{__name__}.{_MODULE_OF[name]}"), name)


__all__ = [
    "REPORT_FILE",
    "Against",
    "AgainstView",
    "ArmRow",
    "DifferencesView",
    "EqualResults",
    "EqualView",
    "Explanation",
    "ExplanationView",
    "Ladder",
    "LadderView",
    "Mechanism",
    "MechanismView",
    "Results",
    "ResultsView",
    "Standing",
    "SweepHeading",
    "TrialDifferences",
    "TrialResult",
    "VerdictTable",
    "against_paper",
    "against_to_json",
    "against_to_markdown",
    "at_equal",
    "budget_forecast",
    "budget_lines",
    "differences",
    "differences_to_json",
    "disk_lines",
    "equal_to_csv",
    "equal_to_json",
    "explain",
    "explanation_to_json",
    "ladder",
    "ladder_to_csv",
    "ladder_to_json",
    "measured_table",
    "mechanism",
    "mechanism_to_csv",
    "mechanism_to_json",
    "mechanism_to_markdown",
    "plan_table",
    "price_lines",
    "results",
    "status_table",
    "tabulate",
    "to_csv",
    "to_json",
    "to_latex",
    "to_markdown",
    "to_parquet",
    "to_text",
    "watch_frame",
    "write_report",
]
