"""The probe and the update watch against first principles: tests/oracle.py in float64, and plain torch."""

import itertools
import math

import pytest
import torch
from oracle import Oracle, unpack
from small_trials import SMALL, build, small_batch, small_trial

from models import device
from models.config import GateConfig, MoEConfig
from models.diagnostics import probe

MOE = MoEConfig(num_experts=4, top_k=2)
GATES = {
    "none": None,
    "sdpa": GateConfig(position="sdpa"),
    "headwise, wide": GateConfig(position="sdpa", granularity="headwise", scale=2.0),
    "shared": GateConfig(position="sdpa", sharing="head_shared"),
    "NS-sigmoid": GateConfig(position="sdpa", activation="ns_sigmoid"),
    "value": GateConfig(position="value"),
    "key": GateConfig(position="key", granularity="headwise"),
    "dense": GateConfig(position="dense", activation="silu", combine="additive"),
    "input-independent": GateConfig(position="sdpa", input="none"),
    "constant": GateConfig(position="sdpa", input="constant", scale=0.5),
}
SHAPES = {
    "plain": SMALL,
    "sinks": SMALL.model_copy(update={"softmax_sink": True}),
    "norms": SMALL.model_copy(update={"sandwich_norm": True, "sdpa_output": "group_norm"}),
    "experts": SMALL.model_copy(update={"moe": MOE, "ffn_size": 16}),
}
BINS = 8


def probed(model, tokens, bins=BINS):
    with device.on("cpu"):
        return probe(model, {"tokens": tokens, "position_ids": torch.arange(tokens.shape[1]).expand_as(tokens)}, bins)


def seen_by_oracle(trial, model, batch):
    oracle = Oracle(trial.model, trial.gates, unpack(dict(model.named_parameters()), trial.model, trial.gates))
    oracle.losses(*batch)
    return oracle.seen


def close(expected):
    return pytest.approx(expected, rel=2e-5, abs=1e-7)


def rms(tensor):
    return math.sqrt(float((tensor**2).mean()))


@pytest.mark.parametrize(("shape", "kind"), itertools.product(SHAPES, GATES))
def test_a_probe_measures_what_the_equations_give(world, shape, kind):
    trial, batch = small_trial(GATES[kind], SHAPES[shape]), small_batch()
    model = build(trial)
    found, seen = probed(model, batch[0]), seen_by_oracle(trial, model, batch)
    for layer in range(SMALL.num_layers):
        heads = seen["attention"][layer][:, :, 1:, 0].mean(dim=(1, 2))
        assert found.first_token_attention[layer] == close(heads.tolist())
        assert found.max_activation[layer] == close(float(seen["residual"][layer].abs().max()))
        assert found.residual_rms[layer] == close(rms(seen["residual"][layer]))
        assert found.attention_output_rms[layer] == close(rms(seen["attention_output"][layer]))
        assert found.ffn_output_rms[layer] == close(rms(seen["ffn"][layer]))
    gate = GATES[kind]
    assert list(found.gate_scores) == ([gate.position] if gate is not None and gate.input != "constant" else [])
    for position, scores in found.gate_scores.items():
        for layer in range(SMALL.num_layers):
            exact = seen[position][layer]
            assert scores.mean[layer] == close(float(exact.mean()))
            for limit in (0.1, 0.5):
                share = float((exact.abs() < limit).double().mean())
                assert scores.share_below[str(limit)][layer] == pytest.approx(share, abs=2 / exact.numel())
            edges = torch.linspace(scores.low, scores.high, BINS + 1, dtype=torch.float64)[1:-1]
            counts = torch.bincount(torch.bucketize(exact.flatten(), edges, right=True), minlength=BINS)
            assert scores.histogram[layer] == pytest.approx((counts / exact.numel()).tolist(), abs=2 / exact.numel())
    assert not found.nonfinite
