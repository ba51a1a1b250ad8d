"""The files a sweep trains on, looked at before anything runs: they exist, they can be read, and what they hash to.

What is filled into ``data`` here (vocabulary, hashes) is what the fingerprint covers in place of the paths.
"""

from __future__ import annotations

import base64
import bz2
import gzip
import hashlib
import importlib.resources
import importlib.util
import io
import json
import lzma
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

BUILT_IN_CORPUS = "sotu"
BUILT_IN_TOKENIZER = "bytes"
CORPUS_SUFFIXES = (".jsonl", ".jsonl.gz", ".jsonl.xz", ".jsonl.bz2", ".jsonl.zst")
PREPARED_INFO = "info.json"

Found = TypeVar("Found")


class FileError(Exception):
    """What is wrong with a file that a sweep names."""


@dataclass(frozen=True)
class CorpusFile:
    """A corpus file, or a folder that ``gatesweep data prepare`` made, with what it says of itself."""

    path: str
    """Absolute; the name of a built-in one."""
    sha256: str
    prepared: dict[str, Any] | None = None
    """info.json: ``tokenizer``, ``tokenizer_sha256``, ``vocab_size``, ``validation_every``, ``slice_bytes`` ..."""

    @property
    def identity(self) -> str:
        """Its hash; the path of one that is not on this machine."""
        return self.sha256 or self.path


class Files:
    """Reads and hashes each file once. ``folder``: where relative paths start, the sweep file's own.

    ``may_be_absent``: a file with an absolute path belongs to the machine that will run the sweep, and need not be
    here. It has no hash then, a tokenizer no vocabulary, and ``absent`` names it.
    """

    def __init__(self, folder: Path, *, may_be_absent: bool = False) -> None:
        self._folder = folder
        self._may_be_absent = may_be_absent
        self.absent: dict[str, Path] = {}
        """By the name in the sweep."""
        self.named: dict[str, Path] = {}
        """Every file but the built-in ones, by its name in the sweep."""
        self._corpora: dict[str, CorpusFile | FileError] = {}
        self._tokenizers: dict[str, dict[str, Any] | FileError] = {}

    def corpus(self, name: str) -> CorpusFile:
        """What a sweep names as a corpus; FileError when it is none."""
        return _remember(self._corpora, name, self._read_corpus)

    def tokenizer(self, name: str) -> dict[str, Any]:
        """The ``data`` fields that follow from the tokenizer; FileError when it is none."""
        return _remember(self._tokenizers, name, self._read_tokenizer)

    def _read_corpus(self, name: str) -> CorpusFile:
        if name == BUILT_IN_CORPUS:
            path = built_in_corpus_path()
        else:
            allowed = f"{BUILT_IN_CORPUS}, the path of a .jsonl file (packed or not), or a prepared folder"
            path = self._existing(name, allowed, folder=True)
        if name in self.absent:
            return CorpusFile(str(path), "")
        if path.is_dir():
            return _prepared_folder(path)
        _check_first_document(path)
        stays = name if name == BUILT_IN_CORPUS else str(path)
        return CorpusFile(stays, _sha256(path))

    def _read_tokenizer(self, name: str) -> dict[str, Any]:
        if name == BUILT_IN_TOKENIZER:
            return {"tokenizer": name, "tokenizer_sha256": name, "vocab_size": 256}
        kinds = "a Hugging Face tokenizer.json, a SentencePiece .model or a .tiktoken file"
        path = self._existing(name, f"{BUILT_IN_TOKENIZER}, or the path of {kinds}")
        if name in self.absent:
            return {"tokenizer": str(path)}
        return {
            "tokenizer": str(path),
            "tokenizer_sha256": _tokenizer_sha256(path),
            "vocab_size": tokenizer_vocab_size(path),
        }

    def _existing(self, name: str, allowed: str, *, folder: bool = False) -> Path:
        try:
            path = Path(name).expanduser()
            is_absolute = path.is_absolute()
            path = (path if is_absolute else self._folder / path).resolve()
            self.named[name] = path
            if not path.exists():
                if self._may_be_absent and is_absolute:
                    self.absent[name] = path
                    return path
                raise FileError(f"got {name!r}, but there is no file {path}; allowed: {allowed}")
            if not (path.is_file() or (folder and path.is_dir())):
                raise FileError(f"got {name!r}, but {path} is not a file; allowed: {allowed}")
        except (OSError, RuntimeError) as error:
            raise FileError(f"got {name!r}, which can't be looked at: {error}; allowed: {allowed}") from error
        return path


def built_in_corpus_path() -> Path:
    """The corpus that comes with the package."""
    path = Path(str(importlib.resources.files("models"))) / "data" / f"{BUILT_IN_CORPUS}.jsonl.xz"
    if not path.exists():
        raise FileError(f"the built-in corpus is not at {path}: the installation is incomplete")
    return path


