"""An independent model in plain torch, written from the paper's equations: what ``layer_specs`` must build.

No Megatron here. The weights are Megatron's, taken apart by ``unpack`` into one matrix a projection, so that a small
gate's gradient is compared by itself and not beside the large ones of the queries.

Shapes: B batch, S sequence, H query heads, K key/value heads, D head dimension. Everything runs in float64.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from models.config import GateConfig, ModelConfig, TrialConfig

Weights = dict[str, Tensor]


def unpack(named: Mapping[str, Tensor], model: ModelConfig, gates: Sequence[GateConfig]) -> Weights:
    """Megatron's tensors (weights, or their gradients) by our names, as float64 copies."""
    weights = {}
    for name, tensor in named.items():
        tensor = tensor.detach().double()
        if name.endswith("self_attention.linear_qkv.weight"):
            prefix = name.removesuffix("self_attention.linear_qkv.weight")
            weights |= {f"{prefix}{part}": rows for part, rows in _qkv(tensor, model, gates).items()}
        elif name.endswith("linear_fc1.weight"):
            stem = name.removesuffix("linear_fc1.weight")
            weights[f"{stem}gate"], weights[f"{stem}up"] = tensor.chunk(2)
        else:
            weights[name] = tensor.clone()
    return weights


def _qkv(fused: Tensor, model: ModelConfig, gates: Sequence[GateConfig]) -> Weights:
    """Per query group [queries | a block a gate | key | value]: the matrices that multiply the layer's input."""
    hidden, dim, groups = model.hidden_size, model.head_dim, model.num_kv_heads
    queries = model.num_query_heads // groups
    rows = {"wq": queries * dim}
    for gate in gates:
        if gate.input == "hidden" and gate.position != "dense":
            heads = queries if gate.position in ("sdpa", "query") else 1
            rows[f"w_gate_{gate.position}"] = heads * dim if gate.granularity == "elementwise" else heads
    switch = model.switch_head
    if switch is None:
        rows |= {"wk": dim, "wv": dim}
    else:
        several = switch.num_experts * dim
        rows |= {"w_router": switch.num_experts, "wk": several if switch.projections == "key_value" else dim}
        rows["wv"] = several
    blocks = fused.reshape(groups, sum(rows.values()), hidden).split(list(rows.values()), dim=1)
    return {part: block.reshape(-1, hidden).clone() for part, block in zip(rows, blocks, strict=True)}


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


def chosen(logits: Tensor, top_k: int) -> Tensor:
    """One for the ``top_k`` largest, zero for the others."""
    rank = (logits[..., None, :] > logits[..., :, None]).sum(dim=-1)
    return (rank < top_k).double()


