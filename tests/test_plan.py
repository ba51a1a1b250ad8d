"""From a sweep to trials: the grammar of cells, stable order and fingerprints, matching."""

# ruff: noqa: E501  (sweeps in one line)

import gzip
import hashlib
import itertools
import json
import lzma
import random
import re
from collections import Counter
from pathlib import Path

import pytest

from models import accounting
from models.config import TrialConfig
from models.presets import PRESETS
from orchestrator.plan import expand
from orchestrator.sweep import UserError, load, parse

SMALL = """\
name: small
question: Does it help?
base:
  model: {preset: cpu-tiny}
  data: {corpus: corpus.jsonl}
  train: {tokens: 8192, batch_tokens: 2048, lr: 1e-3}
baseline: none
arms:
  none: {}
  g1: {gate: {position: sdpa}}
seeds: [1, 2]
controls: []
"""
CORPUS = '{"text": "one"}\n{"text": "two"}\n'


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "corpus.jsonl").write_text(CORPUS)
    return tmp_path


@pytest.fixture
def plan(folder):
    return lambda text, *overrides: expand(parse(text, folder / "x.yaml", overrides))


def cells(plan):
    """The cells' axis values of the baseline, in no order, seed by seed once."""
    return sorted(tuple(trial.axes.values()) for trial in plan.trials if (trial.arm, trial.seed) == ("none", 1))


def one(plan, arm, **axes):
    (trial,) = [trial for trial in plan.trials if trial.arm == arm and trial.seed == 1 and trial.axes == axes]
    return trial


# ---- cells


def test_without_axes_a_cell_is_an_arm(plan):
    planned = plan(SMALL)
    assert Counter((trial.arm, trial.seed) for trial in planned.trials) == Counter(
        itertools.product(["none", "g1"], [1, 2])
    )
    assert all(trial.axes == {} for trial in planned.trials)
    assert planned.refusals == ()


def test_axes_make_a_product(plan):
    planned = plan(SMALL + "axes: {train.lr: [1e-3, 2e-3], train.tokens: [4096, 8192, 1e6]}\n")
    assert cells(planned) == sorted(itertools.product([1e-3, 2e-3], [4096, 8192, 1_000_000]))
    assert len(planned.trials) == 2 * 6 * 2


def test_a_zip_group_is_one_factor(plan):
    planned = plan(
        SMALL + "axes: {train.beta1: [0.8, 0.9]}\nzip: [{train.tokens: [4096, 8192], train.lr: [2e-3, 1e-3]}]\n"
    )
    assert cells(planned) == sorted([(b, *p) for b in (0.8, 0.9) for p in ((4096, 2e-3), (8192, 1e-3))])


def test_two_zip_groups_multiply(plan):
    text = "zip:\n  - {train.tokens: [4096, 8192], train.lr: [2e-3, 1e-3]}\n  - {train.beta1: [0.8, 0.9], train.beta2: [0.9, 0.95]}\n"
    assert len(cells(plan(SMALL + text))) == 4


def test_rows_stand_beside_the_product_and_know_every_axis(plan):
    planned = plan(
        SMALL + "axes: {train.lr: [2e-3, 4e-3]}\nrows: [{train.lr: 1e-2, train.tokens: 4096}, {train.tokens: 2048}]\n"
    )
    assert cells(planned) == [(1e-3, 2048), (2e-3, 8192), (4e-3, 8192), (1e-2, 4096)]
    assert set(planned.trials[0].axes) == {"train.lr", "train.tokens"}


def test_rows_alone_are_the_only_cells(plan):
    assert cells(plan(SMALL + "rows: [{train.lr: 1e-2}, {train.lr: 2e-2}]\n")) == [(1e-2,), (2e-2,)]


def test_an_axis_that_is_not_set_in_a_row_shows_the_default(plan):
    planned = plan(SMALL + "rows: [{train.beta1: 0.8}, {train.lr: 1}]\n")
    assert cells(planned) == [(0.8, 1e-3), (0.9, 1)]


def test_exclude_drops_what_matches_all_its_keys(plan):
    text = SMALL + "axes: {train.lr: [1e-3, 2e-3], train.tokens: [4096, 8192]}\n"
    planned = plan(text + "exclude: [{arm: g1, train.lr: 2e-3}, {train.lr: 1e-3, train.tokens: 4096}]\n")
    left = {(trial.arm, *trial.axes.values()) for trial in planned.trials}
    assert left == {("none", 1e-3, 8192), ("none", 2e-3, 4096), ("none", 2e-3, 8192), ("g1", 1e-3, 8192)}


