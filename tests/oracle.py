"""An independent model in plain torch, written from the paper's equations: what ``layer_specs`` must build.

No Megatron here. The weights are Megatron's, taken apart by ``unpack`` into one matrix a projection, so that a small
gate's gradient is compared by itself and not beside the large ones of the queries.

Shapes: B batch, S sequence, H query heads, K key/value heads, D head dimension. Everything runs in float64.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from torch import Tensor

from models.config import GateConfig, ModelConfig, TrialConfig

Weights = dict[str, Tensor]


def unpack(named: Mapping[str, Tensor], model: ModelConfig, gate: GateConfig | None) -> Weights:
    """Megatron's tensors (weights, or their gradients) by our names, as float64 copies."""
    weights = {}
    for name, tensor in named.items():
        tensor = tensor.detach().double()
        if name.endswith("self_attention.linear_qkv.weight"):
            prefix = name.removesuffix("self_attention.linear_qkv.weight")
            weights |= {f"{prefix}{part}": rows for part, rows in _qkv(tensor, model, gate).items()}
        elif name.endswith("mlp.linear_fc1.weight"):
            stem = name.removesuffix("mlp.linear_fc1.weight")
            weights[f"{stem}ffn_gate"], weights[f"{stem}ffn_up"] = tensor.chunk(2)
        else:
            weights[name] = tensor.clone()
    return weights


def _qkv(fused: Tensor, model: ModelConfig, gate: GateConfig | None) -> Weights:
    """Per query group [queries | gate | key | value]: the matrices that multiply the layer's input."""
    hidden, dim, groups = model.hidden_size, model.head_dim, model.num_kv_heads
    queries = model.num_query_heads // groups
    gate_rows = 0
    if gate is not None and gate.input == "hidden" and gate.position != "dense":
        heads = queries if gate.position in ("sdpa", "query") else 1
        gate_rows = heads * dim if gate.granularity == "elementwise" else heads
    blocks = fused.reshape(groups, queries * dim + gate_rows + 2 * dim, hidden)
    edges = [0, queries * dim, queries * dim + gate_rows, queries * dim + gate_rows + dim, blocks.shape[1]]
    parts = {
        part: blocks[:, start:end].reshape(-1, hidden).clone()
        for part, start, end in zip(("wq", "w_gate", "wk", "wv"), edges[:-1], edges[1:], strict=True)
    }
    return parts if gate_rows else {part: rows for part, rows in parts.items() if part != "w_gate"}


def rms_norm(x: Tensor, weight: Tensor, epsilon: float) -> Tensor:
    return x / torch.sqrt((x * x).mean(dim=-1, keepdim=True) + epsilon) * weight


