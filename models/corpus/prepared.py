"""A corpus as Megatron's indexed dataset: a folder with ``{train,validation,slice}.{bin,idx}`` and info.json.

A corpus file is prepared when a trial first asks for it, under ``<data_dir>/<key>``. The key is a hash of all that
decides the content, so a folder that has its name is whole and never changes. It is written aside and renamed; of two
writers the later one throws its own away. A finished folder is used without looking at the corpus file again, when
``data.corpus_sha256`` says which corpus is meant. A folder that ``make`` wrote is used where it lies.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import secrets
import shutil
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from megatron.core.datasets.indexed_dataset import IndexedDatasetBuilder

from models.config import DataConfig, Frozen
from models.corpus.encode import EncodedChunk, Encoding, encode_chunks
from models.corpus.split import Slice, is_validation
from models.corpus.text import BUILT_IN, CorpusError, corpus_path, file_sha256, read_chunks
from models.corpus.tokens import Tokenizer, Tokens, load_tokenizer, tokenizer_sha256
from models.run_dir import write_json

FORMAT = 1
"""Raised when the same corpus would be written in another way."""

INFO = "info.json"
SplitName = Literal["train", "validation", "slice"]
SPLITS: tuple[SplitName, ...] = ("train", "validation", "slice")
LEAST_SLICE_SHARE_BYTES = 16
"""Below this a head says nothing about its document."""


class PreparedSplit(Frozen):
    """What one .bin/.idx pair holds. Each document is followed by one end-of-document token, which is not counted."""

    num_documents: int
    num_tokens: int
    num_bytes: int
    """UTF-8 bytes of text."""
    bin_file_bytes: int
    idx_file_bytes: int


class PreparedInfo(Frozen):
    """info.json: what the folder was made from, and what came out. The hashes of ``make`` are empty elsewhere."""

    format: int
    corpus: str
    corpus_sha256: str
    tokenizer: str
    tokenizer_sha256: str
    validation_every: int
    slice_bytes: int
    """As asked for; ``slice.num_bytes`` is what whole characters allowed."""
    slice_documents: int | None = None
    vocab_size: int
    eod: int
    train: PreparedSplit
    validation: PreparedSplit
    slice: PreparedSplit
    content_sha256: str = ""
    """Of the six files; what ``data.corpus_sha256`` is for a folder made ahead."""
    num_files: int = 1
    """Input files; their hashes are in ``corpus_sha256``."""
    text_field: str = "text"
    version: str = ""
    """Of the package that wrote it."""


@dataclass(frozen=True)
class Prepared:
    """A finished folder."""

    directory: Path
    info: PreparedInfo
    indices_directory: Path
    """Where Megatron's sample orders are kept: never in a folder that was made ahead, which may be read-only."""

    def prefix(self, split: SplitName) -> str:
        """Megatron's path prefix: the files are ``<prefix>.bin`` and ``<prefix>.idx``."""
        return str(self.directory / split)

    def split(self, split: SplitName) -> PreparedSplit:
        content: PreparedSplit = getattr(self.info, split)
        return content

    @property
    def vocab_size(self) -> int:
        return self.info.vocab_size

    @property
    def eod(self) -> int:
        return self.info.eod


def prepare(data: DataConfig, data_dir: Path, needs: Iterable[SplitName] = SPLITS) -> Prepared:
    """The prepared folder for ``data.corpus``, made now if there is none. Any number of processes may call it at once.

    ``needs``: the splits that must hold text. Raises CorpusError for a corpus or tokenizer that cannot be used, or is
    not the one that ``data`` names by hash.
    """
    if data.corpus not in BUILT_IN and (Path(data.corpus) / INFO).exists():
        prepared = _made_ahead(data, data_dir)
    else:
        prepared = _made_here(data, data_dir)
    _check_vocab_size(data, prepared.vocab_size)
    _check_holds(prepared.info, data, needs)
    return prepared


def _made_here(data: DataConfig, data_dir: Path) -> Prepared:
    corpus_sha256 = data.corpus_sha256 or file_sha256(corpus_path(data.corpus))
    tokenizer_hash = "" if data.tokenizer == "bytes" else data.tokenizer_sha256 or tokenizer_sha256(data.tokenizer)
    key = _key(data, corpus_sha256, tokenizer_hash)
    directory = data_dir.absolute() / key
    if not directory.exists():
        data_dir.mkdir(parents=True, exist_ok=True)
        with _one_at_a_time(data_dir / f".{key}.lock"):
            if not directory.exists():
                _make(data, corpus_sha256, tokenizer_hash, directory)
    return Prepared(directory, read_info(directory), directory / "indices")


