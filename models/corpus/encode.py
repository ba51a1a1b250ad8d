"""Chunks of text -> tokens, here or in several processes; what comes out does not depend on how many there are.

No torch here: a worker process starts in a fraction of a second and stays small.
"""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from dataclasses import dataclass
from multiprocessing import get_context
from typing import Any

import numpy as np
from numpy.typing import NDArray

from models.corpus.split import ROOM_FOR_A_CHARACTER, is_validation
from models.corpus.text import Chunk, CorpusError, documents_of
from models.corpus.tokens import Tokenizer, Tokens, load_tokenizer

CHUNKS_A_WORKER = 2
"""Chunks on their way to or from a worker: one in hand, one waiting."""


@dataclass(frozen=True)
class Encoding:
    """How a chunk becomes tokens; goes to every worker once."""

    tokenizer: str
    text_field: str = "text"
    validation_every: int = 20
    slice_bytes: int = 32_768
    slice_documents: int | None = None


@dataclass(frozen=True)
class EncodedChunk:
    """Documents one after another in ``tokens``, each followed by one end-of-document token."""

    first_document: int
    tokens: Tokens
    lengths: NDArray[np.int64]
    """Tokens of each document, with its end."""
    text_bytes: NDArray[np.int64]
    """UTF-8 bytes of each document's text."""
    heads: list[bytes]
    """The first ``slice_bytes`` of each validation document's text, and room for a character."""
    read_bytes: int

    def __iter__(self) -> Iterator[tuple[int, Tokens, int]]:
        """(index over the corpus, tokens with their end, bytes of text) of each document."""
        ends = np.cumsum(self.lengths)
        for place, (end, length, num_bytes) in enumerate(zip(ends, self.lengths, self.text_bytes, strict=True)):
            yield self.first_document + place, self.tokens[end - length : end], int(num_bytes)


def encode_chunk(chunk: Chunk, encoding: Encoding, tokenizer: Tokenizer) -> EncodedChunk:
    """Raises CorpusError for the first document that cannot be used."""
    texts: list[str] = []
    for document in documents_of(chunk, encoding.text_field):
        if objection := tokenizer.objection(document.text):
            field = f"field {encoding.text_field!r} " if chunk.kind in ("jsonl", "parquet") else "the text "
            raise CorpusError(f"{document.place}: {field}{objection}")
        texts.append(document.text)
    end = np.array([tokenizer.eod], dtype=tokenizer.dtype)
    parts: list[Tokens] = []
    lengths = np.empty(len(texts), dtype=np.int64)
    for place, tokens in enumerate(tokenizer.encode(texts)):
        parts += (tokens, end)
        lengths[place] = len(tokens) + 1
    encoded = [text.encode() for text in texts]
    limit = encoding.slice_bytes + ROOM_FOR_A_CHARACTER
    heads = [
        text[:limit]
        for index, text in enumerate(encoded, start=chunk.first_document)
        if is_validation(index, encoding.validation_every)
    ]
    return EncodedChunk(
        first_document=chunk.first_document,
        tokens=np.concatenate(parts) if parts else end[:0],
        lengths=lengths,
        text_bytes=np.array([len(text) for text in encoded], dtype=np.int64),
        heads=heads,
        read_bytes=chunk.read_bytes,
    )


def encode_chunks(
    chunks: Iterable[Chunk], encoding: Encoding, tokenizer: Tokenizer, num_workers: int = 0
) -> Iterator[EncodedChunk]:
    """In the order of the chunks. With several workers that many processes tokenize while this one reads and writes;
    with one it is done here, on one core; with none here too, on as many as the tokenizer's library takes."""
    if num_workers == 0:
        for chunk in chunks:
            yield encode_chunk(chunk, encoding, tokenizer)
        return
    with _without_library_threads():
        if num_workers == 1:
            for chunk in chunks:
                yield encode_chunk(chunk, encoding, tokenizer)
            return
        # Spawned, not forked: this process may have threads.
        pool = ProcessPoolExecutor(num_workers, get_context("spawn"), _start_worker, (encoding,))
        try:
            yield from _in_order(pool, chunks, CHUNKS_A_WORKER * num_workers)
        except BrokenProcessPool as error:
            raise CorpusError(
                "a process that tokenizes was killed, perhaps for want of memory: fewer workers"
            ) from error
        finally:
            pool.shutdown(wait=True, cancel_futures=True)


@contextmanager
def _without_library_threads() -> Iterator[None]:
    """So that workers are the cores that are used; processes started within inherit it."""
    previous = os.environ.get("TOKENIZERS_PARALLELISM")
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    try:
        yield
    finally:
        if previous is None:
            del os.environ["TOKENIZERS_PARALLELISM"]
        else:
            os.environ["TOKENIZERS_PARALLELISM"] = previous


def _in_order(pool: ProcessPoolExecutor, chunks: Iterable[Chunk], ahead: int) -> Iterator[EncodedChunk]:
    """The window bounds memory: no more than ``ahead`` chunks are read before the oldest one is written."""
    waiting: deque[Future[EncodedChunk]] = deque()
    for chunk in chunks:
        waiting.append(pool.submit(_encode_in_worker, chunk))
        if len(waiting) >= ahead:
            yield waiting.popleft().result()
    while waiting:
        yield waiting.popleft().result()


_worker: dict[str, Any] = {}


def _start_worker(encoding: Encoding) -> None:
    _worker.update(encoding=encoding, tokenizer=load_tokenizer(encoding.tokenizer))


def _encode_in_worker(chunk: Chunk) -> EncodedChunk:
    return encode_chunk(chunk, _worker["encoding"], _worker["tokenizer"])
