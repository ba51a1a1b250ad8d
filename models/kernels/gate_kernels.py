"""The fused gate's Triton kernels and their launches. Importing this module needs Triton.

A row is one head of one token. Elementwise, a program takes a tile of rows and columns. Headwise, it takes whole
rows, so that the sum over the head, which is the gradient of the row's one logit, stays in one program: no atomics,
and the same bits every time.

Arguments ``x_s``, ``x_b``, ``x_h`` are strides of x by position, sequence and head, ``x_g`` and ``x_q`` by group and
by head within it. What is written is contiguous.
"""

from __future__ import annotations

from typing import Any

import triton
import triton.language as tl
from torch import Tensor

_TILE_BYTES = 4096
_NUM_WARPS = 4
"""32 bytes a thread, which is two vector loads from each input."""
_TILE_COLUMNS = 128


@triton.jit  # type: ignore[untyped-decorator]
def _score(logits: tl.tensor, scale: tl.tensor, ACTIVATION: tl.constexpr) -> tuple[tl.tensor, tl.tensor]:
    """(score, its derivative by the logits)."""
    sigmoid = tl.sigmoid(logits)
    if ACTIVATION == "sigmoid":
        score = sigmoid
        slope = sigmoid * (1.0 - sigmoid)
    elif ACTIVATION == "silu":
        score = logits * sigmoid
        slope = sigmoid * (1.0 + logits * (1.0 - sigmoid))
    elif ACTIVATION == "ns_sigmoid":
        score = 0.5 + 0.5 * sigmoid
        slope = 0.5 * sigmoid * (1.0 - sigmoid)
    else:
        tl.static_assert(ACTIVATION == "identity")
        score = logits
        slope = tl.full(logits.shape, 1.0, tl.float32)
    return scale * score, scale * slope


