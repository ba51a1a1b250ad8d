"""Bytes that autograd keeps for the backward pass, a layer and a token, tensor by tensor.

After Korthikanti et al. (arXiv 2205.05198, section 4), for this family: SwiGLU, GQA, RMSNorm, attention without the
S x S matrix (but with it, where there are sink logits), gates, and experts behind the all-gather dispatcher. Every
line is a tensor that ``attention``, ``core_attention``, ``gates`` or Megatron's local layer saves; tests hold the sum
to what autograd really saved. Transformer Engine saves a little less.

All numbers are bytes for a token of the rank's share of the sequence, under ``layout``'s tensor parallelism. With
sequence parallelism, what lies between the matrix products is cut over the tensor ranks too (``apart``).
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from models.accounting.parameters import Gates, attention_width, each, gate_score_width, kv_width
from models.config import GateConfig, Layout, ModelConfig

FP32 = 4
CACHE_LINE = 16
"""In fp32 numbers."""


@dataclass(frozen=True)
class LayerActivations:
    """One layer's, in bytes a token."""

    layer_input: float
    """What full recomputation keeps of the layer."""
    core_attention: float
    """What selective recomputation drops."""
    rest: float

    @property
    def total(self) -> float:
        return self.layer_input + self.core_attention + self.rest

    def kept(self, recompute: str) -> float:
        if recompute == "full":
            return self.layer_input
        return self.total - (self.core_attention if recompute == "selective" else 0.0)


