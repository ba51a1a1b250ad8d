"""What a plan refuses: cells that this version or layout cannot run, and mistakes that only a whole config shows."""

# ruff: noqa: E501  (tables of messages, a line a mistake)

import re

import pytest

from orchestrator.plan import MAX_TRIALS, expand
from orchestrator.sweep import UserError, parse

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


@pytest.fixture
def refused(folder, monkeypatch):
    """Plan a text that is a user's mistake; the message, with the file named shortly, must hold ``said``."""
    monkeypatch.chdir(folder)

    def refuse(text, *overrides, said):
        with pytest.raises(UserError, match=re.escape(said)) as caught:
            expand(parse(text, "x.yaml", overrides))
        return str(caught.value)

    return refuse


# ---- refusals


MOE = "axes: {model.preset: [cpu-moe-tiny]}"
REFUSALS = [
    (f"resources: {{layout: {{tensor: 2}}}}\n{MOE}", "model.moe with layout.tensor 2: Megatron trains experts over tensor ranks only with layout.sequence_parallel true"),
    ("resources: {layout: {tensor: 4}}", "model.num_kv_heads 2 is not divisible by layout.tensor 4"),
    ("resources: {layout: {tensor: 8}}", "model.num_query_heads 4 is not divisible by layout.tensor 8"),
    ("resources: {layout: {tensor: 3}}", "vocabulary 256 is not divisible by layout.tensor 3"),
    ("resources: {layout: {data: 3}}", "a batch of 8 sequences (2,048 tokens) is not divisible by layout.data 3"),
    ("resources: {layout: {data: 2}, micro_batch_sequences: 3}", "a batch of 8 sequences (2,048 tokens) is not divisible by micro_batch_sequences 3 x layout.data 2"),
    ("resources: {layout: {pipeline: 3}}", "model.num_layers 2 is not divisible by layout.pipeline 3"),
    ("resources: {layout: {pipeline: 2, virtual_pipeline: 2}, micro_batch_sequences: 2}", "model.num_layers 2 is not divisible by layout.pipeline 2 x layout.virtual_pipeline 2"),
    ("resources: {layout: {virtual_pipeline: 2}}", "layout.virtual_pipeline 2 interleaves pipeline stages, and layout.pipeline is 1"),
    ("axes: {model.num_layers: [4]}\nresources: {layout: {pipeline: 2, virtual_pipeline: 2}, micro_batch_sequences: 8}", "a rank's 1 micro-batch(es) a step are not a multiple of layout.pipeline 2; set resources.micro_batch_sequences"),
    ("resources: {layout: {expert: 2, data: 2}}", "layout.expert 2 deals out experts, and there is no model.moe"),
    (f"resources: {{layout: {{expert: 2}}}}\n{MOE}", "layout.expert 2 does not divide the 1 rank(s) of layout.tensor x context x data over which experts are dealt out; allowed for instance: layout.data 2"),
    (f"resources: {{layout: {{expert: 3, data: 3}}}}\n{MOE}", "model.moe.num_experts 8 is not divisible by layout.expert 3"),
    ("resources: {layout: {sequence_parallel: true}}", "layout.sequence_parallel spreads the sequence over tensor ranks, and layout.tensor is 1"),
    ("axes: {data.sequence_length: [1, 2]}\nexclude: [{data.sequence_length: 2}]\nresources: {layout: {tensor: 2, sequence_parallel: true}}", "layout.sequence_parallel: data.sequence_length 1 is not divisible by layout.tensor 2"),
    ("resources: {layout: {context: 2}}", "layout.context 2: not in this version. Of Megatron's core attentions only Transformer Engine's sees past its rank's part of a sequence"),
]  # fmt: skip


@pytest.mark.parametrize(("line", "reason"), REFUSALS)
def test_what_cannot_run_is_listed_with_its_reason_and_has_no_trials(plan, line, reason):
    planned = plan(SMALL + line + "\n")
    assert planned.trials == ()
    assert [refusal.arm for refusal in planned.refusals] == ["none", "g1"]
    assert all(reason in refusal.reason for refusal in planned.refusals)


def test_bf16_on_a_cpu_is_refused(plan):
    (refusal, _) = plan(SMALL, "precision=bf16").refusals
    assert refusal.reason == "precision bf16 needs GPUs (resources.gpus is 0); a CPU takes fp32"


