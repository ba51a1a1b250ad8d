"""A YAML file as plain values, with the place of every key and value kept beside them.

The only user of ruamel.yaml, for two reasons: it reads YAML 1.2 (``3e-4`` is a number, ``no`` is text) and it knows
lines and columns. A place is addressed by a path of keys and indices, ``("axes", "train.lr", 1)``: config paths such
as ``train.lr`` are one key where the file writes them as one.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from ruamel.yaml import YAML
from ruamel.yaml.comments import CommentedMap, CommentedSeq
from ruamel.yaml.error import MarkedYAMLError, YAMLError
from ruamel.yaml.scalarbool import ScalarBoolean

from models.redaction import redacted

DocumentPath = tuple[str | int, ...]
MAX_PROBLEMS_SHOWN = 12
MAX_DEPTH = 50


class UserError(Exception):
    """A user's mistake. ``str(error)`` is the whole message: the place, what was got, what is allowed.

    It holds no credential, whatever it is made of: it is shown, logged and sent.
    """

    def __str__(self) -> str:
        return redacted(super().__str__())


def dotted(path: DocumentPath) -> str:
    """``("axes", "train.lr", 1)`` as ``axes.train.lr[1]``."""
    text = ""
    for part in path:
        text += f"[{part}]" if isinstance(part, int) else f".{part}" if text else part
    return text


@dataclass(frozen=True)
class Places:
    """Where things stand: 1-based (line, column) of keys and of values, and which paths an override set."""

    file: str = "sweep"
    keys: dict[DocumentPath, tuple[int, int]] = field(default_factory=dict)
    values: dict[DocumentPath, tuple[int, int]] = field(default_factory=dict)
    overrides: dict[DocumentPath, str] = field(default_factory=dict)

    def override_of(self, path: DocumentPath) -> str | None:
        """The override that set ``path`` or something above it."""
        prefixes = (path[:length] for length in range(len(path), 0, -1))
        return next((self.overrides[prefix] for prefix in prefixes if prefix in self.overrides), None)

    def at(self, path: DocumentPath, *, on_key: bool = False) -> str:
        """``FILE:LINE:COLUMN`` of the path, or of the nearest thing around it that the file has."""
        override = self.override_of(path)
        if override is not None:
            return f"override {override}"
        made = next((text for below, text in self.overrides.items() if below[: len(path)] == path), None)
        if path and made is not None and path not in self.keys:
            return f"override {made}"
        for length in range(len(path), 0, -1):
            prefix = path[:length]
            places = self.keys if on_key or length < len(path) else self.values
            place = places.get(prefix) or self.values.get(prefix)
            if place is not None:
                return f"{self.file}:{place[0]}:{place[1]}"
        return f"{self.file}:1:1"


class Problems:
    """Mistakes gathered in one pass, so that a user mends them all at once."""

    def __init__(self, places: Places) -> None:
        self.places = places
        self._lines: dict[str, None] = {}

    def add(self, path: DocumentPath, text: str, *, on_key: bool = False) -> None:
        """``text`` says what was got and what is allowed; the place and the key path are put before it."""
        name = f"{dotted(path)}: " if path else ""
        self._lines[f"{self.places.at(path, on_key=on_key)}: {name}{text}"] = None

    def __bool__(self) -> bool:
        return bool(self._lines)

    def raise_if_any(self) -> None:
        if not self._lines:
            return
        lines = list(self._lines)
        hidden = len(lines) - MAX_PROBLEMS_SHOWN
        shown = lines[:MAX_PROBLEMS_SHOWN] + ([f"and {hidden} more"] if hidden > 0 else [])
        raise UserError("\n".join(shown))


def parse_yaml(text: str, name: str) -> object:
    """ruamel's own tree, with marks; UserError with the line when the text is not one YAML 1.2 document."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return YAML(typ="rt", pure=True).load(text)
    except MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        place = f"{name}:{mark.line + 1}:{mark.column + 1}" if mark is not None else name
        said = f"{error.context}, {error.problem}" if error.context and error.problem else error.problem
        raise UserError(f"{place}: not valid YAML: {said}") from error
    except (YAMLError, ValueError, RecursionError) as error:
        first_line = (str(error).splitlines() or [type(error).__name__])[0]
        raise UserError(f"{name}: not valid YAML: {first_line}") from error


def read_document(text: str, name: str) -> tuple[dict[str, Any], Places]:
    """The file's top-level mapping as plain values, and the places of all it holds."""
    tree = parse_yaml(text, name)
    if tree is None:
        raise UserError(f"{name}:1:1: the file is empty; a sweep needs name, question, base, baseline, arms and seeds")
    if not isinstance(tree, CommentedMap):
        raise UserError(f"{name}:1:1: the file holds {_kind(tree)}; allowed: a mapping of keys")
    places = Places(name)
    plain = _plain(tree, (), places)
    assert isinstance(plain, dict)
    return plain, places


def read_value(text: str, name: str) -> object:
    """One value in YAML, as plain values: the right side of an override."""
    return _plain(parse_yaml(text, name), (), Places(name))


def _plain(node: object, path: DocumentPath, places: Places, above: tuple[int, ...] = ()) -> object:
    """``node`` without ruamel's types; writes down the places of what is in it."""
    if id(node) in above:
        raise UserError(f"{places.at(path)}: {dotted(path)}: an alias that holds itself")
    if len(above) > MAX_DEPTH:
        raise UserError(f"{places.at(path)}: nested deeper than {MAX_DEPTH} levels")
    inside = (*above, id(node))
    if isinstance(node, CommentedMap):
        plain: dict[str, Any] = {}
        marks: Mapping[Any, Sequence[int]] = node.lc.data or {}
        for key, value in node.items():
            if not isinstance(key, str):
                raise UserError(f"{places.at(path)}: {dotted(path)}: key {key!r} is not text; put it in quotes")
            below = (*path, str(key))
            if key in marks:
                key_line, key_column, line, column = marks[key]
                places.keys[below] = (key_line + 1, key_column + 1)
                places.values[below] = (line + 1, column + 1)
            plain[str(key)] = _plain(value, below, places, inside)
        return plain
    if isinstance(node, CommentedSeq):
        for index in node.lc.data or {}:
            line, column = node.lc.data[index][:2]
            places.values[(*path, index)] = (line + 1, column + 1)
        return [_plain(value, (*path, index), places, inside) for index, value in enumerate(node)]
    return _plain_scalar(node, path, places)


def _plain_scalar(node: object, path: DocumentPath, places: Places) -> object:
    if isinstance(node, bool | ScalarBoolean):
        return bool(node)
    for kind in (int, float, str):
        if isinstance(node, kind):
            return kind(node)
    if node is None:
        return None
    raise UserError(
        f"{places.at(path)}: {dotted(path)}: got {_kind(node)}; allowed: mappings, lists, text, numbers, true, false "
        "and null (put dates in quotes, leave out tags)"
    )


def _kind(node: object) -> str:
    if isinstance(node, CommentedSeq):
        return "a list"
    return {"date": "a date", "TimeStamp": "a date", "TaggedScalar": "a value with a tag"}.get(
        type(node).__name__, f"a {type(node).__name__}" if not isinstance(node, str) else "only text"
    )
