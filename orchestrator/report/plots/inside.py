"""What probes saw inside the models: gate scores and first-token attention, by layer at the end and over training."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from orchestrator.report.plots.picture import ArmStyle, Picture, arm_styles, drawing, finish, legend_height
from orchestrator.store import LayerRow, mean_or_none

if TYPE_CHECKING:
    from matplotlib.axes import Axes

Reading = Callable[[LayerRow], float | None]

_CAPTION = (
    "Probes of the trials at each arm's best learning rate. Left: by layer, at the last probe that all seeds have; "
    "right: mean over layers, over training. Line: mean over seeds, band: from the lowest to the highest seed."
)


@dataclass(frozen=True)
class ArmProbes:
    """The probes of an arm's trials at its best learning rate, a tuple a seed."""

    arm: str
    seeds: tuple[tuple[LayerRow, ...], ...]


@dataclass(frozen=True)
class _Line:
    label: str
    arm: str
    probes: ArmProbes
    read: Reading


def inside_picture(name: str, arms: Sequence[ArmProbes], order: Sequence[str]) -> Picture | None:
    """None when nothing was probed; gates that have no scores leave their panels out."""
    probed = [one for one in arms if one.seeds and all(one.seeds)]
    if not probed:
        return None
    measures = [
        ("gate score", [line for one in probed for line in _gate_lines(one)]),
        (
            "first-token attention",
            [_Line(one.arm, one.arm, one, lambda row: row.first_token_attention) for one in probed],
        ),
    ]
    shown = [(label, lines) for label, lines in measures if lines]
    styles = arm_styles(order)
    heights = [max(2.7, legend_height(len(lines))) for _, lines in shown]
    with drawing(sum(heights) + 0.4) as figure:
        grid = figure.subplots(len(shown), 2, squeeze=False, sharey="row", height_ratios=heights)
        for (label, lines), (by_layer, over_training) in zip(shown, grid, strict=True):
            for line in lines:
                _draw(by_layer, _by_layer(line), styles[line.arm])
                _draw(over_training, _over_training(line), styles[line.arm], line.label)
            by_layer.set(ylabel=label)
            by_layer.xaxis.get_major_locator().set_params(integer=True)
            over_training.legend(loc="center left", bbox_to_anchor=(1.01, 0.5), fontsize=8)
        grid[-1, 0].set(xlabel="layer, from 1, after the last step")
        grid[-1, 1].set(xlabel="share of the schedule, %")
        return finish(figure, name, "Gate scores and first-token attention", _CAPTION)


def _gate_lines(arm: ArmProbes) -> list[_Line]:
    """A line a position; its name is said where there are several."""
    positions = list(dict.fromkeys(position for seed in arm.seeds for row in seed for position in row.gates))

    def reading(position: str) -> Reading:
        return lambda row: row.gates[position]["mean"] if position in row.gates else None

    label = "{0}" if len(positions) == 1 else "{0}, {1}"
    return [_Line(label.format(arm.arm, position), arm.arm, arm, reading(position)) for position in positions]


Points = dict[float, list[float]]
"""Values of the seeds by place; only places where all seeds have one."""


def _by_layer(line: _Line) -> Points:
    last = min(max(row.step for row in seed) for seed in line.probes.seeds)
    return _whole(
        [{float(row.layer): line.read(row) for row in seed if row.step == last} for seed in line.probes.seeds]
    )


def _over_training(line: _Line) -> Points:
    per_seed = []
    for seed in line.probes.seeds:
        fractions = dict.fromkeys(row.fraction for row in seed)
        per_seed.append(
            {100 * at: mean_or_none([line.read(row) for row in seed if row.fraction == at]) for at in fractions}
        )
    return _whole(per_seed)


def _whole(per_seed: Sequence[dict[float, float | None]]) -> Points:
    found: Points = {}
    for seed in per_seed:
        for place, value in seed.items():
            if value is not None:
                found.setdefault(place, []).append(value)
    return {place: values for place, values in sorted(found.items()) if len(values) == len(per_seed)}


def _draw(axes: Axes, points: Points, style: ArmStyle, label: str | None = None) -> None:
    x = list(points)
    axes.fill_between(
        x, [min(v) for v in points.values()], [max(v) for v in points.values()], color=style.colour, alpha=0.12, lw=0
    )
    axes.plot(
        x, [sum(v) / len(v) for v in points.values()], color=style.colour, linestyle=style.dashes, marker=style.marker,
        markersize=5, markeredgecolor="white", markeredgewidth=0.6, label=label,
    )  # fmt: skip
