"""Bandwidth of the fused gate, of the plain torch form and of a device copy, in one run. Needs a CUDA device.

    python tests/bench/gate_bandwidth.py [--granularity headwise] [--dtype fp32] [--sequences 8]

A gate is a memory-bound operation, so a device copy is the bar. Bandwidth counts what a gate must read and write,
once; for the plain form this makes its extra passes show as lost bandwidth, so that ratios are ratios of times.
"""

from __future__ import annotations

import argparse
import statistics
import sys
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from models import gates, kernels
from models.config import GateConfig

DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--granularity", choices=("elementwise", "headwise"), default="elementwise")
    parser.add_argument("--dtype", choices=DTYPES, default="bf16")
    parser.add_argument("--positions", type=int, default=4096, help="sequence length")
    parser.add_argument("--sequences", type=int, default=8, help="micro-batch")
    parser.add_argument("--groups", type=int, default=4, help="key-value heads")
    parser.add_argument("--heads-per-group", type=int, default=4)
    parser.add_argument("--head-dim", type=int, default=128)
    parser.add_argument("--repeats", type=int, default=20, help="calls in each of ten rounds")
    return parser.parse_args()


def tensors(options: argparse.Namespace, device: str) -> tuple[Tensor, Tensor]:
    """(signal [S, B, H, D], logits [S, B, G, Q, D or 1]): the logits a slice of the fused projection's output."""
    s, b, g, q, d = (
        options.positions,
        options.sequences,
        options.groups,
        options.heads_per_group,
        options.head_dim,
    )
    width = d if options.granularity == "elementwise" else 1
    create: dict[str, Any] = {"device": device, "dtype": DTYPES[options.dtype]}
    mixed = torch.randn(s, b, g, q * d + q * width + 2 * d, **create)
    logits = mixed[..., q * d : q * d + q * width].unflatten(3, (q, width))
    return torch.randn(s, b, g * q, d, **create).requires_grad_(), logits.detach().requires_grad_()


def plain(gate: GateConfig, signal: Tensor, logits: Tensor) -> Tensor:
    return gates.apply(gate, signal, gates.scores(gate, logits.flatten(2, 3), lambda scores: scores))


def seconds(work: Callable[[], object], repeats: int) -> float:
    """Time of one ``work`` on the device: the median of ten rounds of ``repeats``, after a warm-up that also compiles.

    Called back to back, so that the device never waits for Python.
    """
    for _ in range(5):
        work()
    rounds = []
    for _ in range(10):
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        for _ in range(repeats):
            work()
        end.record()
        end.synchronize()
        rounds.append(start.elapsed_time(end) / 1e3 / repeats)
    return statistics.median(rounds)


def forward_and_backward(
    gated: Callable[[GateConfig, Tensor, Tensor], Tensor], gate: GateConfig, signal: Tensor, logits: Tensor
) -> tuple[Callable[[], object], Callable[[], object]]:
    output = gated(gate, signal, logits)
    gradient = torch.randn_like(output)
    return (
        lambda: gated(gate, signal, logits),
        lambda: torch.autograd.grad(output, (signal, logits), gradient, retain_graph=True),
    )


def main() -> None:
    options = arguments()
    if not torch.cuda.is_available():
        sys.exit("gate_bandwidth needs a CUDA device, and torch sees none here")
    signal, logits = tensors(options, "cuda")
    gate = GateConfig(position="sdpa", granularity=options.granularity)
    if not kernels.supports(gate, signal, logits):
        sys.exit("gate_bandwidth needs Triton, and `import triton` fails here")
    source, target = torch.randn_like(signal), torch.empty_like(signal)
    work = {"device copy": (lambda: target.copy_(source), 2 * signal.nbytes)}
    signal_bytes, logits_bytes = signal.nbytes, logits.numel() * logits.element_size()
    for name, gated in (("fused", kernels.gated), ("plain torch", plain)):
        forward, backward = forward_and_backward(gated, gate, signal, logits)
        work[f"{name} forward"] = (forward, 2 * signal_bytes + logits_bytes)
        work[f"{name} backward"] = (backward, 3 * signal_bytes + 2 * logits_bytes)
    measured = {name: (seconds(call, options.repeats), num_bytes) for name, (call, num_bytes) in work.items()}

    print(f"{torch.cuda.get_device_name()}, torch {torch.__version__}; signal {list(signal.shape)} {options.dtype}")
    print(f"{options.granularity} sigmoid gate; median of ten rounds of {options.repeats}\n")
    print(f"{'':22}{'time':>12}{'bandwidth':>14}{'of a copy':>12}")
    copy_bandwidth = measured["device copy"][1] / measured["device copy"][0]
    for name, (time, num_bytes) in measured.items():
        bandwidth = num_bytes / time
        print(f"{name:22}{time * 1e6:9.1f} us{bandwidth / 1e9:9.0f} GB/s{bandwidth / copy_bandwidth:12.2f}")
    print()
    for direction in ("forward", "backward"):
        speedup = measured[f"plain torch {direction}"][0] / measured[f"fused {direction}"][0]
        print(f"{direction}: fused is {speedup:.2f} times as fast as plain torch")


if __name__ == "__main__":
    main()
