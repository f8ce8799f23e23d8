"""The inputs before a segment, for convolutions over sequences that are cut into segments held by other processes.

W taps reach W - 1 inputs back: every process gives its last ones to all, and takes those before its own first. Where segments
are shorter than that the inputs come from several. Their gradient goes back the same way.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from ..checks import check_shape

__all__ = ["inputs_before"]

Gather = Callable[[Tensor], Tensor]


def inputs_before(
    x: Tensor,
    count: int,
    *,
    position_ids: Tensor,
    lengths: Sequence[int],
    gather: Gather,
    place: int,
) -> Tensor:
    """Collective: the inputs before this process's segment of every row, oldest first, as `causal_conv1d` continues from.

    Args:
        x: (B, L, D).
        count: W - 1.
        position_ids: (B, L), positions inside whole documents: they tell how many of the inputs are of the segment's own.
        lengths: L of every segment.
        gather: collective, the same tensor of all segments in order, stacked (segments, ...).
        place: which segment this is.

    Returns:
        (B, count, D), zeros for what is before the row or of an earlier document.

    Raises:
        ValueError: shapes that do not fit.
    """
    check_shape("x", x, (None, lengths[place], None))
    check_shape("position_ids", position_ids, (x.shape[0], x.shape[1]))
    before = _InputsBefore.apply(x, count, tuple(lengths), gather, place)
    if not x.shape[1]:
        return before
    distance = torch.arange(count, 0, -1, device=x.device)
    is_own = distance <= position_ids[:, :1]
    # Selected, not multiplied: a NaN of another document stays there.
    return torch.where(is_own[..., None], before, 0)


def _sources(lengths: Sequence[int], count: int, place: int) -> list[tuple[int, int] | None]:
    """For each input before segment `place`, the segment that has it and which of that one's last `count` it is."""
    found: list[tuple[int, int] | None] = []
    for segment in reversed(range(place)):
        kept = min(count, lengths[segment])
        found += [(segment, count - back) for back in range(1, kept + 1)]
    found = [*found, *[None] * count][:count]
    return found[::-1]


class _InputsBefore(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, count: int, lengths: tuple[int, ...], gather: Gather, place: int
    ) -> Tensor:
        ctx.count, ctx.lengths, ctx.gather, ctx.place = count, lengths, gather, place
        rows, length, channels = x.shape
        own = min(count, length)
        tail = x.new_zeros(rows, count, channels)
        tail[:, count - own :] = x[:, length - own :]
        everyones = gather(tail)
        out = torch.zeros_like(tail)
        for row, source in enumerate(_sources(lengths, count, place)):
            if source is not None:
                out[:, row] = everyones[source[0]][:, source[1]]
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None, None, None]:
        count, length = ctx.count, ctx.lengths[ctx.place]
        everyones = ctx.gather(grad.contiguous())
        tail = torch.zeros_like(grad)
        for segment in range(ctx.place + 1, len(everyones)):
            for row, source in enumerate(_sources(ctx.lengths, count, segment)):
                if source is not None and source[0] == ctx.place:
                    tail[:, source[1]] += everyones[segment][:, row]
        own = min(count, length)
        x_grad = grad.new_zeros(grad.shape[0], length, grad.shape[2])
        x_grad[:, length - own :] = tail[:, count - own :]
        return x_grad, None, None, None, None
