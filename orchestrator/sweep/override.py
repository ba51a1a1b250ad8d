"""Dotted overrides from the command line: ``train.tokens=1e6`` sets one value of the file's tree, never the file."""

from __future__ import annotations

from typing import Any

from orchestrator.sweep.document import DocumentPath, Places, UserError, dotted, read_value
from orchestrator.sweep.fields import config_section
from orchestrator.sweep.wording import describe, nearest


def apply_override(tree: dict[str, Any], override: str, places: Places) -> None:
    """Set the value in ``tree`` and mark its place as the override's."""
    key, equals, text = override.partition("=")
    key = key.strip()
    if not equals or not key or not text.strip() or not all(key.split(".")):
        raise UserError(f"override {override!r}: allowed: KEY=VALUE with a dotted key, such as train.tokens=1e6")
    path = override_path(key)
    value = read_value(text, f"override {override!r}")
    arms = tree.get("arms")
    if path[0] == "arms" and len(path) > 2 and isinstance(arms, dict) and path[1] not in arms:
        raise UserError(
            f"override {override!r}: no arm {path[1]!r}; allowed: {', '.join(arms)}{nearest(path[1], arms)}"
        )
    node = tree
    for depth, part in enumerate(path[:-1], start=1):
        below = node.setdefault(str(part), {})
        if below is None and path[0] in ("base", "arms"):
            below = node[str(part)] = {}
        if not isinstance(below, dict):
            raise UserError(
                f"override {override!r}: {dotted(path[:depth])} is {describe(below)}, which has no key "
                f"{path[depth]}; set it as a whole: {dotted(path[:depth])}=..."
            )
        node = below
    node[str(path[-1])] = value
    places.overrides[path] = override


def override_path(key: str) -> DocumentPath:
    """Where a dotted key stands in the file: config keys within ``base``, all others at the top."""
    first, *rest = key.split(".")
    if first in config_section().fields:
        return ("base", first, *rest)
    if first == "axes" and rest:
        return ("axes", ".".join(rest))
    return (first, *rest)
