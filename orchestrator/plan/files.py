"""The files a sweep trains on, looked at before anything runs: they exist, they can be read, and what they hash to.

What is filled into ``data`` here (vocabulary, hashes) is what the fingerprint covers in place of the paths.
"""

from __future__ import annotations

import gzip
import hashlib
import importlib.resources
import json
import lzma
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

BUILT_IN_CORPUS = "sotu"
BUILT_IN_TOKENIZER = "bytes"
CORPUS_SUFFIXES = (".jsonl", ".jsonl.xz", ".jsonl.gz")


class FileError(Exception):
    """What is wrong with a file that a sweep names."""


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
        self._corpora: dict[str, dict[str, Any] | FileError] = {}
        self._tokenizers: dict[str, dict[str, Any] | FileError] = {}

    def corpus(self, name: str) -> dict[str, Any]:
        """The ``data`` fields that follow from the corpus; FileError when it is no corpus."""
        return _remember(self._corpora, name, self._read_corpus)

    def tokenizer(self, name: str) -> dict[str, Any]:
        """The ``data`` fields that follow from the tokenizer; FileError when it is none."""
        return _remember(self._tokenizers, name, self._read_tokenizer)

    def _read_corpus(self, name: str) -> dict[str, Any]:
        if name == BUILT_IN_CORPUS:
            path = built_in_corpus_path()
        else:
            path = self._existing(name, f"{BUILT_IN_CORPUS}, or the path of a .jsonl, .jsonl.xz or .jsonl.gz file")
        if name in self.absent:
            return {"corpus": str(path)}
        _check_first_document(path)
        stays = name if name == BUILT_IN_CORPUS else str(path)
        return {"corpus": stays, "corpus_sha256": _sha256(path)}

    def _read_tokenizer(self, name: str) -> dict[str, Any]:
        if name == BUILT_IN_TOKENIZER:
            return {"tokenizer": name, "tokenizer_sha256": name, "vocab_size": 256}
        path = self._existing(name, f"{BUILT_IN_TOKENIZER}, or the path of a Hugging Face tokenizer.json")
        if name in self.absent:
            return {"tokenizer": str(path)}
        return {
            "tokenizer": str(path),
            "tokenizer_sha256": _sha256(path),
            "vocab_size": tokenizer_vocab_size(path),
        }

    def _existing(self, name: str, allowed: str) -> Path:
        try:
            path = Path(name).expanduser()
            is_absolute = path.is_absolute()
            path = (path if is_absolute else self._folder / path).resolve()
            if not path.exists():
                if self._may_be_absent and is_absolute:
                    self.absent[name] = path
                    return path
                raise FileError(f"got {name!r}, but there is no file {path}; allowed: {allowed}")
            if not path.is_file():
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


def tokenizer_vocab_size(path: Path) -> int:
    """Highest token id + 1, and one more for the end of a document, which the corpus puts after the tokenizer's own."""
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
        raise FileError(f"got {path.name!r}; allowed: a name that ends in {', '.join(CORPUS_SUFFIXES)}")
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
    with path.open("rb") as stream:
        return next((line for line in stream if not line.isspace()), None)


def _sha256(path: Path) -> str:
    try:
        with path.open("rb") as stream:
            return hashlib.file_digest(stream, "sha256").hexdigest()
    except OSError as error:
        raise FileError(f"{path}: cannot be read: {error.strerror}") from error


def _remember(
    known: dict[str, dict[str, Any] | FileError], name: str, read: Callable[[str], dict[str, Any]]
) -> dict[str, Any]:
    if name not in known:
        try:
            known[name] = read(name)
        except FileError as problem:
            known[name] = problem
    found = known[name]
    if isinstance(found, FileError):
        raise found
    return found
