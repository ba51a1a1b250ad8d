"""The interval of a chance, from how often it came true."""

from __future__ import annotations


def clopper_pearson(count: int, number: int, level: float = 0.95) -> tuple[float, float]:
    """Exact interval of Clopper and Pearson (Biometrika 26, 1934) for ``count`` of ``number``, which is at least 1.

    In its closed form by the beta distribution."""
    from scipy.special import betaincinv

    outside = (1.0 - level) / 2.0
    low = float(betaincinv(count, number - count + 1, outside)) if count else 0.0
    high = float(betaincinv(count + 1, number - count, 1.0 - outside)) if count < number else 1.0
    return low, high
