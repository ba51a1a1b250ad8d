"""Learning rates that are not all written in the file: searched for, or a grid that grows at its edge."""

from __future__ import annotations

import math
from typing import Annotated, Any

from pydantic import BeforeValidator, Field, ValidationError, model_validator

from models.config import Count, Frozen, Integer, Positive


def rounded_rate(lr: float) -> float:
    """To three digits: what is read is what was run, and the same on every machine."""
    return float(f"{lr:.3g}")


def _as_tuple(value: Any) -> Any:
    return tuple(float(one) if isinstance(one, int) else one for one in value) if isinstance(value, list) else value


Rates = Annotated[tuple[Positive, ...], BeforeValidator(_as_tuple)]


class SearchedRates(Frozen):
    """``{search: [1e-4, 1e-1], trials: 6}``: so many rates an arm, the first half spread evenly, the others suggested
    one by one from the losses so far."""

    search: Annotated[Rates, Field(min_length=2, max_length=2)]
    """The lowest and the highest rate."""
    trials: Annotated[Integer, Field(ge=3, le=100)]
    """Learning rates of an arm, each run on every seed."""

    @model_validator(mode="after")
    def _is_a_range(self) -> SearchedRates:
        if self.search[1] < 1.5 * self.search[0]:
            raise ValueError(
                f"search: got {list(self.search)}; allowed: two rates, the second at least 1.5 times the first"
            )
        return self

    @property
    def first(self) -> tuple[float, ...]:
        """The middles of equal parts of the range in log LR: of as many parts as half of the trials, rounded up."""
        low, high = map(math.log, self.search)
        number = -(-self.trials // 2)
        return tuple(rounded_rate(math.exp(low + (high - low) * (i + 0.5) / number)) for i in range(number))

    @property
    def most(self) -> int:
        """Rates that an arm may come to have."""
        return self.trials


class ExtendedRates(Frozen):
    """``{values: [1e-3, 2e-3, 4e-3], extend: 2}``: a grid that grows at its edge, for all arms alike."""

    values: Annotated[Rates, Field(min_length=2)]
    extend: Annotated[Count, Field(le=20)]
    """At most so many rates are added."""

    @model_validator(mode="after")
    def _ascends(self) -> ExtendedRates:
        if list(self.values) != sorted(set(self.values)):
            raise ValueError(f"values: got {list(self.values)}; allowed: rates in ascending order, each once")
        return self

    @property
    def first(self) -> tuple[float, ...]:
        return self.values

    @property
    def most(self) -> int:
        return len(self.values) + self.extend


GrowingRates = SearchedRates | ExtendedRates

SEARCH_FORM = "{search: [LOWEST, HIGHEST], trials: NUMBER}"
EXTEND_FORM = "{values: [...], extend: NUMBER}"


def are_rates(value: object) -> bool:
    return isinstance(value, dict) and bool({"search", "values"} & set(value))


def check_rates(name: str, value: dict[str, Any]) -> GrowingRates:
    """ValueError says what is wrong with it."""
    kind = SearchedRates if "search" in value else ExtendedRates
    if name != "train.lr":
        raise ValueError(
            f"got {{{', '.join(value)}}}; allowed: a list of values; only train.lr is searched or extended"
        )
    try:
        return kind.model_validate(value)
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"])
        said = str(first["msg"]).removeprefix("Value error, ")
        form = SEARCH_FORM if kind is SearchedRates else EXTEND_FORM
        raise ValueError(f"{where}: {said}; allowed: {form}" if where else said) from error
