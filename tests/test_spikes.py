"""Loss spikes: planted ones are found, falling and scattering curves have none."""

from __future__ import annotations

import math
import random
from collections.abc import Iterable
from statistics import median

import pytest

from orchestrator.spikes import MIN_WINDOW_STEPS, THRESHOLD_NATS, WARMUP_FRACTION, WINDOW_STEPS, loss_spikes


def spikes(losses: Iterable[float | None], num_steps: int) -> tuple[int, ...]:
    return loss_spikes(enumerate(losses, start=1), num_steps)


def curve(num_steps: int = 2_000, noise: float = 0.03, seed: int = 1) -> list[float]:
    """A training curve from 10.4 nats downwards."""
    rng = random.Random(seed)
    return [2.5 + 7.9 * math.exp(-step / 60) + rng.gauss(0, noise) for step in range(1, num_steps + 1)]


def with_bumps(bumps: dict[int, float]) -> list[float]:
    losses = curve()
    for step, height in bumps.items():
        losses[step - 1] += height
    return losses


def test_a_falling_curve_has_none():
    assert spikes(curve(), 2_000) == ()


def test_planted_spikes_are_found_at_their_steps():
    bumps = {700: 0.6, 1200: 0.5, 1201: 3.0, 1999: 0.5, 2000: 0.5}
    assert spikes(with_bumps(bumps), 2_000) == tuple(bumps)


def test_the_threshold_is_above_the_median_of_the_steps_before():
    flat = [2.0] * 200
    for height, is_spike in ((THRESHOLD_NATS - 1e-6, False), (THRESHOLD_NATS + 1e-6, True)):
        assert bool(spikes([*flat, 2.0 + height], 201)) is is_spike


def test_neither_the_warm_up_nor_a_curve_too_short_for_a_median_counts():
    flat = [2.0] * 2_000
    early = round(WARMUP_FRACTION * 2_000)
    flat[early - 1] = flat[early] = 3.0
    assert spikes(flat, 2_000) == (early + 1,)
    short = [2.0] * MIN_WINDOW_STEPS
    assert spikes([*short[1:], 3.0], 20) == ()
    assert spikes([*short, 3.0], 20) == (MIN_WINDOW_STEPS + 1,)


def test_a_lasting_jump_counts_until_the_median_has_followed():
    assert spikes([2.0] * 500 + [3.0] * 500, 1_000) == tuple(range(501, 501 + WINDOW_STEPS // 2 + 1))


@pytest.mark.parametrize("missing", [None, math.nan, math.inf])
def test_a_missing_loss_is_no_spike_and_shifts_no_step(missing: float | None):
    losses: list[float | None] = [*with_bumps({1200: 0.6})]
    losses[599] = losses[1198] = missing
    assert spikes(losses, 2_000) == (1200,)


def test_the_running_median_is_the_plain_one():
    losses = curve(400, noise=0.4, seed=7)
    plain = [
        step
        for step in range(MIN_WINDOW_STEPS + 1, 401)
        if step > WARMUP_FRACTION * 400
        and losses[step - 1] - median(losses[max(0, step - 1 - WINDOW_STEPS) : step - 1]) > THRESHOLD_NATS
    ]
    assert len(plain) > 10
    assert spikes(losses, 400) == tuple(plain)
