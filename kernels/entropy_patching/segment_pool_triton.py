"""Triton kernels of `segment_pool`: a program walks the rows of its segment; the gradient is a gather by rows."""

# mypy: disable-error-code="no-untyped-def"

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..faces import wide_dtype

__all__ = ["launch_segment_pool", "launch_segment_pool_backward"]

CHANNELS = 1024
"""Widest block of channels of one program."""
TILE = 2048
"""Elements of a tile of the gradient."""


@triton.jit
def segment_pool_kernel(
    p_x, p_start, p_length, p_out, p_row, D, IS_MAX: tl.constexpr, CHANNELS: tl.constexpr, WIDE: tl.constexpr
):  # fmt: skip
    i_segment = tl.program_id(0).to(tl.int64)
    o_d = tl.program_id(1) * CHANNELS + tl.arange(0, CHANNELS)
    m_d = o_d < D
    start = tl.load(p_start + i_segment)
    length = tl.load(p_length + i_segment)
    o_out = i_segment * D + o_d
    # An empty segment reads nothing: its start may lie past the end.
    p_next = p_x + start.to(tl.int64) * D + o_d
    best = tl.load(p_next, mask=o_d < tl.where(length > 0, D, 0), other=0.0).to(WIDE)
    if IS_MAX:
        where = tl.zeros([CHANNELS], tl.int32) + tl.where(length > 0, start, -1)
        for i in range(1, length):
            p_next += D
            b_x = tl.load(p_next, mask=m_d, other=0.0).to(WIDE)
            is_larger = (b_x > best) | ((b_x != b_x) & (best == best))
            best = tl.where(is_larger, b_x, best)
            where = tl.where(is_larger, start + i, where)
        tl.store(p_row + o_out, where, mask=m_d)
    else:
        for _ in range(1, length):
            p_next += D
            best += tl.load(p_next, mask=m_d, other=0.0).to(WIDE)
        best = best / tl.maximum(length, 1)
    tl.store(p_out + o_out, best.to(p_out.dtype.element_ty), mask=m_d)


@triton.jit
def segment_pool_backward_kernel(
    p_grad, p_row, p_segment, p_length, p_dx, T, P, D,
    IS_MAX: tl.constexpr, ROWS: tl.constexpr, CHANNELS: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    o_t = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    o_d = tl.program_id(1) * CHANNELS + tl.arange(0, CHANNELS)
    m_t = o_t < T
    segment = tl.load(p_segment + o_t, mask=m_t, other=0)
    m_tile = m_t[:, None] & (o_d < D)[None, :]
    m_known = m_tile & (segment < P)[:, None]
    o_tile = segment[:, None] * D + o_d[None, :]
    b_grad = tl.load(p_grad + o_tile, mask=m_known, other=0.0).to(WIDE)
    if IS_MAX:
        row = tl.load(p_row + o_tile, mask=m_known, other=-1)
        b_dx = tl.where(row == o_t[:, None], b_grad, 0.0)
    else:
        length = tl.load(p_length + segment, mask=m_t & (segment < P), other=1)
        b_dx = b_grad / length[:, None]
    tl.store(p_dx + o_t[:, None] * D + o_d[None, :], b_dx.to(p_dx.dtype.element_ty), mask=m_tile)


def _wide(tensor: Tensor) -> object:
    return tl.float64 if wide_dtype(tensor) == torch.float64 else tl.float32


def launch_segment_pool(
    x: Tensor, starts: Tensor, lengths: Tensor, pooled: Tensor, rows: Tensor, mode: str
) -> None:
    P, D = pooled.shape
    channels = min(CHANNELS, triton.next_power_of_2(D))
    with torch.cuda.device_of(x):
        segment_pool_kernel[(P, triton.cdiv(D, channels))](
            x,
            starts,
            lengths,
            pooled,
            rows,
            D,
            IS_MAX=mode == "max",
            CHANNELS=channels,
            WIDE=_wide(x),
        )


def launch_segment_pool_backward(
    grad: Tensor, rows: Tensor, segment: Tensor, lengths: Tensor, x_grad: Tensor, mode: str
) -> None:
    T, D = x_grad.shape
    channels = min(CHANNELS, triton.next_power_of_2(D))
    height = max(1, TILE // channels)
    with torch.cuda.device_of(grad):
        segment_pool_backward_kernel[(triton.cdiv(T, height), triton.cdiv(D, channels))](
            grad, rows, segment, lengths, x_grad, T, grad.shape[0], D,
            IS_MAX=mode == "max", ROWS=height, CHANNELS=channels, WIDE=_wide(grad),
        )  # fmt: skip
