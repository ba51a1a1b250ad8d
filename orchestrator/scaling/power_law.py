"""Many fits at once of loss = E + A * (size / reference)^-alpha, as a bootstrap needs them. Pure numbers.

The objective is that of Hoffmann et al. 2022 (arXiv 2203.15556, appendix D.3): Huber loss on the difference of
logarithms, from several starts. Theirs has delta 1e-3; ours is 1.345 SD of the seeds' noise (Huber 1981) and at least
that, since far below the noise it is a median, whose bootstrap covers too little. The surprise: the minimiser is ours
(Levenberg and Marquardt's with Huber's weights), since SciPy's fits one data set a call and a ladder needs hundreds; a
test holds it to SciPy's.
"""

from __future__ import annotations

from typing import Any

import numpy as np

SMALLEST_DELTA = 1e-3
_STARTS = [(floor, exponent) for floor in (0.3, 0.7, 0.95) for exponent in (0.1, 0.3, 0.8)]
"""The floor as a share of the lowest loss, and the exponent."""
EXPONENTS = (0.005, 5.0)
"""What a fit may reach; at an end the data do not tell."""
_ITERATIONS = 60

Array = np.ndarray[Any, np.dtype[np.float64]]
Indices = np.ndarray[Any, np.dtype[np.intp]]


def fit_many(log_sizes: Array, arms: Indices, losses: Array, delta: float = SMALLEST_DELTA) -> Array:
    """(data sets, 2 + arms): log E, log alpha, log A of each arm; one E and one alpha for all arms.

    ``log_sizes`` and ``arms`` (from 0): (trials,), of logarithms relative to the reference; ``losses``: (data sets,
    trials), finite and above 0. The first data set is fitted from all starts, the others from where that one ended.
    """
    first = losses[:1]
    starts = np.array([_start(log_sizes, arms, first[0], *start) for start in _STARTS])
    found, costs = _descend(starts, log_sizes, arms, np.repeat(first, len(starts), axis=0), delta)
    best = found[int(np.argmin(costs))]
    if len(losses) == 1:
        return np.asarray(best[None])
    others, _ = _descend(np.repeat(best[None], len(losses) - 1, axis=0), log_sizes, arms, losses[1:], delta)
    return np.concatenate([best[None], others])


def log_losses(parameters: Array, log_sizes: Array, arms: Indices) -> Array:
    """(data sets, trials)."""
    exponent = np.exp(parameters[:, 1:2])
    return np.asarray(np.logaddexp(parameters[:, :1], parameters[:, 2 + arms] - exponent * log_sizes))


def _costs(residuals: Array, delta: float) -> Array:
    size = np.abs(residuals)
    return np.asarray(np.where(size <= delta, size**2 / 2, delta * (size - delta / 2)).sum(axis=1), dtype=float)


def _start(log_sizes: Array, arms: Indices, losses: Array, floor_share: float, exponent: float) -> Array:
    floor = floor_share * losses.min()
    above = np.log(losses - floor) + exponent * log_sizes
    amplitudes = [above[arms == arm].mean() for arm in range(int(arms.max()) + 1)]
    return np.array([np.log(floor), np.log(exponent), *amplitudes])


def _descend(parameters: Array, log_sizes: Array, arms: Indices, losses: Array, delta: float) -> tuple[Array, Array]:
    targets, one_hot = np.log(losses), np.eye(int(arms.max()) + 1)[arms]
    low = np.array([-20.0, np.log(EXPONENTS[0]), *[-40.0] * one_hot.shape[1]])
    high = np.array([20.0, np.log(EXPONENTS[1]), *[40.0] * one_hot.shape[1]])
    parameters, damping = parameters.copy(), np.full(len(parameters), 1e-3)
    predicted = log_losses(parameters, log_sizes, arms)
    costs = _costs(predicted - targets, delta)
    eye = np.eye(parameters.shape[1])
    for _ in range(_ITERATIONS):
        residuals = predicted - targets
        floor_share = np.exp(parameters[:, :1] - predicted)
        slope = -(1 - floor_share) * np.exp(parameters[:, 1:2]) * log_sizes
        jacobian = np.concatenate(
            [floor_share[..., None], slope[..., None], (1 - floor_share)[..., None] * one_hot], axis=2
        )
        weights = np.minimum(1.0, delta / np.maximum(np.abs(residuals), 1e-300))
        weighted = jacobian * weights[..., None]
        normal = np.swapaxes(weighted, 1, 2) @ jacobian
        gradient = (weighted * residuals[..., None]).sum(axis=1)
        diagonal = np.diagonal(normal, axis1=1, axis2=2) * damping[:, None] + 1e-12
        step = np.linalg.solve(normal + diagonal[:, None, :] * eye, gradient[..., None])[..., 0]
        tried = np.clip(parameters - np.clip(step, -2.0, 2.0), low, high)
        tried_predicted = log_losses(tried, log_sizes, arms)
        tried_costs = _costs(tried_predicted - targets, delta)
        better = tried_costs < costs
        parameters[better], predicted[better] = tried[better], tried_predicted[better]
        costs = np.where(better, tried_costs, costs)
        damping = np.clip(np.where(better, damping * 0.3, damping * 4.0), 1e-9, 1e9)
        # What the quadratic model promises is below what a fit can tell.
        if bool(np.all((gradient * step).sum(axis=1) <= 1e-7 * costs + 1e-15)):
            break
    return parameters, costs
