"""Triton kernels of rows sorted by modality: RMS norm, and heads on their way to positions.

Weight gradients have no atomics: programs of one modality each sum a stretch of its rows, and a
second pass adds the programs up in order. How many programs there are depends on the number of
rows alone, so the bits do not depend on the GPU. Rows are read through a stride, never copied.
"""

# Parameters of kernels are pointers and blocks, of which the type checker knows nothing.
# mypy: disable-error-code="no-untyped-def"

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..faces import wide_dtype

__all__ = ["run_rms_norm", "run_rms_norm_backward", "run_turn", "run_turn_backward"]

NONE, HEAD, ROW = 0, 1, 2
"""What a mean square is taken over."""

TILE = 2048
"""Values that a program of the norm holds of several short rows."""
ROWS_A_PROGRAM = 16
MOST_PROGRAMS = 512
"""Programs a modality in a backward pass: enough rows in flight to hide memory."""


@triton.jit
def modality_of(i_row, p_offsets, N_MODALITIES: tl.constexpr):
    """Modality of sorted rows: how many modalities end at or before them."""
    i_m = i_row * 0
    for m in tl.static_range(N_MODALITIES - 1):
        i_m += (i_row >= tl.load(p_offsets + m)).to(i_row.dtype)
    return i_m


@triton.jit
def stretch_of(p_offsets, i_m, i_p, n_programs, STEP: tl.constexpr):
    """First and last row of one program of a modality."""
    start = tl.load(p_offsets + i_m - 1, mask=i_m > 0, other=0)
    end = tl.load(p_offsets + i_m)
    rows = tl.cdiv(tl.cdiv(end - start, n_programs), STEP) * STEP
    first = start + i_p * rows
    return first, tl.minimum(first + rows, end)


