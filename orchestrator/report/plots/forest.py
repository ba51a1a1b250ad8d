"""The forest plot: every arm's difference to the baseline with its simultaneous interval, against the margin."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from orchestrator.report.figures import NOTHING, delta_text, interval_text
from orchestrator.report.plots.picture import Picture, drawing, finish
from orchestrator.report.terminal import verdict_text
from orchestrator.report.tree import ArmRow

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_MARKS = {"better": ("#0072B2", "<"), "worse": ("#D55E00", ">"), "equivalent": ("#009E73", "D")}
_OTHER = ("#555555", "o")


def effects_picture(name: str, rows: Sequence[ArmRow], baseline: str, margin_nats: float | None) -> Picture | None:
    """None where no arm has a difference."""
    others = [row for row in rows if not row.is_baseline]
    if not any(row.delta_nats is not None for row in others):
        return None
    with drawing(0.36 * len(others) + 1.15) as figure:
        axes: Axes = figure.subplots()
        if margin_nats is not None:
            axes.axvspan(-margin_nats, margin_nats, color="#999999", alpha=0.22, lw=0)
        axes.axvline(0, color="black", linewidth=1)
        for place, row in enumerate(others):
            _row(axes, place, row)
        axes.set(ylim=(len(others) - 0.4, -0.6), xlabel=f"loss less that of {baseline}, nats: left is better")
        axes.set_yticks(range(len(others)), [row.arm for row in others])
        axes.tick_params(axis="y", length=0)
        axes.grid(visible=False, axis="y")
        return finish(figure, name, "Effects", _caption(margin_nats))


def _row(axes: Axes, place: int, row: ArmRow) -> None:
    colour, marker = _MARKS.get(row.decision.partition(",")[0], _OTHER)
    if row.delta_nats is not None:
        if row.low_nats is not None and row.high_nats is not None:
            axes.plot([row.low_nats, row.high_nats], [place, place], color=colour, linewidth=2)
        filled = colour if row.low_nats is not None else "white"
        axes.plot(
            [row.delta_nats],
            [place],
            linestyle="none",
            marker=marker,
            markersize=7,
            color=colour,
            markerfacecolor=filled,
        )
    number = NOTHING if row.delta_nats is None else delta_text(row.delta_nats)
    figures = f"{number} {interval_text(row.low_nats, row.high_nats)}".strip()
    axes.annotate(
        f"{figures}   {verdict_text(row)}", (1.01, place), xycoords=("axes fraction", "data"), va="center", fontsize=8
    )


def _caption(margin_nats: float | None) -> str:
    band = "" if margin_nats is None else f"; grey band: the margin of {margin_nats:g} nats"
    return (
        "Difference to the baseline at each arm's own best learning rate; line: simultaneous interval (none where "
        f"there is no spread to judge by){band}; triangles point to better or worse, a diamond is equivalent, a circle "
        "is open."
    )
