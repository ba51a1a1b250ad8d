"""A sweep's effects beside the ones that the paper published. Read ``published``, ``marks``, ``formats``."""

from orchestrator.report.against.formats import AgainstView, against_to_json, against_to_markdown
from orchestrator.report.against.marks import Against, AgainstTable, Finding, against_paper, mark_claims
from orchestrator.report.against.published import CLAIMS, Claim, is_the_papers

__all__ = [
    "CLAIMS",
    "Against",
    "AgainstTable",
    "AgainstView",
    "Claim",
    "Finding",
    "against_paper",
    "against_to_json",
    "against_to_markdown",
    "is_the_papers",
    "mark_claims",
]
