"""The fields that a file may set, and the check of one value: what was got, what is allowed, the nearest right name.

Read off the pydantic classes, so that a new config field is known to the grammar and to its messages at once.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from functools import cache, cached_property
from types import NoneType
from typing import Annotated, Any, Literal, get_args, get_origin

from pydantic import BaseModel, ConfigDict, TypeAdapter, ValidationError

from models import plugins
from models.config import TrialConfig
from models.presets import PRESETS
from orchestrator.sweep.document import DocumentPath, Problems
from orchestrator.sweep.settings import NUM_PARAMETERS, Derived
from orchestrator.sweep.wording import allowed_words, describe, literal_words, nearest

FILLED_IN_BY_THE_PLAN = {"vocab_size", "corpus_sha256", "tokenizer_sha256"}
_LARGEST_INTEGER = 2**63 - 1


@dataclass(frozen=True, eq=False)
class KnownField:
    """A single value: how it is checked, and how that is said."""

    annotation: Any
    allowed: str
    choices: tuple[str, ...]
    is_number: bool
    default: object

    @cached_property
    def adapter(self) -> TypeAdapter[Any]:
        return TypeAdapter(self.annotation, config=ConfigDict(strict=True, allow_inf_nan=False))


@dataclass(frozen=True, eq=False)
class KnownSection:
    """A mapping of fields. ``nullable``: null stands for none of it (``gate: null``)."""

    fields: Mapping[str, KnownField | KnownSection]
    nullable: bool = False
    may_be_empty: bool = True
    """False: an empty mapping is likely to be a mistake."""
    objection: str = ""
    """Why nothing may be set in it."""
    of_plugins: bool = False
    """Its keys are plug-ins."""


@cache
def section_of(config: type[BaseModel], nullable: bool = False) -> KnownSection:
    """The fields of a pydantic class, classes within it as sections."""
    known: dict[str, KnownField | KnownSection] = {}
    for name, info in config.model_fields.items():
        # A list of sections (more_gates) is one value: it is set as a whole.
        members = (
            () if get_origin(info.annotation) in (tuple, dict) else get_args(info.annotation) or (info.annotation,)
        )
        inner = next((kind for kind in members if isinstance(kind, type) and issubclass(kind, BaseModel)), None)
        if inner is not None:
            known[name] = section_of(inner, nullable=NoneType in members)
        else:
            annotation = Annotated[info.annotation, *info.metadata] if info.metadata else info.annotation
            known[name] = known_field(annotation, info.default, info.description)
    return KnownSection(known, nullable, may_be_empty=not nullable)


def known_field(annotation: object, default: object = None, description: str | None = None) -> KnownField:
    """``description`` says what is allowed where the annotation alone says too little."""
    allowed = description or allowed_words(annotation)
    return KnownField(annotation, allowed, literal_words(annotation), "number" in allowed, default)


@cache
def config_section() -> KnownSection:
    """The first-level keys of ``base`` and of an arm: TrialConfig and a preset, without what the plan fills in."""
    sections = {name: known for name, known in section_of(TrialConfig).fields.items() if name != "seed"}
    model, data = sections["model"], sections["data"]
    assert isinstance(model, KnownSection)
    assert isinstance(data, KnownSection)
    sections["model"] = KnownSection(
        {"preset": known_field(Literal[tuple(PRESETS)]), **model.fields, "plugins": _plugin_sections()}
    )
    sections["data"] = KnownSection(
        {name: known for name, known in data.fields.items() if name not in FILLED_IN_BY_THE_PLAN}
    )
    return KnownSection(sections)


def _plugin_sections() -> KnownSection:
    """``model.plugins``: a section of its own options for every plug-in that is installed."""
    known: dict[str, KnownField | KnownSection] = {}
    for name in plugins.names():
        try:
            known[name] = replace(section_of(plugins.load(name).Options, nullable=True), may_be_empty=True)
        except plugins.PluginError as error:
            known[name] = KnownSection({}, objection=str(error))
        except KeyError as error:
            said = f"plug-in {name}: an option of type {error.args[0]!r} needs a description of what is allowed"
            known[name] = KnownSection({}, objection=said)
    return KnownSection(known, nullable=True, of_plugins=True)


@cache
def config_fields() -> dict[str, KnownField]:
    """Every single config value by its dotted path."""
    return dict(_leaves(config_section(), ""))


def _leaves(section: KnownSection, prefix: str) -> Iterator[tuple[str, KnownField]]:
    for name, known in section.fields.items():
        if isinstance(known, KnownSection):
            yield from _leaves(known, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", known


def check_value(known: KnownField, value: object) -> object:
    """The value in the field's own type (``1e6`` as 1000000); ValueError says what was got and what is allowed."""
    too_large = isinstance(value, int | float) and abs(value) > _LARGEST_INTEGER
    try:
        if not (too_large and "whole" in known.allowed):
            return known.adapter.validate_python(value)
    except ValidationError as error:
        first = error.errors()[0]
        if first["loc"]:
            where = ".".join(str(part) for part in first["loc"])
            raise ValueError(
                f"{where}: {first['msg'].removeprefix('Value error, ')}; allowed: {known.allowed}"
            ) from error
    suggestion = nearest(value, known.choices) if isinstance(value, str) else ""
    raise ValueError(f"got {describe(value)}; allowed: {known.allowed}{suggestion}")


