"""``data prepare``: every kind of input, any number of processes, nothing half-made, what is wrong with its place."""

import bz2
import contextlib
import gzip
import json
import lzma
import os
import signal
import subprocess
import sys
import threading

import pyarrow
import pytest
from pyarrow import parquet
from test_corpus import config, documents_of, made_up_texts, write_corpus, write_tokenizer

from models.config import ValidationConfig
from models.corpus import CorpusError, __main__, gather, make, prepare, train_dataset
from models.corpus import text as corpus_text
from models.corpus.encode import Encoding
from models.corpus.prepared import SPLITS
from models.corpus.split import Slice, equal_shares

TEXTS = made_up_texts(30)
ENCODING = Encoding("bytes", validation_every=4, slice_bytes=200)
FILES = [f"{split}.{suffix}" for split in SPLITS for suffix in ("bin", "idx")]


def made(to, *inputs, encoding=ENCODING, num_workers=1, txt="files"):
    return make.make(make.Recipe(tuple(map(str, inputs)), encoding, txt), to, num_workers)[0]


def content_of(folder):
    return {name: (folder / name).read_bytes() for name in FILES}


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    return write_corpus(tmp_path_factory.mktemp("corpus") / "c.jsonl", TEXTS)


@pytest.fixture(scope="module")
def plain(corpus, tmp_path_factory):
    return made(tmp_path_factory.mktemp("plain") / "made", corpus)


def zstandard(content):
    sink = pyarrow.BufferOutputStream()
    with pyarrow.CompressedOutputStream(sink, "zstd") as stream:
        stream.write(content)
    return sink.getvalue().to_pybytes()


TORN_GZIP = gzip.compress(b'{"text": "a"}\n' * 9, mtime=0)[:-9]
"""Without the time: a test's name has it, and two lanes must find the same names."""
PACKERS = {"gz": gzip.compress, "xz": lzma.compress, "bz2": bz2.compress, "zst": zstandard}


# --- what goes in


@pytest.mark.parametrize("packing", PACKERS)
def test_packed_input_gives_the_same_dataset(corpus, plain, tmp_path, packing):
    path = tmp_path / f"c.jsonl.{packing}"
    path.write_bytes(PACKERS[packing](corpus.read_bytes()))
    assert content_of(made(tmp_path / "made", path)) == content_of(plain)
    data = config(path)
    assert content_of(prepare(data, tmp_path / "data").directory) == content_of(plain)


def test_parquet_gives_the_same_dataset(plain, tmp_path):
    table = pyarrow.table({"id": range(30), "body": TEXTS})
    parquet.write_table(table, tmp_path / "c.parquet", row_group_size=7)
    encoding = Encoding("bytes", "body", validation_every=4, slice_bytes=200)
    assert content_of(made(tmp_path / "made", tmp_path / "c.parquet", encoding=encoding)) == content_of(plain)


def test_text_files_are_documents_or_hold_one_a_line(plain, tmp_path):
    for number, text in enumerate(TEXTS):
        (tmp_path / f"{number:02d}.txt").write_text(text)
    (tmp_path / "lines.md").write_text("not a corpus")
    assert content_of(made(tmp_path / "to" / "files", tmp_path)) == content_of(plain)
    (tmp_path / "lines").mkdir()
    (tmp_path / "lines" / "all.txt.gz").write_bytes(gzip.compress("\n\n".join(TEXTS).encode()))
    assert content_of(made(tmp_path / "to" / "lines", tmp_path / "lines", txt="lines")) == content_of(plain)


def test_folders_and_globs_are_read_in_the_order_of_their_names(plain, tmp_path):
    (tmp_path / "in" / "deeper").mkdir(parents=True)
    (tmp_path / "in" / ".hidden.jsonl").write_text("not looked at")
    write_corpus(tmp_path / "in" / "b.jsonl", TEXTS[10:])
    write_corpus(tmp_path / "in" / "a.jsonl", TEXTS[:10])
    assert content_of(made(tmp_path / "folder", tmp_path / "in")) == content_of(plain)
    assert content_of(made(tmp_path / "glob", tmp_path / "in" / "*.jsonl")) == content_of(plain)
    assert content_of(made(tmp_path / "named", tmp_path / "in/b.jsonl", tmp_path / "in/a.jsonl")) != content_of(plain)


