"""The grammar of sweep files as a JSON schema, for editors: they complete keys and words, and mark what is none.

Made of the same known fields that ``parsing`` checks a file against. It takes everything that ``parse`` takes; what
only the file as a whole shows (an arm that is not there, a key set twice) it leaves to ``gatesweep plan``.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from pydantic import BaseModel, TypeAdapter
from pydantic_core import PydanticUndefined, to_jsonable_python

from models.config import Layout, TrialConfig
from orchestrator.sweep.field_docs import field_docs, list_member
from orchestrator.sweep.fields import (
    FILLED_IN_BY_THE_PLAN,
    KnownField,
    KnownSection,
    config_fields,
    config_section,
    known_field,
    section_of,
)
from orchestrator.sweep.parsing import REQUIRED
from orchestrator.sweep.rates import ExtendedRates, SearchedRates
from orchestrator.sweep.resources import ResourcesRule
from orchestrator.sweep.settings import NUM_PARAMETERS, ArmName, Seed, Settings

Schema = dict[str, Any]
DIALECT = "http://json-schema.org/draft-07/schema#"
"""What editors' YAML servers know best."""

GRAMMAR_DOCS = {
    "name": "The sweep's name, the same as the file's.",
    "question": "The hypothesis, in words, before the run.",
    "base": "The config that all trials share.",
    "arms": "Named changes to `base`, laid over it key by key.",
    "baseline": "The arm that the others are compared with.",
    "axes": "What varies besides the arm: a list of values a config path; the cells are their product.",
    "zip": "Axes that walk along together: one factor of the product.",
    "rows": "Cells beside the product, for every arm.",
    "exclude": "Drops the cells that match all keys of an entry: `arm` and axes.",
    "seeds": "Every cell runs once a seed. `select` choose the learning rates, `confirm` are the verdict's.",
}
"""Keys that no field of a class stands for, and the two that have no docstring for being clear in code."""
_NUMBER: Schema = {"type": "number"}
_PLUGINS = "model.plugins."
PRESET_DOC = "A named size; fields beside it are laid over it."


def sweep_schema(installed_plugins: bool = True) -> Schema:
    """Of a whole file, in draft 7. Without ``installed_plugins`` it is the same on every machine."""
    known = config_section() if installed_plugins else _without_plugins(config_section())
    docs = {**field_docs(TrialConfig), "model.preset": PRESET_DOC}
    config = _section(known, docs, "", _leaf_or_derived)
    settings = _section(section_of(Settings), field_docs(Settings), "", leaf)["properties"]
    settings["match"] = {"anyOf": [{"enum": ["none", "parameters", "flops"]}, settings["match"]]}
    fields = {
        name: field for name, field in config_fields().items() if installed_plugins or not name.startswith(_PLUGINS)
    }
    definitions = {
        "config": config,
        "derived": _derived(fields, _NUMBER),
        "rule": _derived(fields, {"anyOf": [_NUMBER, {"type": "array", "items": _NUMBER, "minItems": 1}]}),
        "where": _where(fields),
    }
    grammar = _grammar(fields)
    properties = {key: grammar.get(key) or settings[key] for key in (*REQUIRED, *grammar, *settings)}
    for key, said in GRAMMAR_DOCS.items():
        properties[key] = {"description": said, **properties[key]}
    return {
        "$schema": DIALECT,
        "title": "A gatesweep sweep",
        "type": "object",
        "properties": properties,
        "required": list(REQUIRED),
        "additionalProperties": False,
        "definitions": definitions,
    }


def leaf(field: KnownField) -> Schema:
    """Of a single value."""
    member = list_member(field.annotation)
    if member is not None:
        made: Schema = {"type": "array", "items": _member(member)}
    else:
        made = _tidied(TypeAdapter(field.annotation).json_schema())
    if field.default is not None and field.default is not PydanticUndefined:
        made["default"] = to_jsonable_python(field.default)
    return made


def _leaf_or_derived(field: KnownField) -> Schema:
    plain = leaf(field)
    return {"anyOf": [plain, {"$ref": "#/definitions/derived"}]} if field.is_number else plain


def _member(config: type[BaseModel]) -> Schema:
    """An entry of a list of sections, such as a gate of ``more_gates``."""
    made = _section(section_of(config), field_docs(config), "", leaf)
    required = [name for name, info in config.model_fields.items() if info.is_required()]
    kept = {name: one for name, one in made["properties"].items() if name not in FILLED_IN_BY_THE_PLAN}
    if config is ResourcesRule:  # two mappings of anything to pydantic
        layout = _section(section_of(Layout), field_docs(Layout), "", leaf)
        kept |= {"where": {"$ref": "#/definitions/where"}, "layout": {"anyOf": [layout, {"type": "null"}]}}
    return {**made, "properties": kept, "required": required}


_NAMES = {"ge": "minimum", "gt": "exclusiveMinimum", "le": "maximum", "lt": "exclusiveMaximum"}


