"""All that decides the numbers of a trial, and its fingerprint."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field, model_validator

from models.config.base import Frozen, as_tuple, evenly_spaced, integral
from models.config.data import DataConfig
from models.config.gate import POSITIONS, GateConfig
from models.config.model import ModelConfig
from models.config.train import FP8Config, TrainConfig

NUMERICS = 1
"""Raised whenever a change alters numbers, so that an old result is never served for new code."""


class TrialConfig(Frozen):
    """Everything that decides a trial's numbers: a cell and a seed."""

    model: ModelConfig
    gate: GateConfig | None = None
    more_gates: Annotated[tuple[GateConfig, ...], BeforeValidator(as_tuple)] = Field(
        default=(), description="a list of gates such as [{position: value}], each at a position of its own"
    )
    data: DataConfig = DataConfig()
    train: TrainConfig
    precision: Literal["fp32", "bf16", "fp8"] = "fp32"
    """In a sweep with GPUs ``bf16`` by default; that and ``fp8`` need them."""
    fp8: FP8Config | None = None
    """Only with precision ``fp8``, and filled in there."""
    seed: Annotated[int, BeforeValidator(integral), Field(ge=0, lt=2**32)]
    """What NumPy's generator takes: Megatron shuffles the samples with it."""

    @model_validator(mode="before")
    @classmethod
    def _fill_in_fp8(cls, values: Any) -> Any:
        """A recipe by default and the same one by name are one trial, with one fingerprint."""
        if isinstance(values, dict) and values.get("precision") == "fp8" and values.get("fp8") is None:
            return {**values, "fp8": {}}
        return values

    @model_validator(mode="after")
    def _fp8_is_used(self) -> TrialConfig:
        if self.fp8 is not None and self.precision != "fp8":
            named = " and ".join(f"fp8.{name}" for name in sorted(self.fp8.model_fields_set)) or "fp8"
            raise ValueError(f"{named} needs precision fp8, not {self.precision}")
        return self

    @model_validator(mode="after")
    def _batch_holds_sequences(self) -> TrialConfig:
        if self.train.batch_tokens % self.data.sequence_length:
            raise ValueError(
                f"train.batch_tokens {self.train.batch_tokens:,} must be a multiple of "
                f"data.sequence_length {self.data.sequence_length:,}"
            )
        return self

    @model_validator(mode="after")
    def _one_gate_a_position(self) -> TrialConfig:
        positions = [gate.position for gate in self.gates]
        if len(set(positions)) < len(positions):
            raise ValueError(f"two gates at one position: {', '.join(positions)}; allowed: one gate a position")
        if self.more_gates and self.gate is None:
            raise ValueError("more_gates needs gate: give the first gate there")
        return self

    @property
    def gates(self) -> tuple[GateConfig, ...]:
        """All gates, in the order of POSITIONS: the order in which a file names them changes nothing."""
        named = self.more_gates if self.gate is None else (self.gate, *self.more_gates)
        return tuple(sorted(named, key=lambda gate: POSITIONS.index(gate.position)))

    @property
    def batch_sequences(self) -> int:
        return self.train.batch_tokens // self.data.sequence_length

    def validation_steps(self) -> tuple[int, ...]:
        """The optimizer steps after which the validation slice is measured, ascending."""
        return evenly_spaced(self.train.num_steps, self.data.validation.points)

    def canonical_json(self) -> str:
        """What the fingerprint covers: hashes stand for the files, so a moved corpus is the same trial.

        What is absent or off is left out, so that a mechanism that is added later changes no earlier fingerprint.
        """
        return _canonical(self._content())

    def fingerprint(self) -> str:
        """16 hexadecimal digits, equal for equal trials on every machine."""
        return self.fingerprint_by_seed()(self.seed)

    def fingerprint_by_seed(self) -> Callable[[int], str]:
        """The fingerprints of this config with other seeds; what they share is put together once."""
        content = self._content()

        def of_seed(seed: int) -> str:
            return hashlib.sha256(_canonical({**content, "seed": seed}).encode()).hexdigest()[:16]

        return of_seed

    def _content(self) -> dict[str, Any]:
        content = self.model_dump(mode="json", exclude={"more_gates"})
        if self.more_gates:
            # The order in which a file names the gates changes nothing.
            content["gate"] = [gate.model_dump(mode="json") for gate in self.gates]
        if self.train.trunk_tokens == self.train.tokens:
            # The longest run is the run that knows of no shorter ones.
            del content["train"]["trunk_tokens"]
        if self.train.warmup_tokens is not None:
            del content["train"]["warmup_fraction"]
        if self.data.corpus_sha256:
            del content["data"]["corpus"]
        for name in ("blend", "validation_sets"):
            content["data"][name] = [_hash_for_path(one) for one in content["data"][name]]
        if self.data.tokenizer_sha256:
            del content["data"]["tokenizer"]
        return _without_absent({"numerics": NUMERICS, **content})


def _canonical(content: dict[str, Any]) -> str:
    return json.dumps(content, sort_keys=True, separators=(",", ":"))


def _hash_for_path(corpus: dict[str, Any]) -> dict[str, Any]:
    dropped = "corpus" if corpus["corpus_sha256"] else "corpus_sha256"
    return {key: value for key, value in corpus.items() if value is not None and key != dropped}


def _without_absent(content: dict[str, Any]) -> dict[str, Any]:
    kept = {}
    for key, value in content.items():
        if isinstance(value, dict):
            value = _without_absent(value)
        if value is not None and value is not False and not (isinstance(value, dict | list) and not value):
            kept[key] = value
    return kept
