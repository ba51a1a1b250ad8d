"""A cell's values -> its TrialConfig: files looked up, everything checked as a whole, the FFN width matched."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from typing import Any

from pydantic import ValidationError
from pydantic_core import ErrorDetails

from models import plugins
from models.accounting import (
    default_ffn_multiple,
    match_ffn_size,
    match_ffn_size_for_flops,
    parameters,
    training_flops_per_token,
)
from models.config import TrainConfig, TrialConfig
from orchestrator.plan import corpora
from orchestrator.plan.cells import CellError, Leaf, Leaves, nested
from orchestrator.plan.files import Files
from orchestrator.sweep import MatchConfig, ResourcesConfig, Sweep, config_fields

_LAYERS = ("resources", "base", "arms", "axes", "zip", "rows")
"""First keys of a place in the file, later ones laid over earlier ones."""


def cell_config(arm: str, leaves: Leaves, files: Files) -> TrialConfig:
    """The config of a cell, with seed 0 and the FFN width not yet matched; CellError when its values make none."""
    values = nested(leaves)
    values["seed"] = 0
    data = values.setdefault("data", {})
    corpora.fill_in(data, leaves, files)
    _pad_vocabulary(data, leaves)
    _look_up_plugins(values, leaves)
    try:
        config = TrialConfig.model_validate(values)
    except ValidationError as error:
        raise _cell_error(error.errors()[0], arm, leaves) from error
    _refuse_in_vain(config.train, leaves)
    return config


def _refuse_in_vain(train: TrainConfig, leaves: Leaves) -> None:
    """An arm or an axis that sets what its schedule never looks at would be a trial of its own, and differ in nothing.

    In ``base`` it does no harm: there it may serve arms with other schedules.
    """
    users = {"train.decay_fraction": ("wsd",), "train.min_lr_fraction": ("cosine", "wsd")}
    for path, schedules in users.items():
        leaf = leaves.get(path)
        if leaf is not None and leaf.source[0] != "base" and train.schedule not in schedules:
            name, allowed = path.partition(".")[2], " or ".join(schedules)
            said = f"{name} does nothing with schedule {train.schedule}; allowed: with schedule {allowed}"
            raise CellError(leaf.source, said)
    fraction = leaves.get("train.warmup_fraction")
    if train.warmup_tokens is not None and fraction is not None and fraction.source[0] != "base":
        raise CellError(fraction.source, "warmup_fraction does nothing beside warmup_tokens; allowed: one of the two")


def _look_up_plugins(values: dict[str, Any], leaves: Leaves) -> None:
    """Each plug-in's options with their defaults, and the hash of its source; null leaves it out."""
    model = values.get("model", {})
    named = {name: options for name, options in (model.get("plugins") or {}).items() if options is not None}
    if "plugins" in model:
        model["plugins"] = {}
    for name, options in named.items():
        path = f"model.plugins.{name}"
        try:
            model["plugins"][name] = plugins.planned(name, options).model_dump()
        except ValidationError as error:
            detail = error.errors()[0]
            where = ".".join([path, *map(str, detail["loc"])])
            said = f"{where}: {detail['msg'].removeprefix('Value error, ')}"
            raise CellError(_within(leaves, where, path).source, said) from error
        except plugins.PluginError as error:
            raise CellError(_within(leaves, path, path).source, str(error)) from error


def _within(leaves: Leaves, *paths: str) -> Leaf:
    """The leaf at the first path that has one, or below it."""
    return next(leaf for path in paths for name, leaf in leaves.items() if name == path or name.startswith(f"{path}."))


def _pad_vocabulary(data: dict[str, Any], leaves: Leaves) -> None:
    """``vocab_size``: the tokenizer's, or what the sweep pads it to; without the tokenizer only the latter is known."""
    padded, tokens = data.get("padded_vocab_size"), data.get("vocab_size")
    if padded is None and tokens is None:
        said = f"there is no file {data['tokenizer']}; to plan without it, set data.padded_vocab_size"
        raise CellError(leaves["data.tokenizer"].source, said)
    if padded is not None and tokens is not None and padded < tokens:
        allowed = f"at least {tokens:,}, the tokens of {data['tokenizer']}"
        raise CellError(leaves["data.padded_vocab_size"].source, f"got {padded:,}; allowed: {allowed}")
    data["vocab_size"] = padded or tokens