def test_an_excluded_cell_need_not_be_possible(plan):
    text = SMALL + "axes: {model.num_query_heads: [3, 4], model.num_kv_heads: [2, 3]}\n"
    planned = plan(
        text
        + "exclude: [{model.num_query_heads: 3, model.num_kv_heads: 2}, {model.num_query_heads: 4, model.num_kv_heads: 3}]\n"
    )
    assert cells(planned) == [(3, 3), (4, 2)]


def test_arms_are_laid_over_base_key_by_key(plan):
    text = SMALL.replace("  train: {tokens", "  gate: {position: value, init: zero}\n  train: {tokens")
    text = text.replace("none: {}", "none: {gate: null}").replace(
        "{gate: {position: sdpa}}", "{gate: {position: sdpa}, model: {num_kv_heads: 4}, train: {beta1: 0.5}}"
    )
    planned = plan(text)
    g1, none = one(planned, "g1").config, one(planned, "none").config
    assert none.gate is None
    assert (g1.gate.position, g1.gate.init) == ("sdpa", "zero")
    assert (g1.model.num_kv_heads, none.model.num_kv_heads) == (4, 2)
    assert (g1.train.beta1, g1.train.beta2, g1.train.tokens) == (0.5, 0.95, 8192)


def test_fields_stand_over_a_preset_wherever_they_are_set(plan):
    text = SMALL.replace("{preset: cpu-tiny}", "{preset: cpu-tiny, ffn_size: 100}").replace(
        "{gate: {position: sdpa}}", "{model: {preset: cpu-1m}}"
    )
    planned = plan(text)
    assert one(planned, "none").config.model.hidden_size == 64
    assert one(planned, "g1").config.model.hidden_size == 128
    assert {trial.config.model.ffn_size for trial in planned.trials} == {100}


def experts_of(planned, arm, **axes):
    moe = one(planned, arm, **axes).config.model.moe
    return None if moe is None else (moe.num_experts, moe.top_k, moe.aux_loss_coefficient)


def test_the_experts_of_a_preset_are_fields_like_any_other(plan):
    text = SMALL.replace(
        "{preset: cpu-tiny}", "{preset: cpu-moe-tiny, moe: {top_k: 1, aux_loss_coefficient: 0.5}}"
    ).replace(
        "seeds:",
        "  more: {model: {moe: {num_experts: 12, top_k: 3}}}\n  dense: {model: {moe: null, ffn_size: 96}}\nseeds:",
    )
    planned = plan(text)
    found = {arm: experts_of(planned, arm) for arm in ("none", "g1", "more", "dense")}
    assert found == {"none": (8, 1, 0.5), "g1": (8, 1, 0.5), "more": (12, 3, 0.5), "dense": None}
    assert experts_of(plan(text, "model.moe.top_k=4"), "none") == (8, 4, 0.5)
    totals = [trial.num_parameters for trial in planned.trials if trial.arm in ("none", "more") and trial.seed == 1]
    assert abs(totals[0] - totals[1]) == 2 * (4 * 3 * 64 * 24 + 4 * 64)


def test_experts_can_be_given_to_a_dense_model_by_an_arm(plan):
    planned = plan(
        SMALL.replace("{gate: {position: sdpa}}", "{model: {moe: {num_experts: 4, top_k: 2}, ffn_size: 96}}")
    )
    assert experts_of(planned, "none") is None
    assert experts_of(planned, "g1") == (4, 2, 1e-3)


def test_a_field_of_the_experts_can_be_an_axis_and_presets_with_and_without_them_too(plan):
    text = SMALL.replace("cpu-tiny", "cpu-moe-tiny") + "axes: {model.moe.num_experts: [8, 12]}\n"
    planned = plan(text)
    assert experts_of(planned, "g1", **{"model.moe.num_experts": 12}) == (12, 2, 1e-3)
    both = plan(SMALL + "axes: {model.preset: [cpu-tiny, cpu-moe-tiny]}\n")
    assert experts_of(both, "g1", **{"model.preset": "cpu-moe-tiny"}) == (8, 2, 1e-3)
    assert experts_of(both, "g1", **{"model.preset": "cpu-tiny"}) is None
    cells = plan(SMALL + "rows:\n  - {model.ffn_size: 100}\n  - {model.moe.num_experts: 4, model.moe.top_k: 2}\n")
    values = {trial.axes["model.moe.num_experts"] for trial in cells.trials}
    assert values == {None, 4}


