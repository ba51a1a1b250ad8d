"""Two tensor-parallel ranks build the same model as one, give its losses, and its gradients: those of the oracle."""

import itertools

import numpy as np
import pytest
import ranks
from oracle import token_weight, wrong
from small_trials import KINDS, SMALL, VOCABULARY, build, shape_of, small_batch, small_trial, token_losses

from models import accounting
from models.config import GateConfig, Layout, SwitchHeadConfig
from models.presets import PRESETS

LAYOUT = Layout(tensor=2)
SHAPES = {
    "one group a rank": SMALL,
    "two groups a rank": SMALL.model_copy(update={"num_query_heads": 8, "num_kv_heads": 4, "head_dim": 4}),
    "norms everywhere": SMALL.model_copy(update={"sandwich_norm": True, "sdpa_output": "group_norm"}),
    "sinks and SiLU": SMALL.model_copy(update={"softmax_sink": True, "sdpa_output": "silu"}),
    "value experts": SMALL.model_copy(
        update={"switch_head": SwitchHeadConfig(projections="value", num_experts=3, top_k=2)}
    ),
    "key and value experts": SMALL.model_copy(
        update={
            "num_query_heads": 8,
            "num_kv_heads": 4,
            "switch_head": SwitchHeadConfig(projections="key_value", num_experts=4, top_k=1),
        }
    ),
}
TOLERANCE = 2e-5
"""Twice that of one rank: sums are taken in another order."""


def shared_gates():
    """The averages over heads, which cross ranks: every position, granularity, order of averaging and input."""
    for position, granularity, average, source in itertools.product(
        ("sdpa", "value", "key", "query"), ("elementwise", "headwise"), ("scores", "logits"), ("hidden", "none")
    ):
        yield (
            f"{position}-{granularity}-{source}-shared-{average}",
            GateConfig(
                position=position,
                granularity=granularity,
                sharing="head_shared",
                shared_average=average,
                input=source,
            ),
        )


GATES = KINDS | dict(shared_gates())
WITH_EXPERTS = ("baseline", "sdpa-elementwise-hidden", "value-headwise-hidden", "key-elementwise-none")
"""Gates that are tried beside SwitchHead: its rows stand between theirs and the end of a group's block."""


# -- what a rank holds ----------------------------------------------------------------------------------------


def axis_of(name):
    return 1 if name.endswith(("linear_proj.weight", "linear_fc2.weight")) else 0


def joined(name, parts, shape):
    """One tensor out of two ranks' parts, each kind of layer in its way; equal on both when not cut."""
    if parts[0].shape == shape:
        np.testing.assert_array_equal(*parts, err_msg=name)
        return parts[0]
    if name.endswith("linear_fc1.weight"):  # [gate | up], each cut by itself
        gates, ups = zip(*(np.split(part, 2) for part in parts), strict=True)
        return np.concatenate([*gates, *ups])
    return np.concatenate(parts, axis=axis_of(name))


def part_of(name, whole, rank, shape):
    """The inverse of ``joined``."""
    if whole.shape == shape:
        return whole
    if name.endswith("linear_fc1.weight"):
        return np.concatenate([np.split(half, 2)[rank] for half in np.split(whole, 2)])
    return np.split(whole, 2, axis=axis_of(name))[rank]


def on_a_rank(rank, folder, wholes):
    """(kind -> count and initial weights, (shape, kind) -> losses and gradients at the given weights)."""
    from models.trainer import World

    World.join(rank, LAYOUT, "cpu", f"file://{folder}/meet")
    return (
        {kind: count_and_weights(gate, LAYOUT) for kind, gate in KINDS.items()},
        {key: losses_and_gradients(key, rank, weights) for key, weights in wholes.items()},
    )


def count_and_weights(gate, layout):
    from models import device, layer_specs

    with device.on("cpu"):
        device.seed_everything(3, "cpu")
        model = layer_specs.build_model(shape_of("cpu-tiny", gate), layout, "cpu")
        weights = {name: parameter.detach().numpy() for name, parameter in model.named_parameters()}
        return layer_specs.num_parameters(model), weights


def losses_and_gradients(key, rank, weights):
    import torch

    shape, kind = key
    model = build(small_trial(GATES[kind], SHAPES[shape]), LAYOUT)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.copy_(torch.from_numpy(part_of(name, weights[name], rank, parameter.shape)))
    batch = small_batch()
    losses = token_losses(model, *batch)
    (losses * token_weight(batch[0])).sum().backward()
    return losses.detach().numpy(), {name: p.grad.numpy() for name, p in model.named_parameters()}


@pytest.fixture(scope="module")
def wholes(world):
    """(shape, kind) -> the weights of the whole model, redrawn so that every gate matters."""
    return {
        (shape, kind): {
            name: parameter.detach().numpy()
            for name, parameter in build(small_trial(gate, SHAPES[shape])).named_parameters()
        }
        for shape, kind in comparable()
        for gate in (GATES[kind],)
    }


@pytest.fixture(scope="module")
def both(wholes):
    return ranks.run(on_a_rank, 2, wholes)


# -- the properties -------------------------------------------------------------------------------------------


def comparable():
    """Every gate in every shape, but for the scalars that a norm behind them cancels: their gradient is rounding."""
    for shape, kind in itertools.product(SHAPES, GATES):
        if SHAPES[shape].switch_head is not None and kind not in WITH_EXPERTS:
            continue
        a_scalar = kind.startswith("value-headwise-none") or (kind.startswith("sdpa-headwise") and "shared" in kind)
        if not (shape == "norms everywhere" and a_scalar):
            yield shape, kind


@pytest.mark.parametrize(("shape", "kind"), list(comparable()))
def test_losses_and_gradients_are_the_oracles(both, wholes, shape, kind):
    import torch

    trial, weights = small_trial(GATES[kind], SHAPES[shape]), wholes[shape, kind]
    results = [rank[1][shape, kind] for rank in both]
    gradients = {}
    for name, whole in weights.items():
        parts = [gradient[name] for _, gradient in results]
        if "q_layernorm" in name or "k_layernorm" in name:
            # Each rank has its own heads' share; finalize_model_grads sums them (held by test_trainer's norms).
            gradients[name] = torch.from_numpy(parts[0] + parts[1])
        else:
            gradients[name] = torch.from_numpy(joined(name, parts, whole.shape))
    named = {name: torch.from_numpy(weight) for name, weight in weights.items()}
    for losses, _ in results:
        assert not wrong(trial, named, torch.from_numpy(losses), gradients, small_batch(), TOLERANCE)


@pytest.mark.parametrize("kind", KINDS)
def test_num_parameters_counts_each_parameter_once_over_ranks(both, kind):
    expected = accounting.parameters(PRESETS["cpu-tiny"], KINDS[kind], VOCABULARY)
    built = [rank[0][kind] for rank in both]
    assert [count for count, _ in built] == [expected, expected]
    assert all(sum(weight.size for weight in weights.values()) < expected for _, weights in built)


@pytest.mark.parametrize("kind", KINDS)
def test_initial_weights_do_not_depend_on_the_layout(world, both, kind):
    _, single = count_and_weights(KINDS[kind], Layout())
    parts = [rank[0][kind][1] for rank in both]
    assert parts[0].keys() == parts[1].keys() == single.keys()
    for name, whole in single.items():
        np.testing.assert_array_equal(joined(name, [part[name] for part in parts], whole.shape), whole, err_msg=name)
