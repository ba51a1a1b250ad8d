"""The one interval, read; and how many seeds it lacks."""

from __future__ import annotations

import math

from orchestrator.verdict.intervals import Spread, critical_at_look
from orchestrator.verdict.samples import Decision, Design, Method, NoiseFloor

MIN_SEEDS_EQUIVALENT = 3
"""Fewer seeds never claim equivalence: on two, an interval is narrow by luck far too often."""

MAX_SEEDS = 1_000
"""Where the search for "n more seeds" gives up."""

SD_LIMIT = 0.80
"""Confidence of the upper limit of the SD with which "n more seeds" is planned."""


def decide(low: float, high: float, margin: float | None, num_seeds: int) -> Decision:
    """The one interval, read. An end that only touches 0 or the margin has not passed it.

    ``num_seeds`` is the smaller of the arm's and the baseline's.
    """
    inside = margin is not None and -margin < low and high < margin
    if high < 0.0:
        return "better, within the margin" if inside else "better"
    if low > 0.0:
        return "worse, within the margin" if inside else "worse"
    return "equivalent" if inside and num_seeds >= MIN_SEEDS_EQUIVALENT else "inconclusive"


def seeds_in_words(more: int | None) -> str:
    if more is None:
        return f"over {MAX_SEEDS:,} more seeds"
    return "1 more seed" if more == 1 else f"{more:,} more seeds"


def more_seeds(
    spread: Spread | NoiseFloor,
    num_compared: int,
    margin: float,
    alpha: float,
    present: int,
    *,
    method: Method = "dunnett",
    design: Design | None = None,
    num_control: int | None = None,
) -> int | None:
    """Seeds that an arm lacks until its interval resolves the declared margin; at least 1, None above MAX_SEEDS.

    The total is the smallest at which the half-width is at most ``margin`` at the level of the next look, when the SD
    is its upper 80 % limit (chi-square), every arm has as many seeds, and the baseline keeps its share (``num_control``
    to ``present``; without it, as many as an arm). It goes by the margin and never by the observed difference, which
    would promise few seeds whenever luck made the difference large.
    """
    from scipy.special import gammaincinv

    design = design or Design()
    degrees = spread.degrees_of_freedom
    sd_limit = spread.sd_nats * math.sqrt(degrees / float(2 * gammaincinv(degrees / 2, 1.0 - SD_LIMIT)))
    share = 1.0 if num_control is None or design.paired else num_control / present
    looks = design.looks.after(present, num_control or present) if design.looks.declared > 1 else design.looks

    def resolves(total: int) -> bool:
        control = round(share * total)
        freedom = _degrees(total, control, num_compared, method, design.paired)
        critical = critical_at_look(method, control, (total,) * num_compared, freedom, alpha, looks, total)
        return critical * sd_limit * math.sqrt(1.0 / total + 1.0 / control) <= margin

    too_few, enough = MIN_SEEDS_EQUIVALENT - 1, MIN_SEEDS_EQUIVALENT
    while not resolves(enough):
        if enough >= MAX_SEEDS:
            return None
        too_few, enough = enough, min(2 * enough, MAX_SEEDS)
    while enough - too_few > 1:
        middle = (too_few + enough) // 2
        too_few, enough = (too_few, middle) if resolves(middle) else (middle, enough)
    return max(1, enough - present)


def _degrees(total: int, control: int, num_compared: int, method: Method, paired: bool) -> int:
    if method == "welch":
        return total - 1 if paired else total + control - 2
    return num_compared * (total - 1) if paired else num_compared * (total - 1) + control - 1
