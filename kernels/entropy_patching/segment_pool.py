"""Maximum or mean of the rows of each patch: contiguous sorted segments, no atomics, the same bits every run.

T rows of D channels, P segments. `torch.scatter_reduce` does the same with atomics, divides the gradient of a maximum
among ties, and adds up 16-bit gradients in 16 bits.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..checks import check_dtype, check_same_device, check_shape
from ..faces import pick_face, wide_dtype

__all__ = ["POOL_MODES", "segment_pool", "segment_pool_reference"]

POOL_MODES = ("max", "mean")
LONG = 64
"""Segments from this length on are reduced one by one on the CPU, shorter ones all together, row by row."""


def segment_pool_reference(x: Tensor, starts: Tensor, lengths: Tensor, mode: str) -> Tensor:
    """The definition, differentiated by autograd; arguments and result as in `segment_pool`."""
    rows = []
    wide = x.to(wide_dtype(x))
    for start, length in zip(starts.tolist(), lengths.tolist(), strict=True):
        part = wide[start : start + length]
        if length == 0:
            rows.append(wide.new_zeros(x.shape[1]))
        elif mode == "mean":
            rows.append(part.mean(0))
        else:
            rows.append(part.gather(0, _first_maximum(part)[None])[0])
    return torch.stack(rows).to(x.dtype) if rows else wide.new_zeros(0, x.shape[1]).to(x.dtype)


def segment_pool(x: Tensor, starts: Tensor, lengths: Tensor, mode: str) -> Tensor:
    """Maximum or mean over `x[starts[j] : starts[j] + lengths[j]]` for each segment j.

    An empty segment gives 0 and takes no gradient. The gradient of a maximum goes to the first row that has it (NaN
    counts as the largest), that of rows in no segment is 0.

    Args:
        x: (T, D), any floating type; added up in fp32 (fp64 for fp64).
        starts: (P,) int32, not decreasing; segments must not overlap. As `patch_boundaries` gives them.
        lengths: (P,) int32.
        mode: `max` or `mean`.

    Returns:
        (P, D) in the type of `x`. Differentiable once.

    Raises:
        ValueError: an unknown mode, or tensors that do not fit.
    """
    if mode not in POOL_MODES:
        raise ValueError(f"unknown pool mode {mode!r}; known: {', '.join(POOL_MODES)}")
    check_shape("x", x, (None, None))
    check_dtype("x", x)
    check_segments(starts, lengths)
    check_same_device(x=x, starts=starts, lengths=lengths)
    pooled, _ = torch.ops.weft.segment_pool(x, starts, lengths, mode)
    return pooled


def check_segments(starts: Tensor, lengths: Tensor) -> None:
    """Raises: ValueError: not two int32 vectors of one length."""
    check_shape("starts", starts, (None,))
    check_shape("lengths", lengths, tuple(starts.shape))
    check_dtype("starts", starts, (torch.int32,))
    check_dtype("lengths", lengths, (torch.int32,))


def segment_of_rows(starts: Tensor, lengths: Tensor, total: int) -> Tensor:
    """(T,) int64: the segment of each row, P where it is in none."""
    rows = torch.arange(total, device=starts.device, dtype=torch.int32)
    # The last segment that starts at or before the row. Empty ones in the middle share their start with the next one,
    # which comes after them; empty ones at the end start at T.
    found = torch.searchsorted(starts, rows, right=True) - 1
    known = found.clamp(min=0)
    is_inside = (found >= 0) & (rows < starts[known] + lengths[known])
    return torch.where(is_inside, found, starts.shape[0])


def _first_maximum(part: Tensor) -> Tensor:
    """Index of the first largest row of (n, D) by channel, NaN being the largest: (D,) int64."""
    largest = part.amax(0)
    order = torch.arange(len(part), device=part.device)[:, None]
    return torch.where((part == largest) | part.isnan(), order, len(part)).amin(0)


def _new_outputs(x: Tensor, starts: Tensor, mode: str) -> tuple[Tensor, Tensor]:
    """(P, D) results, and the (P, D) int32 rows of the maxima (-1: none; nothing is kept for means)."""
    shape = (starts.shape[0], x.shape[1])
    kept = shape if mode == "max" else (0, x.shape[1])
    return (
        torch.empty(shape, dtype=x.dtype, device=x.device),
        torch.empty(kept, dtype=torch.int32, device=x.device),
    )


@torch.library.custom_op("weft::segment_pool", mutates_args=())
def _segment_pool(x: Tensor, starts: Tensor, lengths: Tensor, mode: str) -> tuple[Tensor, Tensor]:
    pooled, rows = _new_outputs(x, starts, mode)
    if pooled.numel() == 0:
        return pooled, rows
    face = pick_face(x)
    if x.shape[0] == 0:
        pooled.zero_()
        rows.fill_(-1)
    elif face == "triton":
        from .segment_pool_triton import launch_segment_pool

        launch_segment_pool(
            x.contiguous(), starts.contiguous(), lengths.contiguous(), pooled, rows, mode
        )
    elif face == "cpu":
        _pool_by_rank(x, starts, lengths, mode, pooled, rows)
    else:
        pooled.copy_(segment_pool_reference(x, starts, lengths, mode))
        if mode == "max":
            for j, (start, length) in enumerate(
                zip(starts.tolist(), lengths.tolist(), strict=True)
            ):
                part = x[start : start + length]
                rows[j] = _first_maximum(part) + start if length else -1
    return pooled, rows


@_segment_pool.register_fake
def _(x: Tensor, starts: Tensor, lengths: Tensor, mode: str) -> tuple[Tensor, Tensor]:
    return _new_outputs(x, starts, mode)


def _pool_by_rank(
    x: Tensor, starts: Tensor, lengths: Tensor, mode: str, pooled: Tensor, rows: Tensor
) -> None:
    """First rows of all segments, then second rows, and so on; the few long segments one by one.

    With segments in order of falling length, those that have an i-th row are the first ones, so that each step works
    on a slice.
    """
    order = lengths.argsort(descending=True, stable=True)
    sizes = lengths[order].tolist()
    begins = starts[order].long()
    many = sum(size >= LONG for size in sizes)
    best = torch.zeros(len(sizes), x.shape[1], dtype=wide_dtype(x))
    where = torch.full(best.shape if mode == "max" else (0, 0), -1, dtype=torch.int32)
    for j in range(many):
        start = int(begins[j])
        part = x[start : start + sizes[j]].to(best.dtype)
        if mode == "mean":
            best[j] = part.mean(0)
            continue
        index = _first_maximum(part)
        best[j] = part.gather(0, index[None])[0]
        where[j] = index + start
    alive = len(sizes)
    for i in range(sizes[many] if many < len(sizes) else 0):
        while sizes[alive - 1] <= i:
            alive -= 1
        at = begins[many:alive] + i
        candidate, current = x[at].to(best.dtype), best[many:alive]
        if mode == "mean":
            current += candidate
            continue
        is_larger = (candidate > current) | (candidate.isnan() & ~current.isnan())
        if i == 0:
            is_larger = torch.ones_like(is_larger)
        best[many:alive] = torch.where(is_larger, candidate, current)
        where[many:alive] = torch.where(is_larger, at[:, None].int(), where[many:alive])
    if mode == "mean":
        best[many:] /= lengths[order][many:, None].clamp(min=1)
    else:
        rows[order] = where
    pooled[order] = best.to(x.dtype)


@torch.library.custom_op("weft::segment_pool_backward", mutates_args=())
def _segment_pool_backward(
    grad: Tensor, rows: Tensor, starts: Tensor, lengths: Tensor, total: int, mode: str
) -> Tensor:
    x_grad = torch.empty(total, grad.shape[1], dtype=grad.dtype, device=grad.device)
    if x_grad.numel() == 0:
        return x_grad
    if starts.shape[0] == 0:
        return x_grad.zero_()
    segment = segment_of_rows(starts, lengths, total)
    if pick_face(grad) == "triton":
        from .segment_pool_triton import launch_segment_pool_backward

        launch_segment_pool_backward(
            grad.contiguous(), rows, segment, lengths.contiguous(), x_grad, mode
        )
        return x_grad
    known = segment.clamp(max=starts.shape[0] - 1)
    gathered = grad[known]
    if mode == "mean":
        gathered = gathered.to(wide_dtype(grad)) / lengths[known][:, None].clamp(min=1)
        has_gradient = (segment < starts.shape[0])[:, None]
    else:
        own = torch.arange(total, device=grad.device, dtype=torch.int32)[:, None]
        has_gradient = rows[known] == own
    # By select: a gradient that is NaN stays with its own rows.
    return x_grad.copy_(torch.where(has_gradient, gathered, 0))


@_segment_pool_backward.register_fake
def _(grad: Tensor, rows: Tensor, starts: Tensor, lengths: Tensor, total: int, mode: str) -> Tensor:
    return torch.empty(total, grad.shape[1], dtype=grad.dtype, device=grad.device)


def _keep(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    x, starts, lengths, ctx.mode = inputs
    ctx.total = x.shape[0]
    ctx.mark_non_differentiable(output[1])
    ctx.save_for_backward(output[1], starts, lengths)


def _backward(ctx: Any, grad: Tensor, _rows: Tensor) -> tuple[Tensor, None, None, None]:
    x_grad = torch.ops.weft.segment_pool_backward(
        grad.contiguous(), *ctx.saved_tensors, ctx.total, ctx.mode
    )
    return x_grad, None, None, None


_segment_pool.register_autograd(_backward, setup_context=_keep)
