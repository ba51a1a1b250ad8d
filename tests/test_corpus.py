"""The way of the text: what is read is what is trained on, every validation token counts once, nothing is raced."""

import gzip
import json
import lzma
import math
import random
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from pathlib import Path
from threading import Barrier

import numpy as np
import pytest
import torch
from megatron.core.datasets.indexed_dataset import IndexedDataset

from models.config import DataConfig, ValidationConfig
from models.corpus import (
    CorpusError,
    OpenedDatasets,
    TrainBatches,
    prepare,
    prepared,
    train_dataset,
    validation_batches,
)
from models.corpus import text as corpus_text
from models.corpus.split import equal_shares, utf8_head
from models.corpus.text import file_sha256


def made_up_texts(num_documents=20, seed=0):
    """Documents of very unequal length, with characters of one to four bytes."""
    rng = random.Random(seed)
    words = ["gate", "value", "Frühling", "слово", "言葉", "🙂", "a", "the"]
    return [" ".join(rng.choices(words, k=rng.randint(3, 120))) for _ in range(num_documents)]


def write_corpus(path, texts):
    path.write_text("".join(json.dumps({"text": text}, ensure_ascii=False) + "\n" for text in texts))
    return path


def config(corpus, **changes):
    changes = {"sequence_length": 16, "validation_every": 4, "validation": ValidationConfig(slice_bytes=200)} | changes
    return DataConfig(corpus=str(corpus), **changes)


def write_tokenizer(path, texts):
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=300, initial_alphabet=alphabet, special_tokens=["<s>"])
    tokenizer.train_from_iterator(texts, trainer)
    # What a downloaded file may bring along, and what must not reach the corpus:
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    tokenizer.enable_truncation(max_length=8)
    tokenizer.enable_padding(length=4)
    tokenizer.save(str(path))
    return tokenizer


@pytest.fixture(scope="module")
def texts():
    return made_up_texts()


@pytest.fixture(scope="module")
def corpus(tmp_path_factory, texts):
    return write_corpus(tmp_path_factory.mktemp("corpus") / "made-up.jsonl", texts)


@pytest.fixture(scope="module")
def small(corpus, tmp_path_factory):
    """(prepared, data) of the made-up corpus, as bytes."""
    data = config(corpus)
    return prepare(data, tmp_path_factory.mktemp("data")), data


def documents_of(content, split):
    dataset = IndexedDataset(content.prefix(split))
    return [np.array(document) for document in dataset[:]]  # its own arrays die with the data set: a segfault


# --- text -> .bin/.idx


def test_the_indexed_dataset_holds_the_text_and_its_split(small, texts):
    content, _ = small
    decoded = {split: [bytes(document) for document in documents_of(content, split)] for split in prepared.SPLITS}
    assert decoded["validation"] == [text.encode() + b"\0" for text in texts[3::4]]
    assert decoded["train"] == [text.encode() + b"\0" for i, text in enumerate(texts) if i % 4 != 3]
    assert content.split("train").num_bytes == sum(len(t.encode()) for i, t in enumerate(texts) if i % 4 != 3)
    assert documents_of(content, "train")[0].dtype == np.uint8


def test_the_built_in_corpus_splits_into_its_known_sizes(tmp_path):
    content = prepare(DataConfig(), tmp_path)
    # models/data/README.md. (The figures 10,244,143 and 517,477 count a two-byte separator between speeches.)
    assert content.split("train").num_bytes == 10_243_701
    assert content.split("validation").num_bytes == 517_457
    assert content.split("slice").num_bytes == 32_768
    assert content.split("slice").num_documents == content.split("validation").num_documents == 11


def test_the_slice_takes_an_equal_head_of_every_validation_document(small, texts):
    content, _ = small
    heads = [bytes(document)[:-1] for document in documents_of(content, "slice")]
    assert len(heads) == len(texts[3::4])
    assert all(text.encode().startswith(head) and head.decode() for text, head in zip(texts[3::4], heads, strict=True))
    assert content.split("slice").num_bytes == sum(map(len, heads))
    assert 200 - 3 * len(heads) <= sum(map(len, heads)) <= 200
    cut = [len(head) for text, head in zip(texts[3::4], heads, strict=True) if len(head) < len(text.encode())]
    assert len(cut) >= 3
    assert max(cut) - min(cut) <= 4  # a share's odd byte, and up to three bytes of a character


