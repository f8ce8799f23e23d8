"""Maximum or mean of the rows of each patch: contiguous sorted segments, no atomics, the same bits every run.

T rows of D channels, P segments. On a GPU `torch.scatter_reduce` does the same with atomics, and in 16 bits for 16-bit
rows; it also divides the gradient of a maximum among ties.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..checks import check_dtype, check_same_device, check_shape
from ..faces import pick_face, wide_dtype

__all__ = ["POOL_MODES", "segment_pool", "segment_pool_reference"]

POOL_MODES = ("max", "mean")


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
    found = torch.searchsorted(starts.contiguous(), rows, right=True) - 1
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
        _pool_by_scatter(x, starts, lengths, mode, pooled, rows)
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


def _pool_by_scatter(
    x: Tensor, starts: Tensor, lengths: Tensor, mode: str, pooled: Tensor, rows: Tensor
) -> None:
    """By scatter_reduce, which is fast on the CPU for an expanded index; a second one finds the first maximum."""
    total, segments = x.shape[0], starts.shape[0]
    wide = x.to(wide_dtype(x))
    segment = segment_of_rows(starts, lengths, total)
    slots = segment[:, None].expand(x.shape)
    reduction = "amax" if mode == "max" else "mean"
    # Rows of no segment land in an extra one.
    found = wide.new_zeros(segments + 1, x.shape[1])
    found.scatter_reduce_(0, slots, wide, reduction, include_self=False)
    pooled.copy_(found[:-1])
    if mode == "mean":
        return
    # Floating numbers are reduced several times faster than integers; fp32 is exact up to 2^24.
    number = torch.float32 if 2 * total < 2**24 else torch.float64
    is_smaller = ((wide == found.index_select(0, segment)) | wide.isnan()).logical_not_()
    order = torch.arange(total, dtype=number, device=x.device)[:, None]
    order = is_smaller.to(number).mul_(total).add_(order)
    first = torch.full(found.shape, -1, dtype=number, device=x.device)
    rows.copy_(first.scatter_reduce_(0, slots, order, "amin", include_self=False)[:-1])


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
    if mode == "max":
        # Every (row, channel) is the maximum of one segment at most; empty segments write to an extra row.
        with_extra = grad.new_zeros(total + 1, grad.shape[1])
        with_extra.scatter_(0, torch.where(rows < 0, total, rows).long(), grad)
        return x_grad.copy_(with_extra[:-1])
    known = segment.clamp(max=starts.shape[0] - 1)
    shares = grad.to(wide_dtype(grad)) / lengths[:, None].clamp(min=1)
    # By select: a gradient that is NaN stays with its own rows.
    return x_grad.copy_(torch.where((segment < starts.shape[0])[:, None], shares[known], 0))


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
