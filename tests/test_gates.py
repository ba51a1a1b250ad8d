"""The gate equations by themselves: activations, averaging over heads, and the rows of the fused projection."""

import math

import pytest
import torch
from torch.testing import assert_close

from models import gates
from models.config import GateConfig


def mean_over_heads(scores):
    return scores.mean(dim=2, keepdim=True)


def logits(heads=3, width=2):
    return torch.linspace(-6.0, 6.0, 2 * heads * width).view(1, 2, heads, width)


def score(gate, x):
    return gates.scores(gate, x, mean_over_heads)


@pytest.mark.parametrize(
    ("activation", "at_minus_infinity", "at_zero", "at_two"),
    [
        ("sigmoid", 0.0, 0.5, 1 / (1 + math.exp(-2))),
        ("ns_sigmoid", 0.5, 0.75, 0.5 + 0.5 / (1 + math.exp(-2))),
        ("silu", 0.0, 0.0, 2 / (1 + math.exp(-2))),
        ("identity", -80.0, 0.0, 2.0),
    ],
)
def test_activations_have_their_values(activation, at_minus_infinity, at_zero, at_two):
    gate = GateConfig(position="sdpa", activation=activation)
    x = torch.tensor([-80.0, 0.0, 2.0]).view(1, 1, 3, 1)
    expected = torch.tensor([at_minus_infinity, at_zero, at_two])
    assert_close(score(gate, x).flatten(), expected, rtol=1e-6, atol=1e-6)


def test_open_starts_a_sigmoid_near_one():
    gate = GateConfig(position="sdpa", init="open")
    assert score(gate, torch.zeros(1, 1, 1, 1)).item() == pytest.approx(0.982, abs=1e-3)


def test_scale_multiplies_the_score():
    for activation in gates.ACTIVATIONS:
        plain, scaled = (GateConfig(position="sdpa", activation=activation, scale=scale) for scale in (1.0, 2.0))
        assert_close(score(scaled, logits()), 2 * score(plain, logits()))


def test_shared_scores_average_after_the_activation_by_default():
    x = logits()
    shared = GateConfig(position="sdpa", sharing="head_shared")
    by_logits = GateConfig(position="sdpa", sharing="head_shared", shared_average="logits")
    assert_close(score(shared, x), x.sigmoid().mean(dim=2, keepdim=True))
    assert_close(score(by_logits, x), x.mean(dim=2, keepdim=True).sigmoid())
    assert (score(shared, x) - score(by_logits, x)).abs().max() > 0.01


def test_averages_agree_when_the_activation_is_linear():
    options = {"position": "sdpa", "sharing": "head_shared", "activation": "identity"}
    by_scores, by_logits = GateConfig(**options), GateConfig(**options, shared_average="logits")
    assert_close(score(by_scores, logits()), score(by_logits, logits()))


def test_apply_multiplies_or_adds_and_keeps_the_signals_dtype():
    signal, factor = torch.tensor([2.0, -4.0]).bfloat16(), torch.tensor([0.5, 0.25])
    multiplied = gates.apply(GateConfig(position="sdpa"), signal, factor)
    added = gates.apply(GateConfig(position="sdpa", combine="additive"), signal, factor)
    assert multiplied.tolist() == [1.0, -1.0]
    assert added.tolist() == [2.5, -3.75]
    assert multiplied.dtype == added.dtype == torch.bfloat16


def test_scores_of_bfloat16_logits_keep_their_tails():
    gate = GateConfig(position="sdpa")
    exact = score(gate, torch.tensor(6.0).view(1, 1, 1, 1))
    assert_close(score(gate, torch.tensor(6.0).bfloat16().view(1, 1, 1, 1)), exact)


@pytest.mark.parametrize(
    ("position", "elementwise", "headwise"),
    [("sdpa", 4 * 16, 4), ("query", 4 * 16, 4), ("key", 16, 1), ("value", 16, 1)],
)
def test_rows_of_a_query_group(position, elementwise, headwise):
    for granularity, expected in (("elementwise", elementwise), ("headwise", headwise)):
        gate = GateConfig(position=position, granularity=granularity)
        assert gates.gate_rows_per_group(gate, num_query_heads_per_group=4, head_dim=16) == expected


@pytest.mark.parametrize(
    "gate",
    [
        None,
        GateConfig(position="dense"),
        GateConfig(position="sdpa", input="none"),
        GateConfig(position="sdpa", input="constant", scale=0.5),
    ],
)
def test_gates_that_are_not_in_the_fused_projection_have_no_rows(gate):
    assert gates.gate_rows_per_group(gate, num_query_heads_per_group=4, head_dim=16) == 0


def test_only_the_gates_rows_are_zeroed():
    weight = torch.ones(2 * 7, 3)
    gates.zero_gate_rows(weight, group_rows=7, gate_start=4, num_gate_rows=1)
    assert weight.sum(dim=1).tolist() == [3, 3, 3, 3, 0, 3, 3] * 2
