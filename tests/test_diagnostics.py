"""The probe and the update watch against first principles: tests/oracle.py in float64, and plain torch.

Killed and resumed attempts (test_checkpoint.py) and two ranks (test_trainer.py) write the same diagnostics.
"""

import itertools
import math

import pytest
import torch
from oracle import Oracle, unpack
from small_trials import (
    SMALL,
    build,
    corpus_trial,
    diagnostics,
    metrics,
    new_attempt,
    small_batch,
    small_trial,
    token_losses,
    write_corpus,
)

from models import device
from models.config import DiagnosticsConfig, GateConfig, MoEConfig
from models.diagnostics import UpdateWatch, first_token, probe
from models.presets import PRESETS

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


@pytest.mark.parametrize(("shape", "kind"), list(itertools.product(SHAPES, GATES)))
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


def test_gates_at_two_places_are_told_apart(world):
    trial, batch = small_trial(GATES["value"]), small_batch()
    trial = trial.model_copy(update={"more_gates": (GATES["headwise, wide"],)})
    model = build(trial)
    found, seen = probed(model, batch[0]), seen_by_oracle(trial, model, batch)
    assert list(found.gate_scores) == ["sdpa", "value"]
    for position, scores in found.gate_scores.items():
        assert scores.mean == close([float(exact.mean()) for exact in seen[position]])
    assert (found.gate_scores["sdpa"].low, found.gate_scores["sdpa"].high) == (0.0, 2.0)


def test_long_sequences_are_taken_in_blocks_of_queries(world, monkeypatch):
    model, tokens = build(small_trial(model=SHAPES["sinks"])), small_batch()[0]
    whole = probed(model, tokens).first_token_attention
    monkeypatch.setattr(first_token, "_ELEMENTS_AT_ONCE", 3 * tokens.numel() * SMALL.num_query_heads)
    assert [probed(model, tokens).first_token_attention[layer] for layer in range(2)] == [close(row) for row in whole]


def test_a_sink_takes_attention_off_the_first_token(world):
    model, tokens = build(small_trial(model=SHAPES["sinks"])), small_batch()[0]
    sums = []
    for logit in (-30.0, 3.0):
        for layer in model.decoder.layers:
            torch.nn.init.constant_(layer.self_attention.core_attention.softmax_offset, logit)
        sums.append(sum(probed(model, tokens).first_token_attention[0]))
    assert sums[1] < 0.6 * sums[0]


def test_a_planted_massive_activation_is_found_in_its_layer_and_above(world):
    trial, batch = small_trial(), small_batch()
    model = build(trial)
    before = probed(model, batch[0])
    with torch.no_grad():
        model.decoder.layers[1].mlp.linear_fc2.weight[5] *= 1000.0
    after = probed(model, batch[0])
    assert after.max_activation[0] == before.max_activation[0]
    assert after.max_activation[1] > 50 * before.max_activation[1]
    assert after.max_activation[1] == close(float(seen_by_oracle(trial, model, batch)["residual"][1].abs().max()))


def test_what_is_not_finite_is_none_and_said(world):
    model = build(small_trial(GATES["sdpa"]))
    with torch.no_grad():
        model.decoder.layers[1].self_attention.linear_qkv.weight.fill_(math.nan)
    found = probed(model, small_batch()[0])
    assert found.nonfinite
    assert found.max_activation[1] is found.residual_rms[1] is found.gate_scores["sdpa"].mean[1] is None
    assert found.gate_scores["sdpa"].histogram[1] is None
    assert found.first_token_attention[1] == [None] * SMALL.num_query_heads
    assert found.max_activation[0] > 0
    assert sum(found.gate_scores["sdpa"].histogram[0]) == pytest.approx(1.0)


def test_a_probe_leaves_mode_random_numbers_buffers_and_gradients_alone(world):
    trial, (tokens, labels) = small_trial(GATES["sdpa"], SHAPES["experts"]), small_batch()
    model = build(trial)
    token_losses(model, tokens, labels).mean().backward()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items() if tensor is not None}
    buffers = {name: buffer.clone() for name, buffer in model.named_buffers()}
    gradients = [parameter.grad.clone() for parameter in model.parameters()]
    drawn = torch.get_rng_state()
    probed(model, tokens)
    assert any("global_tokens_per_expert" in name and buffer.any() for name, buffer in buffers.items())
    for name, buffer in model.named_buffers():
        torch.testing.assert_close(buffer, buffers[name], rtol=0, atol=0, msg=name)
    for name, tensor in before.items():
        torch.testing.assert_close(model.state_dict()[name], tensor, rtol=0, atol=0, msg=name)
    for parameter, gradient in zip(model.parameters(), gradients, strict=True):
        torch.testing.assert_close(parameter.grad, gradient, rtol=0, atol=0)
    assert torch.equal(torch.get_rng_state(), drawn)
    assert model.training
    assert all(layer.self_attention.score_tap is None for layer in model.decoder.layers)
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())
    model.eval()
    probed(model, tokens)
    assert not model.training


