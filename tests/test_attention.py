"""The built GPTModel against the plain-torch oracle, and what each gate position may and may not change."""

import itertools

import pytest
from oracle import relative_error, token_weight, unpack, wrong
from pydantic import ValidationError
from small_trials import KINDS, SMALL, SMALL_SEQUENCE, SMALL_VOCABULARY, build, small_batch, small_trial, token_losses

from models.config import GateConfig

POSITIONS = ("sdpa", "value", "key", "query", "dense")
TOLERANCE = 1e-5

OPTIONS = {
    "sharing": ("head_specific", "head_shared"),
    "shared_average": ("scores", "logits"),
    "combine": ("multiplicative", "additive"),
    "activation": ("sigmoid", "silu", "ns_sigmoid", "identity"),
    "qk_order": ("after_norm", "before_norm"),
    "init": ("normal", "open"),
}


def allowed_gates(position, granularity, input):
    """Every combination of options that GateConfig accepts; scales alternate, as they multiply whatever else is."""
    gates = []
    for values in itertools.product(*OPTIONS.values()):
        options = dict(zip(OPTIONS, values, strict=True))
        scale = (1.0, 1.75)[len(gates) % 2]
        try:
            gates.append(GateConfig(position=position, granularity=granularity, input=input, scale=scale, **options))
        except ValidationError:
            continue
    return gates


def differences(trial):
    """What the built model does differently from the oracle: name -> (relative error, allowed)."""
    model, batch = build(trial), small_batch()
    losses = token_losses(model, *batch)
    (losses * token_weight(batch[0])).sum().backward()
    named = dict(model.named_parameters())
    return wrong(trial, named, losses, {name: p.grad for name, p in named.items()}, batch, TOLERANCE)


def check_against_oracle(trial):
    found = differences(trial)
    assert not found, f"{trial.gate!r} with {trial.model!r}: (error, allowed) {found}"


CASES = [
    (position, granularity, input)
    for position in POSITIONS
    for granularity in ("elementwise", "headwise")
    for input in ("hidden", "none")
    if (position, granularity) != ("dense", "headwise")
]


@pytest.mark.parametrize(("position", "granularity", "input"), CASES)
def test_losses_and_gradients_are_the_oracles_for_every_allowed_gate(world, position, granularity, input):
    gates = allowed_gates(position, granularity, input)
    assert len(gates) >= 8
    for gate in gates:
        check_against_oracle(small_trial(gate))


@pytest.mark.parametrize("position", POSITIONS)
def test_a_constant_scale_is_the_oracles(world, position):
    check_against_oracle(small_trial(GateConfig(position=position, input="constant", scale=0.5)))


@pytest.mark.parametrize(
    "changes",
    [
        {"qk_norm": False},
        {"tied_embeddings": False},
        {"num_kv_heads": 4},
        {"num_kv_heads": 1},
        {"rope_base": 100.0, "norm_epsilon": 1e-2},
        {"sandwich_norm": True},
        {"softmax_sink": True},
        {"sdpa_output": "group_norm"},
        {"sdpa_output": "silu"},
        {"num_query_heads": 6, "num_kv_heads": 3, "head_dim": 4, "ffn_size": 20, "num_layers": 1},
    ],
    ids=str,
)
@pytest.mark.parametrize(
    "gate",
    [
        None,
        GateConfig(position="sdpa", granularity="headwise"),
        GateConfig(position="value", sharing="head_shared"),
        GateConfig(position="key"),
        GateConfig(position="query", granularity="headwise", combine="additive", qk_order="before_norm"),
        GateConfig(position="dense"),
    ],
    ids=lambda gate: "baseline" if gate is None else gate.position,
)
def test_every_model_shape_is_the_oracles(world, gate, changes):
    check_against_oracle(small_trial(gate, SMALL.model_copy(update=changes)))


