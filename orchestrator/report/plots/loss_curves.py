"""Loss over training, an arm a line with the band of its seeds; below, the difference to the baseline."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from orchestrator.report.plots.picture import ArmStyle, Picture, arm_styles, drawing, finish, legend_height
from orchestrator.store import Curve, Imported

if TYPE_CHECKING:
    import numpy as np
    from matplotlib.axes import Axes
    from numpy.typing import NDArray

    Floats = NDArray[np.float64]

NUM_BINS = 60
"""A curve is averaged over so many equal parts of the schedule, or fewer steps: that smooths it and keeps it light."""

SHOWN_FROM = 0.08
"""What comes earlier in the schedule does not set the height of the plot: the first steps fall by nats."""


@dataclass(frozen=True)
class ArmCurves:
    """An arm's trials at its best learning rate, by seed."""

    arm: str
    curves: tuple[Curve, ...]


def curves_picture(
    name: str, arms: Sequence[ArmCurves], baseline: str, order: Sequence[str], foreign: Sequence[Imported] = ()
) -> Picture | None:
    """``order``: all arms of the table, whose looks are the same in every picture. None without any curve.

    ``foreign``: curves from elsewhere, thin and grey, each over its own steps."""
    drawn = [one for one in arms if any(curve.steps for curve in one.curves)]
    if not drawn:
        return None
    styles = arm_styles(order)
    reference = _validations(next((one for one in drawn if one.arm == baseline), None))
    others = [one for one in drawn if one.arm != baseline and reference]
    with drawing(max(6.6 if others else 4.0, legend_height(len(drawn) + len(foreign)))) as figure:
        grid = figure.subplots(
            2 if others else 1, 1, sharex=True, squeeze=False, height_ratios=[3, 2][: 1 + bool(others)]
        )
        top: Axes = grid[0, 0]
        _losses(top, drawn, styles)
        _foreign(top, foreign)
        if others:
            _differences(grid[1, 0], others, reference, styles)
        grid[-1, 0].set(xlabel="share of the schedule, %", xlim=(0, 101))
        figure.legend(*top.get_legend_handles_labels(), loc="outside right upper")
        return finish(figure, name, "Loss over training", _caption(len(others) > 0, baseline, bool(foreign)))


def _caption(has_differences: bool, baseline: str, has_foreign: bool) -> str:
    imported = (
        " Grey: imported and unverified, each over its own steps; validation losses, or training losses where a file "
        "has no others."
        if has_foreign
        else ""
    )
    below = (
        f" Below: validation loss less the mean of {baseline} at the same share of the schedule; under the line is "
        "better."
        if has_differences
        else ""
    )
    return (
        f"Training loss at each arm's best learning rate, averaged over {NUM_BINS} equal parts of the schedule; line: "
        "mean over seeds, band: from the lowest to the highest seed, markers: mean validation loss on the slice."
        + below
        + imported
    )


def _losses(axes: Axes, arms: Sequence[ArmCurves], styles: dict[str, ArmStyle]) -> None:
    import numpy as np

    heights: list[float] = []
    for one in arms:
        style = styles[one.arm]
        table = np.array([_binned(curve) for curve in one.curves if curve.steps])
        centres = (np.arange(NUM_BINS) + 0.5) * 100 / NUM_BINS
        here = np.isfinite(table).all(axis=0)
        x, mean = centres[here], table[:, here].mean(axis=0)
        axes.fill_between(
            x, table[:, here].min(axis=0), table[:, here].max(axis=0), color=style.colour, alpha=0.15, lw=0
        )
        points = _validations(one)
        axes.plot(x, mean, color=style.colour, linestyle=style.dashes)
        axes.plot(
            [100 * at for at in points], [np.mean(losses) for losses in points.values()],
            color=style.colour, marker=style.marker, linestyle="none", markersize=5, markeredgecolor="white",
            markeredgewidth=0.6,
        )  # fmt: skip
        # Off the plot: a legend with line and marker together.
        axes.plot([], [], color=style.colour, linestyle=style.dashes, marker=style.marker, markersize=5, label=one.arm)
        heights += [*mean[x > 100 * SHOWN_FROM], *(loss for at in points if at > SHOWN_FROM for loss in points[at])]
    if heights:
        low, high = min(heights), max(heights)
        pad = 0.06 * (high - low) or 0.1
        axes.set_ylim(low - pad, high + pad)
    axes.set(ylabel="loss, nats a token")


def _foreign(axes: Axes, foreign: Sequence[Imported]) -> None:
    """They may lie outside of what the sweep's own curves show."""
    for number, one in enumerate(foreign):
        for index, curve in enumerate(one.curves):
            last = max(point.step for point in curve.points) or 1
            split = "validation" if any(point.split == "validation" for point in curve.points) else "training"
            points = [(p.step, p.loss_nats) for p in curve.points if p.split == split and p.loss_nats is not None]
            axes.plot(
                [100 * step / last for step, _ in points], [loss for _, loss in points],
                color="0.45", linewidth=1, linestyle=("--", ":", "-.")[number % 3],
                label=f"{one.name} (imported, unverified)" if index == 0 else None,
            )  # fmt: skip


def _binned(curve: Curve) -> Floats:
    """Mean loss in each part of the schedule; NaN where there is no step, or one without a finite loss."""
    import numpy as np

    sums, counts = np.zeros(NUM_BINS), np.zeros(NUM_BINS)
    for row in curve.steps:
        place = min(int(row.fraction * NUM_BINS), NUM_BINS - 1)
        sums[place] += math.nan if row.loss_nats is None else row.loss_nats
        counts[place] += 1
    with np.errstate(invalid="ignore", divide="ignore"):
        return sums / counts


def _validations(arm: ArmCurves | None) -> dict[float, list[float]]:
    """Losses of the seeds by share of the schedule, where all seeds have one."""
    found: dict[float, list[float]] = {}
    for curve in arm.curves if arm else ():
        for row in curve.validations:
            if row.split == "slice" and row.loss_nats is not None:
                found.setdefault(row.fraction, []).append(row.loss_nats)
    number = len(arm.curves) if arm else 0
    return {at: losses for at, losses in sorted(found.items()) if len(losses) == number}


def _differences(
    axes: Axes, arms: Sequence[ArmCurves], reference: dict[float, list[float]], styles: dict[str, ArmStyle]
) -> None:
    import numpy as np

    heights: list[float] = []
    for one in arms:
        style, points = styles[one.arm], _validations(one)
        shared = [at for at in points if at in reference]
        if not shared:
            continue
        differences: list[Any] = [np.array(points[at]) - np.mean(reference[at]) for at in shared]
        x = [100 * at for at in shared]
        low, high = ([float(pick(d)) for d in differences] for pick in (np.min, np.max))
        axes.fill_between(x, low, high, color=style.colour, alpha=0.12, lw=0)
        axes.plot(
            x, [d.mean() for d in differences], color=style.colour, linestyle=style.dashes, marker=style.marker,
            markersize=5, markeredgecolor="white", markeredgewidth=0.6,
        )  # fmt: skip
        heights += [value for at, *pair in zip(shared, low, high, strict=True) if at > SHOWN_FROM for value in pair]
    axes.axhline(0, color="black", linewidth=1)
    if heights:
        low_end, high_end = min(0.0, *heights), max(0.0, *heights)
        pad = 0.08 * (high_end - low_end) or 0.01
        axes.set_ylim(low_end - pad, high_end + pad)
    axes.set(ylabel="difference, nats")