FP8 = ("precision=fp8", "fp8={recipe: mxfp8}")
ON_A_GPU = "resources={gpus: 1}"
FP8_REFUSALS = [
    ((), "resources={gpus: 0}", "precision fp8 needs GPUs (resources.gpus is 0); a CPU takes fp32"),
    ((), "resources={gpus: 1, backend: local}", "precision fp8 needs Transformer Engine; allowed: resources.backend auto or transformer_engine"),
    (("model.hidden_size=72",), ON_A_GPU, "precision fp8, recipe mxfp8: model.hidden_size is 72, no multiple of 32"),
    (("model.head_dim=12",), ON_A_GPU, "precision fp8, recipe mxfp8: model.num_query_heads x head_dim / layout.tensor is 48, no multiple of 32"),
    (("model.ffn_size=96",), "resources={gpus: 1, layout: {tensor: 2}}", "precision fp8, recipe mxfp8: a rank's share of model.ffn_size is 48, no multiple of 32"),
    (("data.sequence_length=16",), "resources={gpus: 1, micro_batch_sequences: 1}", "precision fp8, recipe mxfp8: the tokens of a micro-batch on a rank is 16, no multiple of 32"),
    (("fp8={recipe: blockwise}", "model.ffn_size=256"), ON_A_GPU, "precision fp8, recipe blockwise: model.hidden_size is 64, no multiple of 128; precision fp8, recipe blockwise: model.num_query_heads x head_dim / layout.tensor is 64, no multiple of 128"),
]  # fmt: skip


@pytest.mark.parametrize(("changes", "resources", "reason"), FP8_REFUSALS, ids=range(len(FP8_REFUSALS)))
def test_fp8_that_cannot_be_had_is_refused(plan, changes, resources, reason):
    (refusal, _) = plan(SMALL, *FP8, *changes, resources).refusals
    assert refusal.reason == reason


def test_fp8_on_gpus_is_planned_and_its_matched_widths_are_what_it_takes(plan):
    planned = plan(SMALL + "match: parameters\n", *FP8, ON_A_GPU)
    assert planned.refusals == ()
    assert {trial.config.model.ffn_size for trial in planned.trials} == {192, 160}
    assert {trial.config.fp8.recipe for trial in planned.trials} == {"mxfp8"}


def test_transformer_engine_on_a_cpu_is_refused(plan):
    (refusal, _) = plan(SMALL, "resources={backend: transformer_engine}").refusals
    assert refusal.reason == "resources.backend transformer_engine needs GPUs (resources.gpus is 0); a CPU takes local"


def test_the_back_end_is_no_part_of_what_is_learnt(plan):
    prints = [
        {trial.fingerprint for trial in plan(SMALL, f"resources={{gpus: 1, backend: {backend}}}").trials}
        for backend in ("auto", "local", "transformer_engine")
    ]
    assert prints[0] == prints[1] == prints[2]


RUNNABLE = [
    ("cpu-tiny", "{layout: {pipeline: 2}}"),
    ("cpu-tiny", "{layout: {tensor: 2, sequence_parallel: true}}"),
    ("cpu-tiny", "{layout: {data: 2, recompute: full}}"),
    ("cpu-moe-tiny", "{layout: {data: 2, expert: 2}}"),
    ("cpu-moe-tiny", "{layout: {tensor: 2, expert: 2, sequence_parallel: true}}"),
    ("cpu-1m", "{layout: {pipeline: 2, virtual_pipeline: 2}, micro_batch_sequences: 4}"),
]


@pytest.mark.parametrize(("preset", "resources"), RUNNABLE)
def test_what_runs_is_not_refused(plan, preset, resources):
    planned = plan(SMALL.replace("cpu-tiny", preset) + f"resources: {resources}\n")
    assert planned.refusals == ()
    assert len(planned.trials) == 4


def test_an_odd_width_is_refused_under_tensor_parallelism(plan):
    (refusal, _) = plan(SMALL, "model.ffn_size=191", "resources={layout: {tensor: 2}}").refusals
    assert refusal.reason == "model.ffn_size 191 is not divisible by layout.tensor 2"


def test_only_the_cells_that_cannot_run_are_refused(plan):
    planned = plan(SMALL + "axes: {train.batch_tokens: [1024, 1536]}\nresources: {layout: {data: 4}}\n")
    assert {trial.axes["train.batch_tokens"] for trial in planned.trials} == {1024}
    assert [(refusal.arm, refusal.axes) for refusal in planned.refusals] == [
        (arm, {"train.batch_tokens": 1536}) for arm in ("none", "g1")
    ]


