"""What is built has the parameters and the FLOPs that ``accounting`` says on one rank."""

import itertools

import pytest
from small_trials import KINDS, SMALL, SMALL_VOCABULARY, VOCABULARY, shape_of, small_trial

from models import accounting
from models.config import GateConfig, Layout
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
    if PRESETS[preset].moe is not None and preset != "cpu-moe-tiny":  # many experts take seconds to build
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


OTHER_PLACES = tuple(GateConfig(position=place) for place in ("value", "key", "query", "dense"))


def flop_trials():
    for preset in ("cpu-tiny", "cpu-moe-tiny"):
        for kind, gate in KINDS.items():
            yield f"{preset}, {kind}", shape_of(preset, gate)
        first = shape_of(preset, GateConfig(position="sdpa"))
        yield f"{preset}, everywhere", first.model_copy(update={"more_gates": OTHER_PLACES})


FLOP_TRIALS = dict(flop_trials())


@pytest.mark.parametrize("name", FLOP_TRIALS)
def test_closed_form_flops_are_those_of_a_real_step(world, name):
    """Forward and backward pass each by itself."""
    import torch
    from torch.nn.attention import SDPBackend, sdpa_kernel
    from torch.utils.flop_counter import FlopCounterMode

    from models import device, layer_specs
    from models.trainer import passes

    trial, sequence = FLOP_TRIALS[name], 64
    with device.on("cpu"):
        model = layer_specs.build_model(trial, Layout(), "cpu")
        tokens = torch.arange(2 * sequence).view(2, sequence)
        batch = {"tokens": tokens, "labels": tokens, "position_ids": torch.arange(sequence).expand_as(tokens)}
        # The counter knows matrix products, not the CPU's fused attention, which computes the weights twice besides.
        with sdpa_kernel(SDPBackend.MATH):
            with FlopCounterMode(display=False) as forward:
                loss = passes.token_losses(model, batch).mean()
            with FlopCounterMode(display=False) as backward:
                loss.backward()
    expected = accounting.flops_per_token(trial.model, trial.gates, VOCABULARY, sequence)
    assert forward.get_total_flops() / tokens.numel() == pytest.approx(expected.forward, rel=0.01)
    assert backward.get_total_flops() / tokens.numel() == pytest.approx(expected.backward, rel=0.01)


def test_closed_form_parameters_count_every_gate_of_several(built):
    trial = shape_of("cpu-tiny", KINDS["sdpa-headwise-hidden"])
    several = trial.model_copy(
        update={"more_gates": (KINDS["value-elementwise-none"], KINDS["dense-elementwise-hidden"])}
    )
    counted = sum(parameter.numel() for parameter in built(several).parameters())
    assert counted == accounting.parameters(several.model, several.gates, VOCABULARY)
    assert counted > accounting.parameters(trial.model, trial.gates, VOCABULARY)
