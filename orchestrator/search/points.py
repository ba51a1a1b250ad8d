"""How a sweep's trials look in Optuna: parameters, state, value and attributes. Shared by the study and its copy."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from typing import Any, Protocol

from optuna.distributions import (
    BaseDistribution,
    CategoricalDistribution,
    FloatDistribution,
    IntDistribution,
)
from optuna.trial import TrialState

TOLD = {
    "COMPLETE": TrialState.COMPLETE,
    "PRUNED": TrialState.PRUNED,
    "DIVERGED": TrialState.PRUNED,
    "FAILED": TrialState.FAIL,
}


class PlannedCell(Protocol):
    """What the search needs to know of a trial; ``plan.PlannedTrial`` and the store's rows have it."""

    @property
    def fingerprint(self) -> str: ...
    @property
    def arm(self) -> str: ...
    @property
    def axes(self) -> Mapping[str, Any]: ...
    @property
    def seed(self) -> int: ...


def distributions(cells: Sequence[PlannedCell]) -> dict[str, BaseDistribution]:
    """Optuna's search space over enumerated cells: ``arm`` and text axes categorical, numeric axes floats.

    ``seed`` is a whole number, although seeds have no order: Optuna compares all choices at every ask and tell, and
    there may be thousands. A numeric axis is logarithmic when it is positive and spans a factor of 4 or more. Lists
    and mappings become JSON.
    """
    seeds = [cell.seed for cell in cells]
    space: dict[str, BaseDistribution] = {
        "arm": CategoricalDistribution(list(dict.fromkeys(cell.arm for cell in cells))),
        "seed": IntDistribution(min(seeds), max(seeds)),
    }
    for axis in dict.fromkeys(axis for cell in cells for axis in cell.axes):
        values = [cell.axes[axis] for cell in cells if axis in cell.axes]
        if all(isinstance(value, int | float) and not isinstance(value, bool) for value in values):
            low, high = float(min(values)), float(max(values))
            space[axis] = FloatDistribution(low, high, log=low > 0 and high >= 4 * low)
        else:
            space[axis] = CategoricalDistribution(list(dict.fromkeys(_choice(value) for value in values)))
    return space


def parameters(cell: PlannedCell, space: Mapping[str, BaseDistribution]) -> dict[str, Any]:
    """A cell and its seed as a point of ``space``. An axis that the cell does not have is left out."""
    point: dict[str, Any] = {"arm": cell.arm, "seed": cell.seed}
    for axis, value in cell.axes.items():
        point[axis] = float(value) if isinstance(space[axis], FloatDistribution) else _choice(value)
    return point


def _choice(value: object) -> str | float | int | bool | None:
    return value if isinstance(value, str | float | int | bool | None) else json.dumps(value, sort_keys=True)


def told(state: str, value: float | None) -> tuple[TrialState, float | None]:
    """Optuna's state and value. COMPLETE without a finite value would be told as a NaN: it is FAIL."""
    if state != "COMPLETE":
        return TOLD[state], None
    return (TrialState.COMPLETE, value) if value is not None and math.isfinite(value) else (TrialState.FAIL, None)


def outcome(state: str, cause: str | None, reason: str | None, step: int | None) -> dict[str, Any]:
    known = {"state": str(state), "cause": cause, "reason": reason, "step": step}
    return {key: content for key, content in known.items() if content is not None}
