"""Closed forms against the paper's published figures. That they are the built model's is in test_layer_specs."""

import pytest

from models import accounting
from models.config import GateConfig, ModelConfig
from models.presets import PRESETS

MOE_ATTENTION = ModelConfig(
    num_layers=24, hidden_size=2048, num_query_heads=32, num_kv_heads=4, head_dim=128, ffn_size=768
)
DENSE = PRESETS["dense-1.7b-28l"]
PAPER_VOCABULARY = 152_064
ELEMENTWISE = GateConfig(position="sdpa")
HEADWISE = GateConfig(position="sdpa", granularity="headwise")


@pytest.mark.parametrize(
    ("position", "granularity", "millions"),
    [
        ("sdpa", "elementwise", 201.3),
        ("value", "elementwise", 25.2),
        ("key", "elementwise", 25.2),
        ("query", "elementwise", 201.3),
        ("dense", "elementwise", 100.7),
        ("sdpa", "headwise", 1.57),
        ("value", "headwise", 0.197),
    ],
)
def test_added_parameters_of_the_moe_are_the_papers(position, granularity, millions):
    gate = GateConfig(position=position, granularity=granularity)
    added = MOE_ATTENTION.num_layers * accounting.gate_parameters(MOE_ATTENTION, gate)
    digits = len(str(millions).partition(".")[2])
    assert round(added / 1e6, digits) == millions


@pytest.mark.parametrize(
    ("gate", "ffn_size", "millions"), [(None, 6144, 1720.8), (HEADWISE, 6144, 1721.8), (ELEMENTWISE, 5504, 1728.2)]
)
def test_parameters_of_the_released_checkpoints(gate, ffn_size, millions):
    model = DENSE.model_copy(update={"ffn_size": ffn_size})
    assert round(accounting.parameters(model, gate, PAPER_VOCABULARY) / 1e6, 1) == millions


@pytest.mark.parametrize(("gate", "ffn_size"), [(None, 6144), (HEADWISE, 6144), (ELEMENTWISE, 5504)])
def test_matching_narrows_the_ffn_as_the_paper_did(gate, ffn_size):
    multiple = accounting.default_ffn_multiple(DENSE)
    assert accounting.match_ffn_size(DENSE, gate, multiple) == ffn_size


@pytest.mark.parametrize("preset", PRESETS)
@pytest.mark.parametrize("position", ["sdpa", "value", "key", "query", "dense"])
def test_matched_models_are_as_near_the_baseline_as_the_multiple_allows(preset, position):
    model, gate = PRESETS[preset], GateConfig(position=position)
    for multiple in (1, 2, accounting.default_ffn_multiple(model)):
        matched = model.model_copy(update={"ffn_size": accounting.match_ffn_size(model, gate, multiple)})
        assert matched.ffn_size % multiple == 0
        difference = accounting.parameters(matched, gate, 256) - accounting.parameters(model, None, 256)
        assert abs(difference) <= model.num_layers * 3 * model.hidden_size * multiple / 2


def test_matching_leaves_what_costs_nothing_alone():
    odd = PRESETS["cpu-1m"].model_copy(update={"ffn_size": 383})
    constant = GateConfig(position="sdpa", input="constant", scale=0.5)
    learned = GateConfig(position="sdpa", input="none")
    assert accounting.match_ffn_size(odd, None, 128) == 383
    assert accounting.match_ffn_size(odd, constant, 128) == 383
    assert accounting.match_ffn_size_for_flops(odd, learned, 128) == 383


@pytest.mark.parametrize("position", ["sdpa", "value", "key", "query", "dense"])
def test_flop_matched_models_cost_the_baselines_flops(position):
    model, gate = PRESETS["cpu-4m"], GateConfig(position=position)
    matched = model.model_copy(update={"ffn_size": accounting.match_ffn_size_for_flops(model, gate, 1)})
    ours, baseline = (
        accounting.forward_flops_per_token(shape, kind, 256, 256) for shape, kind in ((matched, gate), (model, None))
    )
    assert ours == pytest.approx(baseline, rel=1e-3)


def test_a_gate_larger_than_the_ffn_is_refused():
    narrow = PRESETS["cpu-tiny"].model_copy(update={"ffn_size": 8})
    with pytest.raises(ValueError, match="the gate's 4,096 parameters a layer exceed the FFN's"):
        accounting.match_ffn_size(narrow, ELEMENTWISE, 2)


def test_training_costs_three_forward_passes():
    for gate in (None, ELEMENTWISE):
        forward = accounting.forward_flops_per_token(DENSE, gate, PAPER_VOCABULARY, 4096)
        assert accounting.training_flops_per_token(DENSE, gate, PAPER_VOCABULARY, 4096) == 3 * forward