@triton.jit  # type: ignore[untyped-decorator]
def _tile(
    num_rows: tl.tensor,
    num_sequences: tl.tensor,
    HEADS: tl.constexpr,
    WIDTH: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
) -> tuple[tl.tensor, ...]:
    """This program's rows; the position, sequence and head of each; its columns; which rows and elements exist.

    64-bit numbers where they are multiplied by strides: a long batch has more than 2^31 elements.
    """
    rows = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    columns = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    tokens = rows // HEADS
    s = (tokens // num_sequences).to(tl.int64)
    b = (tokens % num_sequences).to(tl.int64)
    exists = rows < num_rows
    mask = exists[:, None] & (columns < WIDTH)[None, :]
    return rows.to(tl.int64), s, b, rows % HEADS, columns[None, :], exists, mask


@triton.jit  # type: ignore[untyped-decorator]
def _gate_forward(
    output: tl.tensor,
    signal: tl.tensor,
    logits: tl.tensor,
    num_rows: tl.tensor,
    num_sequences: tl.tensor,
    signal_s: tl.tensor,
    signal_b: tl.tensor,
    signal_h: tl.tensor,
    logits_s: tl.tensor,
    logits_b: tl.tensor,
    logits_g: tl.tensor,
    logits_q: tl.tensor,
    scale: tl.tensor,
    offset: tl.tensor,
    HEADS: tl.constexpr,
    HEADS_PER_GROUP: tl.constexpr,
    WIDTH: tl.constexpr,
    HEADWISE: tl.constexpr,
    ACTIVATION: tl.constexpr,
    ADDITIVE: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
) -> None:
    rows, s, b, h, columns, exists, mask = _tile(num_rows, num_sequences, HEADS, WIDTH, ROWS, COLUMNS)
    g, q = h // HEADS_PER_GROUP, h % HEADS_PER_GROUP
    signal += (s * signal_s + b * signal_b + h * signal_h)[:, None] + columns
    logits += s * logits_s + b * logits_b + g * logits_g + q * logits_q

    y = tl.load(signal, mask=mask).to(tl.float32)
    if HEADWISE:
        x = tl.load(logits, mask=exists).to(tl.float32)[:, None]
    else:
        x = tl.load(logits[:, None] + columns, mask=mask).to(tl.float32)
    score, _ = _score(x + offset, scale, ACTIVATION)
    gated = y + score if ADDITIVE else y * score
    tl.store(output + rows[:, None] * WIDTH + columns, gated, mask=mask)


@triton.jit  # type: ignore[untyped-decorator]
def _gate_backward(
    d_signal: tl.tensor,
    d_logits: tl.tensor,
    d_output: tl.tensor,
    signal: tl.tensor,
    logits: tl.tensor,
    num_rows: tl.tensor,
    num_sequences: tl.tensor,
    d_output_s: tl.tensor,
    d_output_b: tl.tensor,
    d_output_h: tl.tensor,
    signal_s: tl.tensor,
    signal_b: tl.tensor,
    signal_h: tl.tensor,
    logits_s: tl.tensor,
    logits_b: tl.tensor,
    logits_g: tl.tensor,
    logits_q: tl.tensor,
    scale: tl.tensor,
    offset: tl.tensor,
    HEADS: tl.constexpr,
    HEADS_PER_GROUP: tl.constexpr,
    WIDTH: tl.constexpr,
    HEADWISE: tl.constexpr,
    ACTIVATION: tl.constexpr,
    ADDITIVE: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
) -> None:
    rows, s, b, h, columns, exists, mask = _tile(num_rows, num_sequences, HEADS, WIDTH, ROWS, COLUMNS)
    g, q = h // HEADS_PER_GROUP, h % HEADS_PER_GROUP
    d_output += (s * d_output_s + b * d_output_b + h * d_output_h)[:, None] + columns
    signal += (s * signal_s + b * signal_b + h * signal_h)[:, None] + columns
    logits += s * logits_s + b * logits_b + g * logits_g + q * logits_q
    written = rows[:, None] * WIDTH + columns

    # What does not exist is 0, so that it adds nothing to a row's sum.
    dy = tl.load(d_output, mask=mask, other=0.0).to(tl.float32)
    if HEADWISE:
        x = tl.load(logits, mask=exists, other=0.0).to(tl.float32)[:, None]
    else:
        x = tl.load(logits[:, None] + columns, mask=mask, other=0.0).to(tl.float32)
    score, slope = _score(x + offset, scale, ACTIVATION)
    if ADDITIVE:
        d_score = dy
        tl.store(d_signal + written, dy, mask=mask)
    else:
        d_score = dy * tl.load(signal, mask=mask, other=0.0).to(tl.float32)
        tl.store(d_signal + written, dy * score, mask=mask)
    if HEADWISE:
        dx = tl.sum(d_score, axis=1, keep_dims=True) * slope
        tl.store(d_logits + rows[:, None], dx, mask=exists[:, None])
    else:
        tl.store(d_logits + written, d_score * slope, mask=mask)


INTERPRETED = not isinstance(_gate_forward, triton.JITFunction)
"""TRITON_INTERPRET was set when this module was loaded: the kernels run on CPU tensors, and on those only."""


def launch_forward(
    output: Tensor,
    signal_SBGQD: Tensor,
    logits_SBGQD: Tensor,
    *,
    scale: float,
    offset: float,
    activation: str,
    additive: bool,
) -> None:
    num_rows, grid, constants = _launch(signal_SBGQD, logits_SBGQD)
    _gate_forward[grid](
        output,
        signal_SBGQD,
        logits_SBGQD,
        num_rows,
        signal_SBGQD.shape[1],
        *_by_head(signal_SBGQD),
        *logits_SBGQD.stride()[:4],
        scale,
        offset,
        ACTIVATION=activation,
        ADDITIVE=additive,
        **constants,
    )


def launch_backward(
    d_signal: Tensor,
    d_logits: Tensor,
    d_output_SBGQD: Tensor,
    signal_SBGQD: Tensor,
    logits_SBGQD: Tensor,
    *,
    scale: float,
    offset: float,
    activation: str,
    additive: bool,
) -> None:
    num_rows, grid, constants = _launch(signal_SBGQD, logits_SBGQD)
    _gate_backward[grid](
        d_signal,
        d_logits,
        d_output_SBGQD,
        signal_SBGQD,
        logits_SBGQD,
        num_rows,
        signal_SBGQD.shape[1],
        *_by_head(d_output_SBGQD),
        *_by_head(signal_SBGQD),
        *logits_SBGQD.stride()[:4],
        scale,
        offset,
        ACTIVATION=activation,
        ADDITIVE=additive,
        **constants,
    )


def _by_head(x_SBGQD: Tensor) -> tuple[int, int, int]:
    """Strides by position, sequence and head, of a view whose heads were one dimension."""
    s, b, g, q, _ = x_SBGQD.stride()
    return s, b, q if x_SBGQD.shape[3] > 1 else g


def _launch(signal_SBGQD: Tensor, logits_SBGQD: Tensor) -> tuple[int, tuple[int, int], dict[str, Any]]:
    """(rows, grid, what the kernels take as constants)."""
    num_groups, heads_per_group, width = signal_SBGQD.shape[2:]
    headwise = logits_SBGQD.shape[-1] == 1
    columns = triton.next_power_of_2(width)
    if not headwise:
        columns = min(columns, _TILE_COLUMNS)
    tile_rows = max(1, _TILE_BYTES // (signal_SBGQD.element_size() * columns))
    num_rows = signal_SBGQD.numel() // width
    return (
        num_rows,
        (triton.cdiv(num_rows, tile_rows), triton.cdiv(width, columns)),
        {
            "HEADS": num_groups * heads_per_group,
            "HEADS_PER_GROUP": heads_per_group,
            "WIDTH": width,
            "HEADWISE": headwise,
            "ROWS": tile_rows,
            "COLUMNS": columns,
            "num_warps": _NUM_WARPS,
        },
    )