def _prepared_folder(path: Path) -> CorpusFile:
    try:
        info = json.loads((path / PREPARED_INFO).read_text(encoding="utf-8"))
        for split in ("train", "validation", "slice"):
            for suffix in ("bin", "idx"):
                file, expected = path / f"{split}.{suffix}", info[split][f"{suffix}_file_bytes"]
                if file.stat().st_size != expected:
                    raise ValueError(f"{file.name} has {file.stat().st_size:,} bytes, expected {expected:,}")
        if not info["content_sha256"]:
            raise ValueError("it has no content_sha256; it was made for one trial and not by data prepare")
    except FileNotFoundError as error:
        raise FileError(
            f"{path} is a folder, but none that gatesweep data prepare made: no {Path(error.filename).name} in it"
        ) from error
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise FileError(f"{path}: the prepared folder is damaged: {error}") from error
    return CorpusFile(str(path), info["content_sha256"], info)


def tokenizer_vocab_size(path: Path) -> int:
    """Highest token id + 1, and one more for the end of a document, which the corpus puts after the tokenizer's own."""
    sizes = {".json": _hugging_face_size, ".model": _sentencepiece_size, ".tiktoken": _tiktoken_size}
    if path.suffix not in sizes:
        raise FileError(f"{path}: unknown kind of tokenizer; allowed: a name that ends in {', '.join(sizes)}")
    return sizes[path.suffix](path)


def _sentencepiece_size(path: Path) -> int:
    _check_installed(path, "sentencepiece")
    import sentencepiece

    try:
        return int(sentencepiece.SentencePieceProcessor(model_file=str(path)).get_piece_size()) + 1
    except (RuntimeError, OSError) as error:
        raise FileError(f"{path} is no SentencePiece model ({error})") from error


def _tiktoken_size(path: Path) -> int:
    _check_installed(path, "tiktoken")
    highest = -1
    for number, line in enumerate(path.read_bytes().splitlines(), start=1):
        if line.strip():
            try:
                token, rank = line.split()
                base64.b64decode(token, validate=True)
                highest = max(highest, int(rank))
            except ValueError as error:
                raise FileError(f"{path}:{number}: expected a token in base64 and its rank ({error})") from error
    if highest < 0:
        raise FileError(f"{path}: the file holds no token")
    return highest + 2


def _check_installed(path: Path, library: str) -> None:
    if importlib.util.find_spec(library) is None:
        raise FileError(f"{path}: needs {library}, which is not installed; pip install 'gatesweep[data]' brings it")


def _hugging_face_size(path: Path) -> int:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        vocab = content["model"]["vocab"]
        # A unigram model lists its pieces in the order of their ids; the others map pieces to ids.
        ids = list(vocab.values()) if isinstance(vocab, dict) else list(range(len(vocab)))
        ids += [token["id"] for token in content.get("added_tokens") or []]
        return int(max(ids)) + 2
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        said = f"{type(error).__name__}: {error}"
        raise FileError(f"{path} is no Hugging Face tokenizer.json with model.vocab ({said})") from error


def _check_first_document(path: Path) -> None:
    if not path.name.endswith(CORPUS_SUFFIXES):
        mend = "; gatesweep data prepare makes a folder of .txt and .parquet files"
        raise FileError(f"got {path.name!r}; allowed: a name that ends in {', '.join(CORPUS_SUFFIXES)}{mend}")
    try:
        line = _first_line(path)
        document = None if line is None else json.loads(line)
    except (OSError, EOFError, lzma.LZMAError, zlib.error, ValueError, RecursionError) as error:
        said = f"{type(error).__name__}: {error}"
        raise FileError(f"{path}: the first document cannot be read as JSON ({said})") from error
    if line is None:
        raise FileError(f"{path}: the file holds no document")
    if not isinstance(document, dict) or not isinstance(document.get("text"), str):
        raise FileError(f"{path}: the first document has no text; allowed: one JSON object a line, with a field text")


def _first_line(path: Path) -> bytes | None:
    """The first line that is not blank."""
    if path.suffix == ".xz":
        with lzma.open(path, "rb") as packed:
            return next((line for line in packed if not line.isspace()), None)
    if path.suffix == ".gz":
        with gzip.open(path, "rb") as packed_gz:
            return next((line for line in packed_gz if not line.isspace()), None)
    if path.suffix == ".bz2":
        with bz2.open(path, "rb") as packed_bz2:
            return next((line for line in packed_bz2 if not line.isspace()), None)
    if path.suffix == ".zst":
        import pyarrow

        with io.BufferedReader(pyarrow.input_stream(str(path), compression="zstd")) as packed_zst:
            return next((line for line in packed_zst if not line.isspace()), None)
    with path.open("rb") as stream:
        return next((line for line in stream if not line.isspace()), None)


def _sha256(path: Path) -> str:
    try:
        with path.open("rb") as stream:
            return hashlib.file_digest(stream, "sha256").hexdigest()
    except OSError as error:
        raise FileError(f"{path}: cannot be read: {error.strerror}") from error


def _tokenizer_sha256(path: Path) -> str:
    """As ``models.corpus.tokens.tokenizer_sha256``: with tiktoken's pattern, where one stands beside the ranks."""
    beside = path.with_name(path.name + ".json")
    if path.suffix == ".tiktoken" and beside.exists():
        return hashlib.sha256(f"{_sha256(path)}{_sha256(beside)}".encode()).hexdigest()
    return _sha256(path)


def _remember(known: dict[str, Found | FileError], name: str, read: Callable[[str], Found]) -> Found:
    if name not in known:
        try:
            known[name] = read(name)
        except FileError as problem:
            known[name] = problem
    found = known[name]
    if isinstance(found, FileError):
        raise found
    return found
