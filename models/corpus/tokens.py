"""Tokenizers: raw bytes, or a Hugging Face tokenizer.json. Both add one end-of-document token of their own."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from megatron.core.datasets.indexed_dataset import DType
from numpy.typing import NDArray

from models.corpus.text import CorpusError

Tokens = NDArray[np.integer[Any]]


class Tokenizer(Protocol):
    """Text to token ids, all in 0 .. vocab_size - 1; ``eod`` never comes out of a text."""

    @property
    def vocab_size(self) -> int: ...
    @property
    def eod(self) -> int: ...
    @property
    def dtype(self) -> type[np.integer[Any]]:
        """How a token is kept on disk."""
        ...

    def objection(self, text: str) -> str | None:
        """Why this text cannot be tokenized, or None."""
        ...

    def encode(self, texts: Sequence[str]) -> list[Tokens]: ...


class ByteTokenizer:
    """A token a UTF-8 byte. Byte 0 is the end of a document, so a text with NUL is refused."""

    vocab_size = 256
    eod = 0
    dtype: type[np.integer[Any]] = np.uint8

    def objection(self, text: str) -> str | None:
        if "\0" not in text:
            return None
        return f"holds a NUL character at offset {text.index(chr(0))}; tokenizer bytes keeps byte 0 for end of document"

    def encode(self, texts: Sequence[str]) -> list[Tokens]:
        return [np.frombuffer(text.encode(), dtype=np.uint8) for text in texts]


class FileTokenizer:
    """A tokenizer.json; the end of a document is one id above its highest. Adds no special tokens, never truncates."""

    def __init__(self, path: Path) -> None:
        from tokenizers import Tokenizer as HuggingFaceTokenizer

        try:
            self._tokenizer = HuggingFaceTokenizer.from_file(str(path))
        except Exception as error:  # the Rust side raises plain Exception
            raise CorpusError(f"{path}: not a Hugging Face tokenizer.json: {error}") from error
        self._tokenizer.no_truncation()
        self._tokenizer.no_padding()
        vocabulary = self._tokenizer.get_vocab(with_added_tokens=True)
        if not vocabulary:
            raise CorpusError(f"{path}: the tokenizer has no tokens")
        self.eod: int = max(vocabulary.values()) + 1
        self.vocab_size: int = self.eod + 1
        self.dtype: type[np.integer[Any]] = DType.optimal_dtype(self.vocab_size)

    def objection(self, text: str) -> str | None:
        return None

    def encode(self, texts: Sequence[str]) -> list[Tokens]:
        encodings = self._tokenizer.encode_batch(list(texts), add_special_tokens=False)
        return [np.array(encoding.ids, dtype=np.int64) for encoding in encodings]


def tokenizer_path(name: str) -> Path | None:
    """The file behind ``data.tokenizer``; None for the built-in ``bytes``."""
    if name == "bytes":
        return None
    if not Path(name).is_file():
        raise CorpusError(f"data.tokenizer {name!r} is neither 'bytes' nor the path of a tokenizer.json")
    return Path(name)


def load_tokenizer(name: str) -> Tokenizer:
    """The tokenizer behind ``data.tokenizer``: ``bytes``, or a path."""
    path = tokenizer_path(name)
    return ByteTokenizer() if path is None else FileTokenizer(path)