def test_a_preset_can_be_an_axis(plan):
    planned = plan(SMALL + "axes: {model.preset: [cpu-tiny, cpu-1m]}\n")
    assert one(planned, "none", **{"model.preset": "cpu-1m"}).config.model.num_layers == 4
    assert one(planned, "none", **{"model.preset": "cpu-tiny"}).config.model.num_layers == 2


def test_a_derived_axis_follows_its_source_and_is_no_factor(plan):
    planned = plan(
        SMALL + "axes: {train.batch_tokens: [2048, 4096], train.tokens: {of: train.batch_tokens, times: 40}}\n"
    )
    assert cells(planned) == [(2048, 81920), (4096, 163840)]


def test_derived_values_chain_and_follow_arms_and_rows(plan):
    text = SMALL.replace("batch_tokens: 2048", "batch_tokens: {of: data.sequence_length, times: 8}")
    text = text.replace("tokens: 8192", "tokens: {of: train.batch_tokens, times: 2.5}")
    text = text.replace("{gate: {position: sdpa}}", "{data: {sequence_length: 64}}")
    planned = plan(text + "rows: [{train.lr: 1}, {train.batch_tokens: 512}]\n")
    assert one(planned, "none", **{"train.lr": 1, "train.batch_tokens": 2048}).config.train.tokens == 5120
    assert one(planned, "g1", **{"train.lr": 1, "train.batch_tokens": 512}).config.train.tokens == 1280
    assert one(planned, "g1", **{"train.lr": 1e-3, "train.batch_tokens": 512}).config.data.sequence_length == 64


def test_derived_values_are_computed_in_decimal(plan):
    planned = plan(SMALL.replace("lr: 1e-3", "lr: 0.1, epsilon: {of: train.lr, times: 3}"))
    assert planned.trials[0].config.train.epsilon == 0.3


SIZES = "axes: {model.preset: [cpu-tiny, cpu-1m], train.lr: {of: %s, times: [0.32, 0.64], power: %s}}\n"


def test_a_rule_by_width_gives_each_size_its_own_learning_rates(plan):
    planned = plan(SMALL.replace(", lr: 1e-3", "") + SIZES % ("model.hidden_size", -1))
    rates = {(one.config.model.hidden_size, one.config.train.lr) for one in planned.trials}
    assert rates == {(size, times / size) for size in (64, 128) for times in (0.32, 0.64)}


def test_a_rule_by_parameters_is_the_same_in_all_arms_of_a_size(plan):
    text = SMALL.replace(", lr: 1e-3", "").replace("{gate: {position: sdpa}}", "{model: {num_kv_heads: 4}}")
    planned = plan(text + SIZES % ("model.num_parameters", -0.5))
    rates = {arm: [one.config.train.lr for one in planned.trials if one.arm == arm] for arm in ("none", "g1")}
    assert sorted(rates["none"]) == sorted(rates["g1"])
    size = accounting.parameters(PRESETS["cpu-1m"], (), 0)
    assert min(rates["none"]) == float(f"{0.32 / size**0.5:.6g}")


def test_a_derived_value_can_be_a_multiple_of_a_preset_or_a_default(plan):
    text = SMALL.replace("preset: cpu-tiny", "preset: cpu-tiny, ffn_size: {of: model.hidden_size, times: 4}")
    planned = plan(text.replace("lr: 1e-3", "lr: 1e-3, beta1: {of: train.beta2, times: 0.5}"))
    assert planned.trials[0].config.model.ffn_size == 256
    assert planned.trials[0].config.train.beta1 == 0.475


# ---- what a trial is


def test_precision_follows_the_device_unless_it_is_set(plan):
    assert plan(SMALL).trials[0].config.precision == "fp32"
    assert plan(SMALL + "resources: {gpus: 1}\n").trials[0].config.precision == "bf16"
    assert plan(SMALL + "resources: {gpus: 1}\n", "precision=fp32").trials[0].config.precision == "fp32"


