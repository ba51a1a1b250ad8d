"""What stops a trial before its end: ``prune`` of a sweep file."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field, model_validator

from models.config import Count, Frozen, Integer, Positive


class DivergenceConfig(Frozen):
    """When a trial is stopped as diverged. A non-finite loss always is."""

    loss_above_start: Positive | None = 1.0
    """Nats above the first loss; None: this rule is off."""
    loss_above_best: Positive | None = 1.5
    """Nats above the trial's own best so far; None: this rule is off."""
    patience_steps: Count = 5
    """Steps in a row that a rule must hold."""
    gradient_norm_above: Positive | None = 1000.0
    warmup_steps: Annotated[Integer, Field(ge=0)] = 0
    """Steps at the start in which no rule looks."""


def _as_counts(value: Any) -> Any:
    if isinstance(value, list):
        return tuple(value)
    return (value,) if isinstance(value, int | float) and not isinstance(value, bool) else value


class RankConfig(Frozen):
    """Learning rates of an arm that are stopped since others of the same arm do better at the same place."""

    method: Literal["halving", "hyperband"] = "halving"
    """``hyperband`` spares a part of the rates the early rungs, for curves that cross."""
    reduction: Annotated[Integer, Field(ge=2)] = 2
    """At each rung one in so many rates is kept, rounded up; rungs are as many times apart."""
    first_fraction: Annotated[float, Field(gt=0.0, lt=1.0)] = 0.25
    """The first rung, as a share of the schedule."""
    seeds: Annotated[
        tuple[Count, ...], BeforeValidator(_as_counts, json_schema_input_type=Count | tuple[Count, ...])
    ] = Field(default=(1,), description="a whole number of 1 or more, or a list of them, one a rung")
    """The first so many seeds of the sweep decide; at the second rung the second number, the last for all further."""
    margin: Annotated[float, Field(ge=0.0)] = 0.0
    """A rate within so many nats of the last one that is kept is kept, too."""
    audit_share: Annotated[float, Field(ge=0.0, le=1.0)] = 0.1
    """Chance of a rate that ranks too low to be finished all the same."""
    audit_seed: Integer = 0
    """Draws which."""

    @model_validator(mode="after")
    def _seeds_only_grow(self) -> RankConfig:
        if not self.seeds or list(self.seeds) != sorted(self.seeds):
            raise ValueError(f"rank.seeds: got {list(self.seeds)}; allowed: numbers that do not fall from rung to rung")
        return self

    @property
    def rungs(self) -> tuple[float, ...]:
        """Shares of the schedule at which rates are compared, ascending; all below 1."""
        found = [self.first_fraction]
        while found[-1] * self.reduction < 1.0 - 1e-9:
            found.append(found[-1] * self.reduction)
        return tuple(found)

    def seeds_at(self, rung: int) -> int:
        """How many seeds decide at a rung, counted from 0."""
        return self.seeds[min(rung, len(self.seeds) - 1)]


class PruneConfig(Frozen):
    divergence: DivergenceConfig = DivergenceConfig()
    rank: RankConfig | None = None
    """None: nothing is stopped for being worse than something else."""
