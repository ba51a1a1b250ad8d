"""A gate of the paper: where it sits, and what its score is."""

from __future__ import annotations

from typing import Literal, get_args

from pydantic import model_validator

from models.config.base import Frozen, Positive

Position = Literal["sdpa", "value", "key", "query", "dense"]
POSITIONS: tuple[Position, ...] = get_args(Position)
OPEN_OFFSET = 4.0
"""sigmoid(4) = 0.982: ``init: open`` adds this to a gate's logits, so that it starts near 1."""


class GateConfig(Frozen):
    """One gate of the paper (section 2.2): Y' = Y * score or Y + score.

    ``score = scale * activation(X W + offset)`` with X the layer's input after pre-normalisation.
    """

    position: Position
    granularity: Literal["elementwise", "headwise"] = "elementwise"
    sharing: Literal["head_specific", "head_shared"] = "head_specific"
    combine: Literal["multiplicative", "additive"] = "multiplicative"
    activation: Literal["sigmoid", "silu", "ns_sigmoid", "identity"] = "sigmoid"
    input: Literal["hidden", "none", "constant"] = "hidden"
    """``none``: a zero-initialised learned parameter instead of X W; ``constant``: the score is ``scale``."""
    shared_average: Literal["scores", "logits"] = "scores"
    """Head-shared gates average after the activation (our decision), or before it."""
    qk_order: Literal["after_norm", "before_norm"] = "after_norm"
    """Key and query gates act after QK-norm and before RoPE (our decision), or before the norm."""
    init: Literal["normal", "zero", "open"] = "normal"
    """``open`` adds a fixed 4 to the logits, so that a sigmoid starts at 0.98; it is not learnt."""
    scale: Positive = 1.0

    @model_validator(mode="after")
    def _meaningful(self) -> GateConfig:
        if self.position == "dense" and self.granularity == "headwise":
            raise ValueError("granularity headwise is not allowed at position dense: its output has no heads")
        if self.position == "dense" and self.sharing == "head_shared":
            raise ValueError("sharing head_shared is not allowed at position dense: its output has no heads")
        if self.qk_order == "before_norm":
            if self.position not in ("key", "query"):
                raise ValueError(f"qk_order before_norm is for positions key and query, not {self.position}")
            if self.granularity == "headwise" and self.combine == "multiplicative":
                raise ValueError("a headwise gate before QK-norm is cancelled by the norm; use qk_order after_norm")
        if self.init == "open" and self.activation not in ("sigmoid", "ns_sigmoid"):
            raise ValueError(f"init open needs activation sigmoid or ns_sigmoid, not {self.activation}")
        if self.init != "normal" and self.input == "none":
            raise ValueError(f"init {self.init} needs input hidden: a gate with input none starts at zero logits")
        if self.shared_average == "logits" and self.sharing != "head_shared":
            raise ValueError("shared_average logits needs sharing head_shared")
        if self.input == "constant":
            free = ("position", "input", "scale")
            extra = [
                name
                for name, field in type(self).model_fields.items()
                if name not in free and getattr(self, name) != field.default
            ]
            if extra:
                raise ValueError(
                    f"input constant multiplies by scale and takes only position and scale; got also {', '.join(extra)}"
                )
            if self.scale == 1.0:
                raise ValueError("input constant with scale 1.0 changes nothing; the half-scale control is scale: 0.5")
        return self
