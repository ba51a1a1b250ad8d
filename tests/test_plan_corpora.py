"""What ``data`` may name in a sweep: blends, validation sets, prepared folders, tokenizers by path; and its refusals."""

# ruff: noqa: E501  (sweeps in one line)

import base64
import hashlib
import json
import re

import pytest

from models.config import DataConfig, ValidationConfig
from models.corpus import make
from models.corpus.encode import Encoding
from models.corpus.tokens import load_tokenizer, tokenizer_sha256
from orchestrator.plan import expand
from orchestrator.sweep import UserError, parse

SWEEP = """\
name: mixtures
question: Which mixture?
base:
  model: {preset: cpu-tiny}
  train: {tokens: 8192, batch_tokens: 2048, lr: 1e-3}
  data:
    DATA
baseline: none
arms:
  none: {}
seeds: [1]
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("corpora")
    for name in ("a", "b", "c"):
        lines = [json.dumps({"text": f"document {number} of {name}"}) for number in range(40)]
        (path / f"{name}.jsonl").write_text("\n".join(lines) + "\n")
    ranks = [base64.b64encode(bytes([byte])).decode() + f" {byte}\n" for byte in range(256)]
    (path / "bytes.tiktoken").write_text("".join(ranks))
    encoding = Encoding("bytes", validation_every=10, slice_bytes=500, slice_documents=2)
    make.make(make.Recipe((str(path / "a.jsonl"),), encoding), path / "made")
    make.make(make.Recipe((str(path / "b.jsonl"),), Encoding("bytes", validation_every=1)), path / "held-out")
    ranked = Encoding(str(path / "bytes.tiktoken"))
    make.make(make.Recipe((str(path / "b.jsonl"),), ranked), path / "made-ranks")
    return path


@pytest.fixture
def planned(folder):
    def data(text, *overrides):
        return expand(parse(SWEEP.replace("DATA", text), folder / "x.yaml", overrides)).trials[0].config

    return data


def sha256(path):
    return hashlib.sha256(path.read_bytes()).hexdigest()


def test_a_blend_is_hashed_member_by_member_and_measured_on_its_first(planned, folder):
    data = planned("blend: [{corpus: a.jsonl, weight: 3}, {corpus: b.jsonl, weight: 1}]").data
    assert [(m.corpus, m.weight, m.corpus_sha256) for m in data.blend] == [
        (str(folder / f"{name}.jsonl"), weight, sha256(folder / f"{name}.jsonl"))
        for name, weight in (("a", 3), ("b", 1))
    ]
    assert (data.corpus, data.corpus_sha256) == (data.blend[0].corpus, data.blend[0].corpus_sha256)
    other = planned("{corpus: c.jsonl, blend: [{corpus: a.jsonl, weight: 3}, {corpus: b.jsonl, weight: 1}]}").data
    assert (other.corpus, other.blend) == (str(folder / "c.jsonl"), data.blend)


def test_the_fingerprint_hangs_on_every_corpus_and_not_on_its_path(planned, folder):
    text = "blend: [{corpus: a.jsonl, weight: 3}, {corpus: FILE, weight: 1}]\n    validation_sets: [{name: x, corpus: FILE}]"
    before = planned(text.replace("FILE", "c.jsonl")).fingerprint()
    (folder / "moved.jsonl").write_bytes((folder / "c.jsonl").read_bytes())
    assert planned(text.replace("FILE", "moved.jsonl")).fingerprint() == before
    (folder / "moved.jsonl").write_text('{"text": "something else"}\n')
    assert planned(text.replace("FILE", "moved.jsonl")).fingerprint() != before


def test_arms_may_be_mixtures(folder):
    arms = "arms:\n  none: {}\n  more-b: {data: {blend: [{corpus: a.jsonl, weight: 1}, {corpus: b.jsonl, weight: 3}]}}"
    plan = expand(parse(SWEEP.replace("DATA", "corpus: a.jsonl").replace("arms:\n  none: {}", arms), folder / "x.yaml"))
    assert {trial.arm: len(trial.config.data.blend) for trial in plan.trials} == {"none": 0, "more-b": 2}


def test_a_prepared_folder_brings_its_tokenizer_and_its_splits(planned, folder):
    data = planned("corpus: made").data
    assert (data.corpus, data.corpus_sha256) == (str(folder / "made"), make.read_info(folder / "made").content_sha256)
    assert (data.tokenizer, data.tokenizer_sha256, data.vocab_size, data.validation_every) == (
        "bytes",
        "bytes",
        256,
        10,
    )
    assert data.validation == ValidationConfig(slice_bytes=500, slice_documents=2)
    ranks = planned("{corpus: made-ranks, validation: {points: 2}}").data
    assert (ranks.tokenizer, ranks.vocab_size) == (str(folder / "bytes.tiktoken"), 257)
    assert ranks.tokenizer_sha256 == planned("{corpus: b.jsonl, tokenizer: bytes.tiktoken}").data.tokenizer_sha256
    assert ranks.validation == ValidationConfig(points=2)


def test_a_held_out_folder_is_measured_whole(planned):
    text = "{corpus: a.jsonl, validation_sets: [{name: held, corpus: held-out}]}"
    (held,) = planned(text).data.validation_sets
    assert held.validation_every == 1
    assert planned(text).data.validation_every == DataConfig().validation_every


@pytest.mark.parametrize("pattern", [None, "\\p{L}+|\\P{L}"])
def test_plan_and_corpus_agree_on_a_tiktoken_file(planned, folder, tmp_path, pattern):
    path = tmp_path / "other.tiktoken"
    path.write_bytes((folder / "bytes.tiktoken").read_bytes())
    if pattern:
        path.with_name("other.tiktoken.json").write_text(json.dumps({"pattern": pattern}))
    data = planned(f"{{corpus: a.jsonl, tokenizer: {path}}}").data
    assert (data.tokenizer_sha256, data.vocab_size) == (
        tokenizer_sha256(str(path)),
        load_tokenizer(str(path)).vocab_size,
    )


BLEND = "{{blend: [{{corpus: a.jsonl, weight: 1}}, {}]}}"
REFUSALS = [
    (
        BLEND.format("{corpus: gone.jsonl, weight: 1}"),
        "x.yaml:7:53: base.data.blend[1].corpus: got 'gone.jsonl', but there is no file",
    ),
    (BLEND.format("{corpus: ./a.jsonl, weight: 1}"), "blend has the corpus"),
    (BLEND.format("{corpus: b.jsonl}"), "base.data.blend: 1.weight: Field required; allowed: a list such as"),
    (
        BLEND.format("{corpus: b.jsonl, weight: 1, corpus_sha256: abc}"),
        "base.data.blend[1].corpus: corpus_sha256 is filled in by the plan",
    ),
    (
        "{corpus: made, tokenizer: bytes.tiktoken}",
        "base.data.corpus: FOLDER/made was prepared with tokenizer bytes, but this cell has FOLDER/bytes.tiktoken",
    ),
    (
        "{corpus: made, validation_every: 5}",
        "FOLDER/made was prepared with validation_every 10, but this cell has data.validation_every 5",
    ),
    (
        "{corpus: made, validation: {slice_bytes: 100}}",
        "was prepared with slice_bytes 500, but this cell has data.validation.slice_bytes 100",
    ),
    (
        "{blend: [{corpus: made, weight: 1}, {corpus: made-ranks, weight: 1}]}",
        "base.data.blend[1].corpus: FOLDER/made-ranks was prepared with tokenizer FOLDER/bytes.tiktoken, but this cell has bytes",
    ),
    (
        "corpus: held-out",
        "base.data.corpus: FOLDER/held-out was prepared with --validation-every 1: all of it is held out",
    ),
    (
        "{corpus: a.jsonl, validation_sets: [{name: x, corpus: a.jsonl, validation_every: 1}]}",
        "validation set x would measure documents that are trained on: validation_every 1 instead of 20",
    ),
    (
        "{corpus: a.jsonl, validation_sets: [{name: x, corpus: held-out, validation_every: 2}]}",
        "was prepared with validation_every 1, but validation set x has 2",
    ),
    (
        "{corpus: a.jsonl, tokenizer: a.jsonl}",
        "unknown kind of tokenizer; allowed: a name that ends in .json, .model, .tiktoken",
    ),
    (
        "{corpus: a.jsonl, validation_sets: [{name: x, corpus: a.jsonl}, {name: x, corpus: b.jsonl}]}",
        "validation_sets: the name 'x' is taken",
    ),
]


@pytest.mark.parametrize(("data", "said"), REFUSALS, ids=[said[:50] for _, said in REFUSALS])
def test_a_mistake_in_data_is_named_with_its_place(planned, folder, data, said):
    with pytest.raises(UserError, match=re.escape(said.replace("FOLDER", str(folder)))):
        planned(data)


def test_a_list_is_no_axis(planned):
    with pytest.raises(
        UserError, match=r"axes.data.blend: data.blend is a list of sections, which is no value of an axis"
    ):
        planned("corpus: a.jsonl", "axes={data.blend: [[]]}")


def test_separate_documents_need_whole_sequences(folder):
    text = SWEEP.replace("DATA", "{corpus: a.jsonl, separate_documents: true}")
    plan = expand(parse(text, folder / "x.yaml", ["resources={layout: {context: 2}}"]))
    assert "data.separate_documents with layout.context 2" in plan.refusals[0].reason


def test_a_damaged_prepared_folder_is_refused(planned, folder, tmp_path):
    made, _ = make.make(make.Recipe((str(folder / "a.jsonl"),), Encoding("bytes")), tmp_path / "made")
    with (made / "train.bin").open("ab") as stream:
        stream.write(b"more")
    with pytest.raises(UserError, match=r"the prepared folder is damaged: train.bin has [\d,]+ bytes, expected"):
        planned(f"corpus: {made}")
