"""What a cell's ``data`` names: every file looked up and hashed, and prepared folders held against the cell.

A prepared folder was cut by a tokenizer and into splits when it was made. What the sweep leaves out is taken from it;
what the sweep says otherwise is refused.
"""

from __future__ import annotations

from typing import Any

from models.config import BlendMember, DataConfig, ValidationSet
from orchestrator.plan.cells import CellError, Leaf, Leaves
from orchestrator.plan.files import CorpusFile, FileError, Files
from orchestrator.sweep import DocumentPath, config_fields

_SLICE = ("slice_bytes", "slice_documents")


class _Named:
    """A corpus that the cell names, and where."""

    def __init__(self, name: str, source: DocumentPath, files: Files) -> None:
        self.source = source
        try:
            self.file: CorpusFile = files.corpus(name)
        except FileError as problem:
            raise CellError(source, str(problem)) from problem


def fill_in(data: dict[str, Any], leaves: Leaves, files: Files) -> None:
    """Puts paths, hashes and the vocabulary into ``data``; CellError for what cannot be used."""
    main, members, sets = _named(leaves, files)
    trained = members or [main]
    corpora = [main, *members, *sets]
    _fill_tokenizer(data, leaves, files, corpora)
    _fill_splits(data, leaves, main, members, sets)
    data |= {"corpus": main.file.path, "corpus_sha256": main.file.sha256}
    blend: tuple[BlendMember, ...] = _value(leaves, "data.blend")
    if blend:
        data["blend"] = tuple(
            member.model_copy(update={"corpus": named.file.path, "corpus_sha256": named.file.sha256})
            for member, named in zip(blend, members, strict=True)
        )
    validation_sets: tuple[ValidationSet, ...] = _value(leaves, "data.validation_sets")
    if validation_sets:
        data["validation_sets"] = tuple(
            _filled_set(one, named, data, {one.file.identity for one in trained})
            for one, named in zip(validation_sets, sets, strict=True)
        )


def _named(leaves: Leaves, files: Files) -> tuple[_Named, list[_Named], list[_Named]]:
    """The corpus that is measured, the members of the blend, the validation sets."""
    lists: list[list[_Named]] = []
    for path in ("data.blend", "data.validation_sets"):
        named = []
        for index, one in enumerate(_value(leaves, path)):
            source = (*leaves[path].source, index, "corpus")
            if one.corpus_sha256:
                raise CellError(source, "corpus_sha256 is filled in by the plan, from the file itself; leave it out")
            named.append(_Named(one.corpus, source, files))
        lists.append(named)
    members, sets = lists
    leaf = leaves.get("data.corpus")
    if leaf is None and members:
        return members[0], members, sets
    leaf = leaf or Leaf(config_fields()["data.corpus"].default, ("base", "data"))
    return _Named(leaf.value, leaf.source, files), members, sets


def _fill_tokenizer(data: dict[str, Any], leaves: Leaves, files: Files, corpora: list[_Named]) -> None:
    prepared = [(named, named.file.prepared) for named in corpora if named.file.prepared is not None]
    leaf = leaves.get("data.tokenizer")
    if leaf is None and prepared:
        info = prepared[0][1]
        names = ("tokenizer", "tokenizer_sha256", "vocab_size")
        data |= {name: info[name] or info["tokenizer"] for name in names}
    else:
        leaf = leaf or Leaf(config_fields()["data.tokenizer"].default, ("base", "data"))
        try:
            data |= files.tokenizer(leaf.value)
        except FileError as problem:
            raise CellError(leaf.source, str(problem)) from problem
    for named, info in prepared:
        if "tokenizer_sha256" in data and (info["tokenizer_sha256"] or info["tokenizer"]) != data["tokenizer_sha256"]:
            raise CellError(
                named.source,
                f"{named.file.path} was prepared with tokenizer {info['tokenizer']}, but this cell has "
                f"{data['tokenizer']}, another one; allowed: one tokenizer for all corpora",
            )


def _fill_splits(data: dict[str, Any], leaves: Leaves, main: _Named, members: list[_Named], sets: list[_Named]) -> None:
    """``validation_every`` by what is trained on and measured as the main corpus, the slice by what is measured."""
    for named in (main, *members):
        info = named.file.prepared
        if info is not None and info["validation_every"] == 1:
            raise CellError(
                named.source,
                f"{named.file.path} was prepared with --validation-every 1: all of it is held out; allowed: as one of "
                "data.validation_sets, or prepared again",
            )
    _agree(data, leaves, "", ("validation_every",), [main, *members])
    section = data.setdefault("validation", {})
    _agree(section, leaves, "validation.", _SLICE, [main, *sets])


def _agree(section: dict[str, Any], leaves: Leaves, prefix: str, names: tuple[str, ...], corpora: list[_Named]) -> None:
    for name in names:
        path = f"data.{prefix}{name}"
        for named in corpora:
            info = named.file.prepared
            if info is None:
                continue
            made = info.get(name)
            if path not in leaves:
                section.setdefault(name, made)
            wanted = section[name]
            if wanted != made:
                raise CellError(
                    named.source,
                    f"{named.file.path} was prepared with {name} {made}, but this cell has {path} {wanted}; allowed: "
                    "one value for all corpora, or the folder prepared again",
                )


def _filled_set(one: ValidationSet, named: _Named, data: dict[str, Any], trained: set[str]) -> ValidationSet:
    every, info = one.validation_every, named.file.prepared
    of_trial = data.get("validation_every", DataConfig.model_fields["validation_every"].default)
    if info is not None:
        if every not in (None, info["validation_every"]):
            raise CellError(
                named.source,
                f"{named.file.path} was prepared with validation_every {info['validation_every']}, but validation set "
                f"{one.name} has {every}; leave it out, or prepare the folder again",
            )
        every = info["validation_every"]
    if named.file.identity in trained and every not in (None, of_trial):
        raise CellError(
            named.source,
            f"validation set {one.name} would measure documents that are trained on: validation_every {every} "
            f"instead of {of_trial}; leave it out",
        )
    return one.model_copy(
        update={"corpus": named.file.path, "corpus_sha256": named.file.sha256, "validation_every": every}
    )


def _value(leaves: Leaves, path: str) -> Any:
    return leaves[path].value if path in leaves else ()
