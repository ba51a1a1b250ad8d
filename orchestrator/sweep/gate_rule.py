"""When a larger rung of an arm is trained at all: ``verdict.promote`` of a sweep file."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field, model_validator

from models.config import Frozen

GateWord = Literal["better", "equivalent", "inconclusive", "worse"]
"""What a gate makes of a verdict, one word each. Within the margin *better* is better and *worse* is equivalent, since
the margin is what counts as no difference; without an interval an arm is inconclusive. *No result* is none of them, and
passes no gate."""


def _as_words(value: Any) -> Any:
    if isinstance(value, list):
        return tuple(value)
    return (value,) if isinstance(value, str) else value


GateWords = Annotated[
    tuple[GateWord, ...],
    BeforeValidator(_as_words, json_schema_input_type=GateWord | tuple[GateWord, ...]),
    Field(description="better, equivalent, inconclusive or worse, or a list of them"),
]


class PromoteConfig(Frozen):
    """A larger rung of an arm is trained only if its verdict on the rung below passes. The baseline always does."""

    unless: GateWords = ()
    """An arm with one of these verdicts goes no further; all others do."""
    when: GateWords = ()
    """An arm with one of these verdicts goes on; no other does."""

    @model_validator(mode="after")
    def _says_one_thing(self) -> PromoteConfig:
        if bool(self.unless) == bool(self.when):
            got = "both unless and when" if self.unless else "neither unless nor when"
            raise ValueError(f"promote: got {got}; allowed: one of them, such as unless: worse")
        words = self.unless or self.when
        if len(set(words)) < len(words):
            raise ValueError(f"promote: got {', '.join(words)}; allowed: every word once")
        return self

    def passes(self, word: GateWord | None) -> bool:
        """None: there is no result."""
        if word is None:
            return False
        return word in self.when if self.when else word not in self.unless

    def __str__(self) -> str:
        return f"when {' or '.join(self.when)}" if self.when else f"unless {' or '.join(self.unless)}"
