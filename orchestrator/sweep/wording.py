"""How values and what is allowed for them are said in messages."""

from __future__ import annotations

import difflib
from collections.abc import Iterable
from types import UnionType
from typing import Annotated, Any, Literal, Union, get_args, get_origin

from annotated_types import Ge, Gt, Le, Lt


def describe(value: object) -> str:
    """A value as the user wrote it, or the kind of thing it is."""
    if isinstance(value, dict):
        return "a mapping" if value else "an empty mapping"
    if isinstance(value, list | tuple):
        return "a list" if value else "an empty list"
    if value is None or isinstance(value, bool):
        return "null" if value is None else str(value).lower()
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."


def nearest(name: object, allowed: Iterable[str]) -> str:
    """`` (did you mean 'x'?)``, or nothing when no allowed name is near."""
    close = difflib.get_close_matches(str(name), list(allowed), n=1, cutoff=0.6)
    return f" (did you mean {close[0]!r}?)" if close else ""


def literal_words(annotation: object) -> tuple[str, ...]:
    """The words of a Literal, also within Annotated or beside None."""
    words: list[str] = []
    for member in _union_members(annotation):
        kind, _ = _without_metadata(member)
        words += [str(word) for word in get_args(kind)] if get_origin(kind) is Literal else []
    return tuple(words)


def allowed_words(annotation: object) -> str:
    """What a value of a field may be: ``a whole number of at least 1 or null``."""
    return " or ".join(_allowed(member) for member in _union_members(annotation))


def _allowed(annotation: object) -> str:
    kind, metadata = _without_metadata(annotation)
    if words := literal_words(kind):
        return ", ".join(words)
    if description := next((item for item in metadata if isinstance(item, str)), None):
        return description
    names = {int: "a whole number", float: "a number", bool: "true or false", str: "text", type(None): "null"}
    return " ".join([names[kind], _bounds(metadata)]).strip()


def _bounds(metadata: list[Any]) -> str:
    least = next((item.ge for item in metadata if isinstance(item, Ge)), None)
    most = next((item.le for item in metadata if isinstance(item, Le)), None)
    above = next((item.gt for item in metadata if isinstance(item, Gt)), None)
    below = next((item.lt for item in metadata if isinstance(item, Lt)), None)
    if least is not None and most is not None:
        return f"from {_number(least)} to {_number(most)}"
    said = {"of at least": least, "of at most": most, "above": above, "below": below}
    return " and ".join(f"{word} {_number(bound)}" for word, bound in said.items() if bound is not None)


def _number(bound: object) -> str:
    return str(int(bound)) if isinstance(bound, float) and bound.is_integer() else str(bound)


def _union_members(annotation: object) -> tuple[Any, ...]:
    return get_args(annotation) if get_origin(annotation) in (Union, UnionType) else (annotation,)


def _without_metadata(annotation: object) -> tuple[Any, list[Any]]:
    """The bare type, and its metadata with pydantic's FieldInfo opened up; its description comes as a str."""
    metadata: list[Any] = []
    while get_origin(annotation) is Annotated:
        annotation, *more = get_args(annotation)
        metadata += [bound for item in more for bound in getattr(item, "metadata", [item])]
        metadata += [item.description for item in more if getattr(item, "description", None)]
    return annotation, metadata
