"""One scan over sequences that are cut into segments, each held by another process.

A segment is affine in the state that enters it, H_out = P * H_in + S, elementwise. Pass 1 scans from zero for S and sums the step
sizes, from which P follows; both are exchanged, and every process combines them in the same order; pass 2 is the
scan itself from the state found. The gradient mirrors it: a sweep without what comes from the right, an exchange, the sweep
itself. What is exchanged does not grow with the length of the sequence. Nothing is divided by P, so its underflow is right.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn.functional import softplus

from ..checks import check_shape
from .chunks import combine_states
from .op import _backward_op, _forward_op
from .reference import SOFTPLUS_THRESHOLD, ScanInputs

__all__ = ["selective_scan_segment"]

Gather = Callable[[Tensor], Tensor]

HAS_START = -1.0
"""In place of a segment's summed step sizes, which are not negative: a document starts inside, and nothing passes."""


def selective_scan_segment(
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor,
    z: Tensor,
    delta_bias: Tensor | None = None,
    *,
    position_ids: Tensor,
    gather: Gather,
    place: int,
) -> Tensor:
    """Collective: `selective_scan` with `delta_softplus` of this process's segment of every row.

    Args:
        u, delta, z: (B, L, D). A: (D, N). B, C: (B, L, N). D, delta_bias: (D,). L may differ between segments, and be 0.
        position_ids: (B, L), positions inside whole documents: a segment that continues one begins above 0.
        gather: collective, the same tensor of all segments in order, stacked (segments, ...).
        place: which segment this is.

    Returns:
        (B, L, D) in the type of u.

    Raises:
        ValueError: shapes that do not fit.
    """
    check_shape("u", u, (None, None, None))
    batch, length, channels = u.shape
    check_shape("position_ids", position_ids, (batch, length))
    for name, tensor in (("delta", delta), ("z", z)):
        check_shape(name, tensor, (batch, length, channels))
    for name, tensor in (("B", B), ("C", C)):
        check_shape(name, tensor, (batch, length, A.shape[1]))
    tensors = (u, delta, A, B.unsqueeze(2), C.unsqueeze(2), D, z, delta_bias)
    return _SegmentScan.apply(*tensors, position_ids == 0, gather, place)


class _SegmentScan(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, *arguments: Any) -> Tensor:
        *tensors, starts, gather, place = arguments
        u, delta, A, B, C, _, _, bias = tensors
        bare = (u, delta, A, B, C, None, None, bias, starts)
        _, ends, _ = _forward_op(*bare, None, True, False)
        message = torch.cat((ends, _summed_steps(ScanInputs(*bare, True))[..., None]), -1)
        everyones = gather(message)
        totals = everyones[..., -1]
        entering, _ = combine_states(_decays(totals, A), everyones[..., :-1])
        needs_states = any(ctx.needs_input_grad)
        out, _, states = _forward_op(*tensors, starts, entering[place], True, needs_states)
        ctx.gather, ctx.place = gather, place
        ctx.save_for_backward(*tensors, starts, states, totals)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        *tensors, starts, states, totals = ctx.saved_tensors
        grad = grad.contiguous()
        found = _backward_op(grad, None, *tensors, starts, states, True)
        everyones = ctx.gather(found[-1])
        decays = _decays(totals, tensors[2])
        leaving, _ = combine_states(decays.flip(0), everyones.flip(0))
        last = len(everyones) - 1
        # To the right of the last segment there is nothing, so its first sweep was the whole.
        if ctx.place < last:
            mine = leaving[last - ctx.place].contiguous()
            found = _backward_op(grad, mine, *tensors, starts, states, True)
        given = [None if x is None else g for x, g in zip(tensors, found[:-1], strict=True)]
        return (*given, None, None, None)


def _summed_steps(inputs: ScanInputs) -> Tensor:
    """(B, D): the sum of a segment's step sizes, or `HAS_START`."""
    raw = inputs.delta.to(inputs.wide)
    if inputs.delta_bias is not None:
        raw = raw + inputs.delta_bias.to(inputs.wide)
    assert inputs.starts is not None
    total = softplus(raw, threshold=SOFTPLUS_THRESHOLD).sum(1)
    return total.masked_fill(inputs.starts.any(1)[:, None], HAS_START)


def _decays(totals: Tensor, A: Tensor) -> Tensor:
    """(segments, B, D, N): what each segment leaves of a state that enters it."""
    is_cut = (totals == HAS_START)[..., None]
    decays = torch.exp(totals[..., None] * A.to(totals.dtype))
    return decays.masked_fill(is_cut, 0.0)