def test_a_trial_carries_its_price_and_layout(plan):
    planned = plan(SMALL.replace("tokens: 8192", "tokens: 8193") + "resources: {layout: {data: 2}}\n")
    trial = one(planned, "g1")
    model, gate = trial.config.model, trial.config.gate
    assert trial.num_parameters == accounting.parameters(model, gate, 256)
    assert trial.training_flops == 5 * 2048 * accounting.training_flops_per_token(model, gate, 256, 256)
    assert trial.layout.data == 2
    assert planned.training_flops == sum(trial.training_flops for trial in planned.trials)


def test_the_corpus_is_hashed_and_its_path_made_absolute(plan, folder):
    data = plan(SMALL).trials[0].config.data
    assert data.corpus == str(folder / "corpus.jsonl")
    assert data.corpus_sha256 == hashlib.sha256(CORPUS.encode()).hexdigest()
    assert (data.tokenizer, data.tokenizer_sha256, data.vocab_size) == ("bytes", "bytes", 256)


def test_the_built_in_corpus_keeps_its_name(plan):
    data = plan(SMALL, "data.corpus=sotu").trials[0].config.data
    assert data.corpus == "sotu"
    assert len(data.corpus_sha256) == 64


@pytest.mark.parametrize(("suffix", "opener"), [("xz", lzma.open), ("gz", gzip.open)])
def test_packed_corpora_are_taken(plan, folder, suffix, opener):
    with opener(folder / f"packed.jsonl.{suffix}", "wt") as stream:
        stream.write("\n" + CORPUS)
    assert plan(SMALL, f"data.corpus=packed.jsonl.{suffix}").trials


@pytest.mark.parametrize(
    ("vocab", "added", "size"),
    [
        ({"a": 0, "b": 1, "c": 7}, [], 9),
        ({"a": 0}, [{"id": 4, "content": "<s>"}], 6),
        ([["a", -1.0], ["b", -2.0]], None, 3),
    ],
)
def test_a_tokenizer_has_one_token_more_for_the_end_of_a_document(plan, folder, vocab, added, size):
    text = json.dumps({"model": {"vocab": vocab}, "added_tokens": added})
    (folder / "tokenizer.json").write_text(text)
    data = plan(SMALL, "data.tokenizer=tokenizer.json").trials[0].config.data
    assert data.vocab_size == size
    assert data.tokenizer_sha256 == hashlib.sha256(text.encode()).hexdigest()
    assert data.tokenizer == str(folder / "tokenizer.json")


# ---- order and fingerprints


GOLDEN = {
    ("none", 1): "225237de3f498a29",
    ("none", 2): "de93505b320cd30b",
    ("g1", 1): "97321a70174e83c9",
    ("g1", 2): "6e031b7f9f10303b",
}


def test_fingerprints_are_what_they_were(plan):
    """They change with NUMERICS or a new field that is not absent by default; then all stored results are of other trials."""
    assert {(trial.arm, trial.seed): trial.fingerprint for trial in plan(SMALL).trials} == GOLDEN


def test_the_same_file_gives_the_same_plan(plan):
    text = SMALL + "axes: {train.lr: [1e-3, 2e-3, 3e-3], train.tokens: [4096, 8192]}\n"
    assert plan(text).trials == plan(text).trials
    assert len({trial.fingerprint for trial in plan(text).trials}) == 24


def test_a_moved_sweep_is_the_same_trials(plan, folder, tmp_path_factory):
    elsewhere = tmp_path_factory.mktemp("elsewhere")
    (elsewhere / "corpus.jsonl").write_text(CORPUS)
    moved = expand(parse(SMALL, elsewhere / "y.yaml"))
    assert [trial.fingerprint for trial in moved.trials] == [trial.fingerprint for trial in plan(SMALL).trials]


def test_another_text_is_another_trial(plan, folder):
    before = {trial.fingerprint for trial in plan(SMALL).trials}
    (folder / "corpus.jsonl").write_text(CORPUS + '{"text": "three"}\n')
    assert before.isdisjoint(trial.fingerprint for trial in plan(SMALL).trials)


def test_positions_count_and_every_block_holds_all_cells_of_one_seed(plan):
    planned = plan(SMALL + "axes: {train.lr: [1e-3, 2e-3, 3e-3]}\n", "seeds=[5, 3, 9]")
    assert [trial.position for trial in planned.trials] == list(range(18))
    assert [trial.seed for trial in planned.trials] == [5] * 6 + [3] * 6 + [9] * 6


