"""Tokenizers: raw bytes, or a file of Hugging Face, SentencePiece or tiktoken.

All of them turn text into ids and nothing else: no special token is put in, nothing is cut. To the ids of the file
one is added, above the highest: the end of a document, which no text gives.
"""

from __future__ import annotations

import base64
import binascii
import hashlib
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from models.corpus.text import CorpusError, file_sha256

Tokens = NDArray[np.integer[Any]]

CL100K_PATTERN = (
    r"'(?i:[sdmt]|ll|ve|re)|[^\r\n\p{L}\p{N}]?+\p{L}++|\p{N}{1,3}+| ?[^\s\p{L}\p{N}]++[\r\n]*+|\s++$|\s*[\r\n]|"
    r"\s+(?!\S)|\s"
)
"""How tiktoken's cl100k_base cuts text into pre-tokens. A .tiktoken file holds only ranks; another pattern stands in
a JSON file beside it, ``NAME.tiktoken.json`` with the key ``pattern``."""


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
    """A tokenizer out of a file: ``encode_one`` gives a text's ids, ``highest`` is the largest one that can come."""

    def __init__(self, encode: Callable[[Sequence[str]], list[list[int]]], highest: int) -> None:
        self._encode = encode
        self.eod = highest + 1
        self.vocab_size = self.eod + 1
        # Megatron's DType.optimal_dtype, without loading torch in every process that tokenizes.
        self.dtype: type[np.integer[Any]] = np.uint16 if self.vocab_size < 65_500 else np.int32

    def objection(self, text: str) -> str | None:
        return None

    def encode(self, texts: Sequence[str]) -> list[Tokens]:
        return [np.array(ids, dtype=self.dtype) for ids in self._encode(texts)]


def hugging_face(path: Path) -> FileTokenizer:
    """A tokenizer.json. Text that spells one of its special tokens becomes that token, as in the library."""
    from tokenizers import Tokenizer as HuggingFaceTokenizer

    try:
        tokenizer = HuggingFaceTokenizer.from_file(str(path))
    except Exception as error:  # the Rust side raises plain Exception
        raise CorpusError(f"{path}: not a Hugging Face tokenizer.json: {error}") from error
    tokenizer.no_truncation()
    tokenizer.no_padding()
    vocabulary = tokenizer.get_vocab(with_added_tokens=True)
    if not vocabulary:
        raise CorpusError(f"{path}: the tokenizer has no tokens")

    def encode(texts: Sequence[str]) -> list[list[int]]:
        return [encoding.ids for encoding in tokenizer.encode_batch_fast(list(texts), add_special_tokens=False)]

    return FileTokenizer(encode, max(vocabulary.values()))


def sentencepiece_model(path: Path) -> FileTokenizer:
    """A SentencePiece .model, without its begin and end tokens."""
    try:
        import sentencepiece
    except ImportError as error:
        raise CorpusError(_missing(path, "sentencepiece")) from error
    try:
        processor = sentencepiece.SentencePieceProcessor(model_file=str(path))
    except (RuntimeError, OSError) as error:
        raise CorpusError(f"{path}: not a SentencePiece model: {error}") from error

    def encode(texts: Sequence[str]) -> list[list[int]]:
        return [processor.encode(text, out_type=int, add_bos=False, add_eos=False) for text in texts]

    return FileTokenizer(encode, processor.get_piece_size() - 1)


def tiktoken_ranks(path: Path) -> FileTokenizer:
    """A .tiktoken file: a base64 token and its rank a line. No text becomes a special token."""
    try:
        import tiktoken
    except ImportError as error:
        raise CorpusError(_missing(path, "tiktoken")) from error
    # Not tiktoken's own reader: it caches by path, and would serve an old file.
    ranks = read_ranks(path)
    try:
        encoding = tiktoken.Encoding(
            path.name, pat_str=tiktoken_pattern(path), mergeable_ranks=ranks, special_tokens={}
        )
    except Exception as error:  # the Rust side raises what it likes
        raise CorpusError(f"{path}: no tiktoken encoding: {error}") from error

    def encode(texts: Sequence[str]) -> list[list[int]]:
        return [encoding.encode_ordinary(text) for text in texts]

    return FileTokenizer(encode, max(ranks.values()))


def read_ranks(path: Path) -> dict[bytes, int]:
    ranks: dict[bytes, int] = {}
    for number, line in enumerate(path.read_bytes().splitlines(), start=1):
        if not line.strip():
            continue
        try:
            token, rank = line.split()
            ranks[base64.b64decode(token, validate=True)] = int(rank)
        except (ValueError, binascii.Error) as error:
            raise CorpusError(
                f"{path}:{number}: expected a token in base64 and its rank, got {line[:60].decode(errors='replace')!r}"
            ) from error
    missing = [byte for byte in range(256) if bytes([byte]) not in ranks]
    if missing:
        raise CorpusError(f"{path}: {len(missing)} of the 256 single bytes have no rank, the first is {missing[0]}")
    return ranks


def tiktoken_pattern(path: Path) -> str:
    """The pattern in ``NAME.tiktoken.json`` beside the ranks; cl100k_base's where there is no such file."""
    beside = path.with_name(path.name + ".json")
    if not beside.exists():
        return CL100K_PATTERN
    try:
        content = json.loads(beside.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise CorpusError(f"{beside}: not JSON: {error}") from error
    if not isinstance(content, dict) or set(content) != {"pattern"} or not isinstance(content["pattern"], str):
        raise CorpusError(f'{beside}: expected {{"pattern": "..."}} and no other key')
    return str(content["pattern"])


def _missing(path: Path, library: str) -> str:
    return f"{path}: needs {library}, which is not installed; pip install 'gatesweep[data]' brings it"


_KINDS: dict[str, Callable[[Path], FileTokenizer]] = {
    ".json": hugging_face,
    ".model": sentencepiece_model,
    ".tiktoken": tiktoken_ranks,
}


def tokenizer_path(name: str) -> Path | None:
    """The file behind ``data.tokenizer``; None for the built-in ``bytes``."""
    if name == "bytes":
        return None
    path = Path(name)
    if not path.is_file() or path.suffix not in _KINDS:
        said = "a file of another kind" if path.is_file() else "neither 'bytes' nor the path of a tokenizer.json"
        raise CorpusError(
            f"data.tokenizer {name!r} is {said}; allowed: bytes, or a file that ends in {', '.join(_KINDS)}"
        )
    return path


def tokenizer_sha256(name: str) -> str:
    """Hash of all that decides the ids: the file, and tiktoken's pattern where one stands beside it; '' for bytes."""
    path = tokenizer_path(name)
    if path is None:
        return ""
    digest = file_sha256(path)
    beside = path.with_name(path.name + ".json")
    if path.suffix == ".tiktoken" and beside.exists():
        digest = hashlib.sha256(f"{digest}{file_sha256(beside)}".encode()).hexdigest()
    return digest


def load_tokenizer(name: str) -> Tokenizer:
    """The tokenizer behind ``data.tokenizer``: ``bytes``, or a path."""
    path = tokenizer_path(name)
    return ByteTokenizer() if path is None else _KINDS[path.suffix](path)
