"""The half-scale control joins gate sweeps by itself, and only those that lack it."""

import pytest
from sweep_runs import SWEEP

from orchestrator.plan import expand
from orchestrator.sweep import UserError, parse
from orchestrator.sweep.parsing import HALF_SCALE

GATES = SWEEP.replace("controls: []\n", "").replace("corpus: corpus.jsonl, ", "")


def arms(*overrides, text=GATES):
    return parse(text, "x.yaml", overrides).arms


def test_a_gate_sweep_gets_the_half_scale_control_behind_its_own_arms():
    assert list(arms()) == ["baseline", "g1", "half-scale"]
    trials = {trial.arm: trial for trial in expand(parse(GATES, "x.yaml")).trials}
    control, baseline = trials["half-scale"].config, trials["baseline"].config
    assert (control.gate.position, control.gate.input, control.gate.scale) == ("sdpa", "constant", 0.5)
    assert control.model_copy(update={"gate": None}) == baseline
    assert trials["half-scale"].num_parameters == trials["baseline"].num_parameters


def test_the_control_is_the_baseline_with_its_own_settings_halved():
    assert arms("arms.baseline.model.num_kv_heads=4")["half-scale"] == {"model": {"num_kv_heads": 4}, **HALF_SCALE}


def test_the_extra_seeds_of_the_baseline_count_the_control():
    two = parse(GATES, "x.yaml", ["seeds=[1,2]"])
    assert two.extra_baseline_seeds == (3,)
    assert parse(GATES, "x.yaml", ["seeds=[1,2]", "controls=[]"]).extra_baseline_seeds == ()


@pytest.mark.parametrize(
    "overrides",
    [
        ["controls=[]"],
        ["arms.g1.gate=null", "arms.g1.model.num_kv_heads=4"],
        ["baseline=g1"],
        ["gate.position=value", "arms.g1.gate=null"],
        ["axes={gate.granularity: [headwise]}"],
        ["arms.g1={gate: {position: sdpa, input: constant, scale: 0.5}}"],
    ],
)
def test_what_is_no_gate_sweep_or_has_the_control_stays_as_it_is(overrides):
    assert list(arms(*overrides)) == ["baseline", "g1"]


def test_an_arm_of_that_name_is_kept():
    text = GATES.replace("seeds: [1]", "  half-scale: {gate: {position: value}}\nseeds: [1]")
    assert arms(text=text)["half-scale"] == {"gate": {"position": "value"}}


def test_an_unknown_control_is_refused():
    with pytest.raises(UserError, match=r"controls: .*allowed: a list of half-scale, .*, or \[\] for none"):
        arms("controls=[deeper]")


# ---- controls with more parameters

SIZED = "controls=[wider-ffn, more-kv-heads, more-query-heads, half-scale]"


def added(*overrides, text=GATES):
    """By arm, parameters beyond the baseline's of the same seed."""
    plan = expand(parse(text, "x.yaml", overrides))
    sizes = {trial.arm: trial.num_parameters for trial in plan.trials}
    return {arm: size - sizes["baseline"] for arm, size in sizes.items()}, plan


def test_sized_controls_add_what_the_dearest_gates_add_and_change_one_key_each():
    more, plan = added(SIZED, "model.preset=cpu-1m")
    assert more["more-kv-heads"] == more["more-query-heads"] == more["g1"] > 0 == more["half-scale"]
    step = 3 * 128 * 2 * 4  # matrices x hidden size x multiple of the width x layers
    assert abs(more["wider-ffn"] - more["g1"]) <= step / 2
    keys = {contrast.arm: [change.key for change in contrast.declared] for contrast in plan.contrasts}
    assert keys == {
        "g1": ["gate"],
        "half-scale": ["gate"],
        "wider-ffn": ["model.ffn_size"],
        "more-kv-heads": ["model.num_kv_heads"],
        "more-query-heads": ["model.num_query_heads"],
    }
    assert not any(contrast.implied for contrast in plan.contrasts)


def test_more_experts_are_as_nearly_equal_as_experts_allow_and_refused_where_there_are_none():
    control = "controls=[more-experts]"
    more, plan = added(control, "model.preset=cpu-moe-1m", "model.ffn_size=16")
    experts = {trial.arm: trial.config.model.moe for trial in plan.trials}
    assert (experts["more-experts"].top_k, experts["g1"].num_experts) == (experts["baseline"].top_k, 16)
    assert experts["more-experts"].num_experts > 16
    assert 0.5 <= more["more-experts"] / more["g1"] <= 2
    (refused,) = added(control)[1].refusals
    assert (refused.arm, refused.reason) == (
        "more-experts",
        "control more-experts is impossible: the model has no experts",
    )


def test_a_control_whose_step_is_far_from_the_gates_is_refused():
    _, plan = added("controls=[more-kv-heads]", "arms.g1.gate.granularity=headwise", "model.preset=cpu-1m")
    (refused,) = plan.refusals
    assert "the gates add 2,048 parameters; the nearest larger model.num_kv_heads, 4, adds 65,536" in refused.reason


def test_sized_heads_stay_divisible_by_the_layout():
    _, plan = added("controls=[more-query-heads, wider-ffn]", "resources.layout.tensor=2", "model.preset=cpu-1m")
    assert not plan.refusals
    models = {trial.arm: trial.config.model for trial in plan.trials}
    assert (models["more-query-heads"].num_query_heads, models["wider-ffn"].ffn_size % 2) == (6, 0)


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (["match=parameters"], "match: parameters takes that off again; allowed: with match: none"),
        (["arms.g1={model: {qk_norm: false}}"], "no sweep of gated arms and an ungated baseline"),
        (["axes={gate.granularity: [headwise]}"], "no sweep of gated arms and an ungated baseline"),
    ],
)
def test_sized_controls_without_anything_to_equal_are_refused(overrides, words):
    with pytest.raises(UserError, match=f"controls: wider-ffn: .*{words}"):
        arms("controls=[wider-ffn]", *overrides)


def test_a_sized_control_of_ones_own_is_kept():
    text = GATES.replace("seeds: [1]", "  wider-ffn: {model: {ffn_size: 200}}\nseeds: [1]")
    assert arms("controls=[wider-ffn]", text=text)["wider-ffn"] == {"model": {"ffn_size": 200}}
