"""The key of an arm at values of axes: of a group of learning rates, and of an arm on a rung of a ladder."""

from __future__ import annotations

import json
from collections.abc import Mapping


def arm_key(arm: str, axes: Mapping[str, object]) -> str:
    """The same whatever the order of the axes. Kept in stores."""
    return json.dumps([arm, dict(axes)], sort_keys=True, default=str)
