"""How a model is trained: AdamW, schedule, budget, and the scaling of FP8."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, model_validator

from models.config.base import Count, Fraction, Frozen, Positive


class TrainConfig(Frozen):
    """AdamW, its schedule and its budget. Batches and budgets are in tokens."""

    tokens: Count
    batch_tokens: Count
    lr: Positive
    min_lr_fraction: Fraction = 0.1
    schedule: Literal["cosine", "wsd", "constant"] = "cosine"
    """``wsd``: warm-up, stable, then linear decay over the last ``decay_fraction``."""
    warmup_fraction: Fraction = 0.1
    warmup_tokens: Count | None = None
    """In place of ``warmup_fraction``: a warm-up that does not grow with the budget."""
    trunk_tokens: Count | None = None
    """With ``wsd``: the data comes in the order of a run of so many tokens, at least ``tokens``. So runs of several
    budgets are one run up to where each begins to decay, and shorter ones may start from a checkpoint of a longer."""
    decay_fraction: Fraction = 0.2
    weight_decay: Annotated[float, Field(ge=0.0)] = 0.1
    """Never applied to norms, biases and input-independent gates."""
    beta1: Annotated[float, Field(ge=0.0, lt=1.0)] = 0.9
    beta2: Annotated[float, Field(ge=0.0, lt=1.0)] = 0.95
    epsilon: Positive = 1e-8
    clip_gradient_norm: Positive = 1.0

    @property
    def num_steps(self) -> int:
        """Optimizer steps; the last batch may go past ``tokens``, never short of it."""
        return -(-self.tokens // self.batch_tokens)

    @property
    def num_data_steps(self) -> int:
        """Steps that the order of the training data is made for."""
        return -(-(self.trunk_tokens or self.tokens) // self.batch_tokens)

    @property
    def warmup_steps(self) -> int:
        if self.warmup_tokens is not None:
            return round(self.warmup_tokens / self.batch_tokens)
        return round(self.warmup_fraction * self.num_steps)

    @property
    def decay_steps(self) -> int:
        """Of ``wsd``: the last so many steps have less than the full rate, each less than the one before."""
        return round(self.decay_fraction * self.num_steps)

    @model_validator(mode="after")
    def _schedule_fits(self) -> TrainConfig:
        decay = self.decay_fraction if self.schedule == "wsd" else 0.0
        if self.warmup_tokens is None and self.warmup_fraction + decay > 1.0:
            raise ValueError(
                f"warmup_fraction {self.warmup_fraction} + decay_fraction {self.decay_fraction} must not exceed 1"
            )
        if self.warmup_tokens is not None and self.warmup_steps > self.num_steps - round(decay * self.num_steps):
            left = f"{self.num_steps:,} steps" + (f" less decay_fraction {decay:g} of them" if decay else "")
            raise ValueError(
                f"warmup_tokens {self.warmup_tokens:,} is {self.warmup_steps:,} steps; allowed: at most {left}"
            )
        return self

    @model_validator(mode="after")
    def _trunk_is_longer(self) -> TrainConfig:
        if self.trunk_tokens is None:
            return self
        if self.schedule != "wsd":
            raise ValueError(f"trunk_tokens does nothing with schedule {self.schedule}; allowed: with schedule wsd")
        if self.trunk_tokens < self.tokens:
            raise ValueError(f"trunk_tokens {self.trunk_tokens:,} must not be below tokens {self.tokens:,}")
        return self


class FP8Config(Frozen):
    """How precision ``fp8`` scales the operands of matrix products; weights are kept in bf16 and fp32."""

    recipe: Literal["tensorwise", "delayed", "blockwise", "mxfp8"] = "tensorwise"
    """Of Transformer Engine: one scale a tensor, from its present or its past maximum (``delayed``), one a block of
    128 x 128 or 1 x 128 (``blockwise``), or one for 32 values (``mxfp8``; Blackwell only)."""
    format: Literal["hybrid", "e4m3"] = "hybrid"
    """``hybrid``: E4M3 forward, E5M2 for gradients."""

    @property
    def multiple(self) -> int:
        """What every dimension of a matrix product must be a multiple of: the kernel's alignment, or the block."""
        return {"tensorwise": 16, "delayed": 16, "blockwise": 128, "mxfp8": 32}[self.recipe]
