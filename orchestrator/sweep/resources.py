"""What a trial takes of the cluster: its ranks, where they stand, and what runs at once."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field, ValidationError, model_validator
from pydantic_core import to_jsonable_python

from models.accounting import ACCELERATORS, AcceleratorName
from models.config import Backend, Count, Frozen, Integer, Layout, Positive

Placement = Literal["pack", "spread", "strict_pack", "strict_spread"]

WARM_BELOW_SECONDS = 600.0
"""With ``warm: auto``: where a fresh start, half a minute at worst, costs less than 5 %, processes are not kept."""


def as_tuple(value: Any) -> Any:
    return tuple(value) if isinstance(value, list) else value


ASSUMED_MEMORY_GIB = 79.5
"""Of a GPU that no sweep names: an 80 GB one."""


class ResourcesRule(Frozen):
    """Resources for the cells that match ``where``; what it leaves out stays as it is for all."""

    where: Annotated[dict[str, Any], Field(min_length=1, description="a mapping of arm, or axes, to values")]
    """``arm``, or axes by their dotted names: a cell matches all of them."""
    gpus: Annotated[float, Field(ge=0.0)] | None = None
    cpus: Positive | None = None
    layout: dict[str, Any] | None = Field(default=None, description="keys of resources.layout, or null")
    """Laid over the other layout key by key."""
    placement: Placement | None = None
    micro_batch_sequences: Count | None = None
    memory_gib: Positive | None = None
    accelerator: AcceleratorName | None = None
    peak_flops: Positive | None = None
    warm: Literal["auto", "on", "off"] | None = None

    @model_validator(mode="after")
    def _changes_something(self) -> ResourcesRule:
        names = [name for name in type(self).model_fields if name != "where"]
        if all(getattr(self, name) is None for name in names):
            raise ValueError(f"a rule that changes nothing; allowed: at least one of {', '.join(names)}")
        return self

    def matches(self, arm: str, axes: Mapping[str, Any]) -> bool:
        """Also with ``axes`` as the store keeps them, in JSON."""
        cell = {**axes, "arm": arm}
        return all(
            to_jsonable_python(cell.get(name)) == to_jsonable_python(value) for name, value in self.where.items()
        )


class ResourcesConfig(Frozen):
    """What one rank takes, and how a trial is spread over ranks."""

    gpus: Annotated[float, Field(ge=0.0)] = 0.0
    cpus: Positive = 1.0
    layout: Layout = Layout()
    placement: Placement = "pack"
    """Of the groups of tensor-parallel ranks, each of which is on one node: on as few nodes as go, or spread out."""
    backend: Backend = "auto"
    micro_batch_sequences: Count | None = None
    """Sequences a rank takes at once; None: as many as fit into its memory, by the model of ``accounting``."""
    max_trials: Annotated[Integer, Field(ge=0)] | None = None
    """Trials at once; None: as many as the cluster holds. ``gatesweep set`` changes it while the sweep runs."""
    max_gpus: Annotated[float, Field(ge=0.0)] | None = None
    """GPUs at once, likewise."""
    grace_seconds: Positive = 600.0
    """How long gangs on a cluster train on without a controller, waiting for the next one to adopt them."""
    warm: Literal["auto", "on", "off"] = "auto"
    """Whether a gang's processes take further trials; ``auto``: after trials of less than ten minutes."""
    warm_trials: Count = 100
    """After so many trials a gang's processes are replaced."""
    accelerator: AcceleratorName | None = None
    """What the GPUs are: their memory and their peak, unless those are given."""
    memory_gib: Positive | None = None
    """Of one rank. None: the accelerator's; of unknown GPUs 79.5; on the CPU without a limit."""
    peak_flops: Positive | None = None
    """FLOPs a second of one rank at best: what utilisation is measured by. None: the accelerator's, if it is named."""
    expected_flops: Positive | None = None
    """FLOPs a second that one rank is thought to reach: what ``plan`` prices by until trials are complete."""

    by: Annotated[tuple[ResourcesRule, ...], BeforeValidator(as_tuple)] = Field(
        default=(), description="a list of rules such as [{where: {arm: large}, layout: {tensor: 2}}]"
    )
    """Other resources for the cells that match; the first rule that does holds."""

    def of(self, arm: str, axes: Mapping[str, Any]) -> ResourcesConfig:
        """Those of one cell, without rules."""
        rule = next((rule for rule in self.by if rule.matches(arm, axes)), None)
        return self.model_copy(update={"by": ()}) if rule is None else self.with_rule(rule)

    def with_rule(self, rule: ResourcesRule) -> ResourcesConfig:
        """A rule's values laid over the others, ``layout`` key by key."""
        changes = {name: value for name, value in rule.model_dump(exclude={"where"}).items() if value is not None}
        layout = {**self.layout.model_dump(), **changes.pop("layout", {})}
        return ResourcesConfig.model_validate({**self.model_dump(exclude={"by"}), **changes, "layout": layout})

    @property
    def device(self) -> Literal["cpu", "cuda"]:
        return "cuda" if self.gpus else "cpu"

    @property
    def rank_memory_gib(self) -> float | None:
        """Ranks that share a GPU share its memory."""
        if self.memory_gib is not None or not self.gpus:
            return self.memory_gib
        whole = ACCELERATORS[self.accelerator].memory_gib if self.accelerator else ASSUMED_MEMORY_GIB
        return whole * min(1.0, self.gpus)

    def rank_peak_flops(self, precision: str) -> float | None:
        """In a trial's precision; None when it is not known."""
        if self.peak_flops is not None or self.accelerator is None:
            return self.peak_flops
        peak = ACCELERATORS[self.accelerator].peak_flops(precision)
        return None if peak is None else peak * min(1.0, self.gpus)

    @model_validator(mode="after")
    def _accelerator_is_used(self) -> ResourcesConfig:
        if self.accelerator is not None and not self.gpus:
            raise ValueError(f"accelerator {self.accelerator} needs gpus, which is 0")
        return self

    @model_validator(mode="after")
    def _rules_make_resources(self) -> ResourcesConfig:
        for number, rule in enumerate(self.by):
            try:
                own = self.with_rule(rule)
            except ValidationError as error:
                found = error.errors()[0]
                where = "".join(f"{part}: " for part in found["loc"])
                said = found["msg"].removeprefix("Value error, ")
                raise ValueError(f"by[{number}]: {where}{said}") from error
            if own.device != self.device:
                raise ValueError(
                    f"by[{number}]: gpus {own.gpus:g} where the sweep has {self.gpus:g}; allowed: one kind of device "
                    "for all cells, since the precision follows from it"
                )
        return self