@pytest.mark.parametrize("tokenizer", ["bytes", "file"])
def test_the_number_of_workers_does_not_show(corpus, tmp_path, monkeypatch, tokenizer):
    monkeypatch.setattr(corpus_text, "CHUNK_BYTES", 1000)
    if tokenizer == "file":
        write_tokenizer(tmp_path / "tokenizer.json", TEXTS)
        tokenizer = str(tmp_path / "tokenizer.json")
    encoding = Encoding(tokenizer, validation_every=4, slice_bytes=200)
    folders = [made(tmp_path / f"by-{n}", corpus, encoding=encoding, num_workers=n) for n in (1, 3)]
    assert content_of(folders[0]) == content_of(folders[1])
    infos = [json.loads((folder / "info.json").read_text()) for folder in folders]
    assert infos[0] == infos[1]


# --- what comes out


def test_a_trial_on_the_folder_trains_on_what_one_on_the_text_does(corpus, plain, tmp_path):
    text, folder = config(corpus), config(plain)
    samples = []
    for data in (text, folder):
        main = gather(data, tmp_path / "data").main
        dataset = train_dataset(main, data, 40, seed=2)
        samples.append([dataset[i]["tokens"].tolist() for i in range(40)])
        assert main.split("slice").num_bytes == gather(text, tmp_path / "data").main.split("slice").num_bytes
    assert samples[0] == samples[1]
    assert not (plain / "indices").exists()


def test_all_of_a_held_out_corpus_is_validation(corpus, tmp_path):
    folder = made(
        tmp_path / "made", corpus, encoding=Encoding("bytes", validation_every=1, slice_bytes=200, slice_documents=4)
    )
    data = config(folder, validation=ValidationConfig(slice_bytes=200, slice_documents=4))
    content = prepare(data.model_copy(update={"validation_every": 1}), tmp_path / "data", ("validation", "slice"))
    assert [bytes(document)[:-1].decode() for document in documents_of(content, "validation")] == TEXTS
    assert content.split("train").num_documents == 0


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"validation_every": 5}, r"data.validation_every is 5, but .*made was prepared with 4"),
        ({"validation": ValidationConfig(slice_bytes=99)}, r"data.validation.slice_bytes is 99, but .* with 200"),
        ({"corpus_sha256": "0" * 64}, r"made has changed since the sweep was planned"),
    ],
)
def test_a_folder_that_is_not_what_the_trial_asks_for_is_refused(plain, tmp_path, changes, message):
    with pytest.raises(CorpusError, match=message):
        prepare(config(plain, **changes), tmp_path)


def test_the_slice_is_bounded_in_memory_and_the_same_as_if_it_were_not():
    heads = [bytes([97 + number % 26]) * (1 + (number * 7919) % 300) for number in range(3000)]
    gathered = Slice(4000)
    most = 0
    for head in heads:
        gathered.add(head)
        most = max(most, gathered._kept_bytes)
    shares = equal_shares([len(head) for head in heads], 4000)
    assert gathered.texts() == [head[:share].decode() for head, share in zip(heads, shares, strict=True) if share]
    assert most <= 16 * 4000 + 300 < sum(map(len, heads))


def test_a_slice_of_few_documents_takes_them_evenly():
    gathered = Slice(1000, num_documents=5)
    for number in range(40):
        gathered.add(f"{number:02d}".encode())
    assert gathered.texts() == ["00", "08", "16", "24", "32"]


def test_a_slice_that_says_nothing_about_its_documents_is_refused(tmp_path):
    path = write_corpus(tmp_path / "c.jsonl", ["some text of a document"] * 100)
    data = config(path, validation=ValidationConfig(slice_bytes=200))
    with pytest.raises(CorpusError, match=r"slice_bytes 200 over 25 validation documents leaves less than 16 bytes"):
        prepare(data, tmp_path / "data")
    data = config(path, validation=ValidationConfig(slice_bytes=200, slice_documents=8))
    assert prepare(data, tmp_path / "data").split("slice").num_documents <= 8


