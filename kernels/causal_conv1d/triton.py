"""The causal convolution in Triton: a program walks the tokens of one chunk, a few channels a thread.

The last W - 1 inputs stay in registers, so each input is loaded and widened once. Tiles of tokens by channels would
be bound by instructions: shifted loads widen, mask and select every input W times in the forward and 2W - 1
times in the backward. The rows of a few tokens are loaded together, so that the memory system is kept busy.
Each program of the backward leaves one partial weight gradient; these are summed in a fixed order.
Names: `i_` index, `o_` offsets, `p_` pointer, `m_` mask, `b_` value of a block of channels.
"""

# mypy: disable-error-code="no-untyped-def, assignment, var-annotated"
# ruff: noqa: RUF005 (Triton cannot unpack tuples)

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..faces import wide_dtype

__all__ = [
    "BACKWARD",
    "FORWARD",
    "backward_kernel",
    "conv_backward",
    "conv_forward",
    "forward_kernel",
]

WIDE = {torch.float32: tl.float32, torch.float64: tl.float64}


class Walk(NamedTuple):
    """Tokens of one program, and how many of their rows are loaded together."""

    chunk: int
    rows: int


FORWARD = {"small": Walk(16, 8), "large": Walk(64, 8)}
BACKWARD = {"small": Walk(29, 4), "large": Walk(125, 4)}
"""The backward walks W - 1 tokens more than the chunk; together they fill whole groups of rows."""

LARGE = 2**24
"""Inputs from which on there are programs enough for long chunks."""
CHANNELS = 128
"""Most channels a program, which has one warp: four channels a thread are one load of eight bytes in 16 bits."""


@triton.jit
def _mask(o_d, D, is_wanted):
    """Channels of a row that is wanted as a whole or not at all; the interpreter mistypes `block & scalar`."""
    return o_d < tl.where(is_wanted, D, 0)


@triton.jit
def _sigmoid(b_x):
    # exp2 is one instruction of the hardware; exp guards denormals around it.
    if b_x.dtype == tl.float64:
        return tl.sigmoid(b_x)
    return 1 / (1 + tl.exp2(b_x * -1.4426950408889634))


@triton.jit
def _is_start(p_positions, i_b, i_t, L):
    """Of one token; none outside the row."""
    return tl.load(p_positions + i_b * L + i_t, mask=(i_t >= 0) & (i_t < L), other=1) == 0


@triton.jit
def _taps(p_weight, o_d, m_d, W: tl.constexpr, WIDE: tl.constexpr):
    """The columns of the weight, that of the current token first."""
    b_ws = ()
    for back in tl.static_range(W):
        b_w = tl.load(p_weight + o_d * W + (W - 1 - back), mask=m_d, other=0).to(WIDE)
        b_ws = b_ws + (b_w,)
    return b_ws


