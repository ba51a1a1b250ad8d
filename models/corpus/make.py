"""``gatesweep data prepare``: many files into one prepared folder, made ahead of any sweep, in several processes.

The folder appears whole or not at all. A second run with the same inputs finds it and is done; a run that was killed
leaves a hidden folder, which the next run with the same target clears away.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import shutil
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from models.corpus.encode import EncodedChunk, Encoding, encode_chunks
from models.corpus.prepared import (
    FORMAT,
    INFO,
    SPLITS,
    PreparedInfo,
    PreparedSplit,
    SplitName,
    check_slice,
    read_info,
    write_splits,
)
from models.corpus.text import CorpusError, TxtDocuments, file_sha256, find_files, kind_of, read_chunks
from models.corpus.tokens import load_tokenizer, tokenizer_sha256
from models.run_dir import write_json


@dataclass(frozen=True)
class Recipe:
    """What is asked for. ``encoding.tokenizer`` is ``bytes`` or a path."""

    inputs: tuple[str, ...]
    encoding: Encoding
    txt_documents: TxtDocuments = "files"


@dataclass(frozen=True)
class Progress:
    """How far a run is, over all inputs."""

    read_bytes: int
    """Of the files as they lie on disk."""
    total_bytes: int
    num_documents: int
    num_tokens: int
    text_bytes: int


Report = Callable[[Progress], None]


def make(recipe: Recipe, directory: Path, num_workers: int = 1, report: Report = lambda _: None) -> tuple[Path, bool]:
    """The prepared folder, and whether it was there already. Raises CorpusError.

    The content hangs on the inputs and the recipe alone, never on ``num_workers``.
    """
    paths = find_files(recipe.inputs)
    directory = directory.absolute()
    with _alone(directory):
        hashes = [file_sha256(path) for path in paths]
        corpus_sha256 = _corpus_sha256(recipe, paths, hashes)
        if directory.exists() and not _is_empty(directory):
            _check_same(directory, recipe, corpus_sha256)
            return directory, True
        _write(recipe, paths, corpus_sha256, directory, num_workers, report)
    return directory, False


def content_sha256(directory: Path) -> str:
    """Hash of the six files, as they lie on disk."""
    names = [f"{split}.{suffix}" for split in SPLITS for suffix in ("bin", "idx")]
    content = [FORMAT, {name: file_sha256(directory / name) for name in names}]
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def _write(
    recipe: Recipe, paths: list[Path], corpus_sha256: str, directory: Path, num_workers: int, report: Report
) -> None:
    encoding = recipe.encoding
    tokenizer = load_tokenizer(encoding.tokenizer)
    chunks = encode_chunks(
        read_chunks(paths, encoding.text_field, recipe.txt_documents),
        encoding,
        tokenizer,
        num_workers,
    )
    aside = _aside(directory)
    shutil.rmtree(aside, ignore_errors=True)  # of a run that was killed: the lock says that none is at work
    aside.mkdir()
    try:
        total = sum(path.stat().st_size for path in paths)
        splits = write_splits(_reported(chunks, total, report), encoding, tokenizer, aside)
        info = _info(recipe, paths, corpus_sha256, splits, tokenizer.vocab_size, tokenizer.eod, content_sha256(aside))
        _check_of_use(info)
        write_json(aside / INFO, info)
        aside.rename(directory)
    finally:
        shutil.rmtree(aside, ignore_errors=True)


def _reported(chunks: Iterable[EncodedChunk], total_bytes: int, report: Report) -> Iterator[EncodedChunk]:
    num_documents = num_tokens = text_bytes = 0
    for chunk in chunks:
        yield chunk
        num_documents += len(chunk.lengths)
        num_tokens += len(chunk.tokens) - len(chunk.lengths)
        text_bytes += int(chunk.text_bytes.sum())
        report(Progress(chunk.read_bytes, total_bytes, num_documents, num_tokens, text_bytes))


def _info(
    recipe: Recipe,
    paths: list[Path],
    corpus_sha256: str,
    splits: dict[SplitName, PreparedSplit],
    vocab_size: int,
    eod: int,
    content: str,
) -> PreparedInfo:
    encoding = recipe.encoding
    return PreparedInfo(
        format=FORMAT,
        corpus=", ".join(recipe.inputs),
        corpus_sha256=corpus_sha256,
        tokenizer="bytes" if encoding.tokenizer == "bytes" else str(Path(encoding.tokenizer).absolute()),
        tokenizer_sha256=tokenizer_sha256(encoding.tokenizer),
        validation_every=encoding.validation_every,
        slice_bytes=encoding.slice_bytes,
        slice_documents=encoding.slice_documents,
        vocab_size=vocab_size,
        eod=eod,
        train=splits["train"],
        validation=splits["validation"],
        slice=splits["slice"],
        content_sha256=content,
        num_files=len(paths),
        text_field=encoding.text_field,
        version=_version(),
    )


def _version() -> str:
    try:
        return version("gatesweep")
    except PackageNotFoundError:  # run from a folder that was never installed
        return ""


def _check_of_use(info: PreparedInfo) -> None:
    """A folder without validation text can still be a member of a blend; one without any text is of no use."""
    if info.train.num_tokens + info.validation.num_tokens == 0:
        raise CorpusError(
            f"{info.corpus}: no text: {info.train.num_documents + info.validation.num_documents} documents"
        )
    check_slice(info, info.corpus, "--slice-bytes", "--slice-documents")


def _corpus_sha256(recipe: Recipe, paths: list[Path], hashes: list[str]) -> str:
    """Of what is read, in its order. Not of the names: a moved corpus is the same one."""
    files = [[kind_of(path), digest] for path, digest in zip(paths, hashes, strict=True)]
    return hashlib.sha256(json.dumps([recipe.txt_documents, recipe.encoding.text_field, files]).encode()).hexdigest()


def _check_same(directory: Path, recipe: Recipe, corpus_sha256: str) -> None:
    if not (directory / INFO).exists():
        raise CorpusError(f"{directory}: exists and is no prepared dataset; choose another --to")
    info, encoding = read_info(directory), recipe.encoding
    pairs = {
        "inputs": (corpus_sha256[:16], info.corpus_sha256[:16]),
        "tokenizer": (tokenizer_sha256(encoding.tokenizer)[:16] or "bytes", info.tokenizer_sha256[:16] or "bytes"),
        "--validation-every": (encoding.validation_every, info.validation_every),
        "--slice-bytes": (encoding.slice_bytes, info.slice_bytes),
        "--slice-documents": (encoding.slice_documents, info.slice_documents),
    }
    differing = [f"{name} {asked} against {made}" for name, (asked, made) in pairs.items() if asked != made]
    if differing:
        raise CorpusError(
            f"{directory}: holds another dataset ({', '.join(differing)}); remove it or choose another --to"
        )


def _aside(directory: Path) -> Path:
    return directory.with_name(f".{directory.name}.partial")


def _is_empty(directory: Path) -> bool:
    return directory.is_dir() and not any(directory.iterdir())


@contextmanager
def _alone(directory: Path) -> Iterator[None]:
    """One writer a target. A killed one's lock goes with its process."""
    directory.parent.mkdir(parents=True, exist_ok=True)
    path = directory.with_name(f".{directory.name}.lock")
    with path.open("w") as stream:
        try:
            fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise CorpusError(f"{directory}: another process is preparing it now") from error
        try:
            yield
        finally:
            path.unlink(missing_ok=True)