def _made_ahead(data: DataConfig, data_dir: Path) -> Prepared:
    """The folder itself, when it is what ``data`` asks for. The tokenizer's file need not be there any more."""
    directory = Path(data.corpus).absolute()
    info = read_info(directory)
    if data.corpus_sha256 and data.corpus_sha256 != info.content_sha256:
        raise CorpusError(
            f"data.corpus: {directory} has changed since the sweep was planned: content {info.content_sha256[:16]}..., "
            f"expected {data.corpus_sha256[:16]}...; put the folder back, or plan the sweep again"
        )
    asked = data.tokenizer_sha256 if data.tokenizer != "bytes" else ""
    if not asked and data.tokenizer != "bytes":
        asked = tokenizer_sha256(data.tokenizer)
    pairs = {
        "tokenizer": (asked[:16] or "bytes", info.tokenizer_sha256[:16] or "bytes"),
        "validation_every": (data.validation_every, info.validation_every),
        "validation.slice_bytes": (data.validation.slice_bytes, info.slice_bytes),
        "validation.slice_documents": (data.validation.slice_documents, info.slice_documents),
    }
    for name, (wanted, made) in pairs.items():
        if wanted != made:
            raise CorpusError(f"data.{name} is {wanted}, but {directory} was prepared with {made}; prepare it again")
    indices_directory = data_dir.absolute() / f"prepared-{info.content_sha256[:16]}" / "indices"
    return Prepared(directory, info, indices_directory)


def _key(data: DataConfig, corpus_sha256: str, tokenizer_hash: str) -> str:
    content = [FORMAT, corpus_sha256, tokenizer_hash, data.validation_every, data.validation.slice_bytes]
    if data.validation.slice_documents is not None:
        content.append(data.validation.slice_documents)
    return hashlib.sha256(json.dumps(content).encode()).hexdigest()[:16]


@contextmanager
def _one_at_a_time(path: Path) -> Iterator[None]:
    """Spares processes of one host the same work. Correctness does not hang on it: not every file system locks."""
    with path.open("w") as stream:
        with suppress(OSError):
            fcntl.flock(stream, fcntl.LOCK_EX)
        yield


@contextmanager
def made_aside(directory: Path) -> Iterator[Path]:
    """A fresh folder beside ``directory`` that takes its name at the end, unless another writer was first."""
    aside = directory.with_name(f".{directory.name}.{secrets.token_hex(8)}")
    aside.mkdir(parents=True)
    try:
        yield aside
        try:
            aside.rename(directory)
        except OSError:
            if not directory.is_dir():
                raise
    finally:
        shutil.rmtree(aside, ignore_errors=True)


def _make(data: DataConfig, corpus_sha256: str, tokenizer_hash: str, directory: Path) -> None:
    path = corpus_path(data.corpus)
    _check_hash("data.corpus", path, file_sha256(path), corpus_sha256)
    if tokenizer_hash:
        _check_hash("data.tokenizer", Path(data.tokenizer), tokenizer_sha256(data.tokenizer), tokenizer_hash)
    tokenizer = load_tokenizer(data.tokenizer)
    _check_vocab_size(data, tokenizer.vocab_size)
    encoding = Encoding(
        tokenizer=data.tokenizer,
        validation_every=data.validation_every,
        slice_bytes=data.validation.slice_bytes,
        slice_documents=data.validation.slice_documents,
    )
    with made_aside(directory) as aside:
        splits = write_splits(encode_chunks(read_chunks([path]), encoding, tokenizer), encoding, tokenizer, aside)
        info = PreparedInfo(
            format=FORMAT,
            corpus=data.corpus,
            corpus_sha256=corpus_sha256,
            tokenizer=data.tokenizer,
            tokenizer_sha256=tokenizer_hash,
            validation_every=data.validation_every,
            slice_bytes=data.validation.slice_bytes,
            slice_documents=data.validation.slice_documents,
            vocab_size=tokenizer.vocab_size,
            eod=tokenizer.eod,
            train=splits["train"],
            validation=splits["validation"],
            slice=splits["slice"],
        )
        write_json(aside / INFO, info)


def _check_hash(key: str, path: Path, actual: str, expected: str) -> None:
    if actual != expected:
        raise CorpusError(
            f"{key}: {path} has changed since the sweep was planned: sha256 {actual[:16]}..., expected "
            f"{expected[:16]}...; put the file back, or plan the sweep again"
        )


def _check_vocab_size(data: DataConfig, actual: int) -> None:
    if data.vocab_size != max(actual, data.padded_vocab_size or 0):
        raise CorpusError(
            f"data.vocab_size is {data.vocab_size:,}, but tokenizer {data.tokenizer} has {actual:,} tokens"
            + ("" if data.tokenizer == "bytes" else " (its highest id + 1, and one for end of document)")
        )