def test_equal_shares_give_away_what_a_short_document_cannot_use():
    assert equal_shares([100, 3, 100], 53) == [25, 3, 25]
    assert equal_shares([100, 100, 100], 50) == [17, 17, 16]
    assert equal_shares([5, 6], 100) == [5, 6]
    assert equal_shares([9, 9, 9], 2) == [1, 1, 0]


def test_a_head_never_cuts_a_character():
    text = "a🙂é"
    assert [utf8_head(text.encode(), limit).decode() for limit in range(8)] == [
        *("", "a", "a", "a", "a", "a🙂", "a🙂", text),
    ]


@pytest.mark.parametrize("suffix", ["jsonl", "jsonl.gz", "jsonl.xz"])
def test_packed_and_plain_corpora_give_the_same_tokens(corpus, small, tmp_path, suffix):
    pack = {"jsonl": bytes, "jsonl.gz": gzip.compress, "jsonl.xz": lzma.compress}[suffix]
    path = tmp_path / f"c.{suffix}"
    path.write_bytes(pack(corpus.read_bytes()))
    content = prepare(config(path), tmp_path)
    for split in prepared.SPLITS:
        assert Path(content.prefix(split) + ".bin").read_bytes() == Path(small[0].prefix(split) + ".bin").read_bytes()


def test_chunks_do_not_show_in_the_result(corpus, small, tmp_path, monkeypatch):
    monkeypatch.setattr(corpus_text, "CHUNK_BYTES", 50)
    content = prepare(small[1], tmp_path)
    assert content.info == small[0].info


def test_a_tokenizer_file_is_used_as_its_vocabulary_and_one_end_of_document(corpus, texts, tmp_path):
    tokenizer = write_tokenizer(tmp_path / "tokenizer.json", texts)
    tokenizer.no_truncation()
    tokenizer.no_padding()
    highest = max(tokenizer.get_vocab().values())
    data = config(corpus, tokenizer=str(tmp_path / "tokenizer.json"), vocab_size=highest + 2)
    content = prepare(data, tmp_path / "data")
    assert (content.vocab_size, content.eod) == (highest + 2, highest + 1)
    stored = documents_of(content, "validation")
    assert stored[0].dtype == np.uint16
    assert [document[-1] for document in stored] == [content.eod] * len(stored)
    assert [tokenizer.decode(document[:-1].tolist()) for document in stored] == texts[3::4]
    assert content.split("validation").num_tokens == sum(map(len, stored)) - len(stored)
    assert content.split("validation").num_bytes == sum(len(text.encode()) for text in texts[3::4])


def test_a_large_vocabulary_is_kept_as_int32(corpus, texts, tmp_path):
    from tokenizers import Tokenizer, models, pre_tokenizers

    vocabulary = {word: i for i, word in enumerate(sorted({w for text in texts for w in text.split()}), start=70_000)}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="a"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.save(str(tmp_path / "words.json"))
    data = config(corpus, tokenizer=str(tmp_path / "words.json"), vocab_size=max(vocabulary.values()) + 2)
    document = documents_of(prepare(data, tmp_path), "train")[0]
    assert document.dtype == np.int32
    assert document.tolist() == [*(vocabulary[word] for word in texts[0].split()), data.vocab_size - 1]


# --- the folder


def test_what_decides_the_content_decides_the_folder(corpus, small, texts, tmp_path):
    tokenizer = write_tokenizer(tmp_path / "tokenizer.json", texts)
    other = write_corpus(tmp_path / "other.jsonl", texts[:-1])
    variants = [
        config(corpus),
        config(other),
        config(corpus, validation_every=5),
        config(corpus, validation=ValidationConfig(slice_bytes=201)),
        config(corpus, tokenizer=str(tmp_path / "tokenizer.json"), vocab_size=tokenizer.get_vocab_size() + 1),
    ]
    assert len({prepare(data, tmp_path).directory for data in variants}) == len(variants)
    assert prepare(config(corpus, sequence_length=32), tmp_path) == prepare(config(corpus), tmp_path)


def test_a_finished_folder_is_used_again_even_without_the_corpus_file(texts, tmp_path):
    path = write_corpus(tmp_path / "c.jsonl", texts)
    data = config(path, corpus_sha256=file_sha256(path))
    first = prepare(data, tmp_path / "data")
    path.unlink()
    assert prepare(data, tmp_path / "data") == first


def test_a_torn_preparation_is_passed_over(small, tmp_path):
    content, data = small
    torn = tmp_path / f".{content.directory.name}.0123456789abcdef"
    torn.mkdir()
    (torn / "train.bin").write_bytes(b"half")
    assert prepare(data, tmp_path).info == content.info
    assert (torn / "train.bin").read_bytes() == b"half"


