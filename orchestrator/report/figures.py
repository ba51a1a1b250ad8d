"""Numbers as readers see them. Shortened, never cut: a figure that does not fit goes to another line."""

from __future__ import annotations

import textwrap
from collections.abc import Mapping

NOTHING = "-"


def lr_text(lr: float | None) -> str:
    """``4e-3``, ``0.5``, ``1``: up to six digits, without padding zeros."""
    if lr is None:
        return NOTHING
    if lr >= 0.1:
        return f"{lr:g}"
    mantissa, exponent = f"{lr:.5e}".split("e")
    return f"{mantissa.rstrip('0').rstrip('.')}e{int(exponent)}"


def loss_text(value: float | None) -> str:
    return NOTHING if value is None else f"{value:.4f}"


def perplexity_text(value: float | None) -> str:
    return NOTHING if value is None else f"{value:.5g}"


def spread_text(sd: float | None) -> str:
    return "" if sd is None else f"±{sd:.4f}"


def delta_text(value: float | None) -> str:
    return NOTHING if value is None else f"{value:+.4f}"


def interval_text(low: float | None, high: float | None) -> str:
    return "" if low is None or high is None else f"[{low:+.4f}, {high:+.4f}]"


def count_text(value: float | None) -> str:
    """Exact below ten million, then to three digits: ``905,216``, ``1.72 B``."""
    if value is None:
        return NOTHING
    if value < 10_000_000:
        return f"{value:,.0f}"
    for unit, size in (("M", 1e6), ("B", 1e9), ("T", 1e12)):
        if value < 999.5 * size:
            return f"{value / size:.3g} {unit}"
    return f"{value:.2e}"


def flops_text(value: float | None) -> str:
    return NOTHING if value is None else f"{value:.3g}" if value < 1000 else f"{value:.2e}".replace("e+", "e")


def memory_text(size: float) -> str:
    """``131 MiB``, ``61.2 GiB``: three digits."""
    for unit in ("KiB", "MiB"):
        size /= 1024
        if size < 999.5:
            return f"{size:.3g} {unit}"
    size /= 1024
    return f"{size:.3g} GiB" if size < 999.5 else f"{size:,.0f} GiB"


def states_text(counts: Mapping[str, int], separator: str = ", ") -> str:
    """``4 complete, 2 diverged``."""
    return separator.join(f"{count:,} {state.lower()}" for state, count in counts.items()) or "none"


def axis_text(value: object) -> str:
    """As the sweep file writes it."""
    if value is None:
        return "null"
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, float):
        return lr_text(value) if 0 < value < 0.1 else f"{value:g}"
    return str(value)


def axes_text(axes: Mapping[str, object]) -> str:
    """``model.preset = cpu-1m, train.tokens = 81920``."""
    return ", ".join(f"{name} = {axis_text(value)}" for name, value in axes.items())


def plural(count: int, noun: str) -> str:
    return f"{count:,} {noun}" if count == 1 else f"{count:,} {noun}s"


def wrapped(text: str, width: int, indent: int = 2) -> list[str]:
    """Lines of at most ``width`` (and never under 20) that break between words only, indented from the second on."""
    return textwrap.wrap(
        text, max(width, 20), subsequent_indent=" " * indent, break_long_words=False, break_on_hyphens=False
    )
