"""Tables out of the store: results with their verdicts, plans, status. Everything printed here was computed below."""

from orchestrator.report.against import Against, AgainstView, against_paper, against_to_json, against_to_markdown
from orchestrator.report.denominator_formats import EqualView, equal_to_csv, equal_to_json
from orchestrator.report.denominators import EqualResults, at_equal
from orchestrator.report.differences import DifferencesView, TrialDifferences, differences, differences_to_json
from orchestrator.report.explanation import Explanation, ExplanationView, explain, explanation_to_json
from orchestrator.report.formats import to_csv, to_json, to_markdown
from orchestrator.report.html import REPORT_FILE, write_report
from orchestrator.report.ladder import Ladder, ladder
from orchestrator.report.ladder_formats import LadderView, ladder_to_csv, ladder_to_json
from orchestrator.report.listings import plan_table, status_table
from orchestrator.report.measured import measured_table
from orchestrator.report.mechanism import Mechanism, mechanism
from orchestrator.report.mechanism_formats import (
    MechanismView,
    mechanism_to_csv,
    mechanism_to_json,
    mechanism_to_markdown,
)
from orchestrator.report.paper_form import to_latex, to_parquet
from orchestrator.report.results import results
from orchestrator.report.spending import Standing, budget_forecast, budget_lines, disk_lines, price_lines
from orchestrator.report.tables import tabulate
from orchestrator.report.terminal import ResultsView, to_text
from orchestrator.report.tree import ArmRow, Results, SweepHeading, TrialResult, VerdictTable
from orchestrator.report.watching import watch_frame

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
