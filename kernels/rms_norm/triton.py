"""The norm in Triton: a program takes a few rows at a time, whole where they fit in registers.

Rows wider than `WIDEST` are walked twice in blocks. The backward has a fixed number of programs; each takes every n-th group of
rows and leaves one partial weight gradient, and these are summed in a fixed order.
Names: `i_` index, `o_` offsets, `p_` pointer, `m_` mask, `b_` value of a tile.
"""

from __future__ import annotations

# mypy: disable-error-code="no-untyped-def"
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from .reference import statistics_dtype, sum_dtype

__all__ = [
    "WIDEST",
    "Tile",
    "backward_kernel",
    "forward_kernel",
    "norm_backward",
    "norm_forward",
    "tile_of",
]

WIDE = {torch.float32: tl.float32, torch.float64: tl.float64}
WIDEST = 8192
"""Channels of a row that is held whole."""


class Tile(NamedTuple):
    """Rows and channels of a tile, tiles of a row, warps of a program, and programs of the backward."""

    rows: int
    channels: int
    blocks: int
    warps: int
    programs: int


def tile_of(channels: int) -> Tile:
    if channels > WIDEST:
        return Tile(1, 4096, triton.cdiv(channels, 4096), 8, 528)
    size = max(16, triton.next_power_of_2(channels))
    if size <= 2048:
        return Tile(2048 // size, size, 1, 4, 1056)
    return Tile(1, size, 1, size // 512, 528)


@triton.jit
def _sigmoid(b_x):
    # exp2 is one instruction of the hardware; exp guards denormals around it.
    if b_x.dtype == tl.float64:
        return tl.sigmoid(b_x)
    return 1 / (1 + tl.exp2(b_x * -1.4426950408889634))


@triton.jit
def _load_total(
    p_x, p_residual, p_total, o_r, o_d, m_r, D, stride_x, stride_residual,
    HAS_RESIDUAL: tl.constexpr, IS_STORED: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    """What is normalised: the input, or its sum with the residual as it is rounded for the caller."""
    m = m_r[:, None] & (o_d < D)[None, :]
    b_x = tl.load(p_x + o_r[:, None] * stride_x + o_d[None, :], mask=m, other=0).to(WIDE)
    if HAS_RESIDUAL:
        o_residual = o_r[:, None] * stride_residual + o_d[None, :]
        b_x += tl.load(p_residual + o_residual, mask=m, other=0).to(WIDE)
        b_total = b_x.to(p_total.dtype.element_ty)
        if IS_STORED:
            tl.store(p_total + o_r[:, None] * D + o_d[None, :], b_total, mask=m)
        b_x = b_total.to(WIDE)
    return b_x


@triton.jit
def _store_normalised(
    p_y, p_weight, p_gate, b_total, b_scale, o_r, o_d, m_r, D, stride_gate,
    HAS_GATE: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    m = m_r[:, None] & (o_d < D)[None, :]
    b_w = tl.load(p_weight + o_d, mask=o_d < D, other=0).to(WIDE)
    b_y = b_total * b_scale[:, None] * b_w[None, :]
    if HAS_GATE:
        o_gate = o_r[:, None] * stride_gate + o_d[None, :]
        b_z = tl.load(p_gate + o_gate, mask=m, other=0).to(WIDE)
        b_y = b_y * b_z * _sigmoid(b_z)
    tl.store(p_y + o_r[:, None] * D + o_d[None, :], b_y.to(p_y.dtype.element_ty), mask=m)


@triton.jit
def forward_kernel(
    p_x, p_weight, p_residual, p_gate, p_y, p_total, p_scale, R, D, stride_x, stride_residual,
    stride_gate, eps,
    BR: tl.constexpr, BD: tl.constexpr, BLOCKS: tl.constexpr, HAS_RESIDUAL: tl.constexpr,
    HAS_GATE: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    o_r = tl.program_id(0).to(tl.int64) * BR + tl.arange(0, BR)
    m_r = o_r < R
    o_d = tl.arange(0, BD)
    b_total = _load_total(
        p_x,
        p_residual,
        p_total,
        o_r,
        o_d,
        m_r,
        D,
        stride_x,
        stride_residual,
        HAS_RESIDUAL,
        True,
        WIDE,
    )
    b_square = tl.sum(b_total * b_total, 1)
    for i in range(1, BLOCKS):
        b_later = _load_total(
            p_x, p_residual, p_total, o_r, i * BD + o_d, m_r, D, stride_x, stride_residual,
            HAS_RESIDUAL, True, WIDE,
        )  # fmt: skip
        b_square += tl.sum(b_later * b_later, 1)
    b_scale = tl.rsqrt(b_square / D + eps)
    tl.store(p_scale + o_r, b_scale, mask=m_r)
    _store_normalised(
        p_y, p_weight, p_gate, b_total, b_scale, o_r, o_d, m_r, D, stride_gate, HAS_GATE, WIDE
    )
    for i in range(1, BLOCKS):
        b_later = _load_total(
            p_x, p_residual, p_total, o_r, i * BD + o_d, m_r, D, stride_x, stride_residual,
            HAS_RESIDUAL, False, WIDE,
        )  # fmt: skip
        _store_normalised(
            p_y, p_weight, p_gate, b_later, b_scale, o_r, i * BD + o_d, m_r, D, stride_gate,
            HAS_GATE, WIDE,
        )  # fmt: skip


@triton.jit
def _load_grads(
    p_grad, p_total, p_gate, p_weight, p_dgate, b_scale, o_r, o_d, m_r, D, stride_total,
    stride_gate, HAS_GATE: tl.constexpr, STORES_GATE: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    """The gradient of the norm, the normalised input and the weight; stores the gradient of the gate where asked.

    That one needs no mean over the row: stored first, it holds no registers while the row is summed.
    """
    m = m_r[:, None] & (o_d < D)[None, :]
    b_grad = tl.load(p_grad + o_r[:, None] * D + o_d[None, :], mask=m, other=0).to(WIDE)
    o_total = o_r[:, None] * stride_total + o_d[None, :]
    b_n = tl.load(p_total + o_total, mask=m, other=0).to(WIDE) * b_scale[:, None]
    # Loaded anew for each row: held over all, it would cost the registers that the widest rows lack.
    b_w = tl.load(p_weight + o_d, mask=o_d < D, other=0).to(WIDE)
    if HAS_GATE:
        o_gate = o_r[:, None] * stride_gate + o_d[None, :]
        b_z = tl.load(p_gate + o_gate, mask=m, other=0).to(WIDE)
        b_opening = _sigmoid(b_z)
        if STORES_GATE:
            b_dz = b_grad * b_n * b_opening * (1 + b_z * (1 - b_opening)) * b_w[None, :]
            o_dgate = o_r[:, None] * D + o_d[None, :]
            tl.store(p_dgate + o_dgate, b_dz.to(p_dgate.dtype.element_ty), mask=m)
        b_grad = b_grad * b_z * b_opening
    return b_grad, b_n, b_w


@triton.jit
def _store_grads(
    p_dtotal, p_total_grad, b_grad, b_n, b_w, b_scale, b_mean, o_r, o_d, m_r, D,
    HAS_RESIDUAL: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    m = m_r[:, None] & (o_d < D)[None, :]
    o = o_r[:, None] * D + o_d[None, :]
    b_dtotal = (b_grad * b_w[None, :] - b_n * b_mean[:, None]) * b_scale[:, None]
    if HAS_RESIDUAL:
        b_dtotal += tl.load(p_total_grad + o, mask=m, other=0).to(WIDE)
    tl.store(p_dtotal + o, b_dtotal.to(p_dtotal.dtype.element_ty), mask=m)


@triton.jit
def backward_kernel(
    p_grad, p_total_grad, p_total, p_weight, p_gate, p_scale, p_dtotal, p_dgate, p_partial, R, D,
    stride_total, stride_gate, programs,
    BR: tl.constexpr, BD: tl.constexpr, BLOCKS: tl.constexpr, HAS_RESIDUAL: tl.constexpr,
    HAS_GATE: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    i_program = tl.program_id(0)
    o_d = tl.arange(0, BD)
    p_row = p_partial + i_program.to(tl.int64) * D
    b_dw = tl.zeros([BR, BD], WIDE)
    for i_rows in range(i_program, tl.cdiv(R, BR), programs):
        o_r = (i_rows * BR + tl.arange(0, BR)).to(tl.int64)
        m_r = o_r < R
        b_scale = tl.load(p_scale + o_r, mask=m_r, other=0)
        b_grad, b_n, b_w = _load_grads(
            p_grad, p_total, p_gate, p_weight, p_dgate, b_scale, o_r, o_d, m_r, D, stride_total,
            stride_gate, HAS_GATE, True, WIDE,
        )  # fmt: skip
        b_mean = tl.sum(b_grad * b_n * b_w[None, :], 1)
        for i in range(1, BLOCKS):
            b_grad2, b_n2, b_w2 = _load_grads(
                p_grad, p_total, p_gate, p_weight, p_dgate, b_scale, o_r, i * BD + o_d, m_r, D,
                stride_total, stride_gate, HAS_GATE, True, WIDE,
            )  # fmt: skip
            b_mean += tl.sum(b_grad2 * b_n2 * b_w2[None, :], 1)
        b_mean = b_mean / D
        b_dw += b_grad * b_n
        _store_grads(
            p_dtotal, p_total_grad, b_grad, b_n, b_w, b_scale, b_mean, o_r, o_d, m_r, D,
            HAS_RESIDUAL, WIDE,
        )  # fmt: skip
        for i in range(1, BLOCKS):
            # Sums of later blocks stay in this program's row of the partials.
            o_later = i * BD + o_d
            b_grad2, b_n2, b_w2 = _load_grads(
                p_grad, p_total, p_gate, p_weight, p_dgate, b_scale, o_r, o_later, m_r, D,
                stride_total, stride_gate, HAS_GATE, False, WIDE,
            )  # fmt: skip
            _store_grads(
                p_dtotal, p_total_grad, b_grad2, b_n2, b_w2, b_scale, b_mean, o_r, o_later, m_r,
                D, HAS_RESIDUAL, WIDE,
            )  # fmt: skip
            b_sum = tl.load(p_row + o_later, mask=o_later < D, other=0)
            b_sum += tl.sum(b_grad2 * b_n2, 0)
            tl.store(p_row + o_later, b_sum, mask=o_later < D)
            tl.debug_barrier()
    tl.store(p_row + o_d, tl.sum(b_dw, 0), mask=o_d < D)


def _rows(tensor: Tensor) -> Tensor:
    """(R, D) with channels next to each other: a view wherever one exists."""
    flat = tensor.reshape(-1, tensor.shape[-1])
    return flat if flat.stride(1) == 1 else flat.contiguous()


def norm_forward(
    x: Tensor, weight: Tensor, residual: Tensor | None, gate: Tensor | None, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    """As in `reference.py`."""
    source = _rows(x)
    rest = None if residual is None else _rows(residual)
    door = None if gate is None else _rows(gate)
    rows, channels = source.shape
    y = x.new_empty(x.shape)
    dtype = sum_dtype(x, residual)
    total = x if residual is None else x.new_empty(x.shape, dtype=dtype)
    scale = x.new_empty((*x.shape[:-1], 1), dtype=statistics_dtype(dtype))
    tile = tile_of(channels)
    with torch.cuda.device_of(x):
        forward_kernel[(triton.cdiv(rows, tile.rows),)](
            source, weight.contiguous(), rest, door, y, None if rest is None else total, scale,
            rows, channels, source.stride(0), 0 if rest is None else rest.stride(0),
            0 if door is None else door.stride(0), eps, BR=tile.rows, BD=tile.channels,
            BLOCKS=tile.blocks, HAS_RESIDUAL=rest is not None, HAS_GATE=door is not None,
            WIDE=WIDE[scale.dtype], num_warps=tile.warps,
        )  # fmt: skip
    return y, total, scale


def norm_backward(
    grad: Tensor,
    total_grad: Tensor | None,
    total: Tensor,
    weight: Tensor,
    gate: Tensor | None,
    scale: Tensor,
) -> tuple[Tensor, Tensor, Tensor | None]:
    """As in `reference.py`; contiguous gradients."""
    source = _rows(total)
    door = None if gate is None else _rows(gate)
    rows, channels = source.shape
    dtotal = total.new_empty(total.shape)
    dgate = None if gate is None else gate.new_empty(gate.shape)
    tile = tile_of(channels)
    programs = min(triton.cdiv(rows, tile.rows), tile.programs)
    # Rows of several blocks are added to in place.
    make = scale.new_empty if tile.blocks == 1 else scale.new_zeros
    partial = make(programs, channels)
    with torch.cuda.device_of(total):
        backward_kernel[(programs,)](
            grad, total_grad, source, weight.contiguous(), door, scale, dtotal, dgate, partial,
            rows, channels, source.stride(0), 0 if door is None else door.stride(0), programs,
            BR=tile.rows, BD=tile.channels, BLOCKS=tile.blocks,
            HAS_RESIDUAL=total_grad is not None, HAS_GATE=door is not None,
            WIDE=WIDE[scale.dtype], num_warps=tile.warps,
        )  # fmt: skip
    return dtotal, partial.sum(0).to(weight.dtype), dgate