# --- whole or not at all


def test_a_second_run_is_recognised_and_another_one_refused(corpus, tmp_path):
    recipe = make.Recipe((str(corpus),), ENCODING)
    assert make.make(recipe, tmp_path / "made") == (tmp_path / "made", False)
    before = os.stat(tmp_path / "made" / "train.bin").st_mtime_ns
    copy = tmp_path / "copy.jsonl"
    copy.write_bytes(corpus.read_bytes())
    for inputs in (str(corpus), str(copy)):
        assert make.make(make.Recipe((inputs,), ENCODING), tmp_path / "made", 2) == (tmp_path / "made", True)
    assert os.stat(tmp_path / "made" / "train.bin").st_mtime_ns == before
    with pytest.raises(CorpusError, match=r"holds another dataset \(--slice-bytes 100 against 200\)"):
        made(tmp_path / "made", corpus, encoding=Encoding("bytes", validation_every=4, slice_bytes=100))
    copy.write_text('{"text": "other"}\n')
    with pytest.raises(CorpusError, match=r"holds another dataset \(inputs \w+ against \w+\)"):
        made(tmp_path / "made", copy)
    (tmp_path / "folder" / "of-mine").mkdir(parents=True)
    with pytest.raises(CorpusError, match="exists and is no prepared dataset"):
        made(tmp_path / "folder", corpus)


@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGTERM])
def test_a_run_that_is_killed_leaves_nothing_half_made(tmp_path, how):
    """The input is a pipe that is never finished, so the run is in the middle when the signal comes."""
    os.mkfifo(pipe := tmp_path / "slow.jsonl")
    target = tmp_path / "to" / "made"
    code = (
        "import sys; from pathlib import Path; from models.corpus import make, text, __main__\n"
        "text.CHUNK_BYTES = 1; make.file_sha256 = lambda path: 'hash'\n"
        "sys.exit(__main__.main(sys.argv[1:]))"
    )
    command = [sys.executable, "-c", code, "prepare", str(pipe), "--to", str(target)]
    run = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
    writer = threading.Thread(target=_feed, args=(pipe, target, run, how))
    writer.start()
    _, said = run.communicate(timeout=120)
    writer.join(timeout=120)
    assert run.returncode != 0, said.decode()
    assert not target.exists()
    left = [path.name for path in target.parent.iterdir() if path.suffix != ".lock"]
    assert left == ([".made.partial"] if how == signal.SIGKILL else [])
    folder = made(target, write_corpus(tmp_path / "c.jsonl", TEXTS))
    assert [path.name for path in target.parent.iterdir() if path.suffix != ".lock"] == ["made"]
    make.verify(folder)


def _feed(pipe, target, run, how):
    """Documents until the run has begun to write, then the signal."""
    with contextlib.suppress(BrokenPipeError), pipe.open("w") as stream:
        while not target.with_name(".made.partial").exists():
            stream.write(json.dumps({"text": "words " * 50}) + "\n")
        run.send_signal(how)
        run.wait(timeout=120)


def test_two_runs_with_one_target_do_not_meet(corpus, tmp_path):
    with make._alone(tmp_path / "made"), pytest.raises(CorpusError, match="another process is preparing it now"):
        made(tmp_path / "made", corpus)
    made(tmp_path / "made", corpus)


def test_a_changed_byte_is_found(corpus, tmp_path):
    folder = made(tmp_path / "made", corpus)
    make.verify(folder)
    with (folder / "train.bin").open("r+b") as stream:
        stream.seek(100)
        stream.write(b"~")
    with pytest.raises(CorpusError, match="the files are not what was written"):
        make.verify(folder)


