"""The cells of a sweep before they are configs: which values each one sets, and from which place of the file.

Values are laid over one another as a flat map from config path to Leaf, base below, then the arm, then the axes, so
that every value of a cell still knows its line.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from decimal import Decimal
from functools import cache
from typing import Any

from pydantic import ValidationError

from models.accounting import parameters
from models.config import ModelConfig
from models.presets import PRESETS
from orchestrator.sweep import (
    NUM_PARAMETERS,
    Derived,
    DocumentPath,
    ExtendedRates,
    SearchedRates,
    Sweep,
    check_value,
    config_fields,
)


@dataclass(frozen=True)
class Leaf:
    """One config value and where in the file it was written."""

    value: Any
    source: DocumentPath


Leaves = dict[str, Leaf]
_NULLABLE = ("gate", "model.moe", "model.switch_head", "fp8")
"""Sections of the config that may be absent, as every plug-in's may."""
_PLUGINS = "model.plugins."


class CellError(Exception):
    """A cell that makes no config: the message, and the place in the file that it is about.

    ``on_key``: it is about the key at that place, not about its value.
    """

    def __init__(self, source: DocumentPath, message: str, *, on_key: bool = False) -> None:
        super().__init__(message)
        self.source = source
        self.message = message
        self.on_key = on_key


def assignments(sweep: Sweep) -> list[Leaves]:
    """What the axes set, a map a cell: the product of axes and zip groups, then the rows.

    With rows and neither axes nor zip there are only the rows. Derived axes go along in every cell.
    """
    derived: Leaves = {}
    factors: list[list[Leaves]] = []
    for name, axis in sweep.axes.items():
        if isinstance(axis, Derived):
            derived[name] = Leaf(axis, ("axes", name))
        elif isinstance(axis, SearchedRates | ExtendedRates):
            factors.append([{name: Leaf(value, ("axes", name))} for value in axis.first])
        else:
            factors.append([{name: Leaf(value, ("axes", name, index))} for index, value in enumerate(axis)])
    for number, group in enumerate(sweep.zip):
        points = range(len(next(iter(group.values()))))
        factors.append(
            [{name: Leaf(values[i], ("zip", number, name, i)) for name, values in group.items()} for i in points]
        )
    product = itertools.product(*factors) if factors or not sweep.rows else ()
    cells = [derived | {name: leaf for part in parts for name, leaf in part.items()} for parts in product]
    for number, row in enumerate(sweep.rows):
        cells.append(derived | {name: Leaf(value, ("rows", number, name)) for name, value in row.items()})
    return cells


def number_of_cells(sweep: Sweep) -> int:
    """Cells before exclusion, without making them."""
    product = 1 if sweep.axes or sweep.zip or not sweep.rows else 0
    for axis in sweep.axes.values():
        if isinstance(axis, SearchedRates | ExtendedRates):
            product *= axis.most
        else:
            product *= 1 if isinstance(axis, Derived) else len(axis)
    for group in sweep.zip:
        product *= len(next(iter(group.values())))
    return (product + len(sweep.rows)) * len(sweep.arms)


def arm_leaves(sweep: Sweep, arm: str) -> Leaves:
    """What all cells of an arm are laid over: base, and the arm over it."""
    return _layered((sweep.base, ("base",)), (sweep.arms[arm], ("arms", arm)))


def _layered(*layers: tuple[Mapping[str, Any], DocumentPath]) -> Leaves:
    leaves: Leaves = {}
    for tree, source in layers:
        for path, leaf in flat(tree, "", source):
            # A plug-in without options of its own here leaves those from before as they are.
            if leaf.value != {} or not any(old.startswith(f"{path}.") for old in leaves):
                _lay_over(leaves, path, leaf)
    return leaves


def compose(sweep: Sweep, of_arm: Leaves, assignment: Leaves) -> Leaves:
    """A cell's values: its arm's, the axes over those; presets opened, derived values computed.

    ``model.preset`` stays among them as the cell's value on that axis, though no config has it.
    """
    _refuse_own_rates(of_arm, assignment)
    leaves = _with_axes(of_arm, assignment)
    leaves.setdefault("precision", Leaf("fp32" if sweep.resources.gpus == 0 else "bf16", ("resources", "gpus")))
    derived = {path: leaf for path, leaf in leaves.items() if isinstance(leaf.value, Derived)}
    by_size = [leaf for leaf in derived.values() if leaf.value.of == NUM_PARAMETERS]
    size = _num_parameters(sweep, assignment, by_size[0]) if by_size else None
    for path in derived:
        _compute(leaves, path, (path,), size)
    return leaves


def _with_axes(below: Leaves, assignment: Leaves) -> Leaves:
    leaves = dict(below)
    for path, leaf in assignment.items():
        _lay_over(leaves, path, leaf)
    preset = leaves.get("model.preset")
    if preset is not None:
        inner = {section for path in leaves for section in _sections(path)}
        for path, leaf in _of_preset(preset.value, preset.source):
            if path not in inner and not any(section in leaves for section in _sections(path)):
                leaves.setdefault(path, leaf)
    return leaves