@pytest.mark.parametrize(
    "positions",
    [("sdpa", "value"), ("value", "key"), ("query", "key", "dense"), ("sdpa", "value", "key", "query", "dense")],
    ids="+".join,
)
@pytest.mark.parametrize("sdpa_output", [None, "group_norm"])
def test_gates_at_several_places_are_the_oracles(world, positions, sdpa_output):
    options = {
        "sdpa": {"activation": "silu"},
        "value": {"granularity": "headwise"},
        "key": {"sharing": "head_shared"},
        "query": {"input": "none"},
        "dense": {"combine": "additive"},
    }
    first, *more = [GateConfig.model_validate({"position": at, **options[at]}) for at in positions]
    trial = small_trial(first, SMALL.model_copy(update={"sdpa_output": sdpa_output}))
    check_against_oracle(trial.model_copy(update={"more_gates": tuple(more)}))


def test_the_comparison_sees_a_gate_that_is_a_little_wrong(world, monkeypatch):
    """The guard of the tests above: 1e-4 of one score must be enough to fail."""
    from models import gates

    monkeypatch.setitem(gates.ACTIVATIONS, "sigmoid", lambda logits: logits.sigmoid() * 1.0001)
    found = differences(small_trial(GateConfig(position="value", granularity="headwise")))
    assert {"losses", "decoder.layers.0.w_gate_value"} <= found.keys()


# -- what a gate changes --------------------------------------------------------------------------------------


def ungated_twin(model, trial):
    """The baseline with the gated model's other weights."""
    import torch

    shape = trial.model
    twin = build(trial.model_copy(update={"gate": None}))
    named = dict(model.named_parameters())
    with torch.no_grad():
        for name, parameter in twin.named_parameters():
            weight = named[name]
            if name.endswith("linear_qkv.weight"):
                parts = unpack({name: weight}, shape, trial.gates)
                prefix = name.removesuffix("self_attention.linear_qkv.weight")
                groups = [parts[prefix + part].view(shape.num_kv_heads, -1, shape.hidden_size) for part in QKV]
                weight = torch.cat(groups, dim=1).view(-1, shape.hidden_size)
            parameter.copy_(weight)
    return twin


QKV = ("wq", "wk", "wv")


def trace(model):
    """The tensors of the first layer's attention, in the order of the forward pass. All see the same input."""
    import torch

    attention = model.decoder.layers[0].self_attention
    seen = {}

    def keep(name, value):
        seen[name] = value.detach().clone()

    def core_inputs(module, inputs):
        for name, tensor in zip(("query", "key", "value"), inputs, strict=False):
            keep(name, tensor)

    handles = [
        attention.core_attention.register_forward_pre_hook(core_inputs),
        attention.core_attention.register_forward_hook(lambda m, i, out: keep("sdpa_output", out)),
        attention.linear_proj.register_forward_pre_hook(lambda m, inputs: keep("projection_input", inputs[0])),
        attention.linear_proj.register_forward_hook(lambda m, i, out: keep("projection_output", out[0])),
        attention.register_forward_hook(lambda m, i, out: keep("output", out[0])),
    ]
    seen["losses"] = token_losses(model, *small_batch()).detach()
    for handle in handles:
        handle.remove()
    # Attention is linear in the values: those that are 1 at one position and 0 elsewhere show its probabilities.
    probes = torch.eye(SMALL_SEQUENCE)[:, :, None, None, None].expand(-1, -1, *seen["value"].shape[1:])
    seen["probabilities"] = torch.stack(
        [attention.core_attention(seen["query"], seen["key"], probe, None).detach() for probe in probes]
    )
    return seen


ATTENTION_CHAIN = ("probabilities", "sdpa_output", "projection_input", "projection_output", "output", "losses")
CHANGED = {
    "query": ("query", *ATTENTION_CHAIN),
    "key": ("key", *ATTENTION_CHAIN),
    "value": ("value", *ATTENTION_CHAIN[1:]),
    "sdpa": ATTENTION_CHAIN[2:],
    "dense": ATTENTION_CHAIN[4:],
}


def some_gates(position):
    """A gate of each kind at ``position``."""
    granularities = ("elementwise",) if position == "dense" else ("elementwise", "headwise")
    gates = [GateConfig(position=position, granularity=granularity) for granularity in granularities]
    gates.append(GateConfig(position=position, input="none"))
    gates.append(GateConfig(position=position, combine="additive", activation="silu"))
    gates.append(GateConfig(position=position, input="constant", scale=0.5))
    if position != "dense":
        gates.append(GateConfig(position=position, sharing="head_shared"))
    return gates