def matched(config: TrialConfig, sweep: Sweep, arm: str, resources: ResourcesConfig) -> TrialConfig:
    """``config`` with the FFN width of its match; ValueError when there is no such width.

    An arm that sets ``model.ffn_size`` itself keeps it.
    """
    match: MatchConfig = sweep.match
    if match.by == "none" or not config.gates or "ffn_size" in sweep.arms[arm].get("model", {}):
        return config
    multiple = ffn_step(config, match, resources)
    match_width = match_ffn_size if match.by == "parameters" else match_ffn_size_for_flops
    model = config.model.model_copy(update={"ffn_size": match_width(config.model, config.gates, multiple)})
    return config.model_copy(update={"model": model})


def ffn_step(config: TrialConfig, match: MatchConfig, resources: ResourcesConfig) -> int:
    """Matched FFN widths are multiples of this."""
    multiple = match.ffn_multiple or default_ffn_multiple(config.model)
    rows = resources.layout.tensor * (config.fp8.multiple if config.fp8 is not None else 1)
    return math.lcm(multiple, rows)


def match_residual(config: TrialConfig, match: MatchConfig, resources: ResourcesConfig) -> float:
    """The most by which a matched trial may miss, as a share: half a step of its FFN width."""
    if match.by == "none" or not config.gates:
        return 0.0
    wider = config.model.model_copy(update={"ffn_size": config.model.ffn_size + ffn_step(config, match, resources)})
    if match.by == "parameters":
        sizes = [parameters(model, config.gates, config.data.vocab_size) for model in (config.model, wider)]
    else:
        sizes = [
            training_flops_per_token(model, config.gates, config.data.vocab_size, config.data.sequence_length)
            for model in (config.model, wider)
        ]
    return (sizes[1] / sizes[0] - 1.0) / 2.0


def _cell_error(detail: ErrorDetails, arm: str, leaves: Leaves) -> CellError:
    """pydantic's error, at the place in the file that made it."""
    path = ".".join(str(part) for part in detail["loc"])
    message = detail["msg"].removeprefix("Value error, ")
    if detail["type"] == "missing":
        return _missing(path, arm, leaves)
    prefix = f"{path}." if path else ""
    inside = {name: leaf for name, leaf in leaves.items() if name == path or name.startswith(prefix)}
    return CellError(_blamed(inside, message).source, message)


def _missing(path: str, arm: str, leaves: Leaves) -> CellError:
    section, _, name = path.rpartition(".")
    if not section:
        return CellError(("base",), f"missing key {name}; set it in base, an arm or an axis", on_key=True)
    inside = {known: leaf for known, leaf in leaves.items() if known.startswith(f"{section}.")}
    allowed = config_fields()[path].allowed
    if not inside:
        return CellError(("base",), f"missing key {path}; allowed: {allowed}", on_key=True)
    latest = max(inside.values(), key=lambda leaf: _LAYERS.index(str(leaf.source[0])))
    if latest.source[0] in ("base", "arms"):
        return CellError(latest.source[:-1], f"missing key {name}; allowed: {allowed}", on_key=True)
    return CellError(latest.source, f"sets a part of {section}, but arm {arm} lacks {path}")


def _blamed(inside: Mapping[str, Leaf], message: str) -> Leaf:
    """The value that a message is about: of those it names, the one laid on last, then the one it names first."""

    def where(path: str) -> int:
        found = re.search(rf"\b{path.rpartition('.')[2]}\b", message)
        return found.start() if found else -1

    named = {path: leaf for path, leaf in inside.items() if where(path) >= 0} or inside
    return max(named.items(), key=lambda item: (_LAYERS.index(str(item[1].source[0])), -where(item[0])))[1]