def test_all_reasons_of_a_cell_are_given_at_once(plan):
    (refusal, _) = plan(SMALL, "precision=bf16", "resources={layout: {pipeline: 3, data: 3}}").refusals
    assert refusal.reason.count(";") == 3


def test_an_impossible_match_is_a_refusal_of_the_gated_arm(plan):
    planned = plan(SMALL + "match: parameters\n", "model.ffn_size=16")
    (refusal,) = planned.refusals
    assert refusal.arm == "g1"
    assert refusal.reason == "match parameters is impossible: the gate's 4,096 parameters a layer exceed the FFN's"
    assert {trial.arm for trial in planned.trials} == {"none"}


# ---- mistakes that only a whole config shows


def arm(content):
    return SMALL.replace("{gate: {position: sdpa}}", content)


WHOLE = [
    (arm("{gate: {position: dense, granularity: headwise}}"), "x.yaml:10:45: arms.g1.gate.granularity: granularity headwise is not allowed at position dense: its output has no heads"),
    (arm("{gate: {granularity: headwise}}"), "x.yaml:10:8: arms.g1.gate: missing key position; allowed: sdpa, value, key, query, dense"),
    (arm("{model: {num_kv_heads: 3}}"), "x.yaml:10:30: arms.g1.model.num_kv_heads: num_query_heads 4 must be a multiple of num_kv_heads 3"),
    (arm("{model: {moe: {num_experts: 4, top_k: 5}}}"), "x.yaml:10:45: arms.g1.model.moe.top_k: top_k 5 must not exceed num_experts 4"),
    (arm("{model: {moe: {num_experts: 4}}}"), "x.yaml:10:16: arms.g1.model.moe: missing key top_k; allowed: a whole number of at least 1"),
    (arm("{model: {moe: {}}}"), "x.yaml:10:21: arms.g1.model.moe: got an empty mapping; allowed: a mapping with at least one key, or null for none"),
    (SMALL + "axes: {model.moe.top_k: [1, 2]}", "x.yaml:13:26: axes.model.moe.top_k[0]: sets a part of model.moe, but arm none lacks model.moe.num_experts"),
    (SMALL + "axes: {model.moe: [1, 2]}", "axes.model.moe: model.moe is a section; allowed: one of its fields: model.moe.num_experts"),
    (arm("{model: {head_dim: 15}}"), "arms.g1.model.head_dim: head_dim 15 must be even"),
    (arm("{gate: {position: sdpa, qk_order: before_norm}}"), "arms.g1.gate.qk_order: qk_order before_norm is for positions key and query, not sdpa"),
    (SMALL.replace("batch_tokens: 2048", "batch_tokens: 2000"), "x.yaml:6:39: base.train.batch_tokens: train.batch_tokens 2,000 must be a multiple of data.sequence_length 256"),
    (SMALL + "axes: {train.batch_tokens: [2048, 2000]}", "x.yaml:13:35: axes.train.batch_tokens[1]: train.batch_tokens 2,000 must be a multiple"),
    (SMALL + "rows: [{train.batch_tokens: 2000}]", "x.yaml:13:29: rows[0].train.batch_tokens: train.batch_tokens 2,000 must be"),
    (SMALL + "zip: [{train.batch_tokens: [2048, 2000], train.lr: [1, 2]}]", "zip[0].train.batch_tokens[1]: train.batch_tokens 2,000 must be"),
    (SMALL.replace(", lr: 1e-3", ""), "x.yaml:6:3: base.train: missing key lr; allowed: a number above 0"),
    (SMALL.replace("  model: {preset: cpu-tiny}\n", ""), "x.yaml:3:1: base: missing key model; set it in base, an arm or an axis"),
    (SMALL.replace("preset: cpu-tiny", "num_layers: 2"), "x.yaml:4:3: base.model: missing key hidden_size; allowed: a whole number of at least 1"),
    (SMALL + "axes: {gate.scale: [0.5, 2]}", "x.yaml:13:21: axes.gate.scale[0]: sets a part of gate, but arm none lacks gate.position (arm none)"),
    (SMALL.replace("lr: 1e-3", "lr: {of: train.epsilon, times: 1, power: 2}, epsilon: -1"), "got -1"),
    (SMALL.replace("lr: 1e-3", "lr: {of: train.weight_decay, times: 1, power: -1}, weight_decay: 0.0"), "train.weight_decay is 0, of which there is no power"),
    (SMALL.replace(", lr: 1e-3", "").replace("{gate: {position: sdpa}}", "{data: {sequence_length: 64}}") + "axes: {train.lr: {of: data.sequence_length, times: [1e-5, 2e-5]}}\n", "arm g1 sets data.sequence_length, so its values would not be the other arms'"),
    (SMALL.replace("preset: cpu-tiny", "preset: cpu-tiny, ffn_size: {of: model.num_parameters, times: 1}"), "derived values in a circle: model.num_parameters -> model.ffn_size -> model.num_parameters"),
    (SMALL.replace("lr: 1e-3", "lr: {of: train.epsilon, times: 2}, epsilon: {of: train.lr, times: 2}"), "derived values in a circle: train.lr -> train.epsilon -> train.lr"),
    (SMALL.replace("tokens: 8192", "tokens: {of: train.lr, times: 3}"), "x.yaml:6:19: base.train.tokens: 3 times train.lr 0.001: got 0.003; allowed: a whole number of at least 1"),
    (SMALL.replace("lr: 1e-3", "lr: {of: gate.scale, times: 1}").replace("none: {}", "none: {gate: {position: key}}").replace("{gate: {position: sdpa}}", "{}"), "x.yaml:6:49: base.train.lr: is a multiple of gate.scale, which has no value here (arm g1)"),
    (SMALL.replace("lr: 1e-3", "lr: {of: train.min_lr_fraction, times: -1}"), "-1 times train.min_lr_fraction 0.1: got -0.1; allowed: a number above 0"),
    (SMALL + "axes: {train.lr: [1, 2]}\nexclude: [{arm: g1, train.lr: 1}, {arm: g1, train.lr: 1}, {train.lr: 2}]", "x.yaml:10:3: arms.g1: exclude drops every cell of this arm"),
    (SMALL + "axes: {train.lr: [1, 2], train.beta1: [0.8, 0.9]}\nexclude: [{train.lr: 1, train.beta1: 0.8}]\nrows: [{train.lr: 1, train.beta1: 0.9}]", "x.yaml:15:8: rows[0]: none (train.lr=1.0, train.beta1=0.9) is the same trial as none (train.lr=1.0, train.beta1=0.9); allowed: cells that differ"),
    (arm("{}"), "x.yaml:10:3: arms.g1: g1 is the same trial as none; allowed: cells that differ"),
    (arm("{model: {ffn_size: 192}}"), "arms.g1: g1 is the same trial as none"),
    (arm("{fp8: {recipe: delayed}}"), "x.yaml:10:22: arms.g1.fp8.recipe: fp8.recipe needs precision fp8, not fp32"),
]  # fmt: skip


