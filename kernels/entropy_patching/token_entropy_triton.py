"""Triton kernels of `token_entropy` and `linear_entropy`.

Tiles of logits are merged into running (m, S, W): with `d = m_old - m_new`, `W <- e^d (W + d S)` and `S <- e^d S`.
Columns that do not exist are read as -inf and dropped by select: `(x - m) * 0` with x = -inf would be NaN.
"""

# mypy: disable-error-code="no-untyped-def"

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..faces import is_interpreted, wide_dtype

__all__ = ["launch_linear_entropy", "launch_token_entropy", "launch_token_entropy_backward"]

COLUMNS = 1024
"""Widest tile of logits that are read from memory."""
TILE = 2048
"""Elements of such a tile."""
HEAD_TILES: dict[bool, dict[str, int]] = {
    # 16-bit on tensor cores: 64 x 256 plus a narrow tail in one sweep over the channels (V = 260 wastes 4 %).
    True: {"ROWS": 64, "COLUMNS": 256, "CHANNELS": 64, "num_warps": 8, "num_stages": 3},
    # fp32 in full precision runs on ordinary units.
    False: {"ROWS": 32, "COLUMNS": 64, "CHANNELS": 32, "num_warps": 8, "num_stages": 2},
}
"""Tiles of the fused head, by whether the input is 16-bit."""
WIDEST_TAIL = 64


@triton.jit
def _merge(peak, total, weighted, b_x):
    """The running (m, S, W) of each row with one more tile of logits [R, C]."""
    is_out = b_x == float("-inf")
    new_peak = tl.maximum(peak, tl.max(b_x, 1))
    b_shift = tl.where(is_out, 0.0, b_x - new_peak[:, None])
    b_exp = tl.where(is_out, 0.0, tl.exp(b_shift))
    # While nothing was added the old peak is -inf, and so would be the product with S = 0: NaN.
    step = tl.where(total > 0, peak - new_peak, 0.0)
    keep = tl.exp(step)
    weighted = keep * (weighted + step * total) + tl.sum(b_shift * b_exp, 1)
    total = keep * total + tl.sum(b_exp, 1)
    return new_peak, total, weighted


@triton.jit
def _store(p_entropy, p_peak, p_log_total, o_row, m_row, peak, total, weighted):
    log_total = tl.log(total)
    tl.store(p_entropy + o_row, log_total - weighted / total, mask=m_row)
    tl.store(p_peak + o_row, peak, mask=m_row)
    tl.store(p_log_total + o_row, log_total, mask=m_row)


@triton.jit
def token_entropy_kernel(
    p_x,
    p_entropy,
    p_peak,
    p_log_total,
    T,
    V,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    WIDE: tl.constexpr,
):
    o_row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    m_row = o_row < T
    peak = tl.full([ROWS], float("-inf"), WIDE)
    total = tl.zeros([ROWS], WIDE)
    weighted = tl.zeros([ROWS], WIDE)
    for i_v in range(0, V, COLUMNS):
        o_v = i_v + tl.arange(0, COLUMNS)
        m_x = m_row[:, None] & (o_v < V)[None, :]
        b_x = tl.load(p_x + o_row[:, None] * V + o_v[None, :], mask=m_x, other=float("-inf"))
        peak, total, weighted = _merge(peak, total, weighted, b_x.to(WIDE))
    _store(p_entropy, p_peak, p_log_total, o_row, m_row, peak, total, weighted)


@triton.jit
def token_entropy_backward_kernel(
    p_grad,
    p_x,
    p_entropy,
    p_peak,
    p_log_total,
    p_dx,
    T,
    V,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    WIDE: tl.constexpr,
):
    o_row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    o_v = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    m_row = o_row < T
    m_x = m_row[:, None] & (o_v < V)[None, :]
    o_x = o_row[:, None] * V + o_v[None, :]
    b_grad = tl.load(p_grad + o_row, mask=m_row, other=0.0).to(WIDE)
    b_entropy = tl.load(p_entropy + o_row, mask=m_row, other=0.0)
    b_peak = tl.load(p_peak + o_row, mask=m_row, other=0.0)
    b_log_total = tl.load(p_log_total + o_row, mask=m_row, other=0.0)
    b_x = tl.load(p_x + o_x, mask=m_x, other=float("-inf")).to(WIDE)
    b_log_p = (b_x - b_peak[:, None]) - b_log_total[:, None]
    b_dx = -tl.exp(b_log_p) * (b_log_p + b_entropy[:, None]) * b_grad[:, None]
    b_dx = tl.where(b_x == float("-inf"), 0.0, b_dx)
    tl.store(p_dx + o_x, b_dx.to(p_dx.dtype.element_ty), mask=m_x)


@triton.jit
def _add_product(b_acc, b_h, p_w, o_v, o_d, V, D, UPCAST: tl.constexpr):
    """`b_acc + b_h W^T` for rows `o_v` of W and channels `o_d`."""
    m_w = (o_d < D)[:, None] & (o_v < V)[None, :]
    b_w = tl.load(p_w + o_v.to(tl.int64)[None, :] * D + o_d[:, None], mask=m_w, other=0.0)
    if UPCAST:
        # The interpreter multiplies the bit patterns of bf16.
        b_w = b_w.to(b_acc.dtype)
    return tl.dot(b_h, b_w, b_acc, input_precision="ieee", out_dtype=b_acc.dtype)