def check_section(
    section: KnownSection, node: object, path: DocumentPath, problems: Problems, *, derived: bool = False
) -> dict[str, Any]:
    """The mapping with its values in their own types; what is wrong in it goes to ``problems`` and is left out.

    ``derived``: the section is a part of the trial's config, and values may be derived from others.
    """
    if section.objection:
        problems.add(path, section.objection, on_key=True)
        return {}
    if not isinstance(node, dict):
        problems.add(path, f"got {describe(node)}; allowed: a mapping with keys among {', '.join(section.fields)}")
        return {}
    if not node and not section.may_be_empty:
        problems.add(path, "got an empty mapping; allowed: a mapping with at least one key, or null for none")
    checked: dict[str, Any] = {}
    for name, value in node.items():
        known = section.fields.get(name)
        below = (*path, name)
        if known is None:
            said = unknown_plugin(name) if section.of_plugins else unknown_key(name, section.fields)
            problems.add(below, said, on_key=True)
        elif isinstance(known, KnownSection):
            none = value is None and known.nullable
            checked[name] = None if none else check_section(known, value, below, problems, derived=derived)
        else:
            try:
                checked[name] = (
                    check_derived(known, value) if derived and is_derived(value) else check_value(known, value)
                )
            except ValueError as error:
                problems.add(below, str(error))
    return checked


def is_derived(value: object) -> bool:
    return isinstance(value, dict) and ("of" in value or "times" in value)


def check_derived(known: KnownField, value: dict[str, Any]) -> Derived:
    """``{of: PATH, times: NUMBER, power: NUMBER}`` for a number field; ValueError says what is wrong with it."""
    if not known.is_number:
        raise ValueError(f"got a derived value; allowed: {known.allowed}; only numbers can be multiples")
    if not {"of", "times"} <= set(value) <= {"of", "times", "power"}:
        raise ValueError(f"a derived value has the keys of and times, and may have power; got {', '.join(value)}")
    source = value["of"]
    numbers = [NUM_PARAMETERS, *(name for name, field in config_fields().items() if field.is_number)]
    if source not in numbers:
        raise ValueError(f"of: got {describe(source)}; allowed: a config path of a number{nearest(source, numbers)}")
    factors = {name: factor for name, factor in value.items() if name != "of"}
    for name, factor in factors.items():
        try:
            factors[name] = check_value(known_field(float), factor)
        except ValueError as error:
            raise ValueError(f"{name}: {error}") from error
    return Derived.model_validate({"of": source, **factors})


def check_derived_axis(known: KnownField, value: dict[str, Any]) -> Derived | tuple[Derived, ...]:
    """The same of an axis, where ``times`` may be a list: as many values a cell, each a multiple of its own."""
    times = value.get("times")
    if not isinstance(times, list):
        return check_derived(known, value)
    found = tuple(check_derived(known, {**value, "times": one}) for one in times)
    if len(set(times)) < len(times) or not found:
        raise ValueError(f"times: got {describe(times)}; allowed: a number, or a list of numbers, each once")
    return found


def unknown_plugin(name: str) -> str:
    known = plugins.names()
    installed = f"{', '.join(known) or 'none'}{nearest(name, known)}"
    return f"no plug-in {name!r} is installed here; installed (entry points {plugins.GROUP}): {installed}"


def unknown_key(name: str, allowed: Iterable[str]) -> str:
    """The message for a key that is not there; it also knows keys that belong to another section."""
    names = list(allowed)
    if name == "seed":
        return "the seed is no part of an arm or a cell; give the sweep's own list, seeds: [1, 2]"
    if name in FILLED_IN_BY_THE_PLAN:
        return f"{name} is filled in by the plan, from the files themselves; leave it out"
    close = nearest(name, names)
    if not close:
        elsewhere = {path.rpartition(".")[2]: path for path in reversed(config_fields())}
        elsewhere |= {section: f"base.{section}" for section in config_section().fields}
        near = difflib.get_close_matches(name, elsewhere, n=1, cutoff=0.6)
        close = f" (did you mean {elsewhere[near[0]]!r}?)" if near else ""
    return f"unknown key {name!r}; allowed: {', '.join(names)}{close}"
