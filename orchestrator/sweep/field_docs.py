"""What the source says of each config field: the docstring below it, by dotted path."""

from __future__ import annotations

import ast
import inspect
import re
import textwrap
from functools import cache
from types import UnionType
from typing import Annotated, Union, get_args, get_origin

from pydantic import BaseModel


@cache
def field_docs(config: type[BaseModel]) -> dict[str, str]:
    """One line of text by dotted path, for the fields of ``config`` and of the classes in it that have a docstring."""
    docs: dict[str, str] = {}
    for owner in reversed(config.__mro__):
        if issubclass(owner, BaseModel) and owner is not BaseModel:
            docs |= _own_docs(owner)
    for name, info in config.model_fields.items():
        for kind in _classes(info.annotation):
            docs |= {f"{name}.{below}": said for below, said in field_docs(kind).items()}
    return docs


def list_member(annotation: object) -> type[BaseModel] | None:
    """The class of the entries, where a field is a list of sections."""
    while get_origin(annotation) is Annotated:
        annotation = get_args(annotation)[0]
    classes = _classes(get_args(annotation)[0]) if get_origin(annotation) is tuple else []
    return classes[0] if classes else None


def _classes(annotation: object) -> list[type[BaseModel]]:
    members = get_args(annotation) if get_origin(annotation) in (Union, UnionType) else (annotation,)
    return [kind for kind in members if isinstance(kind, type) and issubclass(kind, BaseModel)]


def _own_docs(owner: type[BaseModel]) -> dict[str, str]:
    tree = ast.parse(textwrap.dedent(inspect.getsource(owner))).body[0]
    assert isinstance(tree, ast.ClassDef)
    docs: dict[str, str] = {}
    for field, below in zip(tree.body, tree.body[1:], strict=False):
        if not (isinstance(field, ast.AnnAssign) and isinstance(field.target, ast.Name)):
            continue
        if isinstance(below, ast.Expr) and isinstance(below.value, ast.Constant) and isinstance(below.value.value, str):
            said = " ".join(below.value.value.split()).replace("``", "`")
            docs[field.target.id] = re.sub(r"\bNone\b", "null", said)
    return docs
