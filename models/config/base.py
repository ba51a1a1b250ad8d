"""What every config object is made of: strict numbers, and a frozen base. No coercion but YAML's integral floats."""

from __future__ import annotations

from typing import Annotated, Any

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field


def integral(value: Any) -> Any:
    """``1e6`` is how YAML writes a million."""
    if isinstance(value, float) and value.is_integer():
        return int(value)
    return value


def as_tuple(value: Any) -> Any:
    return tuple(value) if isinstance(value, list) else value


Integer = Annotated[int, BeforeValidator(integral)]
Count = Annotated[int, BeforeValidator(integral), Field(ge=1)]
Fraction = Annotated[float, Field(ge=0.0, le=1.0)]
Positive = Annotated[float, Field(gt=0.0)]


class Frozen(BaseModel):
    """Base of every config object: immutable, strict, unknown keys refused."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, allow_inf_nan=False)


def evenly_spaced(num_steps: int, points: int) -> tuple[int, ...]:
    """At most ``points`` of the steps 1 to ``num_steps``, ascending; the last is ``num_steps``. None for 0 points."""
    points = min(points, num_steps)
    return tuple(sorted({max(1, round(num_steps * i / points)) for i in range(1, points + 1)}))
