"""Text out of files: which files, how they are unpacked, and their documents, a few MB at a time.

Reading is cut in two, so that many processes can share the work: ``read_chunks`` only cuts a file into chunks of raw
records, in order; ``documents_of`` looks into a chunk, in any process. No torch here.
"""

from __future__ import annotations

import bz2
import glob
import gzip
import hashlib
import io
import json
import lzma
import os
import zlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, Literal

BUILT_IN = {"sotu": Path(__file__).parent.parent / "data" / "sotu.jsonl.xz"}
PACKINGS = (".gz", ".xz", ".bz2", ".zst")
KINDS = (".jsonl", ".txt", ".parquet")
CORPUS_SUFFIXES = (".jsonl", *(f".jsonl{packing}" for packing in PACKINGS))
"""What a sweep may name without preparing it."""

CHUNK_BYTES = 4_000_000
"""Text tokenized at once: enough to keep a process busy, little beside the model."""
MAX_RECORD_BYTES = 1 << 28
"""One document in memory, with its tokens, must not be the end of the machine."""
_PARQUET_ROWS = 1024

TxtDocuments = Literal["files", "lines"]
_DAMAGED = (EOFError, lzma.LZMAError, gzip.BadGzipFile, zlib.error)


class CorpusError(ValueError):
    """A corpus or tokenizer that cannot be used; the message names the file and, where there is one, the line."""


@dataclass(frozen=True)
class Document:
    place: str
    """``FILE:LINE`` (of the unpacked file), ``FILE:row N`` (1-based), or the file."""
    text: str


@dataclass(frozen=True)
class Chunk:
    """Records of one file, in order and not looked into."""

    path: str
    kind: Literal["jsonl", "lines", "file", "parquet"]
    first_record: int
    """1-based line or row of ``records[0]``."""
    first_document: int
    """0-based, counted over all files that are read together."""
    records: Sequence[bytes] | Any
    """Lines (blank ones too: they are no documents), or a pyarrow array."""
    num_documents: int
    read_bytes: int
    """Of the files as they lie on disk: how far the reader has come with this chunk."""


def corpus_path(corpus: str) -> Path:
    """The file behind ``data.corpus``: a built-in name, or a path."""
    if corpus in BUILT_IN:
        return BUILT_IN[corpus]
    path = Path(corpus)
    if not path.name.endswith(CORPUS_SUFFIXES):
        mend = "; gatesweep data prepare makes a folder of it" if kind_of(path) is not None else ""
        raise CorpusError(
            f"data.corpus {corpus!r} is neither built in ({', '.join(BUILT_IN)}) nor a {', '.join(CORPUS_SUFFIXES)} "
            f"file nor a prepared folder{mend}"
        )
    if not path.is_file():
        raise CorpusError(f"data.corpus: no such file: {path}")
    return path


def file_sha256(path: Path) -> str:
    """Hash of the file as it lies on disk, packed or not."""
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def kind_of(path: Path) -> str | None:
    """The suffix below the packing, one of KINDS; None for another file. A parquet file packs its own columns."""
    name = path.name
    packing = next((packing for packing in PACKINGS if name.endswith(packing)), "")
    suffix = Path(name.removesuffix(packing)).suffix
    return suffix if suffix in KINDS and not (packing and suffix == ".parquet") else None


def find_files(inputs: Sequence[str]) -> list[Path]:
    """The files behind paths, folders (searched to the bottom, hidden names left out) and globs, in a fixed order.

    Inputs keep their order; what is found in a folder or by a glob is sorted. Raises CorpusError.
    """
    found: list[Path] = []
    for name in inputs:
        path = Path(name).expanduser()
        if path.is_dir():
            inside = sorted(p for p in path.rglob("*") if p.is_file() and kind_of(p) is not None)
            paths = [p for p in inside if not any(part.startswith(".") for part in p.relative_to(path).parts)]
        elif path.exists():
            paths = [path]
        elif glob.has_magic(name):
            paths = [Path(match) for match in sorted(glob.glob(str(path), recursive=True)) if os.path.isfile(match)]
        else:
            raise CorpusError(f"{name}: no such file or folder")
        if not paths:
            raise CorpusError(f"{name}: holds no file that ends in {', '.join(KINDS)}, packed or not")
        found += paths
    for path in found:
        if kind_of(path) is None:
            raise CorpusError(
                f"{path}: unknown kind of file; allowed: {', '.join(KINDS)}, the first two also with "
                f"{', '.join(PACKINGS)}"
            )
    first_name: dict[Path, Path] = {}
    for path in found:
        if first_name.setdefault(path.resolve(), path) is not path:
            raise CorpusError(f"{path}: named more than once; allowed: every file once")
    return found


