"""What a config accepts, what it refuses and with which words, and what its fingerprint hangs on. No torch."""

import itertools

import pytest
from pydantic import BaseModel, ValidationError

from models.config import (
    BlendMember,
    DataConfig,
    GateConfig,
    Layout,
    ModelConfig,
    MoEConfig,
    PluginConfig,
    SwitchHeadConfig,
    TrainConfig,
    TrialConfig,
    ValidationConfig,
    ValidationSet,
)
from models.presets import PRESETS


def trial(gate=None, **changes):
    content = {
        "model": PRESETS["cpu-tiny"],
        "gate": gate,
        "train": TrainConfig(tokens=81_920, batch_tokens=2048, lr=1e-3),
        "seed": 1,
    }
    return TrialConfig(**content | changes)


# -- gates ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"position": "dense", "granularity": "headwise"}, "headwise is not allowed at position dense"),
        ({"position": "dense", "sharing": "head_shared"}, "head_shared is not allowed at position dense"),
        *(
            ({"position": position, "qk_order": "before_norm"}, f"for positions key and query, not {position}")
            for position in ("sdpa", "value", "dense")
        ),
        *(
            ({"position": position, "qk_order": "before_norm", "granularity": "headwise"}, "cancelled by the norm")
            for position in ("key", "query")
        ),
        *(
            (
                {"position": "sdpa", "init": "open", "activation": activation},
                f"open needs activation sigmoid or ns_sigmoid, not {activation}",
            )
            for activation in ("silu", "identity")
        ),
        ({"position": "sdpa", "init": "open", "input": "none"}, "init open needs input hidden: a gate"),
        ({"position": "sdpa", "shared_average": "logits"}, "shared_average logits needs sharing head_shared"),
        *(
            ({"position": "sdpa", "input": "constant", "scale": 0.5, name: value}, f"got also {name}")
            for name, value in {
                "granularity": "headwise",
                "sharing": "head_shared",
                "combine": "additive",
                "activation": "silu",
                "init": "zero",
            }.items()
        ),
        ({"position": "sdpa", "input": "constant"}, "constant with scale 1.0 changes nothing"),
        ({"position": "sdpa", "input": "none", "scale": 0.0}, "greater than 0"),
        ({"position": "middle"}, "'sdpa', 'value', 'key', 'query' or 'dense'"),
        ({"position": "sdpa", "sharring": "head_shared"}, "Extra inputs are not permitted"),
    ],
)
def test_gates_without_a_meaning_are_refused_by_name(options, message):
    with pytest.raises(ValidationError, match=message):
        GateConfig(**options)


def test_a_headwise_gate_before_the_norm_is_allowed_where_the_norm_does_not_cancel_it():
    gate = GateConfig(position="key", qk_order="before_norm", granularity="headwise", combine="additive")
    assert gate.qk_order == "before_norm"


# -- types ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("value", [81_920, 81_920.0])
def test_integral_floats_are_integers(value):
    train = TrainConfig(tokens=value, batch_tokens=2048, lr=1e-3)
    assert train.tokens == 81_920
    assert isinstance(train.tokens, int)


@pytest.mark.parametrize("value", ["81920", "8e4", 81_920.5, 0, -1, None, True, [81_920], float("inf"), float("nan")])
def test_nothing_else_is_taken_for_a_count(value):
    with pytest.raises(ValidationError, match="tokens"):
        TrainConfig(tokens=value, batch_tokens=2048, lr=1e-3)


@pytest.mark.parametrize("value", ["1e-3", 0, -1e-3, None, True, float("inf"), float("nan")])
def test_a_learning_rate_is_a_positive_finite_number(value):
    with pytest.raises(ValidationError, match="lr"):
        TrainConfig(tokens=81_920, batch_tokens=2048, lr=value)


@pytest.mark.parametrize(
    ("name", "value"), [("qk_norm", 1), ("qk_norm", "true"), ("tied_embeddings", "no"), ("hidden_size", "64")]
)
def test_nothing_is_coerced(name, value):
    with pytest.raises(ValidationError, match=name):
        ModelConfig(**PRESETS["cpu-tiny"].model_dump() | {name: value})