def test_order_seed_draws_the_order_and_nothing_else(plan):
    text = SMALL + "axes: {train.lr: [1e-3, 2e-3, 3e-3, 4e-3]}\n"
    one_order, other = plan(text), plan(text, "order_seed=1")
    assert [t.fingerprint for t in one_order.trials] != [t.fingerprint for t in other.trials]
    assert {t.fingerprint for t in one_order.trials} == {t.fingerprint for t in other.trials}


def test_blocks_of_different_seeds_have_different_orders(plan):
    planned = plan(SMALL + "axes: {train.lr: [1e-3, 2e-3, 3e-3, 4e-3]}\n")
    first, second = planned.trials[:8], planned.trials[8:]
    assert [(t.arm, t.axes) for t in first] != [(t.arm, t.axes) for t in second]


def test_a_new_arm_leaves_the_order_of_the_others(plan):
    text = SMALL + "axes: {train.lr: [1e-3, 2e-3, 3e-3]}\nbaseline_seeds: 2\n"
    longer = plan(text, "arms.g2={gate: {position: value}}")
    kept = [trial.fingerprint for trial in longer.trials if trial.arm != "g2"]
    assert kept == [trial.fingerprint for trial in plan(text).trials]


def test_layout_and_retry_change_no_fingerprint(plan):
    before = [trial.fingerprint for trial in plan(SMALL).trials]
    assert [
        t.fingerprint for t in plan(SMALL, "resources={layout: {data: 2}, cpus: 2}", "retry={error: 3}").trials
    ] == before


def test_random_sweeps_hold_the_properties_of_a_plan(plan):
    """Many drawn grammars: the number of cells is the product, all differ, configs say what their axes say."""
    draw = random.Random(0)
    pool = {
        "train.lr": [1e-4, 1e-3, 1e-2],
        "train.tokens": [4096, 8192, 20000],
        "train.beta1": [0.5, 0.8],
        "data.sequence_length": [128, 256],
        "model.head_dim": [8, 16, 32],
        "train.weight_decay": [0, 0.1, 0.2],
    }
    for _ in range(25):
        names = draw.sample(sorted(pool), draw.randint(0, 4))
        axes = {name: draw.sample(pool[name], draw.randint(1, len(pool[name]))) for name in names}
        zipped = {name: axes.pop(name) for name in names[:2]} if len(names) > 2 and draw.random() < 0.5 else {}
        length = min(map(len, zipped.values()), default=1)
        zipped = {name: values[:length] for name, values in zipped.items()}
        excluded = (
            [dict(zip(axes, next(itertools.product(*axes.values())), strict=True))]
            if len(axes) > 1 and draw.random() < 0.5
            else []
        )
        content = {
            "axes": axes,
            "zip": [zipped] if zipped else [],
            "exclude": excluded,
            "match": draw.choice(["none", "parameters", "flops"]),
        }
        sizes = [len(values) for values in axes.values()]
        product = 1
        for size in sizes:
            product *= size
        expected = (product - len(excluded)) * length
        text = SMALL + "".join(f"{key}: {json.dumps(value)}\n" for key, value in content.items())
        if expected == 0:
            with pytest.raises(UserError, match="exclude drops every cell of this arm"):
                plan(text)
            continue
        planned = plan(text)
        assert len(planned.trials) == expected * 2 * 2, text
        assert len({trial.fingerprint for trial in planned.trials}) == len(planned.trials), text
        assert planned.trials == plan(text).trials
        for trial in planned.trials:
            for name, value in trial.axes.items():
                section, field = name.split(".")
                assert getattr(getattr(trial.config, section), field) == value
            assert TrialConfig.model_validate(trial.config.model_dump()).fingerprint() == trial.fingerprint


# ---- matching


PAPER = """\
name: paper
question: Do the totals come out?
base:
  model: {preset: dense-1.7b-28l}
  data: {tokenizer: tokenizer.json}
  train: {tokens: 1e6, batch_tokens: 4096, lr: 4e-3}
baseline: none
arms:
  none: {}
  headwise: {gate: {position: sdpa, granularity: headwise}}
  elementwise: {gate: {position: sdpa}}
match: parameters
seeds: [1]
controls: []
"""


def test_matching_gives_the_papers_checkpoints(plan, folder):
    vocabulary = {"first": 0, "last": 152_064 - 2}
    (folder / "tokenizer.json").write_text(json.dumps({"model": {"vocab": vocabulary}}))
    planned = {trial.arm: trial for trial in plan(PAPER).trials}
    assert planned["none"].config.data.vocab_size == 152_064
    assert {arm: trial.config.model.ffn_size for arm, trial in planned.items()} == {
        "none": 6144,
        "headwise": 6144,
        "elementwise": 5504,
    }
    millions = {arm: round(trial.num_parameters / 1e6, 1) for arm, trial in planned.items()}
    assert millions == {"none": 1720.8, "headwise": 1721.8, "elementwise": 1728.2}


