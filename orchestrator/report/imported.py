"""Curves from elsewhere, told beside the verdicts: marked, measured as far as a file allows, and judged by nothing."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from statistics import fmean, stdev

from orchestrator.report.figures import NOTHING, delta_text, loss_text, spread_text
from orchestrator.report.tree import ImportedRow, Results
from orchestrator.store import Imported, ImportedCurve

UNVERIFIED = "imported, unverified"
IMPORTED_HEADINGS = ("imported, unverified", "curves", "seeds", "loss (nats)", "difference", "measured", "from")
IMPORTED_NOTE = (
    "imported curves are no part of any verdict: their data, tokenizer, schedule and seeds are what their files say, "
    "and nobody has checked it; a difference is to the baseline's mean, described, without an interval"
)


def with_imported(results: Results, given: Sequence[Imported]) -> Results:
    return replace(results, imported=tuple(_row(results, one) for one in given)) if given else results


def _row(results: Results, given: Imported) -> ImportedRow:
    split = "validation" if all(_has(curve, "validation") for curve in given.curves) else "training"
    losses = [_loss(curve, split, results.tail) for curve in given.curves]
    known = [loss for loss in losses if loss is not None]
    mean = fmean(known) if len(known) == len(losses) else None
    seeds = tuple(curve.seed for curve in given.curves if curve.seed is not None)
    return ImportedRow(
        name=given.name,
        num_curves=len(given.curves),
        seeds=seeds,
        split=split,
        loss_nats=mean,
        loss_sd_nats=stdev(known) if mean is not None and len(known) > 1 else None,
        delta_nats=_difference(results, mean if split == "validation" and len(seeds) == len(given.curves) else None),
        source=given.source,
        format=given.format,
        sha256=given.sha256,
        imported_at=given.imported_at.isoformat(timespec="seconds"),
    )


def _has(curve: ImportedCurve, split: str) -> bool:
    return any(point.split == split for point in curve.points)


def _loss(curve: ImportedCurve, split: str, tail: float) -> float | None:
    """The mean over the sweep's own tail, of the steps that the file has; None where one is not finite."""
    last = max(point.step for point in curve.points)
    ours = [point for point in curve.points if point.split == split]
    in_tail = [point.loss_nats for point in ours if point.step > (1.0 - tail) * last] or [ours[-1].loss_nats]
    finite = [loss for loss in in_tail if loss is not None and math.isfinite(loss)]
    return fmean(finite) if len(finite) == len(in_tail) else None


def _difference(results: Results, mean: float | None) -> float | None:
    """To the baseline of the only table; with several there is none to take."""
    if mean is None or len(results.tables) != 1:
        return None
    baseline = next(row for row in results.tables[0].rows if row.is_baseline)
    return None if baseline.loss_nats is None else mean - baseline.loss_nats


def imported_cells(row: ImportedRow) -> tuple[str, ...]:
    return (
        row.name,
        str(row.num_curves),
        ", ".join(map(str, row.seeds)) or "not known",
        f"{loss_text(row.loss_nats)} {spread_text(row.loss_sd_nats)}".rstrip(),
        delta_text(row.delta_nats) if row.delta_nats is not None else NOTHING,
        f"{row.split} loss",
        f"{row.source} ({row.format})",
    )
