"""Caps on a sweep that may be changed while it runs: ``max_trials=4``, ``max_gpus=none``."""

from __future__ import annotations

from orchestrator.sweep.document import UserError
from orchestrator.sweep.resources import ResourcesConfig
from orchestrator.sweep.wording import nearest

CAPS = ("max_trials", "max_gpus")


def check_cap(text: str) -> str:
    """The cap in one form, ``max_gpus=64`` or ``max_gpus=none``; UserError for what is none."""
    name, equals, value = text.partition("=")
    if not equals or name not in CAPS:
        raise UserError(f"set {text}: allowed: {', '.join(f'{cap}=NUMBER' for cap in CAPS)}{nearest(name, CAPS)}")
    if value.lower() in ("none", "null"):
        return f"{name}=none"
    try:
        number = float(value)
        ResourcesConfig.model_validate({name: int(number) if number.is_integer() else number})
    except ValueError as error:
        raise UserError(f"set {text}: got {value!r}; allowed: a number, 0 or more, or none") from error
    return f"{name}={number:g}"