def test_a_failed_preparation_leaves_no_folder(tmp_path):
    path = write_corpus(tmp_path / "c.jsonl", ["good", "good", "good", "bad \0"])
    with pytest.raises(CorpusError, match="NUL"):
        prepare(config(path), tmp_path / "data")
    assert [p for p in (tmp_path / "data").iterdir() if p.is_dir()] == []


def test_a_folder_cut_short_is_refused(corpus, tmp_path):
    content = prepare(config(corpus), tmp_path)
    Path(content.prefix("train") + ".bin").write_bytes(b"short")
    with pytest.raises(CorpusError, match=r"damaged: train.bin has 5 bytes, expected [\d,]+; remove the folder"):
        prepare(config(corpus), tmp_path)


def test_of_two_writers_the_later_one_discards_its_own(tmp_path):
    target = tmp_path / "folder"
    with prepared.made_aside(target) as late, prepared.made_aside(target) as early:
        (late / "file").write_text("late")
        (early / "file").write_text("early")
    assert (target / "file").read_text() == "early"
    assert list(tmp_path.iterdir()) == [target]


@pytest.mark.parametrize("locks", [True, False])
def test_many_may_prepare_at_once(small, tmp_path, monkeypatch, locks):
    content, data = small
    if not locks:
        monkeypatch.setattr(prepared, "_one_at_a_time", lambda path: nullcontext())
    start = Barrier(4)

    def together(_):
        start.wait()
        return prepare(data, tmp_path)

    with ThreadPoolExecutor(4) as pool:
        results = list(pool.map(together, range(4)))
    assert [result.info for result in results] == [content.info] * 4
    assert [p.name for p in tmp_path.iterdir() if p.is_dir()] == [content.directory.name]


# --- training batches


def all_tokens(dataset, num_steps, batch_sequences, micro_batch_sequences, num_ranks):
    """What the model sees: [step][sequence], put together over ranks and micro-batches."""
    steps = []
    for step in range(num_steps):
        for rank in range(num_ranks):
            batches = TrainBatches(dataset, batch_sequences, micro_batch_sequences, rank, num_ranks)
            steps.extend(batch["tokens"] for batch in batches.micro_batches(step))
    return torch.cat(steps)


def test_batches_are_shifted_text_ready_for_the_model(small):
    content, data = small
    dataset = train_dataset(content, data, 12, seed=1)
    (batch,) = TrainBatches(dataset, 6).micro_batches(1)
    stored = Path(content.prefix("train") + ".bin").read_bytes()
    documents = [bytes(document) for document in documents_of(content, "train")]
    for tokens, labels in zip(batch["tokens"], batch["labels"], strict=True):
        assert torch.equal(tokens[1:], labels[:-1])
        assert all(part in stored for part in bytes([*tokens.tolist(), int(labels[-1])]).split(b"\0"))
    assert len(documents) == content.split("train").num_documents
    assert {name: (value.shape, value.dtype) for name, value in batch.items()} == {
        "tokens": ((6, 16), torch.int64),
        "labels": ((6, 16), torch.int64),
        "loss_mask": ((6, 16), torch.float32),
        "position_ids": ((6, 16), torch.int64),
    }
    assert batch["loss_mask"].all()
    assert torch.equal(batch["position_ids"][3], torch.arange(16))


def test_samples_do_not_depend_on_ranks_or_micro_batches(small):
    content, data = small
    dataset = train_dataset(content, data, 24, seed=1)
    whole = all_tokens(dataset, 3, 8, None, 1)
    assert len({tuple(row) for row in whole.tolist()}) == 24
    for micro_batch_sequences, num_ranks in [(1, 1), (4, 1), (None, 2), (2, 2), (1, 8)]:
        assert torch.equal(all_tokens(dataset, 3, 8, micro_batch_sequences, num_ranks), whole)


def test_a_step_is_the_same_whatever_came_before(small):
    content, data = small
    undisturbed = list(TrainBatches(train_dataset(content, data, 24, seed=1), 8, 4).micro_batches(2))
    batches = TrainBatches(train_dataset(content, data, 24, seed=1), 8, 4)
    for step in (1, 0):
        list(batches.micro_batches(step))
    for ours, theirs in zip(batches.micro_batches(2), undisturbed, strict=True):
        assert torch.equal(ours["tokens"], theirs["tokens"])


