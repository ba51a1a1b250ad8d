"""The shape of a model, and the mechanisms that are no gates."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field, model_validator

from models.config.base import Count, Frozen, Positive, integral


class MoEConfig(Frozen):
    """A mixture of experts in place of every FFN: a softmax router sends each token to its ``top_k`` experts.

    No token is dropped. The chosen weights sum to one (a softmax over the chosen logits), but for ``top_k`` 1: there
    the weight is the expert's own probability, since a weight that is always one would teach the router nothing.
    The paper does not publish the coefficients: the defaults are ours.
    """

    num_experts: Annotated[int, BeforeValidator(integral), Field(ge=2)]
    top_k: Count
    aux_loss_coefficient: Annotated[float, Field(ge=0.0)] = 1e-3
    """Of the load-balancing loss over the global batch (arXiv 2501.11873); 0 turns it off."""
    z_loss_coefficient: Annotated[float, Field(ge=0.0)] = 1e-3
    """Of the router's z-loss (ST-MoE, arXiv 2202.08906); 0 turns it off."""

    @model_validator(mode="after")
    def _enough_experts(self) -> MoEConfig:
        if self.top_k > self.num_experts:
            raise ValueError(f"top_k {self.top_k} must not exceed num_experts {self.num_experts}")
        return self


class SwitchHeadConfig(Frozen):
    """SwitchHead (arXiv 2312.07987): ``num_experts`` projections a kv head for the value, or for key and value.

    Of the layer's input a sigmoid router gives each kv head a score an expert; the ``top_k`` best experts' projections
    are summed, weighted by their scores. Key and value share the router, as the source side does there. The output's
    experts are not built: the paper of the gate (Table 6) has none.
    """

    projections: Literal["value", "key_value"]
    num_experts: Count
    top_k: Count

    @model_validator(mode="after")
    def _enough_experts(self) -> SwitchHeadConfig:
        if self.top_k > self.num_experts:
            raise ValueError(f"top_k {self.top_k} must not exceed num_experts {self.num_experts}")
        return self


class PluginConfig(Frozen):
    """A mechanism from another package (``models.plugins``). A sweep names options only; the plan writes both."""

    options: dict[str, Any]
    sha256: str


class ModelConfig(Frozen):
    """A decoder of the paper's shape family, dense or MoE: pre-norm RMSNorm, SwiGLU, RoPE, GQA."""

    num_layers: Count
    hidden_size: Count
    num_query_heads: Count
    num_kv_heads: Count
    head_dim: Count
    ffn_size: Count
    """Of one expert, where there are experts."""
    moe: MoEConfig | None = None
    switch_head: SwitchHeadConfig | None = None
    qk_norm: bool = True
    tied_embeddings: bool = True
    rope_base: Positive = 10_000.0
    sdpa_output: Literal["group_norm", "silu"] | None = None
    """A non-linearity on the SDPA output without a gate (paper, Table 3): RMSNorm of each head, or SiLU."""
    softmax_sink: bool = False
    """A learned logit a head in the softmax's denominator, which can take attention off the first token."""
    sandwich_norm: bool = False
    """Normalise the outputs of attention and FFN before they join the residual."""
    plugins: dict[str, PluginConfig] = Field(default={}, description="a mapping from plug-ins to their options")
    norm_epsilon: Positive = 1e-6
    init_std: Positive = 0.02

    @model_validator(mode="after")
    def _shape(self) -> ModelConfig:
        if self.num_query_heads % self.num_kv_heads:
            raise ValueError(
                f"num_query_heads {self.num_query_heads} must be a multiple of num_kv_heads {self.num_kv_heads}"
            )
        if self.head_dim % 2:
            raise ValueError(f"head_dim {self.head_dim} must be even: RoPE rotates pairs")
        if self.softmax_sink and self.sdpa_output == "group_norm":
            raise ValueError("softmax_sink with sdpa_output group_norm does nothing: the norm cancels a head's scale")
        return self
