"""Resources that differ by cell: the grammar of ``resources.by``, and what the plan makes of it."""

from __future__ import annotations

from pathlib import Path

import pytest
from rich.console import Console
from sweep_runs import SWEEP, plan_of

from models.config import Layout
from orchestrator.gang import GangShape
from orchestrator.plan import Plan
from orchestrator.report import plan_table
from orchestrator.sweep import ResourcesConfig, UserError

PAIR = "resources={cpus: 2, layout: {data: 2}, by: [{where: {arm: g1}, cpus: 1, layout: {tensor: 2}}]}"


def layouts(plan: Plan) -> dict[str, Layout]:
    return {f"{one.arm} {one.axes.get('train.lr', '')}".strip(): one.layout for one in plan.trials}


def test_a_rule_is_laid_over_the_resources_of_all_and_the_layout_key_by_key(tmp_path: Path):
    plan = plan_of(tmp_path, [PAIR])
    assert layouts(plan) == {"baseline": Layout(data=2), "g1": Layout(data=2, tensor=2)}
    cpus = {one.arm: one.resources.cpus for one in plan.trials}
    assert cpus == {"baseline": 2, "g1": 1}
    assert {one.fingerprint for one in plan.trials} == {one.fingerprint for one in plan_of(tmp_path).trials}


def test_the_first_rule_that_matches_all_of_its_keys_holds(tmp_path: Path):
    by = "{where: {arm: g1, train.lr: 1e-3}, cpus: 3}, {where: {train.lr: 0.001}, cpus: 4}, {where: {arm: g1}, cpus: 5}"
    plan = plan_of(tmp_path, ["axes={train.lr: [1e-3, 2e-3]}", f"resources={{by: [{by}]}}"])
    cpus = {(one.arm, one.axes["train.lr"]): one.resources.cpus for one in plan.trials}
    assert cpus == {("g1", 0.001): 3, ("baseline", 0.001): 4, ("g1", 0.002): 5, ("baseline", 0.002): 1}


def test_rules_outlive_the_store_s_json(tmp_path: Path):
    resources = plan_of(tmp_path, [PAIR]).sweep.resources
    again = ResourcesConfig.model_validate(resources.model_dump(mode="json"))
    assert again == resources
    assert GangShape.of(again.of("g1", {})) == GangShape(Layout(tensor=2, data=2), 1, 0)


def test_refusals_and_micro_batches_go_by_the_cell_s_own_layout(tmp_path: Path):
    by = "[{where: {arm: g1}, layout: {tensor: 3}}, {where: {arm: baseline}, layout: {data: 4}}]"
    plan = plan_of(tmp_path, [f"resources={{by: {by}}}"])
    (refusal,) = plan.refusals
    assert refusal.arm == "g1"
    assert "is not divisible by layout.tensor 3" in refusal.reason
    (trial,) = plan.trials
    assert trial.micro_batch_sequences == 1  # of four sequences


@pytest.mark.parametrize(
    ("by", "said"),
    [
        ("[{where: {arm: g2}, cpus: 2}]", r"resources\.by\[0\]\.where\.arm: got 'g2'; allowed: baseline, g1"),
        ("[{where: {train.lr: 1}, cpus: 2}]", r"train\.lr.*not an axis of this sweep; allowed: arm"),
        ("[{where: {arm: g1}, gpu: 2}]", r"0\.gpu: Extra inputs are not permitted"),
        ("[{where: {arm: g1}}]", "a rule that changes nothing; allowed: at least one of gpus, cpus"),
        ("[{where: {arm: g1}, layout: {tensors: 2}}]", r"by\[0\]: layout: tensors: Extra inputs"),
        ("[{where: {arm: g1}, gpus: 1}]", r"by\[0\]: gpus 1 where the sweep has 0; allowed: one kind of device"),
        ("[{where: {arm: g1}, cpus: 2}, {where: {arm: g1}, cpus: 3}]", None),
    ],
)
def test_a_mistake_in_a_rule_is_told(tmp_path: Path, by: str, said: str | None):
    if said is None:
        assert {one.resources.cpus for one in plan_of(tmp_path, [f"resources={{by: {by}}}"]).trials} == {1, 2}
        return
    with pytest.raises(UserError, match=said):
        plan_of(tmp_path, [f"resources={{by: {by}}}"])


def test_a_rule_that_no_cell_takes_is_refused(tmp_path: Path):
    text = SWEEP.replace(
        "seeds: [1]", "axes: {train.lr: [1e-3, 2e-3]}\nexclude: [{arm: g1, train.lr: 1e-3}]\nseeds: [1]"
    )
    text += "resources: {by: [{where: {arm: g1, train.lr: 1e-3}, cpus: 2}]}\n"
    with pytest.raises(UserError, match="matches no cell; allowed: a rule that at least one takes"):
        plan_of(tmp_path, text=text)


def test_tensor_ranks_that_share_a_part_of_two_gpus_are_refused(tmp_path: Path):
    plan = plan_of(tmp_path, ["resources={gpus: 0.75, layout: {tensor: 2}}"])
    assert all("they share 1.5 GPUs of one node" in refusal.reason for refusal in plan.refusals)
    assert not plan.trials


def test_the_plan_tells_the_shapes(tmp_path: Path):
    console = Console(width=300, record=True)
    console.print(plan_table(plan_of(tmp_path, [PAIR])))
    said = "gangs: 1 trial on 4 ranks (tensor 2, data 2) x 1 CPU, 1 trial on 2 ranks (data 2) x 2 CPU"
    assert said in console.export_text()