def test_a_whole_number_is_the_same_learning_rate_as_its_float():
    as_integer, as_float = (trial(train=TrainConfig(tokens=2048, batch_tokens=2048, lr=lr)) for lr in (1, 1.0))
    assert as_integer.fingerprint() == as_float.fingerprint()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_kv_heads": 3}, "num_query_heads 4 must be a multiple of num_kv_heads 3"),
        ({"head_dim": 15}, "head_dim 15 must be even"),
        ({"num_layers": 0}, "num_layers"),
    ],
)
def test_impossible_shapes_are_refused(changes, message):
    with pytest.raises(ValidationError, match=message):
        ModelConfig(**PRESETS["cpu-tiny"].model_dump() | changes)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"top_k": 9}, "top_k 9 must not exceed num_experts 8"),
        ({"top_k": 0}, "top_k"),
        ({"num_experts": 1, "top_k": 1}, "greater than or equal to 2"),
        ({"aux_loss_coefficient": -1e-3}, "aux_loss_coefficient"),
        ({"z_loss_coefficient": -1e-3}, "z_loss_coefficient"),
        ({"capacity": 1.0}, "Extra inputs are not permitted"),
    ],
)
def test_impossible_experts_are_refused(changes, message):
    with pytest.raises(ValidationError, match=message):
        MoEConfig(**{"num_experts": 8, "top_k": 2} | changes)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"schedule": "wsd", "warmup_fraction": 0.6, "decay_fraction": 0.5}, r"0.6 \+ decay_fraction 0.5 must not"),
        ({"warmup_fraction": 1.5}, "warmup_fraction"),
        ({"weight_decay": -0.1}, "weight_decay"),
        ({"schedule": "linear"}, "'cosine', 'wsd' or 'constant'"),
        ({"clip_gradient_norm": 0.0}, "clip_gradient_norm"),
        ({"warmup_tokens": 1e5}, r"warmup_tokens 100,000 is 49 steps; allowed: at most 40 steps \["),
        ({"schedule": "wsd", "warmup_tokens": 7e4}, "is 34 steps; allowed: at most 40 steps less decay_fraction 0.2"),
        ({"trunk_tokens": 1e6}, "trunk_tokens does nothing with schedule cosine; allowed: with schedule wsd"),
        ({"schedule": "wsd", "trunk_tokens": 2e4}, "trunk_tokens 20,000 must not be below tokens 81,920"),
    ],
)
def test_impossible_training_is_refused(changes, message):
    with pytest.raises(ValidationError, match=message):
        TrainConfig(**{"tokens": 81_920, "batch_tokens": 2048, "lr": 1e-3} | changes)


def test_a_batch_must_hold_whole_sequences():
    message = "batch_tokens 2,048 must be a multiple of data.sequence_length 300"
    with pytest.raises(ValidationError, match=message):
        trial(data=DataConfig(sequence_length=300))


def test_configs_cannot_be_changed():
    with pytest.raises(ValidationError, match="frozen"):
        trial().seed = 2


# -- what follows from a config -------------------------------------------------------------------------------


@pytest.mark.parametrize(("tokens", "steps"), [(2048, 1), (2049, 2), (81_920, 40), (81_921, 41), (1, 1)])
def test_a_trial_never_sees_fewer_tokens_than_asked_for(tokens, steps):
    train = TrainConfig(tokens=tokens, batch_tokens=2048, lr=1e-3)
    assert train.num_steps == steps


@pytest.mark.parametrize(
    ("points", "expected"), [(1, (40,)), (4, (10, 20, 30, 40)), (3, (13, 27, 40)), (100, tuple(range(1, 41)))]
)
def test_validation_is_spread_evenly_and_ends_at_the_last_step(points, expected):
    data = DataConfig(validation=ValidationConfig(points=points))
    assert trial(data=data).validation_steps() == expected


@pytest.mark.parametrize(("steps", "points"), list(itertools.product((1, 2, 7, 40), (1, 2, 3, 7, 50))))
def test_validation_steps_are_steps(steps, points):
    config = trial(
        data=DataConfig(validation=ValidationConfig(points=points)),
        train=TrainConfig(tokens=2048 * steps, batch_tokens=2048, lr=1e-3),
    )
    found = config.validation_steps()
    assert found == tuple(sorted(set(found)))
    assert found[0] >= 1
    assert found[-1] == steps
    assert len(found) == min(points, steps)


def test_a_world_is_the_product_of_its_layout():
    assert Layout(tensor=2, data=3).world_size == 6


# -- fingerprints ---------------------------------------------------------------------------------------------

TRAIN = trial().train
FULL = trial(GateConfig(position="sdpa"), data=DataConfig(corpus_sha256="c" * 64, tokenizer_sha256="t" * 64))

