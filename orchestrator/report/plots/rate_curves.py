"""Loss against the learning rate, a panel an arm: seeds, means, the parabola with its optimum, and what diverged."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from orchestrator.report.figures import lr_text
from orchestrator.report.plots.picture import ArmStyle, Picture, arm_styles, drawing, finish, panels
from orchestrator.report.tree import ArmRow
from orchestrator.scaling import Optimum

if TYPE_CHECKING:
    from matplotlib.axes import Axes

BEYOND = 1.6
"""The axis goes on beyond the rates by this factor."""

FAR = 3.0
"""An optimum further outside the rates than this factor is told, not drawn: it would squeeze what was measured."""

_INTERVAL_COLOUR = "#56B4E9"
_DIVERGED_COLOUR = "#D55E00"

_CAPTION = (
    "Final validation loss of the trials that choose the learning rate. Small: a seed; large: mean of a rate all of "
    "whose seeds are complete; ring: the rate of the verdict; line: the parabola in log LR; dashed line and shade: its "
    "optimum with the 95 % interval by Fieller; crosses on top: seeds that diverged, of how many."
)


def rates_picture(name: str, rows: Sequence[ArmRow]) -> Picture | None:
    """None where no arm has more than one rate, or nothing ended."""
    shown = [row for row in rows if any(point.losses_nats or point.num_diverged for point in row.points)]
    if not shown or all(len(row.points) < 2 for row in shown):
        return None
    styles = arm_styles([row.arm for row in rows])
    num_rows, num_columns = panels(len(shown), 4)
    rates = sorted({point.lr for row in shown for point in row.points})
    with drawing(2.35 * num_rows + 0.35) as figure:
        grid = figure.subplots(num_rows, num_columns, sharex=True, sharey=True, squeeze=False)
        for axes, row in zip(grid.flat, shown, strict=False):
            _arm(axes, row, styles[row.arm], rates)
        for axes in grid.flat[len(shown) :]:
            axes.remove()
        _scale(grid.flat[0], shown, rates)
        figure.supxlabel("learning rate", fontsize=9)
        figure.supylabel("loss, nats a token", fontsize=9)
        return finish(figure, name, "Loss against the learning rate", _CAPTION)


def _scale(axes: Axes, rows: Sequence[ArmRow], rates: Sequence[float]) -> None:
    from matplotlib.ticker import FixedLocator, FuncFormatter, NullLocator

    inside = [row.optimum.lr for row in rows if row.optimum and rates[0] / FAR <= row.optimum.lr <= rates[-1] * FAR]
    ends = min([*rates, *inside]) / BEYOND, max([*rates, *inside]) * BEYOND
    axes.set_xscale("log")
    axes.set_xlim(*ends)
    step = -(-len(rates) // 6)
    axes.xaxis.set_major_locator(FixedLocator(list(rates[::step])))
    axes.xaxis.set_minor_locator(NullLocator())
    axes.xaxis.set_major_formatter(FuncFormatter(lambda lr, _: lr_text(float(f"{lr:.6g}"))))
    losses = [loss for row in rows for point in row.points for loss in point.losses_nats]
    if losses:
        pad = 0.1 * (max(losses) - min(losses)) or 0.1
        # Room on top for what diverged, and below for what is said of the optimum.
        above = 2.4 if any(point.num_diverged for row in rows for point in row.points) else 1.0
        below = 1.8 if any(row.optimum for row in rows) else 1.0
        axes.set_ylim(min(losses) - below * pad, max(losses) + above * pad)


def _arm(axes: Axes, row: ArmRow, style: ArmStyle, rates: Sequence[float]) -> None:
    if row.optimum is not None:
        _optimum(axes, row.optimum, rates)
    for point in row.points:
        axes.plot(
            [point.lr] * len(point.losses_nats), point.losses_nats, linestyle="none", marker=style.marker, markersize=3,
            markerfacecolor="none", markeredgecolor=style.colour, markeredgewidth=0.8, alpha=0.8,
        )  # fmt: skip
        if point.num_diverged:
            _diverged(axes, point.lr, f"{point.num_diverged} of {point.num_seeds}")
    means = [(point.lr, point.mean_loss_nats) for point in row.points if point.mean_loss_nats is not None]
    if means:
        mark: dict[str, Any] = {"linestyle": "none", "marker": style.marker, "color": style.colour}
        axes.plot(*zip(*means, strict=True), markersize=6.5, markeredgecolor="white", markeredgewidth=0.7, **mark)
    best = [mean for lr, mean in means if lr == row.best_lr]
    if row.best_lr is not None and best:
        axes.plot(
            [row.best_lr], best, linestyle="none", marker="o", markersize=12, markerfacecolor="none",
            markeredgecolor="black", markeredgewidth=1.2,
        )  # fmt: skip
    axes.set_title(row.arm, fontweight="bold" if row.is_baseline else "normal")
    axes.tick_params(labelsize=7.5)


def _optimum(axes: Axes, found: Optimum, rates: Sequence[float]) -> None:
    import numpy as np

    near = rates[0] / FAR <= found.lr <= rates[-1] * FAR
    ends = [*found.fitted, *([found.lr] if near else [])]
    x = np.geomspace(min(ends), max(ends), 60)
    axes.plot(x, [found.loss_at(float(lr)) for lr in x], color="#555555", linewidth=1)
    if near:
        axes.axvline(found.lr, color="#555555", linewidth=1, linestyle=(0, (4, 2)))
    if found.low is not None or found.high is not None:
        low, high = found.low or rates[0] / 1e3, found.high or rates[-1] * 1e3
        axes.axvspan(max(low, rates[0] / 1e3), min(high, rates[-1] * 1e3), color=_INTERVAL_COLOUR, alpha=0.25, lw=0)
    axes.text(
        0.98, 0.03, _told(found), transform=axes.transAxes, ha="right", va="bottom", fontsize=6.5, color="#333333",
        bbox={"facecolor": "white", "alpha": 0.75, "edgecolor": "none", "pad": 1},
    )  # fmt: skip


def _told(found: Optimum) -> str:
    def rounded(lr: float | None, none: str) -> str:
        return none if lr is None else lr_text(float(f"{lr:.2g}"))

    if found.low is None and found.high is None:
        return f"{rounded(found.lr, '')}, interval unbounded"
    return f"{rounded(found.lr, '')} [{rounded(found.low, '0')}, {rounded(found.high, 'no end')}]"


def _diverged(axes: Axes, lr: float, told: str) -> None:
    where = axes.get_xaxis_transform()
    axes.plot([lr], [0.93], transform=where, marker="x", markersize=7, markeredgewidth=1.8, color=_DIVERGED_COLOUR)
    axes.text(lr, 0.86, told, transform=where, ha="center", va="top", fontsize=6.5, color="#333333")
