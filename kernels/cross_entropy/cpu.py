"""The two halves of the loss for the CPU: as `reference.py`, in fewer passes over the logits.

On the CPU it costs nothing to look which tokens are ignored, so the others are not masked.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from ..faces import wide_dtype
from .reference import IGNORED

__all__ = ["LinearCrossEntropy", "keep_counted", "logits_grad", "token_losses"]


def _ignored_places(targets: Tensor) -> Tensor:
    return (targets == IGNORED).nonzero()[:, 0]


def token_losses(logits: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    """As in `reference.py`."""
    wide = logits.to(wide_dtype(logits))
    log_partition = wide.logsumexp(-1)
    on_target = wide.gather(-1, targets.clamp(min=0)[:, None])[:, 0]
    ignored = _ignored_places(targets)
    entropies = (log_partition - on_target).index_fill_(0, ignored, 0)
    return entropies, log_partition.index_fill_(0, ignored, 0)


def logits_grad(
    logits: Tensor,
    targets: Tensor,
    log_partition: Tensor,
    entropy_grad: Tensor,
    square_grad: Tensor,
    out: Tensor,
) -> Tensor:
    """As in `reference.py`."""
    wide = (
        out
        if out.dtype == log_partition.dtype
        else torch.empty_like(out, dtype=log_partition.dtype)
    )
    factor = entropy_grad + 2 * square_grad * log_partition
    torch.sub(logits, log_partition[:, None], out=wide).exp_().mul_(factor[:, None])
    on_target = -entropy_grad.expand(len(targets), 1)
    wide.scatter_add_(-1, targets.clamp(min=0)[:, None], on_target)
    wide.index_fill_(0, _ignored_places(targets), 0)
    return out if wide is out else out.copy_(wide)


def keep_counted(hidden: Tensor, targets: Tensor) -> Tensor:
    """As in `reference.py`; `hidden` itself where all targets count."""
    ignored = _ignored_places(targets)
    return hidden.index_fill(0, ignored, 0) if len(ignored) else hidden


class LinearCrossEntropy(torch.autograd.Function):
    """All of `linear_cross_entropy` where the logits are kept and of the accumulators' type.

    The logits become their softmax in place and that is kept: the exponentials, half the time spent outside of
    products, are taken once.
    """

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
        p = hidden @ weight.T
        known, ignored = targets.clamp(min=0)[:, None], _ignored_places(targets)
        on_target = p.gather(-1, known)[:, 0]
        shift = p.amax(-1, keepdim=True)
        shift.masked_fill_(shift.isinf(), 0)
        total = p.sub_(shift).exp_().sum(-1, keepdim=True)
        p.div_(total)
        log_partition = total.log_().add_(shift)[:, 0].index_fill_(0, ignored, 0)
        ctx.save_for_backward(hidden, weight, known, ignored, p, log_partition)
        entropies = (log_partition - on_target).index_fill_(0, ignored, 0)
        return entropies.sum(), log_partition.square().sum()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, entropy_grad: Tensor, square_grad: Tensor) -> tuple[Any, ...]:
        hidden, weight, known, ignored, p, log_partition = ctx.saved_tensors
        grad = p * (entropy_grad + 2 * square_grad * log_partition)[:, None]
        grad.scatter_add_(-1, known, -entropy_grad.expand(known.shape))
        grad.index_fill_(0, ignored, 0)
        hidden_grad = weight_grad = None
        with torch.autocast(hidden.device.type, enabled=False):
            if ctx.needs_input_grad[0]:
                hidden_grad = grad @ weight
            if ctx.needs_input_grad[1]:
                counted = hidden.index_fill(0, ignored, 0) if len(ignored) else hidden
                weight_grad = grad.T @ counted
        return hidden_grad, weight_grad, None
