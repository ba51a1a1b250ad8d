"""Tokenizers by path give what their libraries give, and nothing more than an end of document."""

import base64
import json
import sys

import numpy as np
import pytest
from test_corpus import config, documents_of, made_up_texts, write_corpus

from models.corpus import CorpusError, prepare
from models.corpus.tokens import CL100K_PATTERN, load_tokenizer, tokenizer_sha256

TEXTS = ["the gate, 12345 gates!\n\n  'Tis ", "Frühling слово 言葉 🙂 <|endoftext|>", "", "x" * 500]


def write_ranks(path, merges=("th", "the", " the", "ga", "te", "gate", " gate")):
    """A small file of BPE ranks: the 256 bytes, then a few merges in order."""
    tokens = [bytes([byte]) for byte in range(256)] + [merge.encode() for merge in merges]
    path.write_text("".join(f"{base64.b64encode(token).decode()} {rank}\n" for rank, token in enumerate(tokens)))
    return {token: rank for rank, token in enumerate(tokens)}


@pytest.fixture(scope="module")
def piece_model(tmp_path_factory):
    import sentencepiece

    path = tmp_path_factory.mktemp("pieces") / "small.model"
    with path.open("wb") as stream:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter(made_up_texts(200)), model_writer=stream, vocab_size=300, byte_fallback=True,
            hard_vocab_limit=False, minloglevel=2,
        )  # fmt: skip
    return path


@pytest.mark.parametrize("pattern", [None, r"\p{L}+|\P{L}"])
def test_a_tiktoken_file_gives_what_tiktoken_gives(tmp_path, pattern):
    import tiktoken

    ranks = write_ranks(path := tmp_path / "small.tiktoken")
    if pattern is not None:
        path.with_name("small.tiktoken.json").write_text(json.dumps({"pattern": pattern}))
    theirs = tiktoken.Encoding(
        "theirs", pat_str=pattern or CL100K_PATTERN, mergeable_ranks=ranks, special_tokens={"<|endoftext|>": 300}
    )
    ours = load_tokenizer(str(path))
    assert [tokens.tolist() for tokens in ours.encode(TEXTS)] == [theirs.encode_ordinary(text) for text in TEXTS]
    assert (ours.eod, ours.vocab_size, ours.dtype) == (len(ranks), len(ranks) + 1, np.uint16)


def test_the_default_pattern_is_that_of_cl100k():
    from tiktoken_ext import openai_public

    source = openai_public.__loader__.get_source("tiktoken_ext.openai_public")
    assert f'r"""{CL100K_PATTERN}"""' in source


def test_a_sentencepiece_model_gives_what_the_library_gives(piece_model):
    import sentencepiece

    theirs = sentencepiece.SentencePieceProcessor(model_file=str(piece_model))
    ours = load_tokenizer(str(piece_model))
    encoded = ours.encode(TEXTS)
    assert [tokens.tolist() for tokens in encoded] == [theirs.encode(text) for text in TEXTS]
    assert ours.eod == theirs.get_piece_size() == ours.vocab_size - 1
    assert theirs.decode(encoded[1].tolist()) == TEXTS[1]


@pytest.mark.parametrize("kind", ["ranks", "pieces"])
def test_a_corpus_in_these_tokens_decodes_to_its_text(tmp_path, piece_model, kind):
    texts = made_up_texts()
    if kind == "ranks":
        path = tmp_path / "r.tiktoken"
        tokens_of = {rank: token for token, rank in write_ranks(path).items()}

        def decode(ids):
            return b"".join(tokens_of[i] for i in ids).decode()
    else:
        import sentencepiece

        path, decode = piece_model, sentencepiece.SentencePieceProcessor(model_file=str(piece_model)).decode
    tokenizer = load_tokenizer(str(path))
    data = config(write_corpus(tmp_path / "c.jsonl", texts), tokenizer=str(path), vocab_size=tokenizer.vocab_size)
    content = prepare(data, tmp_path / "data")
    documents = documents_of(content, "validation")
    assert {int(document[-1]) for document in documents} == {tokenizer.eod}
    assert [decode(document[:-1].tolist()) for document in documents] == texts[3::4]
    assert content.split("validation").num_bytes == sum(len(text.encode()) for text in texts[3::4])


def test_a_pattern_beside_the_ranks_is_part_of_the_tokenizers_identity(tmp_path):
    write_ranks(path := tmp_path / "small.tiktoken")
    seen = {tokenizer_sha256(str(path))}
    for pattern in (r"\p{L}+|\P{L}", r"."):
        path.with_name("small.tiktoken.json").write_text(json.dumps({"pattern": pattern}))
        seen.add(tokenizer_sha256(str(path)))
    assert len(seen) == 3


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("t.tiktoken", "YQ== 0\nnot base64\n", r"tiktoken:2: expected a token in base64 and its rank, got 'not b"),
        ("t.tiktoken", "YQ== 0\n", r"255 of the 256 single bytes have no rank, the first is 0"),
        ("t.model", "nothing", r"t.model: not a SentencePiece model"),
        ("t.txt", "nothing", r"is a file of another kind; allowed: bytes, or a file that ends in .json"),
    ],
)  # fmt: skip
def test_a_file_that_is_no_tokenizer_is_named(tmp_path, name, content, message):
    (tmp_path / name).write_text(content)
    with pytest.raises(CorpusError, match=message):
        load_tokenizer(str(tmp_path / name))


@pytest.mark.parametrize("content", ["{}", '{"pattern": 1}', '{"pattern": "a", "more": 1}', "oops"])
def test_a_bad_pattern_file_is_named(tmp_path, content):
    write_ranks(path := tmp_path / "t.tiktoken")
    path.with_name("t.tiktoken.json").write_text(content)
    with pytest.raises(CorpusError, match=r"t.tiktoken.json: (expected|not JSON)"):
        load_tokenizer(str(path))


@pytest.mark.parametrize(("library", "name"), [("tiktoken", "t.tiktoken"), ("sentencepiece", "t.model")])
def test_a_missing_library_is_told_with_the_extra_that_brings_it(tmp_path, monkeypatch, library, name):
    write_ranks(tmp_path / name)
    monkeypatch.setitem(sys.modules, library, None)
    with pytest.raises(CorpusError, match=rf"needs {library}, which is not installed; pip install 'gatesweep\[data\]'"):
        load_tokenizer(str(tmp_path / name))
