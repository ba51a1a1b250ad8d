"""Closed forms against the paper's published figures. That they are the built model's is in test_layer_specs."""

from typing import get_args

import pytest

from models import accounting
from models.config import GateConfig, MoEConfig
from models.presets import PRESETS

MOE = PRESETS["moe-15a2b"]
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
    added = accounting.parameters(MOE, gate, PAPER_VOCABULARY) - accounting.parameters(MOE, None, PAPER_VOCABULARY)
    digits = len(str(millions).partition(".")[2])
    assert round(added / 1e6, digits) == millions


def test_parameters_of_the_papers_controls_on_the_moe():
    """More key/value heads, more query heads, and 4 more experts, of which a token uses all 4."""
    experts = MoEConfig(num_experts=132, top_k=12)
    controls = {"num_kv_heads": (8, 50.3), "num_query_heads": (48, 201.3), "moe": (experts, 453.0)}
    for name, (value, millions) in controls.items():
        control = MOE.model_copy(update={name: value})
        for count in (accounting.parameters, accounting.active_parameters):
            added = count(control, None, PAPER_VOCABULARY) - count(MOE, None, PAPER_VOCABULARY)
            router = 24 * 4 * 2048 if name == "moe" else 0
            # The router's rows for the 4 experts are no part of the arithmetic; all of them are active.
            assert round((added - router) / 1e6, 1) == millions, (name, count)


@pytest.mark.parametrize(
    ("vocabulary", "tied", "total", "active"),
    [(151_936, False, 15.58, 1.99), (152_064, False, 15.58, 1.99), (152_064, True, 15.27, 1.68)],
)
def test_parameters_of_the_papers_moe(vocabulary, tied, total, active):
    """15 B, and the 2 B of the name; not the 2.54 B of the text, which the published shape gives with no vocabulary."""
    model = MOE.model_copy(update={"tied_embeddings": tied})
    assert round(accounting.parameters(model, None, vocabulary) / 1e9, 2) == total
    assert round(accounting.active_parameters(model, None, vocabulary) / 1e9, 2) == active


def test_all_parameters_of_a_dense_model_are_active():
    for gate in (None, ELEMENTWISE):
        total = accounting.parameters(DENSE, gate, PAPER_VOCABULARY)
        assert accounting.active_parameters(DENSE, gate, PAPER_VOCABULARY) == total


def test_matching_spreads_a_gate_over_the_experts():
    """201.3 M over 24 layers of 128 experts is 10.7 of an expert's width; for FLOPs, over the 8 that a token uses."""
    assert accounting.match_ffn_size(MOE, ELEMENTWISE, 1) == 757
    assert accounting.match_ffn_size(MOE, ELEMENTWISE, accounting.default_ffn_multiple(MOE)) == 760
    assert accounting.match_ffn_size_for_flops(MOE, ELEMENTWISE, 1) == 597


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
        num_ffns = model.num_layers * (model.moe.num_experts if model.moe else 1)
        assert abs(difference) <= num_ffns * 3 * model.hidden_size * multiple / 2


def test_matching_leaves_what_costs_nothing_alone():
    odd = PRESETS["cpu-1m"].model_copy(update={"ffn_size": 383})
    constant = GateConfig(position="sdpa", input="constant", scale=0.5)
    learned = GateConfig(position="sdpa", input="none")
    assert accounting.match_ffn_size(odd, None, 128) == 383
    assert accounting.match_ffn_size(odd, constant, 128) == 383
    assert accounting.match_ffn_size_for_flops(odd, learned, 128) == 383


@pytest.mark.parametrize("preset", ["cpu-4m", "moe-15a2b"])
@pytest.mark.parametrize("position", ["sdpa", "value", "key", "query", "dense"])
def test_flop_matched_models_cost_the_baselines_flops(preset, position):
    model, gate = PRESETS[preset], GateConfig(position=position)
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


def test_flops_by_their_parts():
    """The parts of the paper's 28-layer model, by hand: 1.4 G weights in products, 28 layers of attention."""
    found = accounting.flops_per_token(DENSE, None, PAPER_VOCABULARY, 4096)
    products = accounting.parameters(DENSE, None, PAPER_VOCABULARY) - 28 * (2 * 2048 + 2 * 128) - 2048
    assert found.matrices == 2 * products
    assert found.attention == 28 * 4 * 4096 * 2048
    assert (found.training, found.hardware) == (3 * found.forward, 3 * found.forward)


def test_causal_flops_leave_out_what_lies_above_the_diagonal():
    whole, half = (
        accounting.flops_per_token(DENSE, None, PAPER_VOCABULARY, 4096, causal=causal) for causal in (False, True)
    )
    pairs = sum(position + 1 for position in range(4096))
    assert half.attention / whole.attention == pytest.approx(pairs / 4096**2, rel=1e-9)
    assert half.matrices == whole.matrices


def test_recomputation_is_hardwares_work_and_not_the_models():
    none, selective, full = (
        accounting.flops_per_token(DENSE, ELEMENTWISE, PAPER_VOCABULARY, 4096, recompute=how)
        for how in ("none", "selective", "full")
    )
    assert none.training == selective.training == full.training == none.hardware
    assert selective.recomputation == none.attention
    assert full.recomputation == none.forward - 2 * PAPER_VOCABULARY * 2048


def test_utilisation_is_the_share_of_all_ranks_peak():
    """400 TFLOPs a second on a GPU that can do 989.5 are 40 %; what is unknown stays unknown."""
    peak = accounting.ACCELERATORS["h100"].peak_flops("bf16")
    assert accounting.utilisation(8 * 400e12, peak, 8) == pytest.approx(0.404, abs=1e-3)
    assert accounting.utilisation(None, peak, 8) is None
    assert accounting.utilisation(1e12, None, 1) is None


@pytest.mark.parametrize("name", accounting.ACCELERATORS)
def test_accelerators_are_named_once_and_their_peaks_are_dense(name):
    """Twice the figure would be the one for structured sparsity; fp8 is twice bf16."""
    one = accounting.ACCELERATORS[name]
    assert one.fp32 < one.bf16 < 2.5e15
    assert one.fp8 is None or 1.98 < one.fp8 / one.bf16 < 2.03
    assert name in get_args(accounting.AcceleratorName)
    assert len(accounting.ACCELERATORS) == len(get_args(accounting.AcceleratorName))