def rope(x_BSHD: Tensor, base: float) -> Tensor:
    """Rotate (x_i, x_{i + D/2}) by position * base^(-2i/D): the non-interleaved pairing."""
    num_positions, dim = x_BSHD.shape[1], x_BSHD.shape[-1]
    frequencies = base ** (-torch.arange(0, dim, 2, dtype=torch.float64) / dim)
    angle = (torch.arange(num_positions, dtype=torch.float64)[:, None] * frequencies)[None, :, None, :]
    first, second = x_BSHD.split(dim // 2, dim=-1)
    return torch.cat((first * angle.cos() - second * angle.sin(), second * angle.cos() + first * angle.sin()), dim=-1)


def activation(name: str, x: Tensor) -> Tensor:
    sigmoid = 1.0 / (1.0 + torch.exp(-x))
    return {"sigmoid": sigmoid, "silu": x * sigmoid, "ns_sigmoid": 0.5 + 0.5 * sigmoid, "identity": x}[name]


class Oracle:
    """The whole decoder; ``weights`` are leaves that collect gradients."""

    def __init__(self, model: ModelConfig, gate: GateConfig | None, weights: Weights) -> None:
        self.model, self.gate = model, gate
        self.weights = {name: weight.clone().requires_grad_() for name, weight in weights.items()}

    def losses(self, tokens_BS: Tensor, labels_BS: Tensor) -> Tensor:
        """Cross-entropy in nats of every label, [B, S]."""
        model, weights = self.model, self.weights
        x = weights["embedding.word_embeddings.weight"][tokens_BS]
        for layer in range(model.num_layers):
            prefix = f"decoder.layers.{layer}."
            x = x + self._attention(prefix, rms_norm(x, weights[prefix + "input_layernorm.weight"], model.norm_epsilon))
            normed = rms_norm(x, weights[prefix + "pre_mlp_layernorm.weight"], model.norm_epsilon)
            gated = activation("silu", normed @ weights[prefix + "ffn_gate"].T)
            x = x + (gated * (normed @ weights[prefix + "ffn_up"].T)) @ weights[prefix + "mlp.linear_fc2.weight"].T
        x = rms_norm(x, weights["decoder.final_layernorm.weight"], model.norm_epsilon)
        output = "embedding.word_embeddings.weight" if model.tied_embeddings else "output_layer.weight"
        logits = x @ weights[output].T
        return torch.logsumexp(logits, dim=-1) - logits.gather(-1, labels_BS[..., None])[..., 0]

    def _attention(self, prefix: str, x: Tensor) -> Tensor:
        model, gate, weights = self.model, self.gate, self.weights
        position = None if gate is None else gate.position
        before_norm = gate is not None and gate.qk_order == "before_norm"
        signal = {
            name: (x @ weights[prefix + w].T).unflatten(-1, (-1, model.head_dim))
            for name, w in (("query", "wq"), ("key", "wk"), ("value", "wv"))
        }
        if position == "value" or (before_norm and position in signal):
            signal[position] = self._gated(signal[position], prefix, x)
        if model.qk_norm:
            for name in ("query", "key"):
                weight = weights[f"{prefix}self_attention.{name[0]}_layernorm.weight"]
                signal[name] = rms_norm(signal[name], weight, model.norm_epsilon)
        if not before_norm and position in ("query", "key"):
            signal[position] = self._gated(signal[position], prefix, x)
        mixed = self._sdpa(
            rope(signal["query"], model.rope_base), rope(signal["key"], model.rope_base), signal["value"]
        )
        if position == "sdpa":
            mixed = self._gated(mixed, prefix, x)
        output = mixed.flatten(-2) @ weights[prefix + "self_attention.linear_proj.weight"].T
        return self._gated(output, prefix, x) if position == "dense" else output

    def _sdpa(self, query_BSHD: Tensor, key_BSKD: Tensor, value_BSKD: Tensor) -> Tensor:
        """Query head h attends with key/value head h // (H / K); causal."""
        num_positions, queries_per_group = query_BSHD.shape[1], self.model.num_query_heads // self.model.num_kv_heads
        heads = []
        for head in range(self.model.num_query_heads):
            key, value = (kv[:, :, head // queries_per_group] for kv in (key_BSKD, value_BSKD))
            logits = query_BSHD[:, :, head] @ key.transpose(1, 2) / math.sqrt(self.model.head_dim)
            future = torch.ones(num_positions, num_positions, dtype=torch.bool).triu(1)
            heads.append(logits.masked_fill(future, -math.inf).softmax(dim=-1) @ value)
        return torch.stack(heads, dim=2)

    def _gated(self, signal: Tensor, prefix: str, x: Tensor) -> Tensor:
        """Y * score or Y + score; Y is [B, S, heads, D], or [B, S, hidden] at position dense."""
        gate = self.gate
        assert gate is not None
        score = self._score(gate, prefix, x)
        return signal * score if gate.combine == "multiplicative" else signal + score

    def _score(self, gate: GateConfig, prefix: str, x: Tensor) -> Tensor:
        """scale * activation(X W + offset), averaged over the heads when shared."""
        if gate.input == "constant":
            return torch.tensor(gate.scale, dtype=torch.float64)
        if gate.input == "none":
            logits = self.weights[prefix + "self_attention.gate_parameter"][None, None]
        elif gate.position == "dense":
            logits = x @ self.weights[prefix + "self_attention.linear_gate.weight"].T
        else:
            width = self.model.head_dim if gate.granularity == "elementwise" else 1
            logits = (x @ self.weights[prefix + "w_gate"].T).unflatten(-1, (-1, width))
        if gate.init == "open":
            logits = logits + 4.0
        if gate.sharing == "head_specific":
            return gate.scale * activation(gate.activation, logits)
        if gate.shared_average == "logits":
            return gate.scale * activation(gate.activation, logits.mean(dim=2, keepdim=True))
        return gate.scale * activation(gate.activation, logits).mean(dim=2, keepdim=True)


def relative_error(ours: Tensor, reference: Tensor) -> float:
    """max|a - b| / max|b|; infinite when only the reference is zero, or shapes differ."""
    if ours.shape != reference.shape:
        return math.inf
    ours, reference = ours.detach(), reference.detach()
    difference, size = float((ours.double() - reference.double()).abs().max()), float(reference.abs().max())
    return difference / size if size else (0.0 if difference == 0.0 else math.inf)


def token_weight(tokens_BS: Tensor) -> Tensor:
    """What the tests weight losses with before they sum them: a mistake cannot cancel over tokens."""
    return torch.linspace(0.5, 1.5, tokens_BS.numel(), dtype=torch.float64).view_as(tokens_BS)


def losses_and_gradients(
    trial: TrialConfig, weights: Weights, tokens_BS: Tensor, labels_BS: Tensor
) -> tuple[Tensor, Weights]:
    """The oracle's losses [B, S], and the gradients of their weighted sum, by the names of ``unpack``."""
    oracle = Oracle(trial.model, trial.gate, weights)
    losses = oracle.losses(tokens_BS, labels_BS)
    (losses * token_weight(tokens_BS)).sum().backward()
    return losses.detach(), {name: weight.grad for name, weight in oracle.weights.items() if weight.grad is not None}


def wrong(
    trial: TrialConfig,
    named: Mapping[str, Tensor],
    losses: Tensor,
    gradients: Mapping[str, Tensor],
    batch: tuple[Tensor, Tensor],
    tolerance: float,
) -> dict[str, tuple[float, float]]:
    """Name -> (relative error, allowed), for what differs from the oracle: the losses and each projection's gradient.

    ``named``, ``losses`` and ``gradients`` are Megatron's. A gradient that is a sum of cancelling terms (one scalar
    a layer, in a headwise, shared, input-independent gate) cannot be had to 1e-5 in fp32 by anyone: then eight times
    what the exact gradient moves by when every weight moves by one rounding is allowed.
    """
    weights = unpack(named, trial.model, trial.gate)
    expected_losses, expected = losses_and_gradients(trial, weights, *batch)
    found = unpack(gradients, trial.model, trial.gate)
    assert found.keys() == expected.keys() == weights.keys()
    errors = {name: relative_error(found[name], gradient) for name, gradient in expected.items()}
    allowed = dict.fromkeys(errors, tolerance)
    if not max(errors.values()) < tolerance:
        moved = _one_rounding_away(trial, weights, expected, batch)
        allowed = {name: max(tolerance, 8.0 * moved[name]) for name in errors}
    errors["losses"], allowed["losses"] = relative_error(losses, expected_losses), tolerance
    return {name: (error, allowed[name]) for name, error in errors.items() if not error < allowed[name]}


def _one_rounding_away(
    trial: TrialConfig, weights: Weights, expected: Weights, batch: tuple[Tensor, Tensor]
) -> dict[str, float]:
    """Name -> the most that the gradient moves, over four draws."""
    generator, moved = torch.Generator().manual_seed(0), dict.fromkeys(expected, 0.0)
    for _ in range(4):
        near = {
            name: weight * (1.0 + 1.2e-7 * torch.randn(weight.shape, generator=generator, dtype=torch.float64))
            for name, weight in weights.items()
        }
        _, gradients = losses_and_gradients(trial, near, *batch)
        moved = {name: max(moved[name], relative_error(gradients[name], expected[name])) for name in expected}
    return moved
