"""Dunnett's two-sided critical value (Dunnett, JASA 50, 1955, pp. 1096-1121).

The surprise: it is integrated here and not taken from ``scipy.stats.dunnett``, whose quasi-random integration moves an
interval by up to 0.5 % with its random state; the tests hold the two against each other.
"""

from __future__ import annotations

import math
from functools import lru_cache

_NODES = 96
_REACH = 8.5
"""Standard deviations after which a normal tail (2e-17) is nothing in double precision."""


@lru_cache(maxsize=4096)
def critical_value(num_control: int, num_arms: tuple[int, ...], degrees_of_freedom: int, alpha: float) -> float:
    """Dunnett's two-sided critical value: all |t| of the arms stay below it with probability 1 - ``alpha``.

    ``num_arms`` are the arms' sample sizes. With one arm it is Student's t. Student's and Bonferroni's values bracket
    the root.
    """
    from scipy.optimize import brentq
    from scipy.special import stdtrit

    low = -float(stdtrit(degrees_of_freedom, alpha / 2))
    if len(num_arms) == 1:
        return low
    high = -float(stdtrit(degrees_of_freedom, alpha / 2 / len(num_arms)))
    loadings = tuple(math.sqrt(n / (n + num_control)) for n in num_arms)

    def excess(critical: float) -> float:
        return coverage(critical, loadings, degrees_of_freedom) - (1.0 - alpha)

    return float(brentq(excess, low * (1 - 1e-9), high * (1 + 1e-9), xtol=1e-10, rtol=1e-12))


def coverage(critical: float, loadings: tuple[float, ...], degrees_of_freedom: int) -> float:
    """Probability that every |t_i| <= ``critical`` under no effect (Dunnett 1955, the product form of the correlation).

    The numerators share the baseline's error z: given z and the SD's ratio s, they are independent normals, so the
    probability is a double integral over z and s, done by Gauss-Legendre. Where s is so large that all arms are
    inside for certain, the rest of the chi distribution is added in closed form.
    """
    import numpy as np
    from scipy.special import gammaincc, gammainccinv, gammaincinv, gammaln, ndtr, xlogy

    nodes, weights = np.polynomial.legendre.leggauss(_NODES)
    # The chi distribution as scipy.stats has it, whose import alone takes longer than reading a table's 10^5 trials.
    half = 0.5 * degrees_of_freedom
    root = math.sqrt(degrees_of_freedom)
    lowest = float(np.sqrt(2 * gammaincinv(half, 1e-16))) / root
    highest = float(np.sqrt(2 * gammainccinv(half, 1e-16))) / root
    top = min(highest, max(lowest, 2 * _REACH / critical))
    z = _REACH * nodes
    z_weights = _REACH * weights * np.exp(-0.5 * z**2) / math.sqrt(2 * math.pi)
    s = lowest + (top - lowest) * (nodes + 1) / 2
    log_scale = np.log(2) - 0.5 * np.log(2) * degrees_of_freedom - gammaln(half)
    density = np.exp(log_scale + xlogy(degrees_of_freedom - 1.0, s * root) - 0.5 * (s * root) ** 2)
    s_weights = (top - lowest) / 2 * weights * density * root
    inside, of_loading = np.ones((_NODES, _NODES)), {}
    for loading in loadings:
        if loading not in of_loading:
            residual = math.sqrt(1.0 - loading**2)
            shared, bound = loading * z[:, None], critical * s[None, :]
            of_loading[loading] = ndtr((shared + bound) / residual) - ndtr((shared - bound) / residual)
        inside *= of_loading[loading]
    return float(z_weights @ inside @ s_weights) + float(gammaincc(half, 0.5 * (top * root) ** 2))
