"""The pictures of what a finished trial's probes saw inside its model, by layer."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

from orchestrator.store import LayerRow

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def layer_plots(rows: Sequence[LayerRow], title: str) -> dict[str, Figure]:
    """Figures by file name, of ``rows`` by step and layer; empty without a probe. Heat maps show the last probe.

    A number that was not finite leaves its cell or point empty.
    """
    if not rows:
        return {}
    last = [row for row in rows if row.step == rows[-1].step]
    title = f"{title}\nafter step {last[0].step}"
    plots = {
        "first_token_attention.png": _heat_map(
            [row.heads for row in last], title, "head", "attention on the first token", (0.5, len(last[0].heads) + 0.5)
        ),
        "max_activation.png": _max_activation(rows, title.partition("\n")[0]),
    }
    for position, gate in last[0].gates.items():
        histograms = [row.gates[position]["histogram"] for row in last]
        bins = next((len(histogram) for histogram in histograms if histogram), 0)
        if bins:
            table = [histogram or [None] * bins for histogram in histograms]
            label = f"score of the gate at {position}"
            plots[f"gate_scores_{position}.png"] = _heat_map(
                table, title, label, "share of scores", (gate["low"], gate["high"])
            )
    return plots


def _heat_map(
    table: Sequence[Sequence[float | None]], title: str, xlabel: str, label: str, ends: tuple[float, float]
) -> Figure:
    """``table`` is [layer][column]; the first layer is at the bottom, columns go evenly from end to end."""
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

    figure = Figure(figsize=(6, 1.6 + min(6.0, 0.3 * len(table) + 1.0)), dpi=80, layout="constrained")
    axes = figure.add_subplot()
    values = [[math.nan if value is None else value for value in line] for line in table]
    extent = (*ends, 0.5, len(table) + 0.5)
    image = axes.imshow(values, origin="lower", aspect="auto", interpolation="nearest", vmin=0.0, extent=extent)
    figure.colorbar(image, ax=axes, label=label)
    axes.set(title=title, xlabel=xlabel, ylabel="layer")
    axes.yaxis.set_major_locator(MaxNLocator(integer=True))
    if xlabel == "head":
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    return figure


def _max_activation(rows: Sequence[LayerRow], title: str) -> Figure:
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

    figure = Figure(figsize=(6, 3.6), dpi=80, layout="constrained")
    axes = figure.add_subplot()
    for step in dict.fromkeys(row.step for row in rows):
        line = [(row.layer, row.max_activation) for row in rows if row.step == step]
        values = [math.nan if value is None else value for _, value in line]
        axes.plot([layer for layer, _ in line], values, marker="o", markersize=3, label=f"step {step}")
    axes.set(title=title, xlabel="layer", ylabel="largest activation after the layer")
    axes.set_yscale("log")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.legend(fontsize="small")
    return figure
