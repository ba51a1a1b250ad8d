"""Documents out of a corpus file, the split, and the heads of documents that make up the validation slice."""

from __future__ import annotations

import gzip
import hashlib
import io
import json
import lzma
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

BUILT_IN = {"sotu": Path(__file__).parent.parent / "data" / "sotu.jsonl.xz"}
SUFFIXES = (".jsonl", ".jsonl.xz", ".jsonl.gz")


class CorpusError(ValueError):
    """A corpus or tokenizer that cannot be used; the message names the file and, where there is one, the line."""


@dataclass(frozen=True)
class Document:
    line: int
    """1-based, in the unpacked file."""
    text: str


def corpus_path(corpus: str) -> Path:
    """The file behind ``data.corpus``: a built-in name, or a path."""
    if corpus in BUILT_IN:
        return BUILT_IN[corpus]
    path = Path(corpus)
    if not path.name.endswith(SUFFIXES):
        raise CorpusError(
            f"data.corpus {corpus!r} is neither built in ({', '.join(BUILT_IN)}) nor a {', '.join(SUFFIXES)} file"
        )
    if not path.is_file():
        raise CorpusError(f"data.corpus: no such file: {path}")
    return path


def file_sha256(path: Path) -> str:
    """Hash of the file as it lies on disk, packed or not."""
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def read_documents(path: Path) -> Iterator[Document]:
    """The ``text`` of each line, in order; blank lines are skipped. Raises CorpusError."""
    try:
        with _open(path) as stream:
            for number, line in enumerate(stream, start=1):
                if not line.isspace():
                    yield Document(number, _text_of(line, f"{path}:{number}"))
    except (EOFError, lzma.LZMAError, gzip.BadGzipFile, zlib.error) as error:
        raise CorpusError(f"{path}: cannot be unpacked, the file is damaged: {error}") from error
    except OSError as error:
        raise CorpusError(f"{path}: cannot be read: {error}") from error


def _open(path: Path) -> lzma.LZMAFile | gzip.GzipFile | io.BufferedReader:
    if path.suffix == ".xz":
        return lzma.open(path, "rb")
    if path.suffix == ".gz":
        return gzip.open(path, "rb")
    return path.open("rb")


def _text_of(line: bytes, place: str) -> str:
    try:
        content = json.loads(line.decode())
    except UnicodeDecodeError as error:
        raise CorpusError(f"{place}: not UTF-8: {error}") from error
    except (ValueError, RecursionError) as error:
        raise CorpusError(f"{place}: not JSON: {error}; got {_short(line.decode())}") from error
    if not isinstance(content, dict):
        raise CorpusError(f"{place}: expected an object with a field 'text', got {_short(json.dumps(content))}")
    if "text" not in content:
        raise CorpusError(f"{place}: no field 'text', got only {', '.join(map(repr, content)) or 'an empty object'}")
    text = content["text"]
    if not isinstance(text, str):
        raise CorpusError(f"{place}: field 'text' must be a string, got {_short(json.dumps(text))}")
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise CorpusError(f"{place}: field 'text' is not valid Unicode: {error}") from error
    return text


def _short(text: str, limit: int = 60) -> str:
    text = text.strip()
    return text if len(text) <= limit else text[:limit] + "..."


def is_validation(index: int, validation_every: int) -> bool:
    """Whether document ``index`` (0-based) belongs to the validation split."""
    return index % validation_every == validation_every - 1


def equal_shares(sizes: Sequence[int], total: int) -> list[int]:
    """Deal ``total`` evenly; what is too small for its share gives the rest to the others.

    Sums to min(total, sum(sizes)); shares that are not exhausted differ by at most 1, the first being larger.
    """
    shares = [0] * len(sizes)
    left = min(total, sum(sizes))
    for place, index in enumerate(order := sorted(range(len(sizes)), key=lambda i: (sizes[i], -i))):
        shares[index] = min(sizes[index], left // (len(order) - place))
        left -= shares[index]
    return shares


def utf8_head(encoded: bytes, limit: int) -> bytes:
    """The longest whole-character head of ``encoded`` (valid UTF-8) of at most ``limit`` bytes."""
    if limit >= len(encoded):
        return encoded
    while limit > 0 and encoded[limit] & 0xC0 == 0x80:
        limit -= 1
    return encoded[:limit]