def _refuse_own_rates(of_arm: Leaves, assignment: Leaves) -> None:
    """The values of a list are the same in all arms of a cell: ranks and missing cells are told by them."""
    for leaf in assignment.values():
        if not isinstance(leaf.value, Derived) or len(leaf.source) < 3:
            continue
        source = leaf.value.of
        names = {source, "model.preset"} if source.startswith("model.") and source != NUM_PARAMETERS else {source}
        for name in names:
            own = of_arm.get(name)
            if own is not None and own.source[0] == "arms":
                said = f"arm {own.source[1]} sets {name}, so its values would not be the other arms'"
                raise CellError(leaf.source[:2], f"{said}; allowed: one number of times")


def _num_parameters(sweep: Sweep, assignment: Leaves, asked: Leaf) -> int:
    """Of the cell's model as base and axes give it, so that all arms of a size have one learning rate by a rule of it.

    Without embeddings, which small models mostly consist of, and without gates.
    """
    leaves = _with_axes(_layered((sweep.base, ("base",))), assignment)
    inside = [path for path in leaves if path.startswith("model.")]
    for path in inside:
        _compute(leaves, path, (NUM_PARAMETERS, path), None)
    values = {path: leaves[path] for path in inside if not f"{path}.".startswith(_PLUGINS)}
    try:
        model = ModelConfig.model_validate(nested(values).get("model", {}))
    except ValidationError as error:
        said = f"{NUM_PARAMETERS} has no value here: base and axes together give no whole model"
        raise CellError(asked.source, said) from error
    return parameters(model, (), 0)


def nested(leaves: Leaves) -> dict[str, Any]:
    """The values as TrialConfig takes them."""
    tree: dict[str, Any] = {}
    for path, leaf in leaves.items():
        if path == "model.preset":
            continue
        *sections, name = path.split(".")
        node = tree
        for section in sections:
            node = node.setdefault(section, {})
        node[name] = leaf.value
    return tree


def excluded_by(entry: Mapping[str, Any], arm: str, axes: Mapping[str, Any]) -> bool:
    """Whether a cell matches all keys of an ``exclude`` entry."""
    return all(arm == value if name == "arm" else axes[name] == value for name, value in entry.items())


def axis_values(sweep: Sweep, leaves: Leaves) -> dict[str, Any]:
    """The cell's value on every axis, also where only another row set it; None for a field of what is absent."""
    return {name: _value(leaves, name) for name in sweep.axis_names}


def _value(leaves: Leaves, path: str) -> Any:
    """The value at ``path``, set or by default; None for a field of a gate, or of experts, that are not."""
    if path in leaves:
        return leaves[path].value
    section = path.rpartition(".")[0]
    if (section in _NULLABLE or section.startswith(_PLUGINS)) and not any(
        other.startswith(f"{section}.") for other in leaves
    ):
        return None
    return config_fields()[path].default


@cache
def _of_preset(name: str, source: DocumentPath) -> tuple[tuple[str, Leaf], ...]:
    """The preset's fields, those of its experts too; all of them stand where the preset was named."""
    return tuple((path, Leaf(leaf.value, source)) for path, leaf in flat(PRESETS[name].model_dump(), "model.", ()))


@cache
def _sections(path: str) -> tuple[str, ...]:
    """The sections that a path lies in: ``model`` and ``model.moe`` of ``model.moe.top_k``."""
    return tuple(itertools.accumulate(path.split(".")[:-1], "{}.{}".format))


def flat(tree: Mapping[str, Any], prefix: str, source: DocumentPath) -> Iterator[tuple[str, Leaf]]:
    """The values of a nested section by their dotted paths; a plug-in without options is one itself."""
    for name, value in tree.items():
        below = (*source, name)
        if isinstance(value, dict) and (value or prefix != _PLUGINS):
            yield from flat(value, f"{prefix}{name}.", below)
        else:
            yield f"{prefix}{name}", Leaf(value, below)


def _lay_over(leaves: Leaves, path: str, leaf: Leaf) -> None:
    """Set one value. ``gate: null`` clears the gate, and a field of a gate takes back an earlier ``gate: null``."""
    inside = f"{path}."
    for old in [old for old in leaves if old.startswith(inside)]:
        del leaves[old]
    for old in (*_sections(path), path):
        leaves.pop(old, None)
    leaves[path] = leaf


def _compute(leaves: Leaves, path: str, chain: tuple[str, ...], size: int | None) -> Any:
    """The number at ``path``; a derived one is computed first, in decimal, so that 3 x 0.1 is 0.3.

    ``size``: the model's parameters. A power is rounded to six digits: what is read is what was run, and the same on
    every machine.
    """
    value = _value(leaves, path)
    if not isinstance(value, Derived):
        return value
    leaf = leaves[path]
    source, times = value.of, value.times
    if source in chain:
        raise CellError(leaf.source, f"derived values in a circle: {' -> '.join((*chain, source))}")
    number = size if source == NUM_PARAMETERS else _compute(leaves, source, (*chain, source), size)
    if isinstance(number, bool) or not isinstance(number, int | float):
        raise CellError(leaf.source, f"is a multiple of {source}, which has no value here")
    if value.power == 1.0:
        product = float(Decimal(repr(number)) * Decimal(repr(times)))
    elif number <= 0:
        raise CellError(leaf.source, f"{source} is {number:g}, of which there is no power")
    else:
        product = float(f"{times * number**value.power:.6g}")
    try:
        checked = check_value(config_fields()[path], product)
    except ValueError as error:
        power = "" if value.power == 1.0 else f" to the power {value.power:g}"
        raise CellError(leaf.source, f"{times:g} times {source} {number:g}{power}: {error}") from error
    leaves[path] = Leaf(checked, leaf.source)
    return checked