def read_chunks(
    paths: Sequence[Path], text_field: str = "text", txt_documents: TxtDocuments = "files"
) -> Iterator[Chunk]:
    """The records of all files, in order. Raises CorpusError for what cannot be unpacked or read."""
    first_document = before = 0
    for path in paths:
        try:
            size = path.stat().st_size
            if kind_of(path) == ".parquet":
                chunks = _parquet_chunks(path, text_field, first_document, before, size)
            elif kind_of(path) == ".txt" and txt_documents == "files":
                chunks = _whole_file(path, first_document, before + size)
            else:
                chunks = _line_chunks(path, first_document, before)
            for chunk in chunks:
                first_document = chunk.first_document + chunk.num_documents
                yield chunk
            before += size
        except _DAMAGED as error:
            raise CorpusError(f"{path}: cannot be unpacked, the file is damaged: {error}") from error
        except OSError as error:
            raise CorpusError(f"{path}: cannot be read: {error}") from error


def _line_chunks(path: Path, first_document: int, before: int) -> Iterator[Chunk]:
    kind: Literal["jsonl", "lines"] = "lines" if kind_of(path) == ".txt" else "jsonl"
    with path.open("rb") as packed, _unpacked(path, packed) as stream:
        lines: list[bytes] = []
        first_line, num_bytes, num_documents = 1, 0, 0
        while line := stream.readline(MAX_RECORD_BYTES + 1):
            if len(line) > MAX_RECORD_BYTES:
                raise CorpusError(f"{path}:{first_line + len(lines)}: {_TOO_LONG.format('the line')}")
            lines.append(line)
            num_bytes += len(line)
            num_documents += not line.isspace()
            if num_bytes >= CHUNK_BYTES:
                read = before + packed.tell()
                yield Chunk(str(path), kind, first_line, first_document, lines, num_documents, read)
                first_line += len(lines)
                first_document += num_documents
                lines, num_bytes, num_documents = [], 0, 0
        if lines:
            yield Chunk(str(path), kind, first_line, first_document, lines, num_documents, before + packed.tell())


_TOO_LONG = f"{{}} is longer than {MAX_RECORD_BYTES:,} bytes; allowed: documents up to that, so cut it into several"


def _whole_file(path: Path, first_document: int, read: int) -> Iterator[Chunk]:
    with path.open("rb") as packed, _unpacked(path, packed) as stream:
        content = stream.read(MAX_RECORD_BYTES + 1)
    if len(content) > MAX_RECORD_BYTES:
        raise CorpusError(f"{path}: {_TOO_LONG.format('the file')}, or take each line as a document (--txt lines)")
    yield Chunk(str(path), "file", 1, first_document, [content], 1, read)


def _parquet_chunks(path: Path, text_field: str, first_document: int, before: int, size: int) -> Iterator[Chunk]:
    import pyarrow
    from pyarrow import parquet

    try:
        with parquet.ParquetFile(path) as file:
            if text_field not in file.schema_arrow.names:
                raise CorpusError(f"{path}: no column {text_field!r}, got {', '.join(file.schema_arrow.names)}")
            kind = file.schema_arrow.field(text_field).type
            if not (pyarrow.types.is_string(kind) or pyarrow.types.is_large_string(kind)):
                raise CorpusError(f"{path}: column {text_field!r} must hold strings, got {kind}")
            num_rows, row = file.metadata.num_rows, 0
            for batch in file.iter_batches(_PARQUET_ROWS, columns=[text_field]):
                column = batch.column(0)
                if not len(column):
                    continue
                read = before + size * (row + len(column)) // max(num_rows, 1)
                yield Chunk(str(path), "parquet", row + 1, first_document + row, column, len(column), read)
                row += len(column)
    except pyarrow.ArrowException as error:
        raise CorpusError(f"{path}: not a readable parquet file: {error}") from error