def ffn_sizes(planned):
    return {trial.arm: trial.config.model.ffn_size for trial in planned.trials}


def test_without_match_the_width_stays(plan):
    assert ffn_sizes(plan(SMALL)) == {"none": 192, "g1": 192}


def test_matching_brings_the_parameters_together(plan):
    planned = {trial.arm: trial for trial in plan(SMALL + "match: parameters\n").trials}
    # 64 x 64 gate parameters a layer over 3 x 64 a unit of width: 21.3, to the nearest 2.
    assert planned["g1"].config.model.ffn_size == 170
    assert abs(planned["g1"].num_parameters - planned["none"].num_parameters) <= 2 * 3 * 64


def test_flops_matching_spares_gates_that_cost_none(plan):
    text = SMALL.replace("seeds:", "  free: {gate: {position: sdpa, input: none}}\nseeds:") + "match: flops\n"
    assert ffn_sizes(plan(text)) == {"none": 192, "g1": 170, "free": 192}


def test_the_multiple_can_be_given_and_is_kept_divisible_by_tensor_parallelism(plan):
    assert ffn_sizes(plan(SMALL + "match: {by: parameters, ffn_multiple: 64}\n"))["g1"] == 192
    assert ffn_sizes(plan(SMALL + "match: {by: parameters, ffn_multiple: 3}\n"))["g1"] == 171
    assert (
        ffn_sizes(plan(SMALL + "match: {by: parameters, ffn_multiple: 3}\nresources: {layout: {tensor: 2}}\n"))["g1"]
        == 168
    )


def test_matching_narrows_every_expert(plan):
    text = SMALL.replace("cpu-tiny", "cpu-moe-tiny").replace("{gate: {position: sdpa}}", "{gate: {position: dense}}")
    # 64 x 64 gate parameters a layer over 3 x 64 a unit of width, of 8 experts or of the 2 that a token uses.
    for by, width in (("parameters", 21), ("flops", 13)):
        assert ffn_sizes(plan(text + f"match: {{by: {by}, ffn_multiple: 1}}\n")) == {"none": 24, "g1": width}


def test_an_arm_that_sets_its_width_keeps_it(plan):
    text = SMALL.replace("{gate: {position: sdpa}}", "{gate: {position: sdpa}, model: {ffn_size: 180}}")
    assert ffn_sizes(plan(text + "match: parameters\n")) == {"none": 192, "g1": 180}


def test_a_width_on_an_axis_is_matched_from(plan):
    planned = plan(SMALL + "match: parameters\naxes: {model.ffn_size: [192, 256]}\n")
    assert one(planned, "g1", **{"model.ffn_size": 256}).config.model.ffn_size == 234
    assert one(planned, "none", **{"model.ffn_size": 256}).config.model.ffn_size == 256


# ---- a vocabulary with room, and data that is elsewhere


def test_a_padded_vocabulary_counts_as_parameters(plan):
    plain, padded = plan(SMALL), plan(SMALL, "data.padded_vocab_size=320")
    assert one(padded, "none").config.data.vocab_size == 320
    hidden = one(plain, "none").config.model.hidden_size
    assert one(padded, "none").num_parameters - one(plain, "none").num_parameters == 64 * hidden
    assert one(padded, "none").fingerprint != one(plain, "none").fingerprint


def test_a_vocabulary_padded_below_the_tokenizers_is_refused(plan):
    with pytest.raises(
        UserError, match=r"base\.data\.padded_vocab_size: got 255; allowed: at least 256, the tokens of"
    ):
        plan(SMALL, "data.padded_vocab_size=255")


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("arms.g1.train.decay_fraction=0.5", "decay_fraction does nothing with schedule cosine; allowed: .* wsd"),
        ("axes={train.decay_fraction: [0.1, 0.2]}", "decay_fraction does nothing with schedule cosine"),
        (
            "arms.g1.train={schedule: constant, min_lr_fraction: 0.5}",
            "min_lr_fraction does nothing with .* cosine or wsd",
        ),
        (
            "arms.g1.train={warmup_tokens: 512, warmup_fraction: 0.2}",
            "warmup_fraction does nothing beside warmup_tokens; allowed: one of the two",
        ),
    ],
)
def test_an_arm_that_would_differ_in_nothing_is_refused(plan, override, words):
    with pytest.raises(UserError, match=words):
        plan(SMALL, override)