@dataclass(frozen=True)
class Saved:
    """The model and where it runs: what decides which tensors are saved."""

    model: ModelConfig
    gates: Gates
    layout: Layout
    sequence_length: int
    """Of a whole sequence."""
    item: int
    """Bytes of an activation: 4 in fp32, 2 in bf16."""
    on_cuda: bool

    def layer(self) -> LayerActivations:
        model, hidden = self.model, self.model.hidden_size
        core, attention = self._core_attention()
        norms = 2 * self._norm(hidden) + 2 * self._apart(hidden)
        sandwich = 2 * self._norm(hidden) if model.sandwich_norm else 0.0
        gates = sum(self._gate(gate) for gate in each(self.gates))
        ffn = self._ffn() if model.moe is None else self._experts()
        layer_input = self._apart(hidden)
        rest = norms + sandwich + self._qkv() + attention + self._output_nonlinearity() + gates + ffn - layer_input
        return LayerActivations(layer_input, core, rest)

    def ends(self, vocab_size: int) -> float:
        """After the last layer: final norm, the output layer's input, and the softmax over the vocabulary in fp32."""
        hidden = self.model.hidden_size
        softmax = vocab_size / self.layout.tensor * FP32 + 1 + 8  # target mask and masked targets
        return self._norm(hidden) + self._apart(hidden) + softmax

    def boundary(self) -> float:
        """A layer's output, as it goes to the next pipeline stage."""
        return self._apart(self.model.hidden_size)

    # -- parts, each in bytes a token -----------------------------------------------------------------------

    def _apart(self, width: float) -> float:
        ranks = self.layout.tensor if self.layout.sequence_parallel else 1
        return width * self.item / ranks

    def _cut(self, width: float) -> float:
        return width * self.item / self.layout.tensor

    def _norm(self, width: int) -> float:
        """Input and inverse root mean square."""
        ranks = self.layout.tensor if self.layout.sequence_parallel else 1
        return self._apart(width) + FP32 / ranks

    def _qkv(self) -> float:
        """The fused projection's output, which keys, values and gate logits are views of; QK-norm; RoPE's angles."""
        model, tensor = self.model, self.layout.tensor
        gates = sum(gate_score_width(model, gate) for gate in each(self.gates) if _in_projection(gate))
        found = self._cut(attention_width(model) + 2 * kv_width(model) + gates)
        if model.qk_norm:
            found += self._queries_copied() + (model.num_query_heads + model.num_kv_heads) * FP32 / tensor
        return found

    def _queries_copied(self) -> float:
        """The queries of several groups have keys between them in the projection: they are made one by a copy."""
        model = self.model
        return self._cut(attention_width(model)) if model.num_kv_heads > self.layout.tensor else 0.0

    def a_position(self) -> float:
        """A layer's bytes a position, whatever the number of sequences: the causal mask where attention needs one, and
        on CUDA RoPE's cosines and sines, for queries and for keys."""
        mask = self.sequence_length if self.model.softmax_sink else 0
        return mask + (4 * self.model.head_dim * self.item if self.on_cuda else 0)

    def angles(self) -> float:
        """On the CPU one set of cosines and sines serves all layers; in bytes a position."""
        return 0 if self.on_cuda else 2 * self.model.head_dim * self.item

    def _core_attention(self) -> tuple[float, float]:
        """(dropped by selective recomputation, kept): the rotated queries and keys and the output stay either way."""
        model, heads = self.model, self.model.num_query_heads / self.layout.tensor
        width = self._cut(attention_width(model))
        inputs = width + self._cut(kv_width(model))
        if not model.softmax_sink:
            return heads * FP32, inputs + width  # the log of each softmax's denominator
        # Megatron's own: queries, repeated keys and values, the weights with the sink's column, and the output.
        weights = FP32 if self.item == FP32 else FP32 + self.item
        own = 3 * width + heads * (self.sequence_length + 1) * weights
        return own - inputs, inputs + width

    def _output_nonlinearity(self) -> float:
        """What stands between attention's output and the projection: its own output at least, group norm twice."""
        model = self.model
        width, found = self._cut(attention_width(model)), 0.0
        if model.sdpa_output == "group_norm":
            found += 2 * width + model.num_query_heads * FP32 / self.layout.tensor
        elif model.sdpa_output == "silu":
            found += width
        return found

    def _gate(self, gate: GateConfig) -> float:
        """A gate's score, its signal and its output, as far as nothing else has saved them."""
        signal, output = self._signal(gate), self._output(gate)
        if gate.input == "constant":
            return output
        cut = self.layout.tensor
        if gate.position == "dense":
            cut = self.layout.tensor if self.layout.sequence_parallel else 1
        width = gate_score_width(self.model, gate) / cut
        own_logits = width * self.item if gate.position == "dense" and gate.input == "hidden" else 0.0
        if self.on_cuda and gate.sharing == "head_specific":
            return signal + output + own_logits  # the fused kernel saves signal and logits only
        is_shared = gate.sharing == "head_shared"
        narrow = width / self._heads(gate) if is_shared else width
        activated = narrow if is_shared and gate.shared_average == "logits" else width
        is_sigmoid = gate.activation in ("sigmoid", "ns_sigmoid")
        found = activated * FP32 if is_sigmoid else 0.0
        # Heads with something between them are made one dimension by a copy.
        is_copy = self.item != FP32 or activated != width or (_in_projection(gate) and self._is_grouped(gate))
        if gate.activation == "silu":
            found += activated * FP32 if is_copy else own_logits
        if gate.combine == "additive":
            return found + output
        # The activation's own result is kept once, and logits that are taken as they are only where they are a copy.
        is_own = gate.scale == 1.0 and activated == narrow
        if gate.activation == "identity" and is_own:
            found += narrow * FP32 if is_copy else own_logits
        elif gate.activation != "sigmoid" or not is_own:
            found += narrow * FP32
        return found + signal + output

    def _is_grouped(self, gate: GateConfig) -> bool:
        model = self.model
        in_groups = model.num_query_heads > model.num_kv_heads > self.layout.tensor
        return gate.position in ("sdpa", "query") and in_groups

    def _heads(self, gate: GateConfig) -> float:
        model = self.model
        on_queries = gate.position in ("sdpa", "query")
        return (model.num_query_heads if on_queries else model.num_kv_heads) / self.layout.tensor

    def _signal(self, gate: GateConfig) -> float:
        """Saved by a product, if it is neither attention's output nor a view of the projection."""
        model = self.model
        if gate.position == "dense":
            return self._apart(model.hidden_size)
        if gate.position == "query":
            is_normed = model.qk_norm and gate.qk_order == "after_norm"
            return self._cut(attention_width(model)) if is_normed else self._queries_copied()
        if gate.position == "key" and model.qk_norm and gate.qk_order == "after_norm":
            return self._cut(kv_width(model))
        return 0.0

    def _output(self, gate: GateConfig) -> float:
        """Saved by what comes after: the projection, attention, or QK-norm; RoPE and the residual save nothing."""
        model = self.model
        if gate.position == "sdpa":
            return self._cut(attention_width(model))
        if gate.position == "value" or (gate.position == "key" and gate.qk_order == "before_norm" and model.qk_norm):
            return self._cut(kv_width(model))
        return 0.0

    def _ffn(self) -> float:
        """What goes into the second product, and SwiGLU's own."""
        return (self.model.ffn_size / self.layout.tensor + self._swiglu(self.layout.tensor)) * self.item

    def _swiglu(self, cut: int) -> float:
        """Numbers: both halves of the first product, and on the CPU the activated one too, the rows of the product at
        whole cache lines where nothing is reduced over ranks."""
        width = self.model.ffn_size / cut
        if self.on_cuda:
            return 2 * width
        return width + (2 * width if cut > 1 else math.ceil(2 * width / CACHE_LINE) * CACHE_LINE)

    def _experts(self) -> float:
        """Router and dispatch in fp32 and int64, then the FFN of each of the ``top_k`` copies of a token.

        Experts that are cut over tensor ranks see every token of the sequence; whole ones, with the tokens balanced
        over them, as many as their rank sends out.
        """
        moe, layout = self.model.moe, self.layout
        assert moe is not None
        apart = layout.tensor if layout.sequence_parallel else 1
        router = 13 * moe.num_experts + 28 * moe.top_k + 4
        copies = moe.top_k / (1 if layout.expert == 1 else apart)
        cut = layout.expert_tensor
        one = self.model.hidden_size + 2 * self.model.ffn_size / cut + self._swiglu(cut)
        return router / apart + copies * (one * self.item + FP32)


def _in_projection(gate: GateConfig) -> bool:
    return gate.input == "hidden" and gate.position != "dense"