def test_one_token_is_too_short(world):
    with pytest.raises(ValueError, match="sequences of 2 tokens or more, got 1"):
        probed(build(small_trial()), small_batch()[0][:, :1])


# -- one optimizer step ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", ["plain", "experts"])
def test_a_step_is_measured_as_plain_torch_sees_it(world, shape):
    from models.trainer.optimizer import update, wrap

    trial = small_trial(GATES["sdpa"], SHAPES[shape])
    with device.on("cpu"):
        (model,), optimizer = wrap(trial, [build(trial)], "cpu")
        model.zero_grad_buffer()
        token_losses(model, *small_batch()).mean().backward()
        layers = [list(layer.parameters()) for layer in model.module.decoder.layers]
        gradients = [[parameter.main_grad.double() for parameter in layer] for layer in layers]
        weights = [[parameter.detach().double() for parameter in layer] for layer in layers]
        watch = UpdateWatch(model, optimizer)
        clip = 0.1
        assert update(optimizer, 0.01, clip, watch) > clip
    changes = [
        [new.detach().double() - old for new, old in zip(*pair, strict=True)]
        for pair in zip(layers, weights, strict=True)
    ]
    gradient_norm, update_ratio = watch.result
    assert gradient_norm == pytest.approx([norm(layer) for layer in gradients], rel=1e-6)
    ratios = [norm(change) / norm(weight) for change, weight in zip(changes, weights, strict=True)]
    assert update_ratio == pytest.approx(ratios, rel=1e-6)
    assert all(ratio > 1e-3 for ratio in ratios)


def norm(tensors):
    return math.sqrt(sum(float((tensor**2).sum()) for tensor in tensors))


# -- while training -------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    return write_corpus(tmp_path_factory.mktemp("corpus") / "corpus.jsonl")


@pytest.mark.parametrize("preset", ["cpu-tiny", "cpu-moe-tiny"])
def test_training_is_bit_identical_with_diagnostics_and_without(world, corpus, tmp_path, preset):
    """With experts in several micro-batches: their router keeps counts from one to the next."""
    from models.trainer import train

    trial = corpus_trial(corpus, GateConfig(position="sdpa"), steps=5)
    trial = trial.model_copy(update={"model": PRESETS[preset]})
    curves = []
    for name, wanted in {"on": DiagnosticsConfig(points=5), "none": DiagnosticsConfig(points=0), "off": None}.items():
        spec = new_attempt(tmp_path / name, trial, micro_batch_sequences=2, diagnostics=wanted)
        train(spec, world)
        assert [record.step for record in diagnostics(spec)] == ([1, 2, 3, 4, 5] if name == "on" else [])
        curves.append(metrics(spec))
    assert curves[0] == curves[1] == curves[2]


def test_points_sequences_and_bins_are_heeded(world, corpus, tmp_path):
    from models.trainer import train

    trial = corpus_trial(corpus, GateConfig(position="sdpa"), steps=5)
    found = {}
    for sequences in (1, 3):
        wanted = DiagnosticsConfig(points=2, sequences=sequences, histogram_bins=7)
        spec = new_attempt(tmp_path / str(sequences), trial, diagnostics=wanted)
        train(spec, world)
        found[sequences] = diagnostics(spec)
    for records in found.values():
        assert [(record.step, record.tokens, record.fraction) for record in records] == [(2, 512, 0.4), (5, 1280, 1.0)]
        assert all(len(row) == 7 for record in records for row in record.gate_scores["sdpa"].histogram)
        assert all(0 < ratio < 1 for record in records for ratio in record.update_ratio)
        assert not any(record.nonfinite for record in records)
    assert found[1][-1].gradient_norm == found[3][-1].gradient_norm
    assert found[1][-1].residual_rms != found[3][-1].residual_rms