OTHER_VALUES = {
    "sdpa_output": "silu",
    "moe": MoEConfig(num_experts=8, top_k=2),
    "padded_vocab_size": 512,
    "plugins": {"layer-scale": PluginConfig(options={}, sha256="a")},
    "switch_head": SwitchHeadConfig(projections="value", num_experts=2, top_k=1),
    "more_gates": (GateConfig(position="dense"),),
    "granularity": "headwise",
    "sharing": "head_shared",
    "combine": "additive",
    "activation": "silu",
    "input": "none",
    "schedule": "wsd",
    "warmup_tokens": 4096,
    "precision": "bf16",
    "init": "zero",
    "position": "value",
    "num_kv_heads": 1,
    "head_dim": 32,
    "num_query_heads": 8,
    "sequence_length": 512,
    "blend": (BlendMember(corpus="b.jsonl", weight=1.0),),
    "validation_sets": (ValidationSet(name="books", corpus="b.jsonl"),),
    "slice_documents": 64,
    "corpus_sha256": "d" * 64,
    "tokenizer_sha256": "u" * 64,
}

CONDITIONAL = {
    "shared_average": GateConfig(position="sdpa", sharing="head_shared", shared_average="logits"),
    "qk_order": GateConfig(position="key", qk_order="before_norm"),
}
"""Gate fields that only mean something beside another one."""

NOT_LEARNT = {("data", "corpus"), ("data", "tokenizer")}
"""Paths: the hashes stand for the files."""
WITH_WSD = {("train", "trunk_tokens")}
"""Only there with schedule wsd: below."""


def leaves(config, path=()):
    for name in type(config).model_fields:
        value = getattr(config, name)
        if isinstance(value, BaseModel):
            yield from leaves(value, (*path, name))
        else:
            yield (*path, name), value


def with_leaf(config, path, value):
    """A copy with one field changed, validated anew."""
    content = config.model_dump()
    inner = content
    for name in path[:-1]:
        inner = inner[name]
    inner[path[-1]] = value
    return TrialConfig.model_validate(content)


def another(name, value):
    if name in OTHER_VALUES:
        return OTHER_VALUES[name]
    if isinstance(value, bool):
        return not value
    assert isinstance(value, int | float), f"say in OTHER_VALUES what else than {value!r} {name} may be"
    return 2 * value if isinstance(value, int) else value / 2


WITHIN_FP8 = {("fp8",)}
"""Only there with precision fp8: below."""

LEARNT = [
    (path, value)
    for path, value in leaves(FULL)
    if path not in NOT_LEARNT | WITHIN_FP8 | WITH_WSD and path[-1] not in CONDITIONAL
]


@pytest.mark.parametrize(("path", "value"), LEARNT, ids=[".".join(path) for path, _ in LEARNT])
def test_the_fingerprint_changes_with_every_learnt_field(path, value):
    changed = with_leaf(FULL, path, another(path[-1], value))
    assert changed != FULL
    assert changed.fingerprint() != FULL.fingerprint()


def wsd_trial(**train):
    return TrialConfig.model_validate(
        {**FULL.model_dump(), "train": {**TRAIN.model_dump(), "schedule": "wsd", **train}}
    )


def test_a_longer_trunk_is_another_order_of_the_data_and_a_trunk_of_its_own_length_is_none():
    plain, trunk, branch = wsd_trial(), wsd_trial(trunk_tokens=TRAIN.tokens), wsd_trial(trunk_tokens=2 * TRAIN.tokens)
    assert plain.fingerprint() == trunk.fingerprint() != branch.fingerprint()
    assert [one.train.num_data_steps for one in (plain, branch)] == [TRAIN.num_steps, 2 * TRAIN.num_steps]


def test_a_fraction_of_warm_up_is_nothing_where_tokens_are_given():
    twins = [wsd_trial(warmup_tokens=4096, warmup_fraction=fraction).fingerprint() for fraction in (0.1, 0.3)]
    assert twins[0] == twins[1] != wsd_trial(warmup_tokens=8192).fingerprint()


def fp8_trial(**fp8):
    return TrialConfig.model_validate({**FULL.model_dump(), "precision": "fp8", "fp8": fp8 or None})


def test_fingerprints_of_other_seeds_are_those_of_the_config_with_that_seed():
    of_seed = FULL.fingerprint_by_seed()
    seeds = [FULL.seed, 0, 7, 2**32 - 1]
    assert [of_seed(seed) for seed in seeds] == [FULL.model_copy(update={"seed": s}).fingerprint() for s in seeds]


def test_the_fingerprint_covers_the_fp8_recipe_named_or_not():
    other = [fp8_trial(recipe=recipe) for recipe in ("delayed", "blockwise", "mxfp8")] + [fp8_trial(format="e4m3")]
    prints = [config.fingerprint() for config in (FULL, fp8_trial(), *other)]
    assert len(set(prints)) == len(prints)
    assert fp8_trial(recipe="tensorwise", format="hybrid").fingerprint() == fp8_trial().fingerprint()


def test_an_fp8_recipe_needs_precision_fp8():
    with pytest.raises(ValidationError, match=r"fp8\.recipe needs precision fp8, not fp32"):
        TrialConfig.model_validate({**FULL.model_dump(), "fp8": {"recipe": "delayed"}})