def test_seeds_shuffle_and_longer_trials_start_alike(small):
    content, data = small
    first = all_tokens(train_dataset(content, data, 16, seed=1), 2, 8, None, 1)
    assert not torch.equal(all_tokens(train_dataset(content, data, 16, seed=2), 2, 8, None, 1), first)
    assert torch.equal(all_tokens(train_dataset(content, data, 32, seed=1), 2, 8, None, 1), first)


@pytest.mark.parametrize("sequence_length", [16, 100_000])
def test_training_goes_on_over_several_epochs(small, sequence_length):
    content, data = small
    data = data.model_copy(update={"sequence_length": sequence_length})
    stored = np.fromfile(content.prefix("train") + ".bin", dtype=np.uint8)
    num_samples = max(4, 5 * len(stored) // (2 * sequence_length))
    dataset = train_dataset(content, data, num_samples, seed=3)
    assert len(dataset) >= num_samples
    seen = np.bincount(all_tokens(dataset, num_samples, 1, None, 1).flatten().numpy(), minlength=256)
    rounds = num_samples * sequence_length / len(stored)
    assert rounds >= 2.4
    assert np.all((seen > 0) == (np.bincount(stored, minlength=256) > 0))


def test_index_files_appear_all_at_once(small, tmp_path, monkeypatch):
    """Trials of one seed start together: none may see the files that another is still writing."""
    content = prepare(small[1], tmp_path)
    indices = content.directory / "indices"
    visible_while_writing = []

    def watched_save(*args, save=np.save, **kwargs):
        visible_while_writing.append([path for path in indices.iterdir() if not path.name.startswith(".")])
        save(*args, **kwargs)

    monkeypatch.setattr(np, "save", watched_save)
    train_dataset(content, small[1], 16, seed=1)
    assert visible_while_writing == [[], [], []]
    train_dataset(content, small[1], 16, seed=1)
    assert len(visible_while_writing) == 3
    (finished,) = indices.iterdir()
    assert len(list(finished.iterdir())) == 5  # three arrays, their description, and the signed manifest


def test_a_warm_rank_opens_a_trials_samples_once_and_forgets_the_oldest(small):
    content, data = small
    opened = OpenedDatasets(most=2)
    first = opened.train_dataset(content, data, 16, seed=1)
    second = opened.train_dataset(content, data, 16, seed=2)
    assert opened.train_dataset(content, data, 16, seed=1) is first
    longer = opened.train_dataset(content, data, 32, seed=1)  # in the place of the one asked for longest ago
    assert opened.train_dataset(content, data, 32, seed=1) is longer
    again = opened.train_dataset(content, data, 16, seed=2)
    assert again is not second
    assert torch.equal(all_tokens(again, 2, 8, None, 1), all_tokens(second, 2, 8, None, 1))
    assert not torch.equal(all_tokens(again, 2, 8, None, 1), all_tokens(first, 2, 8, None, 1))


GANG_RANK = """
import hashlib, json, sys
from pathlib import Path
import torch
from models.config import DataConfig
from models.corpus import TrainBatches, prepare, train_dataset
rank, data_dir, data = int(sys.argv[1]), Path(sys.argv[2]), DataConfig.model_validate_json(sys.argv[3])
content = prepare(data, data_dir)
torch.distributed.init_process_group("gloo", f"file://{data_dir}/meet", rank=rank, world_size=2)
batches = TrainBatches(train_dataset(content, data, 16, seed=5), 8, 2, rank, 2)
print(json.dumps([batch["tokens"].tolist() for step in (0, 1) for batch in batches.micro_batches(step)]))
"""


def test_fresh_gloo_ranks_prepare_at_once_and_see_the_samples_of_one_process(small, tmp_path):
    content, data = small
    command = [sys.executable, "-c", GANG_RANK]
    ranks = [
        subprocess.Popen([*command, str(rank), str(tmp_path), data.model_dump_json()], stdout=subprocess.PIPE)
        for rank in (0, 1)
    ]
    try:
        outputs = [rank.communicate(timeout=300)[0] for rank in ranks]
    finally:
        for rank in ranks:
            rank.kill()
    assert [rank.returncode for rank in ranks] == [0, 0]
    dataset = train_dataset(content, data, 16, seed=5)
    for rank, output in enumerate(outputs):
        batches = TrainBatches(dataset, 8, 2, rank, 2)
        expected = [batch["tokens"].tolist() for step in (0, 1) for batch in batches.micro_batches(step)]
        assert json.loads(output) == expected


def test_batches_that_cannot_be_dealt_are_refused(small):
    content, data = small
    dataset = train_dataset(content, data, 8, seed=1)
    with pytest.raises(ValueError, match="8 sequences cannot be dealt evenly to 3 data-parallel ranks"):
        TrainBatches(dataset, 8, None, 0, 3)
    with pytest.raises(ValueError, match=r"share of 4 sequences .* must be a multiple of micro_batch_sequences 3"):
        TrainBatches(dataset, 8, 3, 0, 2)
    with pytest.raises(IndexError, match=r"step 100000 needs 800,008 samples"):
        next(TrainBatches(dataset, 8).micro_batches(100_000))


# --- validation


@pytest.mark.parametrize("split", ["slice", "full"])
@pytest.mark.parametrize(("num_ranks", "batch_sequences"), [(1, 4), (3, 1), (2, 64)])
def test_every_validation_token_is_predicted_once_from_the_one_before(small, split, num_ranks, batch_sequences):
    content, data = small
    ranks = [validation_batches(content, data, split, batch_sequences, rank, num_ranks) for rank in range(num_ranks)]
    assert len({len(batches) for batches in ranks}) == 1
    dealt = [batch for group in zip(*ranks, strict=True) for batch in group]
    assert len(dealt) == num_ranks * len(ranks[0])
    tokens, labels, mask = (
        torch.cat([batch[name] for batch in dealt]).flatten() for name in ("tokens", "labels", "loss_mask")
    )
    documents = documents_of(content, "slice" if split == "slice" else "validation")
    stream = [0, *(byte for document in documents for byte in document.tolist())]
    length = len(stream) - 1
    assert tokens[:length].tolist() == stream[:-1]
    assert labels[:length].tolist() == stream[1:]
    assert bytes(labels[mask == 1].tolist()) == b"".join(bytes(document)[:-1] for document in documents)
    assert not mask[length:].any()
    assert mask.sum() == ranks[0].num_tokens
    assert {batch["tokens"].shape for batch in dealt} == {(batch_sequences, 16)}


@pytest.mark.parametrize("split", ["slice", "full"])
def test_a_uniform_predictor_scores_eight_bits_a_byte(small, split):
    content, data = small
    batches = validation_batches(content, data, split, 4)
    total_nats = 0.0
    for batch in batches:
        logits = torch.zeros(*batch["tokens"].shape, 256)
        losses = torch.nn.functional.cross_entropy(logits.flatten(0, 1), batch["labels"].flatten(), reduction="none")
        total_nats += float((losses.double() * batch["loss_mask"].flatten()).sum())
    assert batches.bits_per_byte(total_nats) == pytest.approx(8.0, rel=1e-6)
    assert total_nats / batches.num_tokens == pytest.approx(math.log(256), rel=1e-6)


def test_bits_per_byte_compares_over_tokenizers(corpus, texts, tmp_path):
    tokenizer = write_tokenizer(tmp_path / "tokenizer.json", texts)
    vocab_size = tokenizer.get_vocab_size() + 1
    data = config(corpus, tokenizer=str(tmp_path / "tokenizer.json"), vocab_size=vocab_size)
    batches = validation_batches(prepare(data, tmp_path), data, "full", 4)
    masked_in = sum(int(batch["loss_mask"].sum()) for batch in batches)
    num_bytes = sum(len(text.encode()) for text in texts[3::4])
    assert masked_in == batches.num_tokens < num_bytes == batches.num_bytes
    expected = masked_in * math.log2(vocab_size) / num_bytes
    assert batches.bits_per_byte(masked_in * math.log(vocab_size)) == pytest.approx(expected, rel=1e-12)


# --- what cannot be used


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        (['{"text": "a"}', "{oops"], r"c.jsonl:2: not JSON: .*got \{oops"),
        (['{"text": "a"}', "", '{"body": "b", "year": 1}'], r"c.jsonl:3: no field 'text', got only 'body', 'year'"),
        (["{}"], r"c.jsonl:1: no field 'text', got only an empty object"),
        (['{"text": 7}'], r"c.jsonl:1: field 'text' must be a string, got 7"),
        (['["text"]'], r"c.jsonl:1: expected an object with a field 'text', got \[\"text\"\]"),
        (['{"text": "a"}', r'{"text": "ab\u0000c"}'], r"c.jsonl:2: field 'text' holds a NUL character at offset 2"),
        ([r'{"text": "\ud800"}'], r"c.jsonl:1: field 'text' is not valid Unicode"),
        (["", "  "], "c.jsonl: the corpus is empty"),
        (['{"text": "a"}'] * 3, r"c.jsonl: no validation document: every 4th .* the corpus has 3"),
        (['{"text": "a"}'] * 3 + ['{"text": ""}'], "c.jsonl: no text for split validation: 0 bytes"),
    ],
)
def test_a_bad_line_is_named(tmp_path, lines, message):
    path = tmp_path / "c.jsonl"
    path.write_text("\n".join(lines) + "\n")
    with pytest.raises(CorpusError, match=message):
        prepare(config(path), tmp_path / "data")


