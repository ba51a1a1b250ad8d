"""What accelerators can do at best, by name: the denominators of utilisation, and the memory that plans reckon with.

Peaks are dense (the makers print twice as much, for structured sparsity) and in the precision that a matrix product
is done in: tensor cores in bf16 and fp8, plain fp32 (torch's default, not TF32). Memory is what the driver shows.
From NVIDIA's data sheets: A100 (1758950), H100 (2287922), H200 (3002446), HGX B200 and B300, L40S, L4, and for the
RTX 4090 its Ada whitepaper's rates with accumulation in fp32.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

AcceleratorName = Literal[
    "a100-40gb", "a100-80gb", "h100", "h100-pcie", "h200", "b200", "b300", "l4", "l40s", "rtx-4090"
]
"""h100, h200, b200 and b300 are the SXM modules."""


@dataclass(frozen=True)
class Accelerator:
    """FLOPs a second by precision, None where it has no such units; memory in GiB."""

    memory_gib: float
    bf16: float
    fp32: float
    fp8: float | None = None

    def peak_flops(self, precision: str) -> float | None:
        peak: float | None = {"bf16": self.bf16, "fp32": self.fp32, "fp8": self.fp8}[precision]
        return peak


ACCELERATORS: dict[AcceleratorName, Accelerator] = {
    "a100-40gb": Accelerator(memory_gib=39.5, bf16=312e12, fp32=19.5e12),
    "a100-80gb": Accelerator(memory_gib=79.5, bf16=312e12, fp32=19.5e12),
    "h100": Accelerator(memory_gib=79.5, bf16=989.5e12, fp32=67e12, fp8=1979e12),
    "h100-pcie": Accelerator(memory_gib=79.5, bf16=756.5e12, fp32=51e12, fp8=1513e12),
    "h200": Accelerator(memory_gib=140, bf16=989.5e12, fp32=67e12, fp8=1979e12),
    "b200": Accelerator(memory_gib=178, bf16=2250e12, fp32=75e12, fp8=4500e12),
    "b300": Accelerator(memory_gib=268, bf16=2250e12, fp32=75e12, fp8=4500e12),
    "l4": Accelerator(memory_gib=22.5, bf16=121e12, fp32=30.3e12, fp8=242.5e12),
    "l40s": Accelerator(memory_gib=44.9, bf16=362e12, fp32=91.6e12, fp8=733e12),
    "rtx-4090": Accelerator(memory_gib=23.9, bf16=165.2e12, fp32=82.6e12, fp8=330.3e12),
}