@triton.jit
def linear_entropy_kernel(
    p_h,
    p_w,
    p_entropy,
    p_peak,
    p_log_total,
    T,
    V,
    D,
    WHOLE,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    TAIL: tl.constexpr,
    CHANNELS: tl.constexpr,
    WIDE: tl.constexpr,
    UPCAST: tl.constexpr,
):
    """WHOLE wide tiles of the vocabulary, the last of them together with a tail of TAIL columns (0: none)."""
    o_row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    m_row = o_row < T
    peak = tl.full([ROWS], float("-inf"), WIDE)
    total = tl.zeros([ROWS], WIDE)
    weighted = tl.zeros([ROWS], WIDE)
    for i_tile in range(0, WHOLE):
        o_v = i_tile * COLUMNS + tl.arange(0, COLUMNS)
        b_x = tl.zeros([ROWS, COLUMNS], WIDE)
        if TAIL > 0:
            o_tail = (i_tile + 1) * COLUMNS + tl.arange(0, TAIL)
            b_tail = tl.zeros([ROWS, TAIL], WIDE)
        for i_d in range(0, D, CHANNELS):
            o_d = i_d + tl.arange(0, CHANNELS)
            m_h = m_row[:, None] & (o_d < D)[None, :]
            b_h = tl.load(p_h + o_row[:, None] * D + o_d[None, :], mask=m_h, other=0.0)
            if UPCAST:
                b_h = b_h.to(WIDE)
            b_x = _add_product(b_x, b_h, p_w, o_v, o_d, V, D, UPCAST)
            if TAIL > 0:
                b_tail = _add_product(b_tail, b_h, p_w, o_tail, o_d, V, D, UPCAST)
        b_x = tl.where((o_v < V)[None, :], b_x, float("-inf"))
        peak, total, weighted = _merge(peak, total, weighted, b_x)
        if TAIL > 0:
            b_tail = tl.where((o_tail < V)[None, :], b_tail, float("-inf"))
            peak, total, weighted = _merge(peak, total, weighted, b_tail)
    _store(p_entropy, p_peak, p_log_total, o_row, m_row, peak, total, weighted)


def _wide(tensor: Tensor) -> Any:
    return tl.float64 if wide_dtype(tensor) == torch.float64 else tl.float32


def _row_tile(vocabulary: int) -> dict[str, int]:
    columns = min(COLUMNS, triton.next_power_of_2(vocabulary))
    return {"ROWS": max(1, TILE // columns), "COLUMNS": columns}


def head_tiles(vocabulary: int, is_narrow: bool) -> tuple[int, dict[str, int]]:
    """Number of wide tiles, and the constants of `linear_entropy_kernel` for it.

    A tail is computed beside the only wide tile; with several, what is left over is one more wide tile.
    """
    constants = dict(HEAD_TILES[is_narrow])
    columns = min(constants["COLUMNS"], max(16, triton.next_power_of_2(vocabulary)))
    rest = vocabulary - columns
    has_tail = 0 < rest <= WIDEST_TAIL
    tail = max(16, triton.next_power_of_2(rest)) if has_tail else 0
    constants |= {"COLUMNS": columns, "TAIL": tail}
    return 1 if has_tail else triton.cdiv(vocabulary, columns), constants


def launch_token_entropy(x: Tensor, entropy: Tensor, peak: Tensor, log_total: Tensor) -> None:
    T, V = x.shape
    tile = _row_tile(V)
    with torch.cuda.device_of(x):
        token_entropy_kernel[(triton.cdiv(T, tile["ROWS"]),)](
            x, entropy, peak, log_total, T, V, **tile, WIDE=_wide(x)
        )


def launch_token_entropy_backward(
    grad: Tensor, x: Tensor, entropy: Tensor, peak: Tensor, log_total: Tensor, x_grad: Tensor
) -> None:
    T, V = x.shape
    tile = _row_tile(V)
    with torch.cuda.device_of(x):
        token_entropy_backward_kernel[
            (triton.cdiv(T, tile["ROWS"]), triton.cdiv(V, tile["COLUMNS"]))
        ](grad, x, entropy, peak, log_total, x_grad, T, V, **tile, WIDE=_wide(x))


def launch_linear_entropy(
    hidden: Tensor, weight: Tensor, entropy: Tensor, peak: Tensor, log_total: Tensor
) -> None:
    T, D = hidden.shape
    V = weight.shape[0]
    whole, constants = head_tiles(V, hidden.element_size() == 2)
    with torch.cuda.device_of(hidden):
        linear_entropy_kernel[(triton.cdiv(T, constants["ROWS"]),)](
            hidden,
            weight,
            entropy,
            peak,
            log_total,
            T,
            V,
            D,
            whole,
            **constants,
            WIDE=_wide(hidden),
            UPCAST=is_interpreted(),
        )