@triton.jit
def _window(
    p_x, p_state, p_positions, i_b, i_t, o_d, L, D, stride_b, stride_l, W: tl.constexpr,
    HAS_STATE: tl.constexpr, HAS_POSITIONS: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    """The W - 1 inputs before token `i_t`, the nearest first; 0 where they are not of its predecessor's document."""
    b_xs = ()
    is_same = i_t >= 0
    for i in tl.static_range(W - 1):
        i_x = i_t - 1 - i
        o_x = i_b * stride_b + i_x.to(tl.int64) * stride_l + o_d
        b_x = tl.load(p_x + o_x, mask=_mask(o_d, D, i_x >= 0), other=0).to(WIDE)
        if HAS_STATE:
            o_state = (i_b * (W - 1) + i_x + W - 1) * D + o_d
            b_state = tl.load(p_state + o_state, mask=_mask(o_d, D, i_x < 0), other=0).to(WIDE)
            b_x = tl.where(i_x < 0, b_state, b_x)
        if HAS_POSITIONS and i > 0:
            is_same = is_same & (_is_start(p_positions, i_b, i_x + 1, L) == 0)
            b_x = tl.where(is_same, b_x, 0)
        b_xs = b_xs + (b_x,)
    return b_xs


@triton.jit
def _sum_of_taps(b_bias, b_ws, b_x, b_xs, W: tl.constexpr):
    b_pre = b_bias + b_ws[0] * b_x
    for i in tl.static_range(W - 1):
        b_pre += b_ws[i + 1] * b_xs[i]
    return b_pre


@triton.jit
def forward_kernel(
    p_x, p_weight, p_bias, p_state, p_positions, p_out, L, D, stride_b, stride_l, chunks, blocks_d,
    W: tl.constexpr, BD: tl.constexpr, CHUNK: tl.constexpr, ROWS: tl.constexpr,
    HAS_BIAS: tl.constexpr, HAS_STATE: tl.constexpr, HAS_POSITIONS: tl.constexpr,
    HAS_SILU: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    i_program = tl.program_id(0)
    o_d = (i_program % blocks_d) * BD + tl.arange(0, BD)
    i_chunk = (i_program // blocks_d) % chunks
    i_b = (i_program // blocks_d // chunks).to(tl.int64)
    m_d = o_d < D
    i_first = i_chunk * CHUNK

    b_ws = _taps(p_weight, o_d, m_d, W, WIDE)
    b_bias = tl.zeros([BD], WIDE)
    if HAS_BIAS:
        b_bias += tl.load(p_bias + o_d, mask=m_d, other=0).to(WIDE)
    b_xs = _window(
        p_x, p_state, p_positions, i_b, i_first, o_d, L, D, stride_b, stride_l, W, HAS_STATE,
        HAS_POSITIONS, WIDE,
    )  # fmt: skip
    for i_rows in range(tl.cdiv(tl.minimum(CHUNK, L - i_first), ROWS)):
        i_row = i_first + i_rows * ROWS
        p_rows = p_x + i_b * stride_b + i_row.to(tl.int64) * stride_l + o_d
        p_outs = p_out + (i_b * L + i_row) * D + o_d
        b_loaded = ()
        for i in tl.static_range(ROWS):
            b_row = tl.load(p_rows + i * stride_l, mask=_mask(o_d, D, i_row + i < L), other=0)
            b_loaded = b_loaded + (b_row,)
        for i in tl.static_range(ROWS):
            if HAS_POSITIONS:
                is_start = _is_start(p_positions, i_b, i_row + i, L)
                b_kept = ()
                for j in tl.static_range(W - 1):
                    b_kept = b_kept + (tl.where(is_start, 0, b_xs[j]),)
                b_xs = b_kept
            b_x = b_loaded[i].to(WIDE)
            b_out = _sum_of_taps(b_bias, b_ws, b_x, b_xs, W)
            if HAS_SILU:
                b_out = b_out * _sigmoid(b_out)
            b_out = b_out.to(p_out.dtype.element_ty)
            tl.store(p_outs + i * D, b_out, mask=_mask(o_d, D, i_row + i < L))
            b_next = (b_x,)
            for j in tl.static_range(W - 2):
                b_next = b_next + (b_xs[j],)
            b_xs = b_next


@triton.jit
def backward_kernel(
    p_grad, p_x, p_weight, p_bias, p_state, p_positions, p_dx, p_dstate, p_partial, L, D, stride_b,
    stride_l, chunks, blocks_d,
    W: tl.constexpr, BD: tl.constexpr, CHUNK: tl.constexpr, ROWS: tl.constexpr,
    HAS_BIAS: tl.constexpr, HAS_STATE: tl.constexpr, HAS_POSITIONS: tl.constexpr,
    HAS_SILU: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    """Rows of a partial (W + 1, D): the taps from the oldest to the newest, then the bias.

    Token t adds to the gradients of t - W + 1 to t, which wait in `b_dxs`, the nearest first, until they are whole. Tokens
    after the row count as starts of documents: what a NaN in the row's end would spoil is selected away.
    """
    i_program = tl.program_id(0)
    o_d = (i_program % blocks_d) * BD + tl.arange(0, BD)
    i_chunk = (i_program // blocks_d) % chunks
    i_b = (i_program // blocks_d // chunks).to(tl.int64)
    m_d = o_d < D
    i_first = i_chunk * CHUNK
    i_end = tl.minimum(i_first + CHUNK, L)

    b_ws = _taps(p_weight, o_d, m_d, W, WIDE)
    b_bias = tl.zeros([BD], WIDE)
    if HAS_BIAS:
        b_bias += tl.load(p_bias + o_d, mask=m_d, other=0).to(WIDE)
    b_xs = _window(
        p_x, p_state, p_positions, i_b, i_first, o_d, L, D, stride_b, stride_l, W, HAS_STATE,
        HAS_POSITIONS, WIDE,
    )  # fmt: skip
    b_dbias = tl.zeros([BD], WIDE)
    b_dws = (tl.zeros([BD], WIDE),)
    b_dxs = ()
    # joined[j]: tokens t - 1 - j and t are of one document. Nothing before the chunk matters here.
    joined = ()
    for _ in tl.static_range(W - 1):
        b_dws = b_dws + (tl.zeros([BD], WIDE),)
        b_dxs = b_dxs + (tl.zeros([BD], WIDE),)
        joined = joined + (i_first >= 0,)

    for i_rows in range(tl.cdiv(i_end - i_first + W - 1, ROWS)):
        i_row = i_first + i_rows * ROWS
        p_rows = p_x + i_b * stride_b + i_row.to(tl.int64) * stride_l + o_d
        o_row = (i_b * L + i_row) * D + o_d
        b_loaded = ()
        b_grads = ()
        for i in tl.static_range(ROWS):
            m_row = _mask(o_d, D, i_row + i < L)
            b_loaded = b_loaded + (tl.load(p_rows + i * stride_l, mask=m_row, other=0),)
            b_grads = b_grads + (tl.load(p_grad + o_row + i * D, mask=m_row, other=0),)
        for i in tl.static_range(ROWS):
            is_start = i_row + i >= L
            if HAS_POSITIONS:
                is_start = is_start | _is_start(p_positions, i_b, i_row + i, L)
            now_joined = (is_start == 0,)
            b_kept = ()
            for j in tl.static_range(W - 1):
                b_kept = b_kept + (tl.where(is_start, 0, b_xs[j]),)
                if j > 0:
                    now_joined = now_joined + ((is_start == 0) & joined[j - 1],)
            b_xs = b_kept
            joined = now_joined

            b_x = b_loaded[i].to(WIDE)
            b_grad = b_grads[i].to(WIDE)
            if HAS_SILU:
                b_pre = _sum_of_taps(b_bias, b_ws, b_x, b_xs, W)
                b_gate = _sigmoid(b_pre)
                b_grad = b_grad * b_gate * (1 + b_pre * (1 - b_gate))
            # The tokens after the chunk are another program's, but for what they give to this one's.
            b_own = tl.where(i_row + i < i_end, b_grad, 0)
            b_dbias += b_own
            b_sums = (b_dws[0] + b_own * b_x,)
            b_next = (b_x,)
            b_waiting = (b_ws[0] * b_grad,)
            for j in tl.static_range(W - 1):
                b_sums = b_sums + (b_dws[j + 1] + b_own * b_xs[j],)
                b_given = tl.where(joined[j], b_grad, 0)
                b_waiting = b_waiting + (b_dxs[j] + b_ws[j + 1] * b_given,)
                if j < W - 2:
                    b_next = b_next + (b_xs[j],)
            b_dws = b_sums
            b_xs = b_next

            i_done = i_row + i - (W - 1)
            b_dx = b_waiting[W - 1]
            o_done = (i_b * L + i_done) * D + o_d
            m_done = _mask(o_d, D, (i_done >= i_first) & (i_done < i_end))
            tl.store(p_dx + o_done, b_dx.to(p_dx.dtype.element_ty), mask=m_done)
            if HAS_STATE:
                o_state = (i_b * (W - 1) + i_done + W - 1) * D + o_d
                b_dstate = b_dx.to(p_dstate.dtype.element_ty)
                tl.store(p_dstate + o_state, b_dstate, mask=_mask(o_d, D, i_done < 0))
            b_dxs = (b_waiting[0],)
            for j in tl.static_range(1, W - 1):
                b_dxs = b_dxs + (b_waiting[j],)

    p_row = p_partial + (i_b * chunks + i_chunk) * (W + 1) * D + o_d
    for back in tl.static_range(W):
        tl.store(p_row + (W - 1 - back) * D, b_dws[back], mask=m_d)
    tl.store(p_row + W * D, b_dbias, mask=m_d)


def _walk(table: dict[str, Walk], x: Tensor) -> Walk:
    return table["large" if x.numel() >= LARGE else "small"]


def _options(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    state: Tensor | None,
    positions: Tensor | None,
    has_silu: bool,
    walk: Walk,
) -> dict[str, Any]:
    return {
        "W": weight.shape[1],
        "BD": min(CHANNELS, max(32, triton.next_power_of_2(x.shape[2]))),
        "CHUNK": walk.chunk,
        "ROWS": walk.rows,
        "HAS_BIAS": bias is not None,
        "HAS_STATE": state is not None,
        "HAS_POSITIONS": positions is not None,
        "HAS_SILU": has_silu,
        "WIDE": WIDE[wide_dtype(x)],
        "num_warps": 1,
    }


def conv_forward(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    state: Tensor | None,
    positions: Tensor | None,
    has_silu: bool,
) -> Tensor:
    """As in `reference.py`; channels of x next to each other, all else contiguous."""
    rows, length, channels = x.shape
    out = x.new_empty(rows, length, channels)
    walk = _walk(FORWARD, x)
    options = _options(x, weight, bias, state, positions, has_silu, walk)
    chunks, blocks_d = triton.cdiv(length, walk.chunk), triton.cdiv(channels, options["BD"])
    with torch.cuda.device_of(x):
        forward_kernel[(rows * chunks * blocks_d,)](
            x, weight, bias, state, positions, out, length, channels, x.stride(0), x.stride(1),
            chunks, blocks_d, **options,
        )  # fmt: skip
    return out


def conv_backward(
    grad: Tensor,
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    state: Tensor | None,
    positions: Tensor | None,
    has_silu: bool,
) -> tuple[Tensor, Tensor | None, Tensor, Tensor]:
    """Gradients of x, of the state before it, of weight (D, W) and of bias (D,)."""
    rows, length, channels = x.shape
    width = weight.shape[1]
    dx = x.new_empty(rows, length, channels)
    dstate = None if state is None else torch.empty_like(state)
    walk = _walk(BACKWARD, x)
    options = _options(x, weight, bias, state, positions, has_silu, walk)
    chunks, blocks_d = triton.cdiv(length, walk.chunk), triton.cdiv(channels, options["BD"])
    partial = x.new_empty(rows * chunks, width + 1, channels, dtype=wide_dtype(x))
    with torch.cuda.device_of(x):
        backward_kernel[(rows * chunks * blocks_d,)](
            grad, x, weight, bias, state, positions, dx, dstate, partial, length, channels,
            x.stride(0), x.stride(1), chunks, blocks_d, **options,
        )  # fmt: skip
    sums = partial.sum(0)
    return dx, dstate, sums[:width].T, sums[width]
