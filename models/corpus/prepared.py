"""A corpus as Megatron's indexed dataset: ``<data_dir>/<key>/{train,validation,slice}.{bin,idx}`` and info.json.

The key is a hash of all that decides the content, so a folder that has its name is whole and never changes.
It is written aside and renamed; of two writers the later one throws its own away. A finished folder is used
without looking at the corpus file again, when ``data.corpus_sha256`` says which corpus is meant.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import secrets
import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from megatron.core.datasets.indexed_dataset import IndexedDatasetBuilder

from models.config import DataConfig, Frozen
from models.corpus.text import (
    CorpusError,
    corpus_path,
    equal_shares,
    file_sha256,
    is_validation,
    read_documents,
    utf8_head,
)
from models.corpus.tokens import Tokenizer, load_tokenizer, tokenizer_path
from models.run_dir import write_json

FORMAT = 1
"""Raised when the same corpus would be written in another way."""

SplitName = Literal["train", "validation", "slice"]
SPLITS: tuple[SplitName, ...] = ("train", "validation", "slice")
CHUNK_CHARACTERS = 4_000_000
"""Text tokenized at once: enough for a tokenizer's threads, little beside the model."""


class PreparedSplit(Frozen):
    """What one .bin/.idx pair holds. Each document is followed by one end-of-document token, which is not counted."""

    num_documents: int
    num_tokens: int
    num_bytes: int
    """UTF-8 bytes of text."""
    bin_file_bytes: int
    idx_file_bytes: int


class PreparedInfo(Frozen):
    """info.json: what the folder was made from, and what came out."""

    format: int
    corpus: str
    corpus_sha256: str
    tokenizer: str
    tokenizer_sha256: str
    validation_every: int
    slice_bytes: int
    """As asked for; ``slice.num_bytes`` is what whole characters allowed."""
    vocab_size: int
    eod: int
    train: PreparedSplit
    validation: PreparedSplit
    slice: PreparedSplit


@dataclass(frozen=True)
class Prepared:
    """A finished folder."""

    directory: Path
    info: PreparedInfo

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


def prepare(data: DataConfig, data_dir: Path) -> Prepared:
    """The prepared folder for ``data``, made now if there is none. Any number of processes may call it at once.

    Raises CorpusError for a corpus or tokenizer that cannot be used, or is not the one that ``data`` names by hash.
    """
    corpus_sha256 = data.corpus_sha256 or file_sha256(corpus_path(data.corpus))
    tokenizer_sha256 = "" if data.tokenizer == "bytes" else data.tokenizer_sha256
    if not tokenizer_sha256 and (path := tokenizer_path(data.tokenizer)):
        tokenizer_sha256 = file_sha256(path)
    key = _key(data, corpus_sha256, tokenizer_sha256)
    directory = data_dir.absolute() / key
    if not directory.exists():
        data_dir.mkdir(parents=True, exist_ok=True)
        with _one_at_a_time(data_dir / f".{key}.lock"):
            if not directory.exists():
                _make(data, corpus_sha256, tokenizer_sha256, directory)
    prepared = Prepared(directory, _read_info(directory))
    _check_vocab_size(data, prepared.vocab_size)
    return prepared


def _key(data: DataConfig, corpus_sha256: str, tokenizer_sha256: str) -> str:
    content = [FORMAT, corpus_sha256, tokenizer_sha256, data.validation_every, data.validation.slice_bytes]
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


def _make(data: DataConfig, corpus_sha256: str, tokenizer_sha256: str, directory: Path) -> None:
    path = corpus_path(data.corpus)
    _check_hash("data.corpus", path, corpus_sha256)
    if tokenizer_file := tokenizer_path(data.tokenizer):
        _check_hash("data.tokenizer", tokenizer_file, tokenizer_sha256)
    tokenizer = load_tokenizer(data.tokenizer)
    _check_vocab_size(data, tokenizer.vocab_size)
    with made_aside(directory) as aside:
        splits = _write_splits(path, data, tokenizer, aside)
        info = PreparedInfo(
            format=FORMAT,
            corpus=data.corpus,
            corpus_sha256=corpus_sha256,
            tokenizer=data.tokenizer,
            tokenizer_sha256=tokenizer_sha256,
            validation_every=data.validation_every,
            slice_bytes=data.validation.slice_bytes,
            vocab_size=tokenizer.vocab_size,
            eod=tokenizer.eod,
            train=splits["train"],
            validation=splits["validation"],
            slice=splits["slice"],
        )
        write_json(aside / "info.json", info)