def _tidied(made: Any) -> Any:
    """pydantic's schema, without titles, and with the names of bounds that it leaves as they are behind a validator."""
    if isinstance(made, list):
        return [_tidied(one) for one in made]
    if not isinstance(made, dict):
        return made
    names = dict(_NAMES)
    if made.get("type") == "array":
        names |= {"minLength": "minItems", "maxLength": "maxItems"}
    kept = {names.get(key, key): one for key, one in made.items() if key != "title"}
    return {
        key: {name: _tidied(below) for name, below in one.items()} if key == "properties" else _tidied(one)
        for key, one in kept.items()
    }


def _section(section: KnownSection, docs: dict[str, str], prefix: str, leaf: Callable[[KnownField], Schema]) -> Schema:
    properties: dict[str, Schema] = {}
    for name, known in section.fields.items():
        path = f"{prefix}{name}"
        if isinstance(known, KnownSection):
            made = _section(known, docs, f"{path}.", leaf)
            made = {"anyOf": [made, {"type": "null"}]} if known.nullable else made
        else:
            made = leaf(known)
        properties[name] = {"description": docs[path], **made} if path in docs else made
    made = {"type": "object", "properties": properties, "additionalProperties": False}
    if section.of_plugins and not section.fields:
        # Whoever reads the schema may have plug-ins that its maker has not.
        made["additionalProperties"] = {"type": ["object", "null"]}
    return made if section.may_be_empty else {**made, "minProperties": 1}


def _without_plugins(section: KnownSection) -> KnownSection:
    model = section.fields["model"]
    assert isinstance(model, KnownSection)
    none = KnownSection({}, nullable=True, of_plugins=True)
    return KnownSection({**section.fields, "model": KnownSection({**model.fields, "plugins": none})})


def _grammar(fields: dict[str, KnownField]) -> dict[str, Schema]:
    """The keys of cells: base, arms, axes, zip, rows, exclude, seeds."""
    lists: dict[str, Schema] = {
        name: {"type": "array", "items": _value(name), "minItems": 1} for name in _may_vary(fields)
    }
    seeds = {"type": "array", "items": leaf(known_field(Seed)), "minItems": 1, "uniqueItems": True}
    both: Schema = {"type": "object", "properties": {"select": seeds, "confirm": seeds}, "additionalProperties": False}
    config: Schema = {"$ref": "#/definitions/config"}
    return {
        "base": {"allOf": [config]},  # beside a $ref draft 7 sees no description
        "baseline": {"type": "string"},
        "arms": {
            "type": "object",
            "propertyNames": leaf(known_field(ArmName)),
            "additionalProperties": {"anyOf": [config, {"type": "null"}]},
        },
        "seeds": {"anyOf": [seeds, {**both, "required": ["select", "confirm"]}]},
        "axes": {"type": "object", "properties": _axes(lists, fields), "additionalProperties": False},
        "zip": {"type": "array", "items": _mapping(lists)},
        "rows": {"type": "array", "items": _mapping({name: _value(name) for name in lists})},
        "exclude": {"type": "array", "items": {"$ref": "#/definitions/where"}},
    }


def _may_vary(fields: dict[str, KnownField]) -> dict[str, KnownField]:
    """What may stand on an axis: all but lists of sections."""
    return {name: field for name, field in fields.items() if field.default != ()}


def _axes(lists: dict[str, Schema], fields: dict[str, KnownField]) -> dict[str, Schema]:
    """A list, each value once; a multiple of another field; learning rates also searched or extended."""
    axes: dict[str, Schema] = {name: {"anyOf": [{**one, "uniqueItems": True}]} for name, one in lists.items()}
    for name, field in _may_vary(fields).items():
        if field.is_number:
            axes[name]["anyOf"].append({"$ref": "#/definitions/rule"})
    axes["train.lr"]["anyOf"] += [_tidied(kind.model_json_schema()) for kind in (SearchedRates, ExtendedRates)]
    return axes


def _value(name: str) -> Schema:
    return {"$ref": f"#/definitions/where/properties/{name}"}


def _where(fields: dict[str, KnownField]) -> Schema:
    """Values of axes, and an arm: the cells that match all of it."""
    values = {name: leaf(field) for name, field in _may_vary(fields).items()}
    return _mapping({"arm": {"type": "string"}, **values})


def _mapping(properties: dict[str, Schema]) -> Schema:
    return {"type": "object", "properties": properties, "additionalProperties": False, "minProperties": 1}


def _derived(fields: dict[str, KnownField], times: Schema) -> Schema:
    numbers = [NUM_PARAMETERS, *(name for name, field in fields.items() if field.is_number)]
    return {
        "description": "Times another config field of the same cell, or times a power of it.",
        "type": "object",
        "properties": {"of": {"enum": numbers}, "times": times, "power": {"type": "number"}},
        "required": ["of", "times"],
        "additionalProperties": False,
    }
