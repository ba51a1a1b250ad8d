"""The paper's sweep files: every run is there once, with the paper's parameters and schedule, and has a CPU twin."""

from pathlib import Path

import pytest

from models.config import TrialConfig
from orchestrator.plan import expand
from orchestrator.sweep import UserError, load

PAPER = Path(__file__).parent.parent / "sweeps" / "paper"
MOE_TABLES = ("table1", "table3", "table4", "table6")
ARMS = {
    "table1": 16,
    "table3": 7,
    "table4": 7,
    "table6": 6,
}
"""Rows of the paper's tables, and the half-scale control of ours in Table 1."""


def planned(name, *overrides):
    return expand(load(PAPER / f"{name}.yaml", overrides), files_may_be_absent=True)


@pytest.fixture(scope="module")
def plans():
    return {path.stem: planned(path.stem) for path in sorted(PAPER.glob("*.yaml"))}


def by_arm(plan) -> dict[str, TrialConfig]:
    return {trial.arm: trial.config for trial in plan.trials if trial.seed == plan.sweep.seeds[0]}


def test_the_files_are_the_tables_and_their_twins(plans):
    tables = ("table1", "table2", "table3", "table4", "table6")
    assert sorted(plans) == sorted([*tables, *(f"{table}-cpu" for table in tables)])
    assert not any(plan.refusals for plan in plans.values())
    for name, count in ARMS.items():
        assert len(by_arm(plans[name])) == count


def test_the_paper_has_38_distinct_runs(plans):
    """24 of the MoE and 14 dense: an arm that stands in several tables is one trial."""
    fingerprints = {name: {trial.fingerprint for trial in plans[name].trials} for name in ("table2", *MOE_TABLES)}
    ours = {trial.fingerprint for trial in plans["table1"].trials if trial.arm == "half-scale"}
    moe = set().union(*(fingerprints[name] for name in MOE_TABLES)) - ours
    assert (len(moe), len(fingerprints["table2"]), len(ours)) == (24, 14, 1)
    assert len(moe | fingerprints["table2"]) == 38


@pytest.mark.parametrize("twin", ["", "-cpu"])
def test_arms_of_one_name_are_one_trial_over_all_tables(plans, twin):
    known = {}
    for table in MOE_TABLES:
        for trial in plans[table + twin].trials:
            first = known.setdefault((trial.arm, trial.seed), trial.fingerprint)
            assert first == trial.fingerprint, (table, trial.arm)
    assert known["v-1top1", 1] == known["g2-headwise", 1]


@pytest.mark.parametrize("table", ["table1", "table2", "table3", "table4", "table6"])
def test_a_twin_has_the_same_arms_in_the_same_settings(plans, table):
    """Arm by arm as many cells, the same gates, and a size that a laptop trains."""
    full, twin = plans[table], plans[f"{table}-cpu"]
    assert list(twin.sweep.arms) == list(full.sweep.arms)
    for arm in full.sweep.arms:
        ours, theirs = (
            [trial.config for trial in plan.trials if trial.arm == arm and trial.seed == 1] for plan in (twin, full)
        )
        assert len(ours) == len(theirs) > 0
        assert {config.gates for config in ours} == {config.gates for config in theirs}
        assert {config.model.switch_head for config in ours} == {config.model.switch_head for config in theirs}
        assert {config.model.moe is None for config in ours} == {config.model.moe is None for config in theirs}
    assert max(trial.num_parameters for trial in twin.trials) < 2e6


# -- what the paper states ------------------------------------------------------------------------------------

ADDED_MILLIONS = {
    "baseline": 0,
    "more-kv-heads": 50,
    "more-query-heads": 201,
    "g1-elementwise": 201,
    "g2-elementwise": 25,
    "g3-elementwise": 25,
    "g4-elementwise": 201,
    "g5-dense": 101,  # printed as 100
    "g1-headwise": 1.6,
    "g2-headwise": 0.2,
    "g1-shared": 201,
    "g2-shared": 25,
    "g1-additive-silu": 201,
    "g1-silu": 201,
    "more-experts": 453,  # printed as 400
    "half-scale": 0,
}
"""Table 1's column +M, but for the two figures that its arithmetic does not give."""


def test_added_parameters_are_those_of_table_1(plans):
    sizes = {trial.arm: trial.num_parameters for trial in plans["table1"].trials}
    for arm, millions in ADDED_MILLIONS.items():
        digits = len(str(millions).partition(".")[2])
        assert round((sizes[arm] - sizes["baseline"]) / 1e6, digits) == millions, arm


def test_the_moe_runs_train_on_the_papers_schedule(plans):
    for name in MOE_TABLES:
        for trial in plans[name].trials:
            train = trial.config.train
            assert (train.num_steps, train.lr, trial.config.batch_sequences) == (100_000, 2e-3, 1024)
            assert train.lr * train.min_lr_fraction == pytest.approx(3e-5)
            assert train.num_steps * train.warmup_fraction == pytest.approx(1000)
            assert trial.config.data.sequence_length == 4096


def test_the_dense_runs_are_the_14_rows_of_table_2(plans):
    rows = {
        (config.model.num_layers, config.train.tokens, config.batch_sequences, config.train.lr, trial.arm)
        for trial in plans["table2"].trials
        for config in (trial.config,)
    }
    settings = {
        (28, 400, 1024, 4.0): ("baseline", "g1-elementwise"),
        (28, 3500, 2048, 4.5): ("baseline", "g1-elementwise"),
        (48, 400, 1024, 4.0): ("baseline", "g1-elementwise", "g1-headwise"),
        (48, 400, 1024, 8.0): ("baseline", "g1-elementwise", "sandwich"),
        (48, 1000, 4096, 5.3): ("baseline", "g1-elementwise"),
        (48, 1000, 4096, 8.0): ("baseline", "g1-elementwise"),
    }
    assert rows == {
        (layers, billions * 10**9, batch, lr / 1000, arm)
        for (layers, billions, batch, lr), arms in settings.items()
        for arm in arms
    }


def test_gated_dense_models_are_as_large_as_their_baselines(plans):
    """As the paper's: 1720.8 M, and 1728.2 M for the released 28 layers with the elementwise gate."""
    sizes = {(trial.arm, trial.config.model.num_layers): trial.num_parameters for trial in plans["table2"].trials}
    assert round(sizes["baseline", 28] / 1e6, 1) == 1720.8
    assert round(sizes["g1-elementwise", 28] / 1e6, 1) == 1728.2
    assert sizes["g1-elementwise", 48] == pytest.approx(sizes["baseline", 48], rel=0.006)


# -- data that is elsewhere -----------------------------------------------------------------------------------


def test_a_plan_without_its_data_says_so_and_a_run_refuses(plans):
    assert [path.name for path in plans["table1"].absent_files] == ["pretrain.jsonl", "tokenizer.json"]
    assert plans["table1-cpu"].absent_files == ()
    with pytest.raises(UserError, match=r"table1\.yaml:\d+:\d+: base\.data\.corpus: got .*there is no file"):
        expand(load(PAPER / "table1.yaml"))