def test_what_only_some_schedules_look_at_may_stand_in_base_and_where_it_is_used(plan):
    arms = ("arms.g1.train.schedule=wsd", "arms.none.train.schedule=constant")
    assert len(plan(SMALL, "train.decay_fraction=0.5", *arms).trials) == 4
    assert len(plan(SMALL, "arms.g1.train={schedule: wsd, decay_fraction: 0.5}").trials) == 4


ELSEWHERE = ("data.corpus=/nowhere/c.jsonl", "data.tokenizer=/nowhere/t.json")


def test_absolute_paths_may_be_absent_from_a_plan_that_is_for_looking_at(folder):
    sweep = parse(SMALL, folder / "x.yaml", (*ELSEWHERE, "data.padded_vocab_size=1000"))
    with pytest.raises(UserError, match=r"data\.corpus: got '/nowhere/c\.jsonl', but there is no file"):
        expand(sweep)
    planned = expand(sweep, files_may_be_absent=True)
    assert [str(path) for path in planned.absent_files] == ["/nowhere/c.jsonl", "/nowhere/t.json"]
    data = one(planned, "none").config.data
    assert (data.vocab_size, data.corpus_sha256, data.tokenizer_sha256) == (1000, "", "")


def test_relative_paths_come_with_the_sweep_and_may_not_be_absent(folder):
    with pytest.raises(UserError, match=r"got 'nowhere\.jsonl', but there is no file"):
        expand(parse(SMALL, folder / "x.yaml", ("data.corpus=nowhere.jsonl",)), files_may_be_absent=True)


def test_an_absent_tokenizer_needs_a_stated_vocabulary(folder):
    said = r"data\.tokenizer: there is no file /nowhere/t\.json; to plan without it, set data\.padded_vocab_size"
    with pytest.raises(UserError, match=said):
        expand(parse(SMALL, folder / "x.yaml", ELSEWHERE), files_may_be_absent=True)


# ---- the files of this repository


def test_every_sweep_of_this_repository_is_planned_without_refusals():
    for path in sorted((Path(__file__).parent.parent / "sweeps").rglob("*.yaml")):
        planned = expand(load(path), files_may_be_absent=True)
        assert planned.trials
        assert planned.refusals == ()


def test_the_baselines_extra_seeds_are_dealt_out_over_the_blocks(plan):
    arms = "arms.g2={gate: {position: value}}", "arms.g3={gate: {position: key}}", "arms.g4={gate: {position: query}}"
    planned = plan(SMALL + "axes: {train.lr: [1e-3, 2e-3]}\n", *arms)
    assert len(planned.trials) == 5 * 2 * 2 + 2 * 2
    blocks = planned.trials[:12], planned.trials[12:]
    for seed, extra, block in zip((1, 2), (3, 4), blocks, strict=True):
        assert {trial.seed for trial in block if trial.arm != "none"} == {seed}
        assert sorted(trial.seed for trial in block if trial.arm == "none") == [seed, seed, extra, extra]
    assert [trial.position for trial in planned.trials] == list(range(24))
    fewer = plan(SMALL + "axes: {train.lr: [1e-3, 2e-3]}\nbaseline_seeds: 2\n", *arms)
    assert {trial.fingerprint for trial in fewer.trials} < {trial.fingerprint for trial in planned.trials}


def test_arms_whose_loss_averages_another_number_of_validations_are_refused(plan):
    many = "arms.g1={data: {validation: {points: 20}}}", "train.tokens=81920", "data.validation.points=40"
    with pytest.raises(UserError, match=re.escape("measured otherwise than none (validations in the last 0.1 of the")):
        plan(SMALL, *many)
    plan(SMALL, *many, "verdict.tail=0.01")


def test_the_quick_start_is_24_trials_at_matched_parameters():
    planned = expand(load(Path(__file__).parent.parent / "sweeps" / "quickstart.yaml"))
    assert len(planned.trials) == 24
    sizes = {trial.arm: trial.num_parameters for trial in planned.trials}
    assert max(sizes.values()) < 1_000_000
    assert max(sizes.values()) / min(sizes.values()) < 1.003
