"""The definition of the loss sums, differentiated by autograd, and its two halves as the ops need them.

T tokens, D model width, V vocabulary. Ignored tokens are selected away before anything is computed from them:
whatever they hold reaches neither a sum nor a gradient.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..faces import wide_dtype

__all__ = [
    "IGNORED",
    "cross_entropy_sums_reference",
    "keep_counted",
    "linear_cross_entropy_reference",
    "logits_grad",
    "token_losses",
]

IGNORED = -100
"""Target of a position that carries no loss."""


def token_losses(logits: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    """(T,) `logsumexp(l) - l[target]` and (T,) logsumexp, in fp32 (fp64 for fp64); 0 where ignored."""
    counted = targets != IGNORED
    wide = torch.where(counted[:, None], logits.to(wide_dtype(logits)), 0)
    log_partition = wide.logsumexp(-1)
    on_target = wide.gather(-1, torch.where(counted, targets, 0)[:, None])[:, 0]
    zero = log_partition.new_zeros(())
    return (
        torch.where(counted, log_partition - on_target, zero),
        torch.where(counted, log_partition, zero),
    )


def logits_grad(
    logits: Tensor,
    targets: Tensor,
    log_partition: Tensor,
    entropy_grad: Tensor,
    square_grad: Tensor,
    out: Tensor,
) -> Tensor:
    """With p the softmax and z the logsumexp: `(g_e + 2 z g_s) p - g_e onehot(target)` into `out`, 0 where ignored.

    `out` may be `logits`.
    """
    counted = (targets != IGNORED)[:, None]
    p = (logits.to(log_partition.dtype) - log_partition[:, None]).exp()
    onehot = torch.zeros_like(p).scatter_(-1, torch.where(counted, targets[:, None], 0), 1)
    factor = (entropy_grad + 2 * square_grad * log_partition)[:, None]
    return out.copy_(torch.where(counted, factor * p - entropy_grad * onehot, 0))


def keep_counted(hidden: Tensor, targets: Tensor) -> Tensor:
    """`hidden` with rows of 0 where the target is ignored: in a product, 0 times a NaN would not vanish."""
    return hidden.masked_fill((targets == IGNORED)[:, None], 0)


def cross_entropy_sums_reference(logits: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    """The definition of `cross_entropy_sums`."""
    entropies, log_partition = token_losses(logits, targets)
    return entropies.sum(), log_partition.square().sum()


def linear_cross_entropy_reference(
    hidden: Tensor, weight: Tensor, targets: Tensor
) -> tuple[Tensor, Tensor]:
    """The definition of `linear_cross_entropy`."""
    return cross_entropy_sums_reference(keep_counted(hidden, targets) @ weight.T, targets)
