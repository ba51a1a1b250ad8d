"""The micro-batch that a plan chooses, and what it says of cells that no micro-batch makes fit."""

import re

import pytest
from fake_gangs import bench, plan  # noqa: F401 (fixtures)

from models import accounting
from models.accounting import GIB, SPARE_FRACTION, fits, fullest_rank, micro_batches
from models.run_dir import read_attempt_spec
from orchestrator.plan import after_out_of_memory, expand
from orchestrator.sweep import UserError, parse

LARGE = """
name: large
question: Does it fit?
base:
  model: {preset: dense-1.7b-28l}
  data: {sequence_length: 4096}
  train: {tokens: 4e9, batch_tokens: 1048576, lr: 4e-3}
baseline: none
arms:
  none: {}
  everywhere: {gate: {position: sdpa, combine: additive, sharing: head_shared}}
seeds: [1]
controls: []
"""
MOE = ("model={preset: moe-15a2b, num_layers: 4, moe: {num_experts: 16}}",)


def planned(*overrides):
    return expand(parse(LARGE, "large.yaml", overrides))


def sizes(found):
    return {trial.arm: trial.micro_batch_sequences for trial in found.trials}


def test_on_the_cpu_a_rank_takes_its_whole_share_as_it_always_did():
    assert sizes(planned("precision=fp32")) == {"none": 256, "everywhere": 256}
    assert sizes(planned("resources={layout: {data: 4}}")) == {"none": 64, "everywhere": 64}


def test_given_sizes_are_kept():
    assert sizes(planned("resources={gpus: 1, accelerator: h200, micro_batch_sequences: 2}")) == {
        "none": 2,
        "everywhere": 2,
    }


def test_after_out_of_memory_the_next_micro_batch_leaves_room_beside_what_had_seemed_enough():
    config, resources = (
        (found := planned("resources={gpus: 1, accelerator: h200}")).trials[0].config,
        found.sweep.resources,
    )
    needed = {size: fullest_rank(config, resources.layout, size, "cuda").total for size in (1, 2, 4, 8)}
    said = after_out_of_memory(config, resources, 8, "CUDA out of memory. Tried to allocate 2.50 GiB.")
    assert needed[4] <= (1 - SPARE_FRACTION) * needed[8]
    assert said.startswith("resources.micro_batch_sequences: 4 would fit (")
    # A card that is smaller than its kind, or shared: what it says of itself counts.
    small = needed[2] / GIB / (1 - SPARE_FRACTION) + 0.01
    said = after_out_of_memory(config, resources, 8, f"GPU 0 has a total capacity of {small:.2f} GiB of which 1 MiB is")
    assert said.startswith("resources.micro_batch_sequences: 2 would fit")
    assert after_out_of_memory(config, resources, 1, "CUDA out of memory").startswith("no smaller micro-batch than 1")


@pytest.mark.parametrize(
    "resources", ["{gpus: 1, accelerator: h100}", "{gpus: 1, accelerator: b300}", "{gpus: 1}", "{memory_gib: 600}"]
)
def test_the_largest_micro_batch_that_fits_is_chosen(resources):
    found = planned(f"resources={resources}")
    limit = found.sweep.resources.rank_memory_gib * GIB
    assert len(found.trials) == 2
    for trial in found.trials:
        candidates = micro_batches(trial.config, trial.layout)
        larger = [size for size in candidates if size > trial.micro_batch_sequences]
        device = found.sweep.resources.device
        assert trial.memory == fullest_rank(trial.config, trial.layout, trial.micro_batch_sequences, device)
        assert fits(trial.memory, limit)
        assert larger
        assert not any(fits(fullest_rank(trial.config, trial.layout, size, device), limit) for size in larger)


def test_ranks_that_share_a_gpu_share_its_memory_and_its_peak():
    half, whole = (planned(f"resources={{gpus: {gpus}, accelerator: h100}}").sweep.resources for gpus in (0.5, 1))
    assert half.rank_memory_gib == whole.rank_memory_gib / 2
    assert half.rank_peak_flops("bf16") == whole.rank_peak_flops("bf16") / 2 == 989.5e12 / 2


def test_the_micro_batch_and_the_memory_are_no_part_of_a_trial():
    fingerprints = [
        [trial.fingerprint for trial in planned(f"resources={{gpus: 1, {more}}}").trials]
        for more in ("accelerator: h100", "memory_gib: 300", "micro_batch_sequences: 1", "peak_flops: 1e15")
    ]
    assert all(found == fingerprints[0] for found in fingerprints)


