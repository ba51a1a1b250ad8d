"""A sweep's report: one HTML file that needs nothing else, and its pictures as PNG beside it."""

from orchestrator.report.html.files import REPORT_FILE, write_report

__all__ = ["REPORT_FILE", "write_report"]