def describe(directory: Path) -> list[tuple[str, str]]:
    """What a prepared folder holds, as (name, value) pairs to show. Raises CorpusError."""
    if not (directory / INFO).exists():
        raise CorpusError(f"{directory}: no prepared dataset: there is no {INFO} in it")
    info = read_info(directory)
    files = "1 file" if info.num_files == 1 else f"{info.num_files:,} files"
    lines = [
        ("from", f"{info.corpus} ({files}, sha256 {info.corpus_sha256[:16]})"),
        ("tokenizer", f"{info.tokenizer} ({info.vocab_size:,} tokens, end of document {info.eod:,})"),
        ("content", info.content_sha256 or "-"),
        ("made by", f"gatesweep {info.version}" if info.version else "-"),
        ("validation", f"every {info.validation_every}th document"),
    ]
    for name in SPLITS:
        split: PreparedSplit = getattr(info, name)
        ratio = f", {split.num_bytes / split.num_tokens:.3f} bytes a token" if split.num_tokens else ""
        lines.append(
            (
                name,
                f"{split.num_documents:,} documents, {split.num_tokens:,} tokens, "
                f"{split.num_bytes:,} bytes of text{ratio}",
            )
        )
    return lines


def verify(directory: Path) -> None:
    """Read all of a folder that was made ahead, and compare. Raises CorpusError."""
    info = read_info(directory)
    if (actual := content_sha256(directory)) != info.content_sha256:
        raise CorpusError(
            f"{directory}: the files are not what was written: content {actual[:16]}..., expected "
            f"{info.content_sha256[:16] or 'none'}..."
        )