# --- what cannot be used


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("c.jsonl", b'{"text": "a"}\n\n{oops\n', r"c.jsonl:3: not JSON: .*got \{oops"),
        ("c.jsonl", b'{"text": "a"}\n{"body": "b"}\n', r"c.jsonl:2: no field 'text', got only 'body'"),
        ("c.jsonl", b'{"text": "a"}\n{"text": "\xff"}\n', r"c.jsonl:2: not UTF-8"),
        ("c.txt", b"fine\nnot \xff fine\n", r"c.txt:2: not UTF-8: invalid start byte at byte 9"),
        ("c.txt", b"with \0 in it", r"c.txt: the text holds a NUL character at offset 5"),
        ("c.jsonl.gz", TORN_GZIP, r"c.jsonl.gz: cannot be unpacked, the file is dam"),
        ("c.jsonl.zst", zstandard(b'{"text": "a"}\n' * 9)[:-9], r"c.jsonl.zst: cannot be unpacked, the file is dam"),
        ("c.parquet", b"PAR1 not at all", r"c.parquet: not a readable parquet file"),
        ("c.csv", b"text\na\n", r"c.csv: unknown kind of file; allowed: .jsonl, .txt, .parquet"),
        ("c.jsonl", b"\n \n", r"c.jsonl: no text: 0 documents"),
    ],
)  # fmt: skip
def test_bad_input_is_named_with_its_place(tmp_path, name, content, message):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(CorpusError, match=message):
        made(tmp_path / "made", tmp_path / name)
    assert not (tmp_path / "made").exists()


def test_of_several_bad_lines_the_first_is_named_by_any_number_of_workers(tmp_path, monkeypatch):
    monkeypatch.setattr(corpus_text, "CHUNK_BYTES", 30)
    (tmp_path / "c.jsonl").write_text('{"text": "good"}\n' * 20 + '{"text": 1}\n' * 20)
    for num_workers in (1, 2):
        with pytest.raises(CorpusError, match=r"c.jsonl:21: field 'text' must be a string, got 1"):
            made(tmp_path / "made", tmp_path / "c.jsonl", num_workers=num_workers)
    assert not (tmp_path / "made").exists()


@pytest.mark.parametrize(
    ("column", "message"),
    [
        (pyarrow.array(["a", None]), r"c.parquet:row 2: column 'text' is null; expected a string"),
        (pyarrow.array([1, 2]), r"c.parquet: column 'text' must hold strings, got int64"),
        (None, r"c.parquet: no column 'text', got other"),
    ],
)
def test_a_bad_parquet_row_is_named(tmp_path, column, message):
    table = pyarrow.table({"other": ["x", "y"]} | ({"text": column} if column is not None else {}))
    parquet.write_table(table, tmp_path / "c.parquet")
    with pytest.raises(CorpusError, match=message):
        made(tmp_path / "made", tmp_path / "c.parquet")


def test_inputs_that_are_not_there_or_there_twice_are_named(corpus, tmp_path):
    with pytest.raises(CorpusError, match=r"gone.jsonl: no such file or folder"):
        made(tmp_path / "made", tmp_path / "gone.jsonl")
    with pytest.raises(CorpusError, match=r"\*.jsonl: holds no file that ends in .jsonl, .txt, .parquet"):
        made(tmp_path / "made", tmp_path / "*.jsonl")
    with pytest.raises(CorpusError, match=r"c.jsonl: named more than once"):
        made(tmp_path / "made", corpus, corpus)


def test_a_document_that_would_not_fit_in_memory_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(corpus_text, "MAX_RECORD_BYTES", 100)
    path = write_corpus(tmp_path / "c.jsonl", ["short", "long" * 100])
    with pytest.raises(CorpusError, match=r"c.jsonl:2: the line is longer than"):
        made(tmp_path / "made", path)


# --- the command


def test_the_command_prepares_shows_and_verifies(corpus, tmp_path, capsys):
    options = ["--to", str(tmp_path / "made"), "--validation-every", "4", "--slice-bytes", "200"]
    assert __main__.main(["prepare", str(corpus), *options]) == 0
    assert "MB of text/s" in capsys.readouterr().out
    assert __main__.main(["prepare", str(corpus), *options]) == 0
    assert "was prepared from these inputs before" in capsys.readouterr().out
    assert __main__.main(["show", str(tmp_path / "made"), "--verify"]) == 0
    said = capsys.readouterr().out
    assert "validation  7 documents" in said
    assert "verified" in said
    assert __main__.main(["show", str(tmp_path)]) == 2
    assert "no prepared dataset: there is no info.json" in capsys.readouterr().err
