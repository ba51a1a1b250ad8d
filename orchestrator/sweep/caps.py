"""Caps on a sweep, and its priority, that may be changed while it runs: ``max_trials=4``, ``max_gpus=none``."""

from __future__ import annotations

from orchestrator.sweep.document import UserError
from orchestrator.sweep.resources import ResourcesConfig
from orchestrator.sweep.wording import nearest

CAPS = ("max_trials", "max_gpus")
PRIORITY = "priority"
MOST_PRIORITY = 1000


def check_cap(text: str) -> str:
    """The cap in one form, ``max_gpus=64`` or ``max_gpus=none``, or ``priority=5``; UserError for what is none."""
    name, equals, value = text.partition("=")
    if equals and name == PRIORITY:
        return f"{PRIORITY}={_priority(text, value)}"
    if not equals or name not in CAPS:
        known = (*CAPS, PRIORITY)
        raise UserError(f"set {text}: allowed: {', '.join(f'{cap}=NUMBER' for cap in known)}{nearest(name, known)}")
    if value.lower() in ("none", "null"):
        return f"{name}=none"
    try:
        number = float(value)
        ResourcesConfig.model_validate({name: int(number) if number.is_integer() else number})
    except ValueError as error:
        raise UserError(f"set {text}: got {value!r}; allowed: a number, 0 or more, or none") from error
    return f"{name}={number:g}"


def _priority(text: str, value: str) -> int:
    try:
        number = int(value)
    except ValueError:
        number = MOST_PRIORITY + 1
    if abs(number) > MOST_PRIORITY:
        raise UserError(f"set {text}: got {value!r}; allowed: a whole number from -{MOST_PRIORITY} to {MOST_PRIORITY}")
    return number