def _unpacked(path: Path, packed: IO[bytes]) -> IO[bytes]:
    openers: dict[str, Callable[[IO[bytes]], Any]] = {
        ".xz": lzma.LZMAFile,
        ".gz": lambda stream: gzip.GzipFile(fileobj=stream, mode="rb"),
        ".bz2": bz2.BZ2File,
        ".zst": _zstandard,
    }
    opener = openers.get(path.suffix)
    return packed if opener is None else opener(packed)


def _zstandard(packed: IO[bytes]) -> Any:
    import pyarrow  # it comes with MLflow, and a library for this packing alone would be one more

    return _Damage(io.BufferedReader(pyarrow.CompressedInputStream(packed, "zstd")))


class _Damage:
    """Arrow says OSError for a damaged archive too: told apart here from a file that cannot be read."""

    def __init__(self, stream: IO[bytes]) -> None:
        self._stream = stream

    def __enter__(self) -> _Damage:
        return self

    def __exit__(self, *_: object) -> None:
        self._stream.close()

    def read(self, size: int) -> bytes:
        try:
            return self._stream.read(size)
        except OSError as error:
            raise EOFError(str(error)) from error

    def readline(self, size: int) -> bytes:
        try:
            return self._stream.readline(size)
        except OSError as error:
            raise EOFError(str(error)) from error


# -- looking into a chunk -------------------------------------------------------------------------------------


def documents_of(chunk: Chunk, text_field: str = "text") -> Iterator[Document]:
    """The chunk's documents, in order; blank lines are none. Raises CorpusError with the place of a bad one."""
    if chunk.kind == "parquet":
        yield from _rows(chunk, text_field)
        return
    for number, record in enumerate(chunk.records, start=chunk.first_record):
        if chunk.kind == "file":
            yield Document(chunk.path, _decoded(record, chunk.path, of_lines=True))
        elif not record.isspace():
            place = f"{chunk.path}:{number}"
            if chunk.kind == "jsonl":
                yield Document(place, _text_of(record, place, text_field))
            else:
                yield Document(place, _decoded(record, place).rstrip("\r\n"))


def _rows(chunk: Chunk, text_field: str) -> Iterator[Document]:
    for number, value in enumerate(chunk.records, start=chunk.first_record):
        place = f"{chunk.path}:row {number}"
        try:
            text = value.as_py()
        except UnicodeDecodeError as error:
            raise CorpusError(f"{place}: column {text_field!r} is not UTF-8: {error}") from error
        if text is None:
            raise CorpusError(f"{place}: column {text_field!r} is null; expected a string")
        yield Document(place, text)


def _decoded(record: bytes, place: str, *, of_lines: bool = False) -> str:
    try:
        return record.decode()
    except UnicodeDecodeError as error:
        where = f"{place}:{record.count(bytes([10]), 0, error.start) + 1}" if of_lines else place
        raise CorpusError(f"{where}: not UTF-8: {error.reason} at byte {error.start}; expected UTF-8 text") from error


def _text_of(line: bytes, place: str, text_field: str) -> str:
    try:
        content = json.loads(line.decode())
    except UnicodeDecodeError as error:
        raise CorpusError(f"{place}: not UTF-8: {error}") from error
    except (ValueError, RecursionError) as error:
        raise CorpusError(f"{place}: not JSON: {error}; got {_short(line.decode())}") from error
    if not isinstance(content, dict):
        raise CorpusError(f"{place}: expected an object with a field {text_field!r}, got {_short(json.dumps(content))}")
    if text_field not in content:
        got = ", ".join(map(repr, content)) or "an empty object"
        raise CorpusError(f"{place}: no field {text_field!r}, got only {got}")
    text = content[text_field]
    if not isinstance(text, str):
        raise CorpusError(f"{place}: field {text_field!r} must be a string, got {_short(json.dumps(text))}")
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise CorpusError(f"{place}: field {text_field!r} is not valid Unicode: {error}") from error
    return text


def _short(text: str, limit: int = 60) -> str:
    text = text.strip()
    return text if len(text) <= limit else text[:limit] + "..."
