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
    with pytest.raises(UserError, match=r"controls: .*half-scale.; allowed: \[half-scale\], or \[\] for none"):
        arms("controls=[wider-ffn]")