class _Writer:
    """One .bin/.idx pair in the making."""

    def __init__(self, prefix: Path, dtype: type[np.integer]) -> None:
        self._prefix = prefix
        self._builder = IndexedDatasetBuilder(f"{prefix}.bin", dtype=dtype)
        self._num_documents = self._num_tokens = self._num_bytes = 0

    def add(self, document: Tokens, num_bytes: int) -> None:
        """One document's tokens with their end, and the bytes of its text."""
        self._builder.add_item(torch.from_numpy(document))
        self._builder.end_document()
        self._num_documents += 1
        self._num_tokens += len(document) - 1
        self._num_bytes += num_bytes

    def finish(self) -> PreparedSplit:
        self._builder.finalize(f"{self._prefix}.idx")
        return PreparedSplit(
            num_documents=self._num_documents,
            num_tokens=self._num_tokens,
            num_bytes=self._num_bytes,
            bin_file_bytes=os.path.getsize(f"{self._prefix}.bin"),
            idx_file_bytes=os.path.getsize(f"{self._prefix}.idx"),
        )


def write_splits(
    chunks: Iterable[EncodedChunk], encoding: Encoding, tokenizer: Tokenizer, directory: Path
) -> dict[SplitName, PreparedSplit]:
    """The six files, chunk by chunk: what is in memory does not grow with the corpus."""
    writers = {split: _Writer(directory / split, tokenizer.dtype) for split in SPLITS}
    heads = Slice(encoding.slice_bytes, encoding.slice_documents)
    for chunk in chunks:
        for index, document, num_bytes in chunk:
            split: SplitName = "validation" if is_validation(index, encoding.validation_every) else "train"
            writers[split].add(document, num_bytes)
        for head in chunk.heads:
            heads.add(head)
    texts = heads.texts()
    for text, tokens in zip(texts, tokenizer.encode(texts), strict=True):
        writers["slice"].add(np.append(tokens, tokenizer.dtype(tokenizer.eod)), len(text.encode()))
    return {split: writer.finish() for split, writer in writers.items()}


def _check_holds(info: PreparedInfo, data: DataConfig, needs: Iterable[SplitName]) -> None:
    """That there is text to train on, or to measure: what a corpus must hold depends on what it is used for."""
    num_documents = info.train.num_documents + info.validation.num_documents
    if num_documents == 0:
        raise CorpusError(f"{data.corpus}: the corpus is empty: it holds no document")
    for split in needs:
        content: PreparedSplit = getattr(info, split)
        if split != "train" and info.validation.num_documents == 0:
            raise CorpusError(
                f"{data.corpus}: no validation document: every {data.validation_every}th is one "
                f"(data.validation_every), and the corpus has {num_documents}"
            )
        if content.num_tokens == 0:
            raise CorpusError(
                f"{data.corpus}: no text for split {split}: {content.num_bytes:,} bytes of text in "
                f"{content.num_documents:,} documents (data.validation.slice_bytes is "
                f"{data.validation.slice_bytes:,})"
            )
    if "slice" in needs:
        check_slice(info, data.corpus, "data.validation.slice_bytes", "data.validation.slice_documents")


def check_slice(info: PreparedInfo, corpus: str, bytes_key: str, documents_key: str) -> None:
    """That the slice says something about each document that it is taken from; the keys are for the message."""
    num_documents = info.validation.num_documents
    given = min(num_documents, info.slice_documents or num_documents)
    cut = info.slice.num_bytes < info.validation.num_bytes
    if cut and info.slice_bytes < LEAST_SLICE_SHARE_BYTES * given:
        raise CorpusError(
            f"{corpus}: {bytes_key} {info.slice_bytes:,} over {given:,} validation documents leaves less than "
            f"{LEAST_SLICE_SHARE_BYTES} bytes of each, which measures nothing; set {documents_key}, the most that "
            "give a head, such as 64"
        )


def read_info(directory: Path) -> PreparedInfo:
    """info.json of a finished folder, its files' sizes checked: a disk that filled up or a copy cut short shows."""
    try:
        info = PreparedInfo.model_validate_json((directory / INFO).read_text())
        for name in SPLITS:
            split: PreparedSplit = getattr(info, name)
            for suffix, expected in (("bin", split.bin_file_bytes), ("idx", split.idx_file_bytes)):
                if (actual := (directory / f"{name}.{suffix}").stat().st_size) != expected:
                    raise ValueError(f"{name}.{suffix} has {actual:,} bytes, expected {expected:,}")
    except (OSError, ValueError) as error:
        raise CorpusError(
            f"prepared corpus {directory} is damaged: {error}; remove the folder and run again"
        ) from error
    return info
