"""Triton kernels for CUDA. Each has a plain torch form elsewhere, which is its fallback and its oracle.

- ``fused_gate``: the face; torch only, so that it imports on a machine without Triton
- ``gate_kernels``: the kernels; imports Triton
"""

from models.kernels.fused_gate import available, gated, supports

__all__ = ["available", "gated", "supports"]
