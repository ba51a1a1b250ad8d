"""What is built has the parameters and the FLOPs that ``accounting`` says on one rank."""

import itertools

import pytest
from small_trials import KINDS, SMALL, SMALL_VOCABULARY, VOCABULARY, shape_of, small_trial

from models import accounting
from models.config import Layout
from models.presets import PRESETS


@pytest.fixture
def built(world):
    """Build a trial's model without memory for its weights: the 1.7 B presets too."""
    import torch

    from models import device, layer_specs

    def build(trial):
        with torch.device("meta"), device.on("cpu"):
            return layer_specs.build_model(trial, Layout(), "cpu")

    return build


@pytest.mark.parametrize("preset", PRESETS)
def test_closed_form_parameters_are_the_built_models(built, preset):
    kinds = KINDS if preset == "cpu-tiny" else {name: KINDS[name] for name in ("baseline", "sdpa-elementwise-hidden")}
    shapes: tuple[dict[str, object], ...] = (
        {},
        {"tied_embeddings": False},
        {"qk_norm": False},
        {"sdpa_output": "group_norm", "sandwich_norm": True},
        {"softmax_sink": True},
    )
    if preset == "moe-15a2b":  # 3,072 experts take seconds to build
        kinds, shapes = {"baseline": None}, ({},)
    for gate, changes in itertools.product(kinds.values(), shapes):
        trial = shape_of(preset, gate, **changes)
        counted = sum(parameter.numel() for parameter in built(trial).parameters())
        assert counted == accounting.parameters(trial.model, gate, VOCABULARY), (gate, changes)


@pytest.mark.parametrize("kind", [name for name in KINDS if name != "baseline"])
def test_closed_form_gate_parameters_are_the_built_models(built, kind):
    for preset in ("cpu-1m", "dense-1.7b-48l"):
        trial = shape_of(preset, KINDS[kind], num_layers=2)
        baseline = built(trial.model_copy(update={"gate": None}))
        added = sum(p.numel() for p in built(trial).parameters()) - sum(p.numel() for p in baseline.parameters())
        assert added == 2 * accounting.gate_parameters(trial.model, KINDS[kind])


def test_num_parameters_counts_every_parameter_of_one_rank(world):
    from models import device, layer_specs

    for gate in KINDS.values():
        with device.on("cpu"):
            model = layer_specs.build_model(small_trial(gate), Layout(), "cpu")
            assert layer_specs.num_parameters(model) == accounting.parameters(SMALL, gate, SMALL_VOCABULARY)


@pytest.mark.parametrize("preset", ["cpu-tiny", "cpu-moe-tiny"])
@pytest.mark.parametrize("kind", KINDS)
def test_closed_form_flops_are_those_of_a_real_forward_pass(world, preset, kind):
    import torch
    from torch.nn.attention import SDPBackend, sdpa_kernel
    from torch.utils.flop_counter import FlopCounterMode

    from models import device, layer_specs
    from models.trainer import passes

    trial = shape_of(preset, KINDS[kind])
    sequence = 64
    with device.on("cpu"):
        model = layer_specs.build_model(trial, Layout(), "cpu")
        tokens = torch.zeros(2, sequence, dtype=torch.int64)
        batch = {"tokens": tokens, "labels": tokens, "position_ids": torch.arange(sequence).expand_as(tokens)}
        # The counter knows matrix products, not the CPU's fused attention.
        with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
            passes.token_losses(model, batch)
    counted = counter.get_total_flops() / tokens.numel()
    closed_form = accounting.forward_flops_per_token(trial.model, trial.gate, VOCABULARY, sequence)
    assert counted == pytest.approx(closed_form, rel=0.01)


def test_closed_form_parameters_count_every_gate_of_several(built):
    trial = shape_of("cpu-tiny", KINDS["sdpa-headwise-hidden"])
    several = trial.model_copy(
        update={"more_gates": (KINDS["value-elementwise-none"], KINDS["dense-elementwise-hidden"])}
    )
    counted = sum(parameter.numel() for parameter in built(several).parameters())
    assert counted == accounting.parameters(several.model, several.gates, VOCABULARY)
    assert counted > accounting.parameters(trial.model, trial.gates, VOCABULARY)