@pytest.mark.parametrize(("text", "said"), WHOLE, ids=range(len(WHOLE)))
def test_a_mistake_of_the_whole_is_told_at_the_value_that_made_it(refused, text, said):
    refused(text + "\n", said=said)


def test_an_exclude_entry_that_matches_nothing_is_a_mistake(refused):
    text = SMALL + "axes: {train.lr: [1, 2], train.beta1: [0.8, 0.9]}\nrows: [{train.lr: 3}]\n"
    refused(text + "exclude: [{train.lr: 3, train.beta1: 0.8}]\n", said="x.yaml:15:11: exclude[0]: matches no cell")


def test_the_same_mistake_in_many_cells_is_told_once(refused):
    text = SMALL.replace("batch_tokens: 2048", "batch_tokens: 2000") + "axes: {train.lr: [1, 2, 3]}\n"
    assert refused(text, said="must be a multiple").count("\n") == 0


def test_the_arms_are_named_when_only_some_have_the_mistake(refused):
    text = SMALL.replace("{gate: {position: sdpa}}", "{data: {sequence_length: 100}}")
    message = refused(text, said="train.batch_tokens 2,048 must be a multiple of data.sequence_length 100")
    assert message.startswith("x.yaml:10:32: arms.g1.data.sequence_length: ")
    refused(
        SMALL.replace("position: sdpa", "init: zero") + "axes: {model.head_dim: [15, 16]}\n",
        said="head_dim 15 must be even",
    )


OVERRIDES = [
    ("gate={position: dense, granularity: headwise}", "override gate={position: dense, granularity: headwise}: base.gate.granularity: granularity headwise is not allowed"),
    ("train.batch_tokens=2000", "override train.batch_tokens=2000: base.train.batch_tokens: train.batch_tokens 2,000 must be"),
    ("data.corpus=nowhere.jsonl", "override data.corpus=nowhere.jsonl: base.data.corpus: got 'nowhere.jsonl', but there is no file"),
]  # fmt: skip


