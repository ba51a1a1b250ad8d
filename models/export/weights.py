"""Our tensors, and the published ones that hold the same numbers: a list of pairs for every architecture.

Ours fuses the projections of a query group: rows [queries | gate | key | value], group after group. Published are
``q_proj`` (with the gate's rows), ``k_proj`` and ``v_proj``; the forms differ in where q_proj keeps the gate:

- ``released``: group after group [queries of the group | gates of the group]
- ``qwen3-next``: head after head [query | gate], and norms are stored as their distance from one

Shapes: G query groups, H query heads, D head dimension.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from models import gates
from models.export.forms import SHARED_EXPERT_SIZE, Architecture

Shape = tuple[int, ...]


@dataclass(frozen=True)
class Weight:
    """One tensor of ours and its published counterparts. ``split`` and ``join`` move rows and change no number."""

    ours: str
    published: Mapping[str, Shape]
    split: Callable[[Tensor], Sequence[Tensor]] = lambda tensor: [tensor]
    join: Callable[[Sequence[Tensor]], Tensor] = lambda tensors: tensors[0]
    offset: float = 0.0
    """Ours minus the published: 1 for the norms of Qwen3-Next."""

    def to_published(self, tensor: Tensor) -> dict[str, Tensor]:
        shifted = (tensor.float() - self.offset).to(tensor.dtype) if self.offset else tensor
        return {name: part.contiguous() for name, part in zip(self.published, self.split(shifted), strict=True)}

    def to_ours(self, published: Mapping[str, Tensor], dtype: torch.dtype) -> Tensor:
        """The sum with an offset is taken in fp32, so that a stored bf16 keeps its digits in an fp32 model."""
        joined = self.join([published[name] for name in self.published])
        return (joined.float() + self.offset).to(dtype) if self.offset else joined.to(dtype)


def weights(architecture: Architecture) -> Iterator[Weight]:
    """Every weight of the model, in the order of the forward pass."""
    model = architecture.model
    embedding = (architecture.vocab_size, model.hidden_size)
    yield Weight("embedding.word_embeddings.weight", {"model.embed_tokens.weight": embedding})
    for layer in range(model.num_layers):
        ours, theirs = f"decoder.layers.{layer}.", f"model.layers.{layer}."
        yield _norm(architecture, f"{ours}input_layernorm", f"{theirs}input_layernorm", model.hidden_size)
        yield from _attention(architecture, f"{ours}self_attention.", f"{theirs}self_attn.")
        yield _norm(architecture, f"{ours}pre_mlp_layernorm", f"{theirs}post_attention_layernorm", model.hidden_size)
        yield from _feed_forward(architecture, f"{ours}mlp.", f"{theirs}mlp.")
    yield _norm(architecture, "decoder.final_layernorm", "model.norm", model.hidden_size)
    if not model.tied_embeddings:
        yield Weight("output_layer.weight", {"lm_head.weight": embedding})


def zeros(architecture: Architecture) -> dict[str, Shape]:
    """Published tensors that hold nothing: the shared expert that Qwen3-Next adds to its experts, and ours lack."""
    model = architecture.model
    if architecture.form != "qwen3-next" or model.moe is None:
        return {}
    into, out = (SHARED_EXPERT_SIZE, model.hidden_size), (model.hidden_size, SHARED_EXPERT_SIZE)
    shapes = {
        "shared_expert.gate_proj": into,
        "shared_expert.up_proj": into,
        "shared_expert.down_proj": out,
        "shared_expert_gate": (1, model.hidden_size),
    }
    return {
        f"model.layers.{layer}.mlp.{name}.weight": shape
        for layer in range(model.num_layers)
        for name, shape in shapes.items()
    }


def _norm(architecture: Architecture, ours: str, theirs: str, size: int) -> Weight:
    offset = 1.0 if architecture.form == "qwen3-next" else 0.0
    return Weight(f"{ours}.weight", {f"{theirs}.weight": (size,)}, offset=offset)


def _attention(architecture: Architecture, ours: str, theirs: str) -> Iterator[Weight]:
    model = architecture.model
    queries = model.num_query_heads // model.num_kv_heads
    gate_rows = gates.gate_rows_per_group(architecture.gate, queries, model.head_dim)
    rows = _Rows(model.num_kv_heads, queries * model.head_dim, gate_rows, model.head_dim)
    by_head = architecture.form == "qwen3-next"
    key_rows, query_rows = rows.groups * rows.head_dim, rows.groups * (rows.query + rows.gate)
    yield Weight(
        f"{ours}linear_qkv.weight",
        {
            f"{theirs}q_proj.weight": (query_rows, model.hidden_size),
            f"{theirs}k_proj.weight": (key_rows, model.hidden_size),
            f"{theirs}v_proj.weight": (key_rows, model.hidden_size),
        },
        split=lambda fused: rows.split(fused, by_head=by_head),
        join=lambda parts: rows.join(parts, by_head=by_head),
    )
    if model.qk_norm:
        for name in ("q", "k"):
            yield _norm(architecture, f"{ours}{name}_layernorm", f"{theirs}{name}_norm", model.head_dim)
    width = model.num_query_heads * model.head_dim
    yield Weight(f"{ours}linear_proj.weight", {f"{theirs}o_proj.weight": (model.hidden_size, width)})


@dataclass(frozen=True)
class _Rows:
    """Rows of a group's block in the fused projection; ``query`` and ``gate`` count those of all its heads."""

    groups: int
    query: int
    gate: int
    head_dim: int

    def split(self, fused: Tensor, *, by_head: bool) -> list[Tensor]:
        """q_proj with the gate's rows, k_proj, v_proj."""
        hidden = fused.shape[-1]
        blocks = fused.view(self.groups, -1, hidden)
        query, key, value = torch.split(blocks, [self.query + self.gate, self.head_dim, self.head_dim], dim=1)
        if by_head:
            query_2GHD = query.reshape(self.groups, 2, -1, self.head_dim, hidden)
            query = query_2GHD.transpose(1, 2)
        return [part.reshape(-1, hidden) for part in (query, key, value)]

    def join(self, parts: Sequence[Tensor], *, by_head: bool) -> Tensor:
        hidden = parts[0].shape[-1]
        query, key, value = parts
        if by_head:
            query = query.view(self.groups, -1, 2, self.head_dim, hidden).transpose(1, 2)
        blocks = [part.reshape(self.groups, -1, hidden) for part in (query, key, value)]
        return torch.cat(blocks, dim=1).reshape(-1, hidden)


def _feed_forward(architecture: Architecture, ours: str, theirs: str) -> Iterator[Weight]:
    model = architecture.model
    if model.moe is None:
        yield from _swiglu(architecture, ours, theirs)
        return
    shape = (model.moe.num_experts, model.hidden_size)
    yield Weight(f"{ours}router.weight", {f"{theirs}gate.weight": shape})
    for expert in range(model.moe.num_experts):
        yield from _swiglu(architecture, f"{ours}experts.local_experts.{expert}.", f"{theirs}experts.{expert}.")


def _swiglu(architecture: Architecture, ours: str, theirs: str) -> Iterator[Weight]:
    into = (architecture.model.ffn_size, architecture.model.hidden_size)
    yield Weight(
        f"{ours}linear_fc1.weight",
        {f"{theirs}gate_proj.weight": into, f"{theirs}up_proj.weight": into},
        split=lambda fused: fused.chunk(2),
        join=lambda parts: torch.cat(list(parts)),
    )
    yield Weight(f"{ours}linear_fc2.weight", {f"{theirs}down_proj.weight": into[::-1]})