def test_arms_with_experts_share_a_micro_batch_and_dense_arms_need_not():
    """At some size the heavier arm alone needs a smaller one."""
    for overrides, is_shared in ((MOE, True), ((), False)):
        different = False
        for gib in range(40, 120, 2):
            found = sizes(planned(*overrides, f"resources={{gpus: 1, memory_gib: {gib}}}"))
            alone = {
                trial.arm: accounting.largest_micro_batch(trial.config, trial.layout, "cuda", gib * GIB)
                for trial in planned(*overrides, f"resources={{gpus: 1, memory_gib: {gib}}}").trials
            }
            different |= len(set(alone.values())) > 1
            if is_shared:
                assert set(found.values()) <= {min(alone.values(), default=0)}
            else:
                assert found == alone
        assert different, overrides


def test_experts_at_another_batch_size_choose_for_themselves():
    text = (*MOE, "resources={gpus: 1, memory_gib: 60}", "train.batch_tokens=1048576")
    small = planned(*text[:-1], "train.batch_tokens=12288")
    assert sizes(small) == {"none": 3, "everywhere": 3}
    assert 3 not in sizes(planned(*text)).values()


@pytest.mark.parametrize(
    ("stages", "sequences", "size"), [(2, 256, 32), (4, 256, 16), (4, 12, 1), (4, 2, 1), (8, 48, 1)]
)
def test_a_pipeline_gets_micro_batches_enough_to_keep_its_stages_busy(stages, sequences, size):
    from models.config import Layout

    trial = planned(f"train.batch_tokens={sequences * 4096}").trials[0].config
    assert micro_batches(trial, Layout(pipeline=stages))[0] == size
    for chunk_size in micro_batches(trial.model_copy(), Layout(pipeline=stages, virtual_pipeline=2)):
        assert sequences // chunk_size % stages == 0 or sequences < stages


REFUSED = [
    "resources={gpus: 1, accelerator: l4}",
    "resources={gpus: 1, accelerator: h100, micro_batch_sequences: 64}",
    "resources={memory_gib: 20}",
    "resources={gpus: 1, memory_gib: 23}",
]


@pytest.mark.parametrize("override", REFUSED)
def test_what_does_not_fit_is_refused_and_what_is_said_to_fit_does(override):
    found = planned(override)
    assert not found.trials
    for refusal in found.refusals:
        assert re.match(r"does not fit: with micro-batches of \d+ sequences? a rank needs [\d,.]+ GiB", refusal.reason)
        _, _, would = refusal.reason.partition("; what would fit: ")
        assert would
        for mend in would.split(", or "):
            changes = [f"resources.{change.replace(' ', '=')}" for change in mend.split(" with ")]
            if not mend.startswith("micro_batch"):
                changes = [*changes, "resources.micro_batch_sequences=null"]
            mended = planned(override, *changes)
            assert refusal.arm in {trial.arm for trial in mended.trials}, mend


def test_an_assumed_memory_is_said_to_be_one():
    (refusal, _) = planned("resources={gpus: 1, micro_batch_sequences: 256}").refusals
    assert "(an assumed size: set resources.accelerator or memory_gib)" in refusal.reason
    (refusal, _) = planned("resources={gpus: 1, micro_batch_sequences: 256, accelerator: h200}").refusals
    assert "assumed" not in refusal.reason
    assert f"has 140.0, of which {SPARE_FRACTION:.0%} stay free" in refusal.reason


def test_an_accelerator_without_gpus_is_a_mistake():
    with pytest.raises(UserError, match="accelerator h100 needs gpus, which is 0"):
        planned("resources={accelerator: h100}")
    with pytest.raises(UserError, match=r"resources.accelerator: got 'h900'; allowed: a100-40gb, a100-80gb, h100"):
        planned("resources={gpus: 1, accelerator: h900}")


def test_the_controller_launches_what_the_plan_chose(bench, plan):  # noqa: F811
    """Also when the sweep names none: a plan and a run never differ."""
    bench.run(plan)
    for trial in plan.trials:
        (attempt,) = bench.store.attempts(trial.fingerprint)
        folder = bench.home / "trials" / trial.fingerprint / "attempts" / f"{attempt.number:03d}-{attempt.token}"
        spec = read_attempt_spec(folder)
        assert spec.micro_batch_sequences == trial.micro_batch_sequences > 1