@pytest.mark.parametrize("name", CONDITIONAL)
def test_the_fingerprint_changes_with_options_of_options(name):
    gate = CONDITIONAL[name]
    plain = gate.model_copy(update={name: type(gate).model_fields[name].default})
    assert plain != gate
    assert trial(gate).fingerprint() != trial(plain).fingerprint()


@pytest.mark.parametrize("name", MoEConfig.model_fields)
def test_the_fingerprint_changes_with_every_field_of_the_experts(name):
    experts = trial(model=PRESETS["cpu-moe-tiny"])
    path = ("model", "moe", name)
    changed = with_leaf(experts, path, another(name, getattr(experts.model.moe, name)))
    assert changed.fingerprint() != experts.fingerprint()
    if name.endswith("coefficient"):
        assert len({with_leaf(experts, path, value).fingerprint() for value in (0.0, 1e-3, 1.0)}) == 3


def test_every_field_is_either_learnt_or_known_not_to_be():
    paths = {path for path, _ in leaves(FULL)}
    assert {path for path, _ in LEARNT} | NOT_LEARNT | WITHIN_FP8 | WITH_WSD | {
        ("gate", name) for name in CONDITIONAL
    } == paths
    assert len(LEARNT) > 40


def test_the_fingerprint_changes_with_the_gate_and_with_numerics(monkeypatch):
    assert trial(None).fingerprint() != trial(GateConfig(position="sdpa")).fingerprint()
    before = FULL.fingerprint()
    monkeypatch.setattr("models.config.trial.NUMERICS", 1_000_000)
    assert FULL.fingerprint() != before


def test_a_moved_corpus_is_the_same_trial():
    for name in ("corpus", "tokenizer"):
        assert with_leaf(FULL, ("data", name), f"/elsewhere/{name}.json").fingerprint() == FULL.fingerprint()


def test_without_a_hash_the_path_counts():
    bare = trial()
    for name in ("corpus", "tokenizer"):
        moved = with_leaf(bare, ("data", name), f"/elsewhere/{name}.json")
        assert moved.fingerprint() != bare.fingerprint()


def test_a_moved_corpus_of_a_list_is_the_same_trial():
    for name, one in [
        ("blend", BlendMember(corpus="a.jsonl", weight=1.0, corpus_sha256="a" * 64)),
        ("validation_sets", ValidationSet(name="books", corpus="a.jsonl", corpus_sha256="a" * 64)),
    ]:
        here, moved, changed = (
            with_leaf(FULL, ("data", name), (one.model_copy(update=update),)).fingerprint()
            for update in ({}, {"corpus": "elsewhere.jsonl"}, {"corpus_sha256": "b" * 64})
        )
        assert here == moved != changed


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"blend": [{"corpus": "a", "weight": 1.0}] * 2}, "blend has the corpus a more than once"),
        ({"blend": [{"corpus": "a", "weight": 0.0}]}, "greater than 0"),
        ({"validation_sets": [{"name": "b", "corpus": "a"}] * 2}, "the name 'b' is taken; allowed: each name once"),
        ({"validation_sets": [{"name": "slice", "corpus": "a"}]}, "the name 'slice' is taken"),
        ({"validation_sets": [{"name": "Much too long a name", "corpus": "a"}]}, "should match pattern"),
    ],
)
def test_lists_of_corpora_that_mean_nothing_are_refused(changes, message):
    with pytest.raises(ValidationError, match=message):
        DataConfig.model_validate(changes)


def test_what_is_absent_or_off_is_not_in_the_fingerprint():
    """So that a mechanism that is added later, off by default, changes no earlier fingerprint."""
    off = trial(model=PRESETS["cpu-tiny"].model_copy(update={"qk_norm": False}))
    assert "qk_norm" in trial().canonical_json()
    for name in ("gate", "qk_norm", "full_at_end", "null", "false"):
        assert name not in off.canonical_json()
    assert '"weight_decay":0.0' in with_leaf(FULL, ("train", "weight_decay"), 0.0).canonical_json()


def test_a_config_comes_back_from_json_the_same():
    for config in (FULL, trial()):
        assert TrialConfig.model_validate_json(config.model_dump_json()) == config
        assert TrialConfig.model_validate(config.model_dump()).fingerprint() == config.fingerprint()


def test_fingerprints_are_those_of_the_version_before():
    """Stored results are found by these. A new field changes them all, unless it is absent (None, False) by default."""
    assert trial().fingerprint() == "1c10ab1e6a434614"
    assert FULL.fingerprint() == "93861f1f1c4817a9"
    assert "moe" not in FULL.canonical_json()
