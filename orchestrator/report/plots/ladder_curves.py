"""Loss against size: every trial of a ladder, each arm's law, and the differences to the baseline."""

from __future__ import annotations

from statistics import fmean
from typing import TYPE_CHECKING, Any

from orchestrator.report.figures import flops_text
from orchestrator.report.ladder import UNITS, Ladder, Rung
from orchestrator.report.plots.picture import ArmStyle, Picture, arm_styles, drawing, finish, legend_height

if TYPE_CHECKING:
    from matplotlib.axes import Axes

    from orchestrator.scaling import ScalingLaw


def ladder_picture(name: str, ladder: Ladder) -> Picture | None:
    """None where no rung has losses."""
    rungs = [rung for rung in ladder.rungs if rung.losses_nats]
    if not rungs:
        return None
    arms = list(dict.fromkeys([ladder.baseline, *(rung.arm for rung in ladder.rungs)]))
    styles = arm_styles(arms)
    beside = _beyond([rung.size for rung in rungs]) ** (0.6 / len(arms))
    laws = {law.arm: law for law in ladder.laws.laws}
    with drawing(max(3.4, legend_height(len(arms)))) as figure:
        left, right = figure.subplots(1, 2)
        for arm in arms:
            own = [rung for rung in rungs if rung.arm == arm]
            if own:
                _arm(left, own, styles[arm], laws.get(arm))
                _differences(right, own, styles[arm], arms.index(arm) - len(arms) / 2, beside)
        right.axhline(0.0, color=styles[ladder.baseline].colour, linewidth=1)
        for axes, title in ((left, "loss, nats a token"), (right, "difference to the baseline, nats")):
            _scale(axes, rungs, ladder.baseline)
            axes.set_xlabel(UNITS[ladder.along])
            axes.set_title(title)
        figure.legend(handles=[_handle(arm, styles[arm]) for arm in arms], loc="outside right upper", fontsize=8)
        return finish(figure, name, "The ladder", _caption(bool(laws)))


def _caption(with_laws: bool) -> str:
    lines = " Lines: the law of each arm." if with_laws else " No law could be fitted; dotted: means, joined."
    return (
        "Final validation loss at each arm's own best learning rate. Small: a trial; large: the mean of a rung."
        f"{lines} Right: the verdicts' differences with their intervals, simultaneous over a rung's arms; arms are set "
        "beside each other for legibility."
    )


def _arm(axes: Axes, rungs: list[Rung], style: ArmStyle, law: ScalingLaw | None) -> None:
    import numpy as np

    for rung in rungs:
        axes.plot(
            [rung.size] * len(rung.losses_nats), rung.losses_nats, linestyle="none", marker=style.marker, markersize=3,
            markerfacecolor="none", markeredgecolor=style.colour, markeredgewidth=0.8, alpha=0.8,
        )  # fmt: skip
    sizes, means = [rung.size for rung in rungs], [fmean(rung.losses_nats) for rung in rungs]
    mark: dict[str, Any] = {
        "marker": style.marker,
        "color": style.colour,
        "markersize": 6.5,
        "markeredgecolor": "white",
    }
    axes.plot(sizes, means, linestyle="none" if law else (0, (1, 2)), linewidth=0.9, **mark)
    if law is not None:
        x = np.geomspace(sizes[0] / _beyond(sizes), sizes[-1] * _beyond(sizes), 80)
        axes.plot(x, [law.loss_nats(float(size)) for size in x], color=style.colour, linestyle=style.dashes)


def _differences(axes: Axes, rungs: list[Rung], style: ArmStyle, place: float, beside: float) -> None:
    for rung in rungs:
        if rung.delta_nats is None:
            continue
        x = rung.size * beside**place
        if rung.low_nats is not None and rung.high_nats is not None:
            axes.plot([x, x], [rung.low_nats, rung.high_nats], color=style.colour, linewidth=1.4)
        axes.plot(
            [x], [rung.delta_nats], marker=style.marker, color=style.colour, markersize=6, markeredgecolor="white"
        )


def _scale(axes: Axes, rungs: list[Rung], baseline: str) -> None:
    """Ticks at the rungs of the baseline, or of the first arm where it has none."""
    from matplotlib.ticker import FixedLocator, FuncFormatter, NullLocator

    sizes = [rung.size for rung in rungs]
    shown = next((arm for arm in (baseline, rungs[0].arm) if any(rung.arm == arm for rung in rungs)), baseline)
    axes.set_xscale("log")
    axes.set_xlim(min(sizes) / _beyond(sizes), max(sizes) * _beyond(sizes))
    ticks = [rung.size for rung in rungs if rung.arm == shown]
    axes.xaxis.set_major_locator(FixedLocator(ticks[:: -(-len(ticks) // 6)]))
    axes.xaxis.set_minor_locator(NullLocator())
    axes.xaxis.set_major_formatter(FuncFormatter(lambda size, _: flops_text(float(f"{size:.6g}"))))


def _beyond(sizes: list[float]) -> float:
    """Axes and laws go on beyond the rungs by this factor."""
    return max(1.1, float((max(sizes) / min(sizes)) ** 0.06))


def _handle(arm: str, style: ArmStyle) -> Any:
    from matplotlib.lines import Line2D

    return Line2D([], [], color=style.colour, linestyle=style.dashes, marker=style.marker, label=arm)