def _check_hash(key: str, path: Path, expected: str) -> None:
    if (actual := file_sha256(path)) != expected:
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

    def __init__(self, prefix: Path, tokenizer: Tokenizer) -> None:
        self._prefix = prefix
        self._tokenizer = tokenizer
        self._builder = IndexedDatasetBuilder(f"{prefix}.bin", dtype=tokenizer.dtype)
        self._num_documents = self._num_tokens = self._num_bytes = 0

    def add(self, texts: Sequence[str]) -> None:
        for text, tokens in zip(texts, self._tokenizer.encode(texts), strict=True):
            document = np.append(tokens, tokens.dtype.type(self._tokenizer.eod))
            self._builder.add_item(torch.from_numpy(document))
            self._builder.end_document()
            self._num_documents += 1
            self._num_tokens += len(tokens)
            self._num_bytes += len(text.encode())

    def finish(self) -> PreparedSplit:
        self._builder.finalize(f"{self._prefix}.idx")
        return PreparedSplit(
            num_documents=self._num_documents,
            num_tokens=self._num_tokens,
            num_bytes=self._num_bytes,
            bin_file_bytes=os.path.getsize(f"{self._prefix}.bin"),
            idx_file_bytes=os.path.getsize(f"{self._prefix}.idx"),
        )


def _write_splits(path: Path, data: DataConfig, tokenizer: Tokenizer, aside: Path) -> dict[SplitName, PreparedSplit]:
    writers = {split: _Writer(aside / split, tokenizer) for split in SPLITS}
    heads: list[bytes] = []
    for chunk in _chunks(path, tokenizer):
        validation = [text for index, text in chunk if is_validation(index, data.validation_every)]
        writers["train"].add([text for index, text in chunk if not is_validation(index, data.validation_every)])
        writers["validation"].add(validation)
        # No document can give more to the slice than the whole slice: the rest need not be kept.
        heads.extend(text.encode()[: data.validation.slice_bytes + 4] for text in validation)
    shares = equal_shares([len(head) for head in heads], data.validation.slice_bytes)
    slices = [utf8_head(head, share).decode() for head, share in zip(heads, shares, strict=True)]
    writers["slice"].add([text for text in slices if text])
    splits = {split: writer.finish() for split, writer in writers.items()}
    _check_not_empty(path, data, splits)
    return splits


def _chunks(path: Path, tokenizer: Tokenizer) -> Iterator[list[tuple[int, str]]]:
    """Documents with their index, a few MB at a time."""
    chunk: list[tuple[int, str]] = []
    num_characters = 0
    for index, document in enumerate(read_documents(path)):
        if objection := tokenizer.objection(document.text):
            raise CorpusError(f"{path}:{document.line}: field 'text' {objection}")
        chunk.append((index, document.text))
        num_characters += len(document.text)
        if num_characters >= CHUNK_CHARACTERS:
            yield chunk
            chunk, num_characters = [], 0
    if chunk:
        yield chunk


def _check_not_empty(path: Path, data: DataConfig, splits: dict[SplitName, PreparedSplit]) -> None:
    num_documents = splits["train"].num_documents + splits["validation"].num_documents
    if num_documents == 0:
        raise CorpusError(f"{path}: the corpus is empty: no line with a document")
    if splits["validation"].num_documents == 0:
        raise CorpusError(
            f"{path}: no validation document: every {data.validation_every}th is one (data.validation_every), "
            f"and the corpus has {num_documents}"
        )
    for split in SPLITS:
        if splits[split].num_tokens == 0:
            raise CorpusError(
                f"{path}: no text for split {split}: {splits[split].num_bytes:,} bytes of text in "
                f"{splits[split].num_documents:,} documents (data.validation.slice_bytes is "
                f"{data.validation.slice_bytes:,})"
            )


def _read_info(directory: Path) -> PreparedInfo:
    """info.json of a finished folder, its files' sizes checked: a disk that filled up or a copy cut short shows."""
    try:
        info = PreparedInfo.model_validate_json((directory / "info.json").read_text())
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