def test_bad_bytes_are_named(tmp_path):
    (tmp_path / "c.jsonl").write_bytes(b'{"text": "a"}\n{"text": "\xff"}\n')
    with pytest.raises(CorpusError, match=r"c.jsonl:2: not UTF-8"):
        prepare(config(tmp_path / "c.jsonl"), tmp_path)


@pytest.mark.parametrize("suffix", ["gz", "xz"])
def test_a_truncated_or_foreign_archive_is_named(corpus, tmp_path, suffix):
    pack = {"gz": gzip.compress, "xz": lzma.compress}[suffix]
    path = tmp_path / f"c.jsonl.{suffix}"
    for content in (pack(corpus.read_bytes())[:-40], b"this is not packed at all"):
        path.write_bytes(content)
        with pytest.raises(CorpusError, match=rf"c.jsonl.{suffix}: cannot be unpacked, the file is damaged"):
            prepare(config(path), tmp_path / "data")


def test_a_missing_or_unknown_corpus_is_named(tmp_path):
    with pytest.raises(CorpusError, match=r"no such file: .*gone.jsonl"):
        prepare(config(tmp_path / "gone.jsonl"), tmp_path)
    with pytest.raises(CorpusError, match=r"'wiki' is neither built in \(sotu\) nor a .jsonl, .jsonl.gz, .jsonl.xz"):
        prepare(config("wiki"), tmp_path)