@pytest.mark.parametrize(("override", "said"), OVERRIDES)
def test_a_mistake_of_the_whole_that_an_override_made_names_the_override(refused, override, said):
    refused(SMALL, override, said=said)


def test_an_override_that_no_trial_would_feel_is_refused(refused, plan):
    axes = SMALL + "axes: {train.lr: [1, 2]}\n"
    refused(
        axes,
        "train.lr=3",
        said="override train.lr=3: no cell takes this value: it is an axis here; override axes.train.lr=[...] instead",
    )
    refused(SMALL + "rows: [{train.lr: 2}]\n", "train.lr=3", said="zip or rows set it; override those as a whole")
    both = SMALL.replace("none: {}", "none: {train: {beta1: 0.5}}").replace(
        "{gate: {position: sdpa}}", "{train: {beta1: 0.6}}"
    )
    refused(both, "train.beta1=0.7", said="every arm sets it; override arms.NAME.train.beta1 instead")
    assert plan(both.replace("0.6}", "0.6}, gate: {position: key}"), "train.lr=3").trials


FILES = [
    ("nowhere.jsonl", None, "x.yaml:5:18: base.data.corpus: got 'nowhere.jsonl', but there is no file "),
    ("nowhere.jsonl", None, "allowed: sotu, the path of a .jsonl file (packed or not), or a prepared folder"),
    ("corpus.txt", b"text", "base.data.corpus: got 'corpus.txt'; allowed: a name that ends in .jsonl, .jsonl.gz, .jsonl.xz, .jsonl.bz2, .jsonl.zst"),
    ("empty.jsonl", b"", "empty.jsonl: the file holds no document"),
    ("words.jsonl", b"not json\n", "words.jsonl: the first document cannot be read as JSON (JSONDecodeError: "),
    ("other.jsonl", b'{"words": 1}\n', "other.jsonl: the first document has no text; allowed: one JSON object a line, with a field text"),
    ("broken.jsonl.xz", b"not xz", "broken.jsonl.xz: the first document cannot be read as JSON (LZMAError: "),
    ("broken.jsonl.gz", b"not gz", "broken.jsonl.gz: the first document cannot be read as JSON (BadGzipFile: "),
]  # fmt: skip


@pytest.mark.parametrize(("name", "content", "said"), FILES)
def test_a_corpus_that_cannot_be_read_is_refused_at_its_line(refused, folder, name, content, said):
    if content is not None:
        (folder / name).write_bytes(content)
    refused(SMALL.replace("corpus.jsonl", name), said=said)


def test_a_folder_is_no_corpus(refused, folder):
    (folder / "many.jsonl").mkdir()
    refused(
        SMALL.replace("corpus.jsonl", "many.jsonl"),
        said="many.jsonl is a folder, but none that gatesweep data prepare made: no info.json in it",
    )


@pytest.mark.parametrize("content", ["words", "[]", "{}", '{"model": {"vocab": {}}}', '{"model": {"vocab": 3}}'])
def test_a_tokenizer_that_is_none_is_refused(refused, folder, content):
    (folder / "t.json").write_text(content)
    text = SMALL.replace("corpus.jsonl}", "corpus.jsonl, tokenizer: t.json}")
    refused(text, said="t.json is no Hugging Face tokenizer.json with model.vocab")


def test_a_missing_tokenizer_is_refused(refused):
    text = SMALL.replace("corpus.jsonl}", "corpus.jsonl, tokenizer: byte}")
    refused(text, said="x.yaml:5:43: base.data.tokenizer: got 'byte', but there is no file")


def test_a_sweep_beyond_all_measure_is_refused_before_it_is_expanded(refused):
    values = list(range(1, 401))
    text = SMALL + f"axes: {{train.lr: {values}, train.tokens: {values}}}\n"
    refused(text, said=f"640,000 trials; allowed: at most {MAX_TRIALS:,}")


@pytest.mark.parametrize(
    ("arm", "named"),
    [
        ("{data: {validation: {slice_bytes: 4}}}", "slice_bytes"),
        ("{data: {validation_every: 3}}", "validation_every"),
    ],
)
def test_an_arm_that_is_measured_otherwise_than_the_baseline_is_refused(plan, arm, named):
    """Its loss would be compared with one on other text."""
    with pytest.raises(UserError, match=rf"x\.yaml:\d+.*odd is measured otherwise than none \({named}\)"):
        plan(SMALL.replace("arms:\n", f"arms:\n  odd: {arm}\n"))
