"""The grammar of cells: axes, zip, rows and exclude, checked against the fields that a config has."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from orchestrator.sweep.document import DocumentPath, Problems
from orchestrator.sweep.fields import (
    KnownField,
    check_derived_axis,
    check_value,
    config_fields,
    config_section,
    is_derived,
    unknown_key,
)
from orchestrator.sweep.rates import GrowingRates, are_rates, check_rates
from orchestrator.sweep.settings import Derived
from orchestrator.sweep.wording import describe, nearest

Values = tuple[Any, ...]


def read_axes(node: object, problems: Problems) -> dict[str, Values | Derived | GrowingRates]:
    """``{train.lr: [1e-3, 4e-3], train.tokens: {of: train.batch_tokens, times: 40}}``."""
    axes: dict[str, Values | Derived | GrowingRates] = {}
    for name, value, path in _entries(node, ("axes",), problems):
        known = _known_axis(name, path, problems)
        if known is None:
            continue
        if is_derived(value) or are_rates(value):
            try:
                axes[name] = check_rates(name, value) if are_rates(value) else check_derived_axis(known, value)
            except ValueError as error:
                problems.add(path, str(error))
        else:
            axes[name] = _value_list(known, value, path, problems, repeats=False)
    return axes


def read_zip(node: object, problems: Problems) -> tuple[dict[str, Values], ...]:
    """``[{train.tokens: [1e6, 2e6], train.lr: [2e-3, 1e-3]}]``: each mapping is one factor of the product."""
    groups: list[dict[str, Values]] = []
    for index, item in _items(node, "zip", problems):
        group: dict[str, Values] = {}
        for name, value, path in _entries(item, ("zip", index), problems):
            known = _known_axis(name, path, problems)
            if known is not None:
                group[name] = _value_list(known, value, path, problems, repeats=True)
        lengths = {name: len(values) for name, values in group.items() if values}
        if len(set(lengths.values())) > 1:
            said = ", ".join(f"{name} has {length}" for name, length in lengths.items())
            problems.add(("zip", index), f"zipped axes must be of one length; {said}")
        elif group:
            points = list(zip(*group.values(), strict=False))
            for place, point in enumerate(points):
                if point in points[:place]:
                    values = ", ".join(f"{name} {value!r}" for name, value in zip(group, point, strict=True))
                    problems.add(("zip", index), f"the same values twice: {values}")
        groups.append(group)
    return tuple(groups)


def read_rows(node: object, problems: Problems) -> tuple[dict[str, Any], ...]:
    """``[{train.lr: 1e-3, train.tokens: 1e6}]``: cells beside the product."""
    return tuple(
        _point(item, ("rows", index), list(config_fields()), problems) for index, item in _items(node, "rows", problems)
    )


def read_exclude(
    node: object, arms: Sequence[str], axes: Sequence[str], problems: Problems
) -> tuple[dict[str, Any], ...]:
    """``[{arm: g1, train.lr: 1.0}]``: drops the cells that match all keys of an entry."""
    return tuple(
        read_where(item, ("exclude", index), arms, axes, problems) for index, item in _items(node, "exclude", problems)
    )


def read_where(
    item: object, path: DocumentPath, arms: Sequence[str], axes: Sequence[str], problems: Problems
) -> dict[str, Any]:
    """``{arm: g1, train.lr: 1.0}``: the cells that match all of it."""
    if not isinstance(item, dict) or not item:
        problems.add(path, f"got {describe(item)}; allowed: a mapping with keys among arm and the sweep's axes")
        return {}
    entry = _point({key: value for key, value in item.items() if key != "arm"}, path, list(axes), problems, "arm")
    if "arm" in item:
        entry = {"arm": item["arm"], **entry}
        if item["arm"] not in arms:
            said = f"got {describe(item['arm'])}; allowed: {', '.join(arms)}{nearest(item['arm'], arms)}"
            problems.add((*path, "arm"), said)
    return entry


def refuse_double_settings(
    arms: Mapping[str, Mapping[str, Any]],
    axes: Mapping[str, Any],
    groups: Sequence[Mapping[str, Any]],
    rows: Sequence[Mapping[str, Any]],
    problems: Problems,
) -> None:
    """A key that two places would set, one of them in vain: two axes, or an arm and an axis."""
    seen = dict.fromkeys(axes, "axes")
    for index, group in enumerate(groups):
        for name in group:
            if name in seen:
                problems.add(("zip", index, name), f"varies already in {seen[name]}; allowed: one place", on_key=True)
            seen[name] = f"zip[{index}]"
    seen |= {name: f"rows[{index}]" for index, row in enumerate(rows) for name in row if name not in seen}
    for arm, content in arms.items():
        for name, path in _set_paths(content, ("arms", arm)):
            covering = next((axis for axis in seen if axis == name or axis.startswith(f"{name}.")), None)
            if covering is not None:
                said = f"{covering} is also an axis (in {seen[covering]}), which would set it again; allowed: one place"
                problems.add(path, said, on_key=True)


def _set_paths(content: Mapping[str, Any], path: DocumentPath) -> Iterator[tuple[str, DocumentPath]]:
    """The config paths that an arm sets; ``gate`` itself for ``gate: null``."""
    for key, value in content.items():
        below = (*path, key)
        if isinstance(value, dict):
            yield from _set_paths(value, below)
        else:
            yield ".".join(str(part) for part in below[2:]), below


def _entries(node: object, path: DocumentPath, problems: Problems) -> Iterator[tuple[str, Any, DocumentPath]]:
    if not isinstance(node, dict) or (not node and path != ("axes",)):
        problems.add(path, f"got {describe(node)}; allowed: a mapping of config paths, such as train.lr: [1e-3, 3e-3]")
        return
    for name, value in node.items():
        yield name, value, (*path, name)


def _items(node: object, key: str, problems: Problems) -> Iterator[tuple[int, Any]]:
    if not isinstance(node, list):
        problems.add((key,), f"got {describe(node)}; allowed: a list of mappings")
        return
    yield from enumerate(node)


def _known_axis(name: str, path: DocumentPath, problems: Problems) -> KnownField | None:
    known = config_fields().get(name)
    if known is not None and known.default == ():
        problems.add(
            path, f"{name} is a list of sections, which is no value of an axis; make an arm of each", on_key=True
        )
        return None
    if known is not None:
        return known
    inside = [field for field in config_fields() if field.startswith(f"{name}.")]
    if inside:
        problems.add(path, f"{name} is a section; allowed: one of its fields: {', '.join(inside)}", on_key=True)
    elif name in config_section().fields or name == "seed":
        problems.add(path, unknown_key(name, ()), on_key=True)
    else:
        said = f"unknown config path {name!r}; allowed: a path such as train.lr or model.preset"
        last = [field for field in config_fields() if field.rpartition(".")[2] == name.rpartition(".")[2]]
        problems.add(
            path, said + (f" (did you mean {last[0]!r}?)" if last else nearest(name, config_fields())), on_key=True
        )
    return None


def _value_list(known: KnownField, node: object, path: DocumentPath, problems: Problems, *, repeats: bool) -> Values:
    if not isinstance(node, list) or not node:
        problems.add(path, f"got {describe(node)}; allowed: a list of values, each {known.allowed}")
        return ()
    values: list[Any] = []
    for index, item in enumerate(node):
        try:
            value = check_value(known, item)
        except ValueError as error:
            problems.add((*path, index), str(error))
            continue
        if value in values and not repeats:
            problems.add((*path, index), f"got {describe(value)} twice; allowed: every value once")
        values.append(value)
    return tuple(values)


def _point(
    node: object, path: DocumentPath, allowed: Sequence[str], problems: Problems, beside: str = ""
) -> dict[str, Any]:
    """One value for each of some axes."""
    if not isinstance(node, dict) or (not node and not beside):
        problems.add(path, f"got {describe(node)}; allowed: a mapping of config paths to values")
        return {}
    point: dict[str, Any] = {}
    for name, value in node.items():
        below = (*path, name)
        if beside and name not in allowed:
            known_names = [beside, *dict.fromkeys(allowed)]
            said = f"not an axis of this sweep; allowed: {', '.join(known_names)}{nearest(name, known_names)}"
            problems.add(below, said, on_key=True)
            continue
        known = _known_axis(name, below, problems)
        if known is None:
            continue
        try:
            point[name] = check_value(known, value)
        except ValueError as error:
            problems.add(below, str(error))
    return point