@pytest.mark.parametrize("position", POSITIONS)
def test_each_position_changes_exactly_what_it_should(world, position):
    for gate in some_gates(position):
        trial = small_trial(gate)
        model = build(trial)
        with_gate, without = trace(model), trace(ungated_twin(model, trial))
        assert len(without) == 9
        changed = {name for name in without if relative_error(with_gate[name], without[name]) > 1e-3}
        touched = {name for name in without if relative_error(with_gate[name], without[name]) > 2e-6}
        assert changed == touched == set(CHANGED[position]), gate


def saturate(model):
    """Make every gate logit of a gated model huge by its weights: hidden channel 0 is kept positive and constant."""
    import torch

    with torch.no_grad():
        model.embedding.word_embeddings.weight[:, 0] = 3.0
        for layer in model.decoder.layers:
            attention, shape = layer.self_attention, SMALL
            layer.input_layernorm.weight[0] = 1.0
            attention.linear_proj.weight[0] = 0.0
            layer.mlp.linear_fc2.weight[0] = 0.0
            if attention.gate_parameters:
                for parameter in attention.gate_parameters.values():
                    parameter.fill_(100.0)
            elif hasattr(attention, "linear_gate"):
                attention.linear_gate.weight.zero_()[:, 0] = 100.0
            else:
                query_rows = shape.num_query_heads // shape.num_kv_heads * shape.head_dim
                blocks = attention.linear_qkv.weight.view(shape.num_kv_heads, -1, shape.hidden_size)
                rows = blocks[:, query_rows : -2 * shape.head_dim]
                assert rows.numel()
                rows.zero_()[..., 0] = 100.0


@pytest.mark.parametrize("activation", ["sigmoid", "ns_sigmoid"])
@pytest.mark.parametrize("position", POSITIONS)
def test_a_gate_at_saturation_is_no_gate(world, position, activation):
    for granularity in ("elementwise",) if position == "dense" else ("elementwise", "headwise"):
        for input in ("hidden", "none"):
            for sharing in ("head_specific",) if position == "dense" else ("head_specific", "head_shared"):
                gate = GateConfig(
                    position=position, granularity=granularity, input=input, activation=activation, sharing=sharing
                )
                trial = small_trial(gate)
                model = build(trial)
                saturate(model)
                batch = small_batch()
                expected = token_losses(ungated_twin(model, trial), *batch)
                assert relative_error(token_losses(model, *batch), expected) < 1e-6, gate


@pytest.mark.parametrize("position", POSITIONS)
def test_a_constant_scale_near_one_is_nearly_no_gate(world, position):
    trial = small_trial(GateConfig(position=position, input="constant", scale=1.0 + 1e-6))
    model = build(trial)
    expected = token_losses(ungated_twin(model, trial), *small_batch())
    assert relative_error(token_losses(model, *small_batch()), expected) < TOLERANCE


@pytest.mark.parametrize("shared_average", ["scores", "logits"])
@pytest.mark.parametrize("position", ["sdpa", "value", "key", "query"])
def test_a_shared_gate_over_equal_heads_is_the_specific_one(world, position, shared_average):
    import torch

    for granularity in ("elementwise", "headwise"):
        shared = GateConfig(
            position=position, granularity=granularity, sharing="head_shared", shared_average=shared_average
        )
        specific = GateConfig(position=position, granularity=granularity)
        model, other = build(small_trial(shared)), build(small_trial(specific))
        width = SMALL.head_dim if granularity == "elementwise" else 1
        query_rows = SMALL.num_query_heads // SMALL.num_kv_heads * SMALL.head_dim
        with torch.no_grad():
            for layer in model.decoder.layers:
                blocks = layer.self_attention.linear_qkv.weight.view(SMALL.num_kv_heads, -1, SMALL.hidden_size)
                rows = blocks[:, query_rows : -2 * SMALL.head_dim]
                rows.view(SMALL.num_kv_heads, -1, width, SMALL.hidden_size).copy_(rows[0, :width].clone())
        different = token_losses(other, *small_batch())
        other.load_state_dict(model.state_dict())
        ours, theirs = token_losses(model, *small_batch()), token_losses(other, *small_batch())
        assert relative_error(ours, theirs) < 2e-6
        assert relative_error(ours, different) > 1e-3