@triton.jit
def rms_norm_kernel(
    p_x, p_weights, p_offsets, p_out, p_scale, total, channels, stride_x, eps,
    N_MODALITIES: tl.constexpr, ROWS: tl.constexpr, BLOCK_D: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    i_row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    i_d = tl.arange(0, BLOCK_D)
    m_row = i_row < total
    m_all = m_row[:, None] & (i_d < channels)[None, :]
    o_row = i_row.to(tl.int64)[:, None]
    i_m = modality_of(i_row, p_offsets, N_MODALITIES)
    b_x = tl.load(p_x + o_row * stride_x + i_d[None, :], mask=m_all, other=0).to(WIDE)
    o_weights = i_m.to(tl.int64)[:, None] * channels + i_d[None, :]
    b_w = tl.load(p_weights + o_weights, mask=m_all, other=0).to(WIDE)
    b_scale = tl.rsqrt(tl.sum(b_x * b_x, 1) / channels + eps)
    tl.store(p_scale + i_row, b_scale, mask=m_row)
    b_out = b_x * b_scale[:, None] * b_w
    o_out = o_row * channels + i_d[None, :]
    tl.store(p_out + o_out, b_out.to(p_out.dtype.element_ty), mask=m_all)


@triton.jit
def rms_norm_backward_kernel(
    p_grad, p_x, p_weights, p_offsets, p_scale, p_x_grad, p_partial, channels, stride_x, n_programs,
    ROWS: tl.constexpr, BLOCK_D: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    i_p, i_m = tl.program_id(0), tl.program_id(1)
    first, last = stretch_of(p_offsets, i_m, i_p, n_programs, ROWS)
    i_d = tl.arange(0, BLOCK_D)
    m_d = i_d < channels
    b_w = tl.load(p_weights + i_m * channels + i_d, mask=m_d, other=0).to(WIDE)[None, :]
    b_sum = tl.zeros((ROWS, BLOCK_D), dtype=WIDE)
    for i_first in range(first, last, ROWS):
        i_row = i_first + tl.arange(0, ROWS)
        m_row = i_row < last
        m_all = m_row[:, None] & m_d[None, :]
        o_row = i_row.to(tl.int64)[:, None]
        b_x = tl.load(p_x + o_row * stride_x + i_d[None, :], mask=m_all, other=0).to(WIDE)
        o_grad = o_row * channels + i_d[None, :]
        b_grad = tl.load(p_grad + o_grad, mask=m_all, other=0).to(WIDE)
        b_scale = tl.load(p_scale + i_row, mask=m_row, other=0).to(WIDE)[:, None]
        b_normal = b_x * b_scale
        b_sum += b_grad * b_normal
        b_scaled = b_grad * b_w
        b_mean = (tl.sum(b_scaled * b_normal, 1) / channels)[:, None]
        b_out = b_scale * (b_scaled - b_normal * b_mean)
        tl.store(p_x_grad + o_grad, b_out.to(p_x_grad.dtype.element_ty), mask=m_all)
    o_partial = (i_m * n_programs + i_p).to(tl.int64) * channels
    tl.store(p_partial + o_partial + i_d, tl.sum(b_sum, 0), mask=m_d)


@triton.jit
def turn_row(
    p_x, p_out, p_weights, p_scale, p_cos, p_sin, i_from, i_to, i_m, stride_x, eps,
    HEADS: tl.constexpr, HALF: tl.constexpr, NORM: tl.constexpr, HAS_TABLE: tl.constexpr,
    BLOCK_H: tl.constexpr, BLOCK_HALF: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    """Sorted row i_from of heads: normalised, turned by position i_to, written to row i_to."""
    i_h, i_d = tl.arange(0, BLOCK_H)[:, None], tl.arange(0, BLOCK_HALF)[None, :]
    m_half = i_d < HALF
    m_all = (i_h < HEADS) & m_half
    o_x = i_h * (2 * HALF) + i_d
    p_row = p_x + i_from.to(tl.int64) * stride_x
    b_first = tl.load(p_row + o_x, mask=m_all, other=0).to(WIDE)
    b_second = tl.load(p_row + o_x + HALF, mask=m_all, other=0).to(WIDE)
    if NORM != 0:
        b_square = tl.sum(b_first * b_first + b_second * b_second, 1)
        if NORM == 1:
            b_scale = tl.rsqrt(b_square / (2 * HALF) + eps)
            i_scale = tl.arange(0, BLOCK_H)
            tl.store(p_scale + i_from.to(tl.int64) * HEADS + i_scale, b_scale, i_scale < HEADS)
            p_w, m_w = p_weights + i_m * (2 * HALF) + i_d, m_half
            b_first, b_second = b_first * b_scale[:, None], b_second * b_scale[:, None]
        else:
            b_scale = tl.rsqrt(tl.sum(b_square, 0) / (HEADS * 2 * HALF) + eps)
            tl.store(p_scale + i_from, b_scale)
            p_w, m_w = p_weights + i_m * (HEADS * 2 * HALF) + o_x, m_all
            b_first, b_second = b_first * b_scale, b_second * b_scale
        b_first *= tl.load(p_w, mask=m_w, other=0).to(WIDE)
        b_second *= tl.load(p_w + HALF, mask=m_w, other=0).to(WIDE)
    if HAS_TABLE:
        o_table = i_to.to(tl.int64) * HALF + i_d
        b_cos = tl.load(p_cos + o_table, mask=m_half, other=0).to(WIDE)
        b_sin = tl.load(p_sin + o_table, mask=m_half, other=0).to(WIDE)
        b_turned = b_first * b_cos - b_second * b_sin
        b_second = b_second * b_cos + b_first * b_sin
        b_first = b_turned
    p_to = p_out + i_to.to(tl.int64) * (HEADS * 2 * HALF) + o_x
    tl.store(p_to, b_first.to(p_out.dtype.element_ty), mask=m_all)
    tl.store(p_to + HALF, b_second.to(p_out.dtype.element_ty), mask=m_all)


@triton.jit
def turn_kernel(
    p_q, p_k, p_v, p_q_out, p_k_out, p_v_out, p_q_weights, p_k_weights, p_q_scale, p_k_scale, p_cos,
    p_sin, p_inverse, p_offsets, stride_q, stride_k, stride_v, eps,
    N_MODALITIES: tl.constexpr, Q_HEADS: tl.constexpr, K_HEADS: tl.constexpr, HALF: tl.constexpr,
    Q_NORM: tl.constexpr, K_NORM: tl.constexpr, HAS_TABLE: tl.constexpr, BLOCK_Q: tl.constexpr,
    BLOCK_K: tl.constexpr, BLOCK_HALF: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    i_to, i_which = tl.program_id(0), tl.program_id(1)
    i_from = tl.load(p_inverse + i_to).to(tl.int32)
    i_m = modality_of(i_from, p_offsets, N_MODALITIES)
    # fmt: off
    if i_which == 0:
        turn_row(p_q, p_q_out, p_q_weights, p_q_scale, p_cos, p_sin, i_from, i_to, i_m, stride_q, eps,
                 Q_HEADS, HALF, Q_NORM, HAS_TABLE, BLOCK_Q, BLOCK_HALF, WIDE)
    elif i_which == 1:
        turn_row(p_k, p_k_out, p_k_weights, p_k_scale, p_cos, p_sin, i_from, i_to, i_m, stride_k, eps,
                 K_HEADS, HALF, K_NORM, HAS_TABLE, BLOCK_K, BLOCK_HALF, WIDE)
    else:
        turn_row(p_v, p_v_out, p_v, p_v, p_cos, p_sin, i_from, i_to, i_m, stride_v, eps,
                 K_HEADS, HALF, 0, False, BLOCK_K, BLOCK_HALF, WIDE)
    # fmt: on


@triton.jit
def turn_back_rows(
    p_grad, p_x, p_x_grad, p_weights, p_scale, p_partial, p_cos, p_sin, p_order, first, last, i_m,
    o_partial, stride_x,
    HEADS: tl.constexpr, HALF: tl.constexpr, NORM: tl.constexpr, HAS_TABLE: tl.constexpr,
    BLOCK_H: tl.constexpr, BLOCK_HALF: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    """Sorted rows first to last of one modality: their gradients, and the sum of its weights'."""
    i_h, i_d = tl.arange(0, BLOCK_H)[:, None], tl.arange(0, BLOCK_HALF)[None, :]
    m_half = i_d < HALF
    m_all = (i_h < HEADS) & m_half
    o_x = i_h * (2 * HALF) + i_d
    if NORM == 1:
        p_w, m_w = p_weights + i_m * (2 * HALF) + i_d, m_half
    else:
        p_w, m_w = p_weights + i_m * (HEADS * 2 * HALF) + o_x, m_all
    if NORM != 0:
        b_first_w = tl.load(p_w, mask=m_w, other=0).to(WIDE)
        b_second_w = tl.load(p_w + HALF, mask=m_w, other=0).to(WIDE)
        b_first_sum = tl.zeros((BLOCK_H, BLOCK_HALF), dtype=WIDE)
        b_second_sum = tl.zeros((BLOCK_H, BLOCK_HALF), dtype=WIDE)
    for i_row in range(first, last):
        i_to = tl.load(p_order + i_row)
        o_row = i_to.to(tl.int64) * (HEADS * 2 * HALF)
        b_first = tl.load(p_grad + o_row + o_x, mask=m_all, other=0).to(WIDE)
        b_second = tl.load(p_grad + o_row + o_x + HALF, mask=m_all, other=0).to(WIDE)
        if HAS_TABLE:
            o_table = i_to.to(tl.int64) * HALF + i_d
            b_cos = tl.load(p_cos + o_table, mask=m_half, other=0).to(WIDE)
            b_sin = tl.load(p_sin + o_table, mask=m_half, other=0).to(WIDE)
            b_turned = b_first * b_cos + b_second * b_sin
            b_second = b_second * b_cos - b_first * b_sin
            b_first = b_turned
        o_sorted = tl.cast(i_row, tl.int64)
        if NORM != 0:
            p_row = p_x + o_sorted * stride_x + o_x
            b_first_x = tl.load(p_row, mask=m_all, other=0).to(WIDE)
            b_second_x = tl.load(p_row + HALF, mask=m_all, other=0).to(WIDE)
            if NORM == 1:
                p_s = p_scale + o_sorted * HEADS + i_h
                b_scale = tl.load(p_s, mask=i_h < HEADS, other=0).to(WIDE)
            else:
                b_scale = tl.load(p_scale + o_sorted).to(WIDE)
            b_first_x *= b_scale
            b_second_x *= b_scale
            b_first_sum += b_first * b_first_x
            b_second_sum += b_second * b_second_x
            b_first *= b_first_w
            b_second *= b_second_w
            b_mean = tl.sum(b_first * b_first_x + b_second * b_second_x, 1)
            if NORM == 1:
                b_mean_all = (b_mean / (2 * HALF))[:, None]
            else:
                b_mean_all = tl.sum(b_mean, 0) / (HEADS * 2 * HALF)
            b_first = b_scale * (b_first - b_first_x * b_mean_all)
            b_second = b_scale * (b_second - b_second_x * b_mean_all)
        p_to = p_x_grad + o_sorted * (HEADS * 2 * HALF) + o_x
        tl.store(p_to, b_first.to(p_x_grad.dtype.element_ty), mask=m_all)
        tl.store(p_to + HALF, b_second.to(p_x_grad.dtype.element_ty), mask=m_all)
    if NORM == 1:
        i_half = tl.arange(0, BLOCK_HALF)
        p_to = p_partial + o_partial * (2 * HALF) + i_half
        tl.store(p_to, tl.sum(b_first_sum, 0), mask=i_half < HALF)
        tl.store(p_to + HALF, tl.sum(b_second_sum, 0), mask=i_half < HALF)
    if NORM == 2:
        p_to = p_partial + o_partial * (HEADS * 2 * HALF) + o_x
        tl.store(p_to, b_first_sum, mask=m_all)
        tl.store(p_to + HALF, b_second_sum, mask=m_all)


@triton.jit
def turn_backward_kernel(
    p_q_grad, p_k_grad, p_v_grad, p_q, p_k, p_q_out, p_k_out, p_v_out, p_q_weights, p_k_weights,
    p_q_scale, p_k_scale, p_q_partial, p_k_partial, p_cos, p_sin, p_order, p_offsets, stride_q,
    stride_k, n_programs,
    Q_HEADS: tl.constexpr, K_HEADS: tl.constexpr, HALF: tl.constexpr, Q_NORM: tl.constexpr,
    K_NORM: tl.constexpr, HAS_TABLE: tl.constexpr, BLOCK_Q: tl.constexpr, BLOCK_K: tl.constexpr,
    BLOCK_HALF: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    i_p, i_m, i_which = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    first, last = stretch_of(p_offsets, i_m, i_p, n_programs, 1)
    o_partial = (i_m * n_programs + i_p).to(tl.int64)
    # fmt: off
    if i_which == 0:
        turn_back_rows(p_q_grad, p_q, p_q_out, p_q_weights, p_q_scale, p_q_partial, p_cos, p_sin, p_order,
                       first, last, i_m, o_partial, stride_q,
                       Q_HEADS, HALF, Q_NORM, HAS_TABLE, BLOCK_Q, BLOCK_HALF, WIDE)
    elif i_which == 1:
        turn_back_rows(p_k_grad, p_k, p_k_out, p_k_weights, p_k_scale, p_k_partial, p_cos, p_sin, p_order,
                       first, last, i_m, o_partial, stride_k,
                       K_HEADS, HALF, K_NORM, HAS_TABLE, BLOCK_K, BLOCK_HALF, WIDE)
    else:
        turn_back_rows(p_v_grad, p_v_grad, p_v_out, p_v_grad, p_v_grad, p_v_grad, p_cos, p_sin, p_order,
                       first, last, i_m, o_partial, 0,
                       K_HEADS, HALF, 0, False, BLOCK_K, BLOCK_HALF, WIDE)
    # fmt: on


def norm_configuration(channels: int) -> dict[str, int]:
    """Rows of a tile, its width and the warps that hold 16 values of it in each thread."""
    block = triton.next_power_of_2(channels)
    rows = max(1, TILE // block)
    return {"ROWS": rows, "BLOCK_D": block, "num_warps": min(16, max(4, rows * block // 512))}


def turn_configuration(q_heads: int, k_heads: int, width: int) -> dict[str, int]:
    """Padded heads and half widths, and warps for 16 values of a row of queries in each thread."""
    blocks = {
        "BLOCK_Q": triton.next_power_of_2(q_heads),
        "BLOCK_K": triton.next_power_of_2(k_heads),
        "BLOCK_HALF": triton.next_power_of_2(width // 2),
    }
    values = 2 * blocks["BLOCK_HALF"] * max(blocks["BLOCK_Q"], blocks["BLOCK_K"])
    return {**blocks, "num_warps": min(16, max(2, values // 512))}


def count_programs(total: int) -> int:
    return min(MOST_PROGRAMS, triton.cdiv(total, ROWS_A_PROGRAM))


def _wide(dtype: torch.dtype) -> tl.dtype:
    return tl.float64 if dtype == torch.float64 else tl.float32


def _row_strided(x: Tensor) -> Tensor:
    """Rows whose channels lie end to end; a slice of wider rows is one without a copy."""
    is_dense = x[0].is_contiguous() if x.shape[0] else True
    return x if is_dense and x.stride(0) >= x[0].numel() else x.contiguous()


def run_rms_norm(x: Tensor, weights: Tensor, offsets: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """Launches the forward pass; arguments and results as in the reference."""
    x, (total, channels), wide = _row_strided(x), x.shape, wide_dtype(x)
    out = torch.empty((total, channels), dtype=x.dtype, device=x.device)
    scale = torch.empty(total, dtype=wide, device=x.device)
    configuration = norm_configuration(channels)
    grid = (triton.cdiv(total, configuration["ROWS"]),)
    with torch.cuda.device_of(x):
        rms_norm_kernel[grid](
            x, weights, offsets, out, scale, total, channels, x.stride(0), eps,
            N_MODALITIES=weights.shape[0], WIDE=_wide(wide), **configuration,
        )  # fmt: skip
    return out, scale


def run_rms_norm_backward(
    grad: Tensor, x: Tensor, weights: Tensor, offsets: Tensor, scale: Tensor
) -> tuple[Tensor, Tensor]:
    """Launches the backward pass: gradients of rows and of weights."""
    x, (total, channels), n_modalities = _row_strided(x), x.shape, weights.shape[0]
    programs = count_programs(total)
    x_grad = torch.empty((total, channels), dtype=x.dtype, device=x.device)
    shape = (n_modalities, programs, channels)
    partial = torch.empty(shape, dtype=scale.dtype, device=x.device)
    with torch.cuda.device_of(x):
        rms_norm_backward_kernel[programs, n_modalities](
            grad, x, weights, offsets, scale, x_grad, partial, channels, x.stride(0), programs,
            WIDE=_wide(scale.dtype), **norm_configuration(channels),
        )  # fmt: skip
    return x_grad, partial.sum(1).to(weights.dtype)


def _norm_of(heads: int, weights: Tensor | None, width: int) -> int:
    if weights is None:
        return NONE
    return ROW if heads > 1 and weights.shape[1] == heads * width else HEAD


def run_turn(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    q_weights: Tensor | None,
    k_weights: Tensor | None,
    cos: Tensor | None,
    sin: Tensor | None,
    inverse: Tensor,
    offsets: Tensor,
    eps: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Launches the forward pass; results as of the op: q, k, v and the inverse roots of q and k."""
    q, k, v = _row_strided(q), _row_strided(k), _row_strided(v)
    (total, q_heads, width), k_heads, wide = q.shape, k.shape[1], wide_dtype(q)
    outs = [torch.empty(x.shape, dtype=x.dtype, device=x.device) for x in (q, k, v)]
    norms, scales = [], []
    for x, weights in ((q, q_weights), (k, k_weights)):
        norm = _norm_of(x.shape[1], weights, width)
        shape = {NONE: (0,), HEAD: (total, x.shape[1]), ROW: (total, 1)}[norm]
        norms.append(norm)
        scales.append(torch.empty(shape, dtype=wide, device=x.device))
    # Where there is nothing to point at, any tensor will do: the kernel does not look.
    q_rows, k_rows, cosines, sines = (
        q if x is None else x.contiguous() for x in (q_weights, k_weights, cos, sin)
    )
    with torch.cuda.device_of(q):
        turn_kernel[total, 3](
            q, k, v, *outs, q_rows, k_rows, *scales, cosines, sines, inverse, offsets,
            q.stride(0), k.stride(0), v.stride(0), eps,
            N_MODALITIES=offsets.shape[0], Q_HEADS=q_heads, K_HEADS=k_heads, HALF=width // 2,
            Q_NORM=norms[0], K_NORM=norms[1], HAS_TABLE=cos is not None, WIDE=_wide(wide),
            **turn_configuration(q_heads, k_heads, width),
        )  # fmt: skip
    return outs[0], outs[1], outs[2], scales[0], scales[1]


def run_turn_backward(
    q_side: tuple[Any, ...],
    k_side: tuple[Any, ...],
    v_grad: Tensor,
    cos: Tensor | None,
    sin: Tensor | None,
    order: Tensor,
    offsets: Tensor,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Launches the backward pass.

    Args:
        q_side, k_side: gradient at positions (T, H, hd), sorted input or None, weights or None,
            inverse roots of sorted rows.
    """
    total, k_heads, width = v_grad.shape
    n_modalities, programs = offsets.shape[0], count_programs(total)
    wide = wide_dtype(v_grad)
    inputs, outs, rows, partials, norms = [], [], [], [], []
    for grad, x, weights, _ in (q_side, k_side):
        norm = _norm_of(grad.shape[1], weights, width)
        channels = 0 if weights is None else weights.shape[1]
        shape = (n_modalities, programs, channels)
        norms.append(norm)
        inputs.append(grad if x is None else _row_strided(x))
        rows.append(grad if weights is None else weights.contiguous())
        outs.append(torch.empty(grad.shape, dtype=grad.dtype, device=grad.device))
        partials.append(torch.empty(shape, dtype=wide, device=grad.device))
    v_out = torch.empty(v_grad.shape, dtype=v_grad.dtype, device=v_grad.device)
    cosines, sines = (v_grad if x is None else x.contiguous() for x in (cos, sin))
    q_heads = q_side[0].shape[1]
    with torch.cuda.device_of(v_grad):
        turn_backward_kernel[programs, n_modalities, 3](
            q_side[0], k_side[0], v_grad, *inputs, *outs, v_out, *rows, q_side[3], k_side[3],
            *partials, cosines, sines, order, offsets, inputs[0].stride(0), inputs[1].stride(0),
            programs,
            Q_HEADS=q_heads, K_HEADS=k_heads, HALF=width // 2, Q_NORM=norms[0], K_NORM=norms[1],
            HAS_TABLE=cos is not None, WIDE=_wide(wide),
            **turn_configuration(q_heads, k_heads, width),
        )  # fmt: skip
    q_rows, k_rows = (
        torch.empty(0, dtype=x.dtype, device=x.device)
        if weights is None
        else partial.sum(1).to(weights.dtype)
        for (x, _, weights, _), partial in zip((q_side, k_side), partials, strict=True)
    )
    return outs[0], outs[1], v_out, q_rows, k_rows
