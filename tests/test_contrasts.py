"""What an arm changes beside the baseline: what it declares, what follows, and nothing else."""

import pytest
from sweep_runs import SWEEP

from orchestrator.plan import expand
from orchestrator.plan import expansion as planning
from orchestrator.report import results
from orchestrator.report.contrasts import contrast_lines, contrast_text
from orchestrator.store import Store
from orchestrator.sweep import UserError, parse

TEXT = SWEEP.replace("corpus: corpus.jsonl, ", "")


def planned(*overrides, text=TEXT):
    return expand(parse(text, "x.yaml", overrides))


def only(plan):
    (contrast,) = plan.contrasts
    return contrast


def keys(changes):
    return [change.key for change in changes]


def test_a_gate_is_one_declared_change_and_its_costs_follow():
    contrast = only(planned("axes.train.lr=[1e-3, 1e-2]", "seeds=[1, 2]"))
    assert (keys(contrast.declared), contrast.implied, contrast.undeclared) == (["gate"], (), ())
    more = contrast.trial.num_parameters - contrast.baseline.num_parameters
    share = 100 * more / contrast.baseline.num_parameters
    said = contrast_text(contrast)
    assert said.startswith(f"changes gate {{position: sdpa}}; so parameters {more:+,} ({share:+.3g}%), FLOPs +")


def test_a_matched_width_is_implied_and_the_residue_is_told():
    contrast = only(planned("match=parameters"))
    assert [(change.key, change.why) for change in contrast.implied] == [("model.ffn_size", "match: parameters")]
    more = contrast.trial.num_parameters - contrast.baseline.num_parameters
    assert more != 0
    assert f"(match: parameters), parameters {more:+,} (" in contrast_text(contrast)


@pytest.mark.parametrize(
    ("arm", "declared"),
    [
        ("{gate: {position: sdpa}, model: {qk_norm: false}}", ["gate", "model.qk_norm"]),
        ("{gate: {position: sdpa}, more_gates: [{position: value}]}", ["gate", "more_gates"]),
        ("{train: {weight_decay: 0.2, beta1: 0.8}}", ["train.weight_decay", "train.beta1"]),
    ],
)
def test_unrelated_keys_are_told_as_several_things_at_once(arm, declared):
    contrast = only(planned(f"arms.g1={arm}"))
    assert sorted(keys(contrast.declared)) == sorted(declared)
    assert contrast_text(contrast).startswith("changes 2 things at once: ")


def test_what_the_baseline_sets_is_a_change_of_every_arm_that_does_not():
    assert keys(only(planned("arms.baseline.model.qk_norm=false")).declared) == ["model.qk_norm", "gate"]


def test_fields_of_an_arms_preset_and_multiples_are_implied():
    contrast = only(planned("arms.g1={model: {preset: cpu-1m}}"))
    assert keys(contrast.declared) == ["model.preset"]
    assert {change.why for change in contrast.implied} == {"model.preset"}
    multiple = only(planned("arms.g1={train: {lr: 1e-3}}", "train.weight_decay={of: train.lr, times: 10}"))
    assert keys(multiple.declared) == ["train.lr"]
    assert [(one.key, one.why) for one in multiple.implied] == [("train.weight_decay", "10 times train.lr")]


def test_a_multiple_on_an_axis_hides_no_baseline():
    text = TEXT.replace("lr: 3e-3", "") + "axes: {train.lr: {of: train.weight_decay, times: 0.01}}\n"
    assert keys(only(planned("arms.g1={train: {weight_decay: 0.2}}", text=text)).declared) == ["train.weight_decay"]


def test_another_layout_of_an_arm_is_told():
    contrast = only(planned("resources.by=[{where: {arm: g1}, layout: {data: 2}}]"))
    assert [(one.key, one.why) for one in contrast.implied] == [("resources.layout", "resources.by")]


def test_a_difference_that_nobody_declared_is_refused(monkeypatch):
    """No rule of the grammar makes one; here the resolution itself is made to."""
    honest = planning.cell_config

    def crooked(arm, leaves, files):
        config = honest(arm, leaves, files)
        train = config.train.model_copy(update={"warmup_fraction": 0.3})
        return config.model_copy(update={"train": train}) if arm == "g1" else config

    monkeypatch.setattr(planning, "cell_config", crooked)
    with pytest.raises(UserError, match=r"g1 differs from baseline in train.warmup_fraction .*which neither sets"):
        planned()


def test_cells_that_differ_otherwise_have_lines_of_their_own():
    lines = contrast_lines(planned("match=parameters", "axes={model.preset: [cpu-1m, cpu-tiny]}"))
    assert [line.partition(")")[0] for line in lines[1:]] == [
        "  g1 (model.preset = cpu-tiny",
        "  g1 (model.preset = cpu-1m",
    ]


def test_the_results_of_a_stored_sweep_tell_arms_that_change_several_things(tmp_path):
    plan = planned("arms.g1.model.qk_norm=false")
    with Store(f"sqlite:///{tmp_path / 'store.db'}") as store:
        store.add(plan)
        (table,) = results(store, "tiny").tables
        (note,) = [note for note in table.footnotes if "more than one thing" in note]
        assert note.endswith("g1 (model.qk_norm, gate)")
        store.add(planned())
        (table,) = results(store, "tiny").tables
        assert not any("more than one thing" in note for note in table.footnotes)