@pytest.mark.parametrize("position", POSITIONS)
def test_no_loss_depends_on_later_tokens(world, position):
    tokens, labels = small_batch()
    changed_tokens = tokens.clone()
    first = 7
    changed_tokens[:, first] = (tokens[:, first] + 5) % SMALL_VOCABULARY
    for gate in [None, *some_gates(position)]:
        model = build(small_trial(gate))
        before, after = token_losses(model, tokens, labels), token_losses(model, changed_tokens, labels)
        assert relative_error(after[:, :first], before[:, :first]) < 1e-6
        assert ((after - before)[:, first:].abs() > 1e-5).all()


# -- construction ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("position", ["sdpa", "value", "key", "query"])
def test_zero_init_starts_the_gate_at_a_half_and_leaves_the_rest_alone(world, position):
    from models import device, layer_specs
    from models.config import Layout

    for granularity in ("elementwise", "headwise"):
        weights = {}
        for init in ("normal", "zero"):
            trial = small_trial(GateConfig(position=position, granularity=granularity, init=init))
            with device.on("cpu"):
                device.seed_everything(1, "cpu")
                model = layer_specs.build_model(trial, Layout(), "cpu")
            weights[init] = unpack(dict(model.named_parameters()), trial.model, trial.gates)
        assert all(
            bool((weights["zero"][name] == weight).all()) != (".w_gate_" in name)
            for name, weight in weights["normal"].items()
        )
        for layer in range(SMALL.num_layers):
            assert not weights["zero"][f"decoder.layers.{layer}.w_gate_{position}"].any()
            assert 0.01 < weights["normal"][f"decoder.layers.{layer}.w_gate_{position}"].std() < 0.03


def test_a_zero_dense_gate_starts_at_zero_logits(world):
    from models import device, layer_specs
    from models.config import Layout

    for init, expected in (("normal", True), ("zero", False)):
        with device.on("cpu"):
            device.seed_everything(1, "cpu")
            trial = small_trial(GateConfig(position="dense", init=init))
            model = layer_specs.build_model(trial, Layout(), "cpu")
        assert bool(model.decoder.layers[0].self_attention.linear_gate.weight.any()) is expected


def test_input_independent_gates_start_at_zero_logits(world):
    from models import device, layer_specs
    from models.config import Layout

    for position in POSITIONS:
        with device.on("cpu"):
            device.seed_everything(1, "cpu")
            trial = small_trial(GateConfig(position=position, input="none"))
            model = layer_specs.build_model(trial, Layout(), "cpu")
        assert not any(layer.self_attention.gate_parameters[position].any() for layer in model.decoder.layers)


@pytest.mark.parametrize(
    "kind", ["baseline", "sdpa-headwise-hidden", "value-elementwise-none", "dense-elementwise-hidden"]
)
def test_bfloat16_models_run_and_are_near(world, kind):
    """The model takes bf16 on a CPU (its optimizer does not), so what a GPU will train can be looked at here."""
    trial = small_trial(KINDS[kind])
    model = build(trial.model_copy(update={"precision": "bf16"}))
    losses = token_losses(model, *small_batch())
    losses.sum().backward()
    assert relative_error(losses, token_losses(build(trial), *small_batch())) < 0.05
    assert all(parameter.grad.isfinite().all() and parameter.grad.any() for parameter in model.parameters())


# -- beside Megatron's own gate -------------------------------------------------------------------------------


@pytest.mark.parametrize("changes", [{}, {"qk_norm": False}, {"num_kv_heads": 4}], ids=str)
def test_the_elementwise_sdpa_gate_is_megatrons_own(world, changes):
    """``attention_output_gate``, the one gate that Megatron has; its rows lie as ours do."""
    trial = small_trial(GateConfig(position="sdpa"), SMALL.model_copy(update=changes))
    ours, theirs = build(trial), megatrons_own(trial)
    theirs.load_state_dict(ours.state_dict())
    (our_logits, our_gradients), (logits, gradients) = (logits_and_gradients(model) for model in (ours, theirs))
    of_logits = relative_error(our_logits, logits)
    of_gradients = max(relative_error(our_gradients[name], gradient) for name, gradient in gradients.items())
    print(
        f"\nsdpa elementwise against Megatron's gate, {changes}: logits {of_logits:.1e}, gradients {of_gradients:.1e}"
    )
    assert max(of_logits, of_gradients) < TOLERANCE


