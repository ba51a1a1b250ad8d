"""Mechanisms out of other packages: entry points of the group ``gatesweep.arms``, by name. Loads no torch itself.

A plug-in is a subclass of ``Plugin``; a sweep turns it on with ``model: {plugins: {NAME: {OPTION: VALUE}}}``. The plan
fills in the hash of the plug-in's source, which so is part of the fingerprint, and every rank compares its own.
"""

from __future__ import annotations

import hashlib
import importlib.util
import re
from functools import cache
from importlib.metadata import EntryPoint, entry_points
from pathlib import Path
from typing import Any

from models.config import Frozen, Layout, ModelConfig, PluginConfig

GROUP = "gatesweep.arms"
_NAME = re.compile(r"[a-z0-9][a-z0-9_-]*")


class PluginError(ValueError):
    """A plug-in that is not there, cannot be loaded, or is not the one that was planned with."""


class Plugin:
    """One mechanism. Its module is imported by ``gatesweep plan`` too: import torch and Megatron inside ``layer_spec``.

    ``options`` are an instance of the class's own ``Options``; all methods speak of one layer.
    """

    class Options(Frozen):
        """What a sweep may set: numbers, text, true or false, Literals; other types need a Field's description."""

    def refusals(self, model: ModelConfig, options: Any, layout: Layout) -> list[str]:
        """Why the mechanism cannot run in this model or on this layout; empty when it can."""
        return []

    def parameters(self, model: ModelConfig, options: Any) -> int:
        """Trainable parameters that it adds to a layer, or takes away. A trial fails at its start if they differ."""
        raise NotImplementedError(f"{type(self).__name__}.parameters(model, options)")

    def forward_flops_per_token(self, model: ModelConfig, options: Any, sequence_length: int) -> int:
        """FLOPs of the matrix products that it adds to a layer's forward pass."""
        return 0

    def layer_spec(self, spec: Any, model: ModelConfig, options: Any) -> Any:
        """The layer's Megatron ModuleSpec with the mechanism in it. ``spec`` is shared: ``dataclasses.replace`` it."""
        raise NotImplementedError(f"{type(self).__name__}.layer_spec(spec, model, options)")


@cache
def names() -> tuple[str, ...]:
    """Of all plug-ins that are installed here, whether they can be loaded or not."""
    return tuple(sorted({entry.name for entry in entry_points(group=GROUP)}))


@cache
def load(name: str) -> Plugin:
    entry = _entry(name)
    said = f"plug-in {name} ({entry.value})"
    if not _NAME.fullmatch(name):
        raise PluginError(f"{said}: allowed: a name of lower-case letters, digits, - and _")
    try:
        found = entry.load()
    except Exception as error:
        raise PluginError(f"{said} cannot be loaded: {type(error).__name__}: {error}") from error
    if not (isinstance(found, type) and issubclass(found, Plugin) and issubclass(found.Options, Frozen)):
        raise PluginError(f"{said} is {found!r}; allowed: a subclass of models.plugins.Plugin, with its Options")
    return found()


def _entry(name: str) -> EntryPoint:
    found = list(entry_points(group=GROUP, name=name))
    if not found:
        known = ", ".join(names()) or "none"
        raise PluginError(f"plug-in {name} is not installed here; installed (entry points {GROUP}): {known}")
    if len(found) > 1:
        raise PluginError(f"plug-in {name} is offered twice: {', '.join(entry.value for entry in found)}")
    return found[0]


def source_sha256(name: str) -> str:
    """Of every .py file of the package that the plug-in is in, by its path there, or of its only module."""
    top = _entry(name).module.partition(".")[0]
    spec = importlib.util.find_spec(top)
    if spec is None or (spec.origin is None and not spec.submodule_search_locations):
        raise PluginError(f"plug-in {name}: there is no package {top} here")
    if spec.submodule_search_locations:
        files = {
            path.relative_to(folder).as_posix(): path
            for folder in spec.submodule_search_locations
            for path in Path(folder).rglob("*.py")
        }
    else:
        files = {Path(str(spec.origin)).name: Path(str(spec.origin))}
    digest = hashlib.sha256()
    for place in sorted(files):
        content = files[place].read_bytes()
        digest.update(f"{place}\0{len(content)}\0".encode() + content)
    return digest.hexdigest()


def planned(name: str, options: dict[str, Any]) -> PluginConfig:
    """What a trial's config says of a plug-in: every option, defaults too, and its source. pydantic checks options."""
    checked = load(name).Options.model_validate(options)
    return PluginConfig(options=checked.model_dump(mode="json"), sha256=source_sha256(name))


def of(model: ModelConfig) -> list[tuple[str, Plugin, Any]]:
    """(name, plug-in, its options) of a model, in the order of names, which is that of their application."""
    loaded = []
    for name in sorted(model.plugins):
        plugin = load(name)
        # Not strict: a tuple has become a list on its way through JSON.
        loaded.append((name, plugin, plugin.Options.model_validate(model.plugins[name].options, strict=False)))
    return loaded


def check_source(model: ModelConfig) -> None:
    """PluginError when a plug-in in this process is not the one that the trial was planned with."""
    for name, config in sorted(model.plugins.items()):
        if (own := source_sha256(name)) != config.sha256:
            raise PluginError(
                f"plug-in {name}: its source here has sha256 {own[:16]}, the trial was planned with "
                f"{config.sha256[:16]}; install the same version on every node, or plan the sweep again"
            )