class Oracle:
    """The whole decoder; ``weights`` are leaves that collect gradients."""

    def __init__(self, model: ModelConfig, gates: Sequence[GateConfig], weights: Weights) -> None:
        self.model, self.gates = model, {gate.position: gate for gate in gates}
        self.weights = {name: weight.clone().requires_grad_() for name, weight in weights.items()}
        self.router_logits: list[Tensor] = []
        """[B, S, experts] of every layer of the last forward pass."""
        self.seen: dict[str, list[Tensor]] = {}
        """Of the last pass, a tensor a layer: ``attention`` probabilities [H, B, S, S]; ``attention_output``, ``ffn``
        and the ``residual`` after the layer, [B, S, hidden]; each gate's scores by its position."""

    def _see(self, name: str, tensor: Tensor) -> Tensor:
        self.seen.setdefault(name, []).append(tensor.detach())
        return tensor

    def losses(self, tokens_BS: Tensor, labels_BS: Tensor) -> Tensor:
        """Cross-entropy in nats of every label, [B, S]."""
        model, weights = self.model, self.weights
        self.router_logits, self.seen = [], {}
        x = weights["embedding.word_embeddings.weight"][tokens_BS]
        for layer in range(model.num_layers):
            prefix = f"decoder.layers.{layer}."
            normed = rms_norm(x, weights[prefix + "input_layernorm.weight"], model.norm_epsilon)
            output = self._see("attention_output", self._attention(prefix, normed))
            x = x + self._sandwiched(prefix + "self_attn_bda", output)
            normed = rms_norm(x, weights[prefix + "pre_mlp_layernorm.weight"], model.norm_epsilon)
            ffn = self._swiglu if model.moe is None else self._experts
            output = self._see("ffn", ffn(prefix + "mlp.", normed))
            x = self._see("residual", x + self._sandwiched(prefix + "mlp_bda", output))
        x = rms_norm(x, weights["decoder.final_layernorm.weight"], model.norm_epsilon)
        output = "embedding.word_embeddings.weight" if model.tied_embeddings else "output_layer.weight"
        logits = x @ weights[output].T
        return torch.logsumexp(logits, dim=-1) - logits.gather(-1, labels_BS[..., None])[..., 0]

    def _swiglu(self, stem: str, x: Tensor) -> Tensor:
        gated = activation("silu", x @ self.weights[stem + "gate"].T) * (x @ self.weights[stem + "up"].T)
        return gated @ self.weights[stem + "linear_fc2.weight"].T

    def _experts(self, stem: str, x: Tensor) -> Tensor:
        """Every expert on every token, weighted; the weight is zero but for the token's top k."""
        moe = self.model.moe
        assert moe is not None
        logits = x @ self.weights[stem + "router.weight"].T
        self.router_logits.append(logits)
        probabilities = logits.exp() / logits.exp().sum(dim=-1, keepdim=True)
        weights = probabilities * chosen(logits, moe.top_k)
        if moe.top_k > 1:
            weights = weights / weights.sum(dim=-1, keepdim=True)
        outputs = [
            weights[..., expert, None] * self._swiglu(f"{stem}experts.local_experts.{expert}.", x)
            for expert in range(moe.num_experts)
        ]
        return torch.stack(outputs).sum(dim=0)

    def fractions(self) -> list[Tensor]:
        """Of the last pass, each layer's share of its choices that went to each expert: f of arXiv 2501.11873."""
        assert self.model.moe is not None
        top_k = self.model.moe.top_k
        return [chosen(logits, top_k).flatten(0, -2).mean(dim=0) / top_k for logits in self.router_logits]

    def router_losses(self, fractions: Sequence[Tensor] | None = None) -> Tensor:
        """Load balancing, experts * sum of f * mean probability, and z-loss, mean of logsumexp^2; zero when dense."""
        moe, total = self.model.moe, torch.zeros((), dtype=torch.float64)
        if moe is None:
            return total
        for logits, fraction in zip(self.router_logits, fractions or self.fractions(), strict=True):
            mean_probability = torch.softmax(logits, dim=-1).flatten(0, -2).mean(dim=0)
            balance = moe.num_experts * (fraction * mean_probability).sum()
            z = (torch.logsumexp(logits, dim=-1) ** 2).mean()
            total = total + moe.aux_loss_coefficient * balance + moe.z_loss_coefficient * z
        return total

    def _sandwiched(self, name: str, output: Tensor) -> Tensor:
        """What joins the residual: with sandwich norm the normalised output."""
        if not self.model.sandwich_norm:
            return output
        return rms_norm(output, self.weights[f"{name}.norm.weight"], self.model.norm_epsilon)

    def _attention(self, prefix: str, x: Tensor) -> Tensor:
        model, weights = self.model, self.weights
        signal = {
            name: (x @ weights[prefix + w].T).unflatten(-1, (-1, model.head_dim))
            for name, w in (("query", "wq"), ("key", "wk"), ("value", "wv"))
        }
        if model.switch_head is not None:
            self._switch(signal, prefix, x)
        signal["value"] = self._gated("value", signal["value"], prefix, x)
        for name in ("query", "key"):
            order = self.gates[name].qk_order if name in self.gates else None
            if order == "before_norm":
                signal[name] = self._gated(name, signal[name], prefix, x)
            if model.qk_norm:
                weight = weights[f"{prefix}self_attention.{name[0]}_layernorm.weight"]
                signal[name] = rms_norm(signal[name], weight, model.norm_epsilon)
            if order == "after_norm":
                signal[name] = self._gated(name, signal[name], prefix, x)
        sinks = weights[prefix + "self_attention.core_attention.softmax_offset"] if model.softmax_sink else None
        mixed = self._sdpa(
            rope(signal["query"], model.rope_base), rope(signal["key"], model.rope_base), signal["value"], sinks
        )
        if model.sdpa_output == "group_norm":
            mixed = rms_norm(mixed, weights[prefix + "self_attention.sdpa_norm_weight"], model.norm_epsilon)
        elif model.sdpa_output == "silu":
            mixed = activation("silu", mixed)
        mixed = self._gated("sdpa", mixed, prefix, x)
        output = mixed.flatten(-2) @ weights[prefix + "self_attention.linear_proj.weight"].T
        return self._gated("dense", output, prefix, x)

    def _switch(self, signal: dict[str, Tensor], prefix: str, x: Tensor) -> None:
        """SwitchHead: head by head, the sum of its chosen experts' projections times their sigmoid scores."""
        switch = self.model.switch_head
        assert switch is not None
        logits = (x @ self.weights[prefix + "w_router"].T).unflatten(-1, (self.model.num_kv_heads, -1))
        scores = activation("sigmoid", logits) * chosen(logits, switch.top_k)
        for name in ("value",) if switch.projections == "value" else ("key", "value"):
            experts = signal[name].unflatten(2, (self.model.num_kv_heads, switch.num_experts))
            signal[name] = sum(
                scores[..., expert, None] * experts[:, :, :, expert] for expert in range(switch.num_experts)
            )

    def _sdpa(self, query_BSHD: Tensor, key_BSKD: Tensor, value_BSKD: Tensor, sinks_H: Tensor | None) -> Tensor:
        """Query head h attends with key/value head h // (H / K); causal. A sink adds e^sink to the denominator."""
        num_positions, queries_per_group = query_BSHD.shape[1], self.model.num_query_heads // self.model.num_kv_heads
        heads, probabilities = [], []
        for head in range(self.model.num_query_heads):
            key, value = (kv[:, :, head // queries_per_group] for kv in (key_BSKD, value_BSKD))
            logits = query_BSHD[:, :, head] @ key.transpose(1, 2) / math.sqrt(self.model.head_dim)
            future = torch.ones(num_positions, num_positions, dtype=torch.bool).triu(1)
            weights = logits.masked_fill(future, -math.inf).exp()
            denominator = weights.sum(dim=-1, keepdim=True)
            if sinks_H is not None:
                denominator = denominator + sinks_H[head].exp()
            probabilities.append(weights / denominator)
            heads.append(probabilities[-1] @ value)
        self._see("attention", torch.stack(probabilities))
        return torch.stack(heads, dim=2)

    def _gated(self, position: str, signal: Tensor, prefix: str, x: Tensor) -> Tensor:
        """Y * score or Y + score, where there is a gate; Y is [B, S, heads, D], or [B, S, hidden] at ``dense``."""
        gate = self.gates.get(position)
        if gate is None:
            return signal
        score = self._see(position, self._score(gate, prefix, x))
        return signal * score if gate.combine == "multiplicative" else signal + score

    def _score(self, gate: GateConfig, prefix: str, x: Tensor) -> Tensor:
        """scale * activation(X W + offset), averaged over the heads when shared."""
        if gate.input == "constant":
            return torch.tensor(gate.scale, dtype=torch.float64)
        if gate.input == "none":
            logits = self.weights[f"{prefix}self_attention.gate_parameters.{gate.position}"][None, None]
        elif gate.position == "dense":
            logits = x @ self.weights[prefix + "self_attention.linear_gate.weight"].T
        else:
            width = self.model.head_dim if gate.granularity == "elementwise" else 1
            logits = (x @ self.weights[f"{prefix}w_gate_{gate.position}"].T).unflatten(-1, (-1, width))
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
    """The oracle's losses [B, S], and the gradients of their weighted sum (and of the router's losses), by the names of
    ``unpack``."""
    oracle = Oracle(trial.model, trial.gates, weights)
    losses = oracle.losses(tokens_BS, labels_BS)
    ((losses * token_weight(tokens_BS)).sum() + oracle.router_losses()).backward()
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
    weights = unpack(named, trial.model, trial.gates)
    expected_losses, expected = losses_and_gradients(trial, weights, *batch)
    found = unpack(gradients, trial.model, trial.gates)
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