def test_a_changed_corpus_or_tokenizer_is_refused(corpus, texts, tmp_path):
    with pytest.raises(
        CorpusError, match=r"data.corpus: .*made-up.jsonl has changed since .*expected 0000000000000000"
    ):
        prepare(config(corpus, corpus_sha256="0" * 64), tmp_path)
    write_tokenizer(tmp_path / "t.json", texts)
    with pytest.raises(CorpusError, match=r"data.tokenizer: .*t.json has changed"):
        prepare(config(corpus, tokenizer=str(tmp_path / "t.json"), tokenizer_sha256="0" * 64), tmp_path)


def test_a_bad_tokenizer_is_named(corpus, texts, tmp_path):
    with pytest.raises(CorpusError, match=r"'.*gone.json' is neither 'bytes' nor the path of a tokenizer.json"):
        prepare(config(corpus, tokenizer=str(tmp_path / "gone.json")), tmp_path)
    (tmp_path / "t.json").write_text("{}")
    with pytest.raises(CorpusError, match=r"t.json: not a Hugging Face tokenizer.json"):
        prepare(config(corpus, tokenizer=str(tmp_path / "t.json")), tmp_path)
    num_tokens = write_tokenizer(tmp_path / "t.json", texts).get_vocab_size() + 1
    with pytest.raises(CorpusError, match=rf"data.vocab_size is 256, but tokenizer .*t.json has {num_tokens} tokens"):
        prepare(config(corpus, tokenizer=str(tmp_path / "t.json")), tmp_path)


def test_a_wrong_vocabulary_is_refused_on_a_finished_folder_too(small):
    content, data = small
    with pytest.raises(CorpusError, match=r"data.vocab_size is 300, but tokenizer bytes has 256 tokens"):
        prepare(data.model_copy(update={"vocab_size": 300}), content.directory.parent)


def test_a_padded_vocabulary_changes_no_token(corpus, tmp_path):
    """Only the model has the further rows; below the tokenizer's tokens it would lack some."""
    plain = prepare(config(corpus), tmp_path / "data")
    padded = prepare(config(corpus, vocab_size=320, padded_vocab_size=320), tmp_path / "data")
    assert padded.directory == plain.directory
    with pytest.raises(CorpusError, match=r"data.vocab_size is 200, but tokenizer bytes has 256 tokens"):
        prepare(config(corpus, vocab_size=200, padded_vocab_size=200), tmp_path / "data")
