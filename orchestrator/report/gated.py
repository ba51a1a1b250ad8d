"""The gates of a ladder, told: which arms go no further, which are not decided yet, and why."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from orchestrator.report.figures import axes_text, plural
from orchestrator.sweep import PromoteConfig, arm_key

if TYPE_CHECKING:
    from orchestrator.store import GatePassage, SweepRow


@dataclass(frozen=True)
class Kept:
    """An arm that is not on a rung, with the reason. ``is_closed``: decided, and against it."""

    key: str
    arm: str
    rung: int
    axes: dict[str, Any]
    num_trials: int
    is_closed: bool
    words: str


def kept_back(sweep: SweepRow) -> tuple[Kept, ...]:
    """What gates keep off the rungs of a stored sweep now, from small to large; nothing of a sweep without gates."""
    return tuple(_kept_back(sweep)) if sweep.settings.get("rungs") else ()


def _kept_back(sweep: SweepRow) -> Iterator[Kept]:
    from orchestrator.store import standing_passages

    standing = standing_passages(sweep.verdict, sweep.settings)
    below: dict[str, tuple[int, Kept | None]] = {}
    for rung in sweep.settings["rungs"]:
        for arm, num_trials in rung["num_trials"].items():
            smaller, kept = below.get(arm, (0, None))
            key = arm_key(arm, rung["axes"])
            found = None
            if smaller and arm != sweep.baseline and not (key in standing and standing[key].is_through):
                closed, words = _why(smaller, kept, standing.get(key))
                found = Kept(key, arm, rung["number"], rung["axes"], num_trials, closed, words)
                yield found
            below[arm] = (rung["number"], found)


def _why(smaller: int, below: Kept | None, passage: GatePassage | None) -> tuple[bool, str]:
    if passage is not None:
        return True, f"not promoted from rung {passage.below}: {passage.reason}"
    if below is not None and below.is_closed:
        return True, below.words
    return False, f"held back until rung {smaller} is decided"


def gate_lines(sweep: SweepRow) -> list[str]:
    """A line for each arm that went through a gate or stands before one."""
    from orchestrator.store import standing_passages

    rule = sweep.verdict.get("promote")
    if rule is None or not sweep.settings.get("rungs"):
        return []
    lines = []
    for one in standing_passages(sweep.verdict, sweep.settings).values():
        if one.is_through:
            lines.append(f"{one.arm} goes on to rung {one.rung} ({axes_text(one.axes)}): {one.reason}")
    by_words: dict[tuple[str, str], list[Kept]] = {}
    for kept in kept_back(sweep):
        by_words.setdefault((kept.arm, kept.words if kept.is_closed else "held back"), []).append(kept)
    for (arm, _), of in by_words.items():
        rungs = f"rung {of[0].rung}" if len(of) == 1 else f"rungs {of[0].rung} to {of[-1].rung}"
        number = sum(kept.num_trials for kept in of)
        lines.append(f"{arm}, {rungs}, {plural(number, 'trial')}: {of[0].words}")
    return [f"gates, promote {PromoteConfig.model_validate(rule)}:", *(f"  {line}" for line in lines)]
