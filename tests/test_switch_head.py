"""SwitchHead against the oracle, its identity with a gate that the paper has, and what it counts."""

import pytest
from oracle import token_weight, wrong
from pydantic import ValidationError
from small_trials import SMALL, SMALL_VOCABULARY, build, small_batch, small_trial, token_losses

from models import accounting
from models.config import GateConfig, SwitchHeadConfig
from models.presets import PRESETS

TOLERANCE = 1e-5
V8, KV8 = (SwitchHeadConfig(projections=projections, num_experts=8, top_k=2) for projections in ("value", "key_value"))
HEADWISE_VALUE = GateConfig(position="value", granularity="headwise")


def switched(gate=None, shape=SMALL, **switch):
    return small_trial(gate, shape.model_copy(update={"switch_head": SwitchHeadConfig(**switch)}))


def losses_and_gradients(trial):
    model, batch = build(trial), small_batch()
    losses = token_losses(model, *batch)
    (losses * token_weight(batch[0])).sum().backward()
    named = dict(model.named_parameters())
    return named, losses, {name: parameter.grad for name, parameter in named.items()}


@pytest.mark.parametrize("projections", ["value", "key_value"])
@pytest.mark.parametrize(("num_experts", "top_k"), [(1, 1), (3, 1), (4, 2), (4, 4)])
@pytest.mark.parametrize(
    "gate",
    [None, GateConfig(position="sdpa"), HEADWISE_VALUE, GateConfig(position="key", granularity="headwise")],
    ids=lambda gate: "no gate" if gate is None else gate.position,
)
def test_losses_and_gradients_are_the_oracles(world, projections, num_experts, top_k, gate):
    trial = switched(gate, projections=projections, num_experts=num_experts, top_k=top_k)
    assert not wrong(trial, *losses_and_gradients(trial), small_batch(), TOLERANCE)


@pytest.mark.parametrize("changes", [{"qk_norm": False}, {"num_kv_heads": 1}, {"softmax_sink": True}], ids=str)
def test_experts_go_with_other_shapes(world, changes):
    trial = switched(None, SMALL.model_copy(update=changes), projections="key_value", num_experts=3, top_k=2)
    assert not wrong(trial, *losses_and_gradients(trial), small_batch(), TOLERANCE)


def test_one_value_expert_is_the_headwise_gate_at_the_value(world):
    """The paper's remark on v 1top1: sigmoid(x w) times x W_V, to the last bit, with weights of the same names."""
    import torch

    expert = losses_and_gradients(switched(projections="value", num_experts=1, top_k=1))
    gate = losses_and_gradients(small_trial(HEADWISE_VALUE))
    for ours, theirs in zip((expert[0], expert[2]), (gate[0], gate[2]), strict=True):
        assert ours.keys() == theirs.keys()
        assert all(torch.equal(ours[name], theirs[name]) for name in ours)
    assert torch.equal(expert[1], gate[1])


def test_a_token_feels_only_its_best_experts(world):
    """An expert that no token chooses has no gradient; with all chosen, each has one."""

    def idle_experts(top_k):
        trial = switched(projections="value", num_experts=8, top_k=top_k)
        _, _, gradients = losses_and_gradients(trial)
        weight = gradients["decoder.layers.0.self_attention.linear_qkv.weight"]
        blocks = weight.view(SMALL.num_kv_heads, -1, SMALL.hidden_size)[:, -8 * SMALL.head_dim :]
        return int((blocks.reshape(-1, SMALL.head_dim * SMALL.hidden_size).abs().amax(dim=1) == 0).sum())

    assert idle_experts(8) == 0
    assert idle_experts(1) > 0


# -- what it counts -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("switch", [V8, KV8], ids=lambda switch: switch.projections)
def test_closed_forms_are_the_built_models(world, switch):
    from torch.nn.attention import SDPBackend, sdpa_kernel
    from torch.utils.flop_counter import FlopCounterMode

    from models import layer_specs

    trial = switched(HEADWISE_VALUE, **switch.model_dump())
    model, (tokens, labels) = build(trial), small_batch()
    assert layer_specs.num_parameters(model) == accounting.parameters(trial.model, trial.gates, SMALL_VOCABULARY)
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        token_losses(model, tokens, labels)
    expected = accounting.forward_flops_per_token(trial.model, trial.gates, SMALL_VOCABULARY, tokens.shape[1])
    assert counter.get_total_flops() == expected * tokens.numel()


@pytest.mark.parametrize(
    ("projections", "num_experts", "top_k", "total", "active"),
    [
        ("key_value", 8, 8, 353.9, 353.9),
        ("key_value", 4, 4, 151.8, 151.8),
        ("value", 4, 4, 76.3, 76.3),
        ("value", 8, 2, 177.7, 26.7),
        ("value", 1, 1, 0.2, 0.2),
    ],
)
def test_added_parameters_of_the_papers_moe(projections, num_experts, top_k, total, active):
    """Each further expert is a further W_K or W_V (25.2 M), a router row a head is 0.2 M: not what Table 6 prints."""
    moe = PRESETS["moe-15a2b"]
    switch = SwitchHeadConfig(projections=projections, num_experts=num_experts, top_k=top_k)
    changed = moe.model_copy(update={"switch_head": switch})
    for count, millions in ((accounting.parameters, total), (accounting.active_parameters, active)):
        assert round((count(changed, None, 152_064) - count(moe, None, 152_064)) / 1e6, 1) == millions


def test_more_chosen_than_there_are_is_refused():
    with pytest.raises(ValidationError, match="top_k 3 must not exceed num_experts 2"):
        SwitchHeadConfig(projections="value", num_experts=2, top_k=3)


def test_its_absence_leaves_fingerprints_alone():
    plain = small_trial()
    assert "switch_head" not in plain.canonical_json()
    assert switched(**V8.model_dump()).fingerprint() != plain.fingerprint()
