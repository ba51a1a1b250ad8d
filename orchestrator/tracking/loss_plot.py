"""The small picture of a finished trial: training and validation loss by tokens."""

from __future__ import annotations

from typing import TYPE_CHECKING

from orchestrator.store import Curve

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def loss_plot(curve: Curve, title: str) -> Figure | None:
    """A figure without pyplot, whose global state is not for threads; None when there is no loss to show."""
    from matplotlib.figure import Figure

    training = [(row.tokens, row.loss_nats) for row in curve.steps if row.loss_nats is not None]
    if not training:
        return None
    stride = -(-len(training) // 2_000)
    figure = Figure(figsize=(6, 3.6), dpi=80, layout="constrained")
    axes = figure.add_subplot()
    axes.plot(*zip(*training[::stride], strict=True), linewidth=0.9, label="training")
    for split, marker in (("slice", "o"), ("full", "s")):
        found = [(v.tokens, v.loss_nats) for v in curve.validations if v.split == split and v.loss_nats is not None]
        if found:
            name = "validation" if split == "slice" else "validation, whole split"
            axes.plot(*zip(*found, strict=True), marker=marker, markersize=4, linestyle="--", label=name)
    axes.set(title=title, xlabel="tokens", ylabel="loss, nats a token")
    axes.legend()
    return figure
