"""A verdict as a gate of a ladder reads it.

The surprise: it is no test of its own. It is the decision of the verdict table, from the one simultaneous interval of
the smaller rung at the sweep's ``alpha``; so no gate closes on a difference that the table would not call worse.
"""

from __future__ import annotations

from orchestrator.sweep import GateWord
from orchestrator.verdict.samples import Decision

GATE_VERSION = "gate-1"
"""Raised whenever a change alters what a decision counts as."""

_WORDS: dict[Decision, GateWord] = {
    "better": "better",
    "better, within the margin": "better",
    "equivalent": "equivalent",
    "worse, within the margin": "equivalent",
    "worse": "worse",
    "inconclusive": "inconclusive",
    "no interval": "inconclusive",
}


def gate_word(decision: Decision) -> GateWord | None:
    """None for what passes no gate: no result, as the arm or the baseline diverged."""
    return _WORDS.get(decision)
