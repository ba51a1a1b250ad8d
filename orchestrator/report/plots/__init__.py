"""The pictures of a sweep, by Matplotlib: legible without colour, each as SVG for a page and as PNG beside it."""

from orchestrator.report.plots.forest import effects_picture
from orchestrator.report.plots.inside import ArmProbes, inside_picture
from orchestrator.report.plots.ladder_curves import ladder_picture
from orchestrator.report.plots.loss_curves import ArmCurves, curves_picture
from orchestrator.report.plots.picture import Picture
from orchestrator.report.plots.rate_curves import rates_picture

__all__ = [
    "ArmCurves",
    "ArmProbes",
    "Picture",
    "curves_picture",
    "effects_picture",
    "inside_picture",
    "ladder_picture",
    "rates_picture",
]