def logits_and_gradients(model):
    tokens, labels = small_batch()
    logits = token_losses(model, tokens, None).detach()
    (token_losses(model, tokens, labels) * token_weight(tokens)).sum().backward()
    return logits, {name: parameter.grad for name, parameter in model.named_parameters()}


def megatrons_own(trial):
    """The model with Megatron's SelfAttention and its gate in the place of ours."""
    import dataclasses

    from megatron.core.models.gpt import GPTModel
    from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec

    from models import device
    from models.config import Layout
    from models.layer_specs.settings import transformer_config

    config = dataclasses.replace(transformer_config(trial, Layout(), "cpu"), attention_output_gate=True)
    with device.on("cpu"):
        return GPTModel(
            config,
            get_gpt_layer_local_spec(qk_layernorm=trial.model.qk_norm, normalization="RMSNorm"),
            vocab_size=SMALL_VOCABULARY,
            max_sequence_length=SMALL_SEQUENCE,
            share_embeddings_and_output_weights=True,
            position_embedding_type="rope",
            rotary_base=trial.model.rope_base,
        )


# -- rows of zeros that fill a group's block up ---------------------------------------------------------------


@pytest.fixture
def filled_up(monkeypatch):
    """Call it, and models have a multiple of 16 rows in each group's block, as FP8 asks for."""
    import dataclasses

    from models.layer_specs import local

    spec_of = local.layer_spec

    def layer_spec(*args, **options):
        spec = spec_of(*args, **options)
        attention = spec.submodules.self_attention
        attention = dataclasses.replace(attention, params={**attention.params, "row_multiple": 16})
        return dataclasses.replace(spec, submodules=dataclasses.replace(spec.submodules, self_attention=attention))

    return lambda: monkeypatch.setattr(local, "layer_spec", layer_spec)


@pytest.mark.parametrize(
    "kind", ["sdpa-headwise-hidden", "value-headwise-hidden", "dense-elementwise-hidden", "sdpa-headwise-none"]
)
def test_rows_that_fill_up_a_block_change_nothing_and_are_not_learnt(world, filled_up, kind):
    import torch

    from models import accounting, layer_specs

    trial = small_trial(KINDS[kind], SMALL.model_copy(update={"head_dim": 6}))
    plain = build(trial)
    filled_up()
    filled = build(trial)
    blocks = (SMALL.num_kv_heads, -1, SMALL.hidden_size)
    named = dict(plain.named_parameters())
    with torch.no_grad():
        for name, parameter in filled.named_parameters():
            if name.endswith("linear_qkv.weight"):
                whole = named[name].view(blocks)
                assert parameter.view(blocks).shape[1] % 16 == 0
                parameter.zero_().view(blocks)[:, : whole.shape[1]] = whole
            else:
                parameter.copy_(named[name])
    losses = token_losses(filled, *small_batch())
    assert relative_error(losses, token_losses(plain, *small_batch())) < 1e-6
    losses.sum().backward()
    for layer in filled.decoder.layers:
        pad, gradient = layer.self_attention.pad_rows, layer.self_attention.linear_qkv.weight.grad.view(blocks)
        assert pad > 0
        assert not gradient[:, -pad:].any()
        assert gradient[:, :-pad].any()
    assert layer_specs.num_parameters(filled) == accounting.parameters(trial.model, trial.gates, SMALL_VOCABULARY)


def test_rows_that_fill_up_a_block_start_at_zero(world, filled_up):
    from models import device, layer_specs
    from models.config import Layout

    filled_up()
    with device.on("cpu"):
        device.seed_everything(1, "cpu")
        model = layer_specs.build_model(small_trial(KINDS["sdpa-headwise-hidden"]), Layout(), "cpu")
    for layer in model.decoder.layers:
        rows = layer.self_attention.linear_qkv.weight.view(SMALL.num_kv_heads, -1, SMALL.hidden_size)
        assert layer.self_attention.pad_rows == 14
        assert not rows[:, -14:].any()
        assert rows[:, :-14].all()
