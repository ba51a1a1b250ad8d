"""The trainer's step beside an eager plain-torch loop of the same model, and beside the same under torch.compile.

    OMP_NUM_THREADS=1 python tests/bench/plain_gpt.py [--preset cpu-1m] [--repetitions 15] [--skip-compile]

The model is written out below: RMSNorm, SwiGLU, RoPE, QK-norm, GQA through scaled_dot_product_attention, tied
embeddings, AdamW in its foreach form, clipping. It has the preset's parameters, to the last one. A step of each is
timed in turn, so that a busy machine slows all; what is printed is the median of the ratios, and their quartiles.
On two idle cores, by the clock: 1.017 (0.998 to 1.068) of eager, 0.823 (0.801 to 0.858) of torch.compile.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from collections.abc import Callable

import torch
from step_time import stepper, trial_of
from torch import Tensor, nn
from torch.nn import functional

from models import accounting, device
from models.config import Layout, ModelConfig, TrialConfig
from models.presets import PRESETS
from models.trainer import World


class Block(nn.Module):
    """Pre-norm attention and SwiGLU FFN on [B, S, hidden]."""

    def __init__(self, model: ModelConfig) -> None:
        super().__init__()
        self.heads, self.kv_heads, self.dim = model.num_query_heads, model.num_kv_heads, model.head_dim
        hidden, self.ffn_size = model.hidden_size, model.ffn_size
        self.attention_norm = nn.RMSNorm(hidden, eps=model.norm_epsilon)
        self.qkv = nn.Linear(hidden, (self.heads + 2 * self.kv_heads) * self.dim, bias=False)
        self.query_norm = nn.RMSNorm(self.dim, eps=model.norm_epsilon)
        self.key_norm = nn.RMSNorm(self.dim, eps=model.norm_epsilon)
        self.projection = nn.Linear(self.heads * self.dim, hidden, bias=False)
        self.ffn_norm = nn.RMSNorm(hidden, eps=model.norm_epsilon)
        self.gate_up = nn.Linear(hidden, 2 * self.ffn_size, bias=False)
        self.down = nn.Linear(self.ffn_size, hidden, bias=False)

    def forward(self, x_BSH: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        batch, sequence, _ = x_BSH.shape
        qkv = self.qkv(self.attention_norm(x_BSH)).view(batch, sequence, -1, self.dim)
        query, key, value = qkv.split([self.heads, self.kv_heads, self.kv_heads], dim=2)
        query, key = rotated(self.query_norm(query), cos, sin), rotated(self.key_norm(key), cos, sin)
        mixed = functional.scaled_dot_product_attention(
            query.transpose(1, 2), key.transpose(1, 2), value.transpose(1, 2), is_causal=True, enable_gqa=True
        )
        x_BSH = x_BSH + self.projection(mixed.transpose(1, 2).reshape(batch, sequence, -1))
        gate, up = self.gate_up(self.ffn_norm(x_BSH)).chunk(2, dim=-1)
        return x_BSH + self.down(functional.silu(gate) * up)


def rotated(x_BSHD: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    first, second = x_BSHD.chunk(2, dim=-1)
    return x_BSHD * cos + torch.cat((-second, first), dim=-1) * sin


class PlainGPT(nn.Module):
    """Mean cross-entropy in nats of labels [B, S] after tokens [B, S]."""

    def __init__(self, trial: TrialConfig) -> None:
        super().__init__()
        model, vocab_size = trial.model, trial.data.vocab_size
        self.embedding = nn.Embedding(vocab_size, model.hidden_size)
        self.blocks = nn.ModuleList(Block(model) for _ in range(model.num_layers))
        self.norm = nn.RMSNorm(model.hidden_size, eps=model.norm_epsilon)
        for parameter in self.parameters():
            if parameter.ndim > 1:
                nn.init.normal_(parameter, std=model.init_std)
        frequencies = model.rope_base ** (-torch.arange(0, model.head_dim, 2) / model.head_dim)
        angles = torch.outer(torch.arange(trial.data.sequence_length), frequencies).repeat(1, 2)[:, None, :]
        self.register_buffer("cos", angles.cos(), persistent=False)
        self.register_buffer("sin", angles.sin(), persistent=False)

    def forward(self, tokens: Tensor, labels: Tensor) -> Tensor:
        x_BSH = self.embedding(tokens)
        for block in self.blocks:
            x_BSH = block(x_BSH, self.cos, self.sin)
        logits = functional.linear(self.norm(x_BSH), self.embedding.weight)
        return functional.cross_entropy(logits.flatten(0, 1), labels.flatten())


def plain_stepper(trial: TrialConfig, compiled: bool) -> Callable[[], float]:
    """A function that does one training step on random bytes and returns its seconds."""
    torch.manual_seed(trial.seed)
    model = PlainGPT(trial)
    expected = accounting.parameters(trial.model, None, trial.data.vocab_size)
    assert sum(parameter.numel() for parameter in model.parameters()) == expected
    train = trial.train
    decay = [parameter for parameter in model.parameters() if parameter.ndim > 1]
    no_decay = [parameter for parameter in model.parameters() if parameter.ndim == 1]
    groups = [{"params": decay, "weight_decay": train.weight_decay}, {"params": no_decay, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=train.lr, betas=(train.beta1, train.beta2), foreach=True)
    loss_of = torch.compile(model) if compiled else model
    tokens = torch.randint(trial.data.vocab_size, (trial.batch_sequences, trial.data.sequence_length))
    labels = tokens.roll(-1, 1)

    def step() -> float:
        start = time.perf_counter()
        optimizer.zero_grad(set_to_none=True)
        loss = loss_of(tokens, labels)
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), train.clip_gradient_norm, foreach=True)
        optimizer.step()
        float(loss.detach())
        return time.perf_counter() - start

    return step


def interleaved(ours: Callable[[], float], plain: Callable[[], float], repetitions: int) -> tuple[list[float], float]:
    """Ratios of tokens/s, ours over the mean of the plain steps before and after; and the median of our seconds."""
    ratios, seconds = [], []
    before = plain()
    for _ in range(repetitions):
        own, after = ours(), plain()
        ratios.append((before + after) / 2 / own)
        seconds.append(own)
        before = after
    return ratios, statistics.median(seconds)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    dense = [name for name, model in PRESETS.items() if model.moe is None]
    parser.add_argument("--preset", choices=dense, default="cpu-1m")
    parser.add_argument("--repetitions", type=int, default=15)
    parser.add_argument("--sequences", type=int, default=8, help="sequences of 256 tokens a step")
    parser.add_argument("--skip-compile", action="store_true", help="torch.compile needs a C++ compiler")
    options = parser.parse_args()
    trial = trial_of(options, None, matched=False)
    print(f"{options.preset}, {trial.train.batch_tokens:,} tokens a step, {torch.get_num_threads()} thread(s)")
    with tempfile.TemporaryDirectory() as folder:
        world = World.join(0, Layout(), "cpu", f"file://{folder}/meet")
        with device.on("cpu"):
            ours = stepper(trial)
        for compiled in (False,) if options.skip_compile else (False, True):
            # Outside of the trainer's context: its function mode would slow the plain model down.
            plain = plain_stepper(trial, compiled)
            for _ in range(3):
                plain()
                with device.on("cpu"):
                    ours()
            print(row(trial, ours, plain, "torch.compile" if compiled else "eager", options.repetitions), flush=True)
        world.leave()


def row(trial: TrialConfig, ours: Callable[[], float], plain: Callable[[], float], name: str, repetitions: int) -> str:
    def in_context() -> float:
        with device.on("cpu"):
            return ours()

    ratios, seconds = interleaved(in_context, plain, repetitions)
    low, median, high = statistics.quantiles(ratios, n=4)
    speed = trial.train.batch_tokens / seconds
    return f"ours {speed:,.0f} tokens/s; over plain torch, {name}: {median:.3f}   quartiles {low:.3f} to {high:.3f}"


if __name__ == "__main__":
    main()
