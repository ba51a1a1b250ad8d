"""A figure made ready: SVG whose text is text, and a PNG. The same data give the same bytes.

The surprise: names are never read as mathematics. A ``$`` in one would else become a formula, or an error.
"""

from __future__ import annotations

import io
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from matplotlib.figure import Figure

PNG_DOTS_PER_INCH = 144
WIDTH_INCHES = 9.6

_SETTINGS: Any = {  # Matplotlib types keys as literals in some versions
    "text.parse_math": False,
    "svg.fonttype": "none",
    "font.family": "sans-serif",
    "font.sans-serif": ["DejaVu Sans", "Verdana", "Helvetica", "Arial"],
    "font.size": 9,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "axes.titlesize": 9.5,
    "axes.titlelocation": "left",
    "grid.color": "#dddddd",
    "grid.linewidth": 0.6,
    "legend.frameon": False,
    "lines.linewidth": 1.4,
    "path.simplify": True,
}

# Okabe and Ito (2008), told apart in every common kind of colour blindness; their yellow is too faint on white.
_COLOURS = ("#000000", "#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9")
_DASHES: tuple[Any, ...] = ("-", (0, (5, 1.5)), (0, (1.2, 1.2)), (0, (6, 1.5, 1.2, 1.5)), (0, (3, 1, 1, 1, 1, 1)))
_MARKERS = ("o", "s", "^", "D", "v", "P", "<", "h", ">")  # no cross: that is what diverged


@dataclass(frozen=True)
class Picture:
    """``name`` is that of its file, without an ending. ``svg`` is one element, to be put into a page as it is."""

    name: str
    title: str
    caption: str
    svg: str
    png: bytes


@dataclass(frozen=True)
class ArmStyle:
    """Colour, dashes and marker: each tells an arm from its neighbours by itself."""

    colour: str
    dashes: Any
    marker: str


def arm_styles(arms: Sequence[str]) -> dict[str, ArmStyle]:
    """The first, the baseline, is black and unbroken. The cycles are of coprime lengths: 315 arms differ."""
    return {
        arm: ArmStyle(_COLOURS[i % len(_COLOURS)], _DASHES[i % len(_DASHES)], _MARKERS[i % len(_MARKERS)])
        for i, arm in enumerate(arms)
    }


@contextmanager
def drawing(height_inches: float, width_inches: float = WIDTH_INCHES) -> Iterator[Figure]:
    """An empty figure, without pyplot and its global state. Draw and ``finish`` it inside the block."""
    import matplotlib
    from matplotlib.figure import Figure

    with matplotlib.rc_context(_SETTINGS):
        yield Figure(figsize=(width_inches, height_inches), layout="constrained")


def finish(figure: Figure, name: str, title: str, caption: str) -> Picture:
    import matplotlib

    as_svg, as_png = io.StringIO(), io.BytesIO()
    # Ids within the SVG come from this salt: two pictures of a page must not share a clip path.
    with matplotlib.rc_context({"svg.hashsalt": name}):
        figure.savefig(as_svg, format="svg", metadata={"Date": None, "Creator": None, "Format": None, "Type": None})
    figure.savefig(as_png, format="png", dpi=PNG_DOTS_PER_INCH, metadata={"Software": None})
    return Picture(name, title, caption, _element(as_svg.getvalue()), as_png.getvalue())


def _element(document: str) -> str:
    """Without the XML declaration and the document type, which a page has no place for."""
    return document[document.index("<svg") :]


def legend_height(number: int) -> float:
    """Inches that a legend of so many lines takes: a figure lower than that would shrink its plots to nothing."""
    return 0.2 * number + 0.4


def panels(number: int, most_columns: int) -> tuple[int, int]:
    """Rows and columns for so many panels: columns are few first, then even."""
    rows = -(-number // most_columns)
    return rows, -(-number // rows)
