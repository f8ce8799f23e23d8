"""Sums of cross-entropy and of squared log-partition over the targets that count, in fp32.

Sums, not means: the trainer divides by the count over all ranks and micro-batches. The gradient
is written out, so that of tensors as large as the logits only the logits themselves are kept, in
their own type.
Source: OLMo 2 (arXiv 2501.00656) section 3.3.3 for the z-loss.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn.functional import linear
from torch.utils.checkpoint import checkpoint

__all__ = ["IGNORED", "cross_entropy_sums", "linear_cross_entropy"]

IGNORED = -100
"""Target of a position that carries no loss."""


class _CrossEntropySums(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, logits: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
        wide = logits.to(torch.promote_types(logits.dtype, torch.float32))
        counted = targets != IGNORED
        known = torch.where(counted, targets, 0)[:, None]
        log_partition = torch.logsumexp(wide, dim=-1)
        ctx.save_for_backward(logits, known, counted, log_partition)
        # `where`, not a product: an ignored position that overflowed must not turn the sum into
        # NaN.
        zero = log_partition.new_zeros(())
        entropy = torch.where(counted, log_partition - wide.gather(-1, known)[:, 0], zero).sum()
        return entropy, torch.where(counted, log_partition, zero).square().sum()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, entropy_grad: Tensor, square_grad: Tensor) -> tuple[Tensor, None]:
        """With p the softmax and z the logsumexp: `(g_e + 2 z g_s) p - g_e onehot(target)`."""
        logits, known, counted, log_partition = ctx.saved_tensors
        zero = log_partition.new_zeros(())
        factor = torch.where(counted, entropy_grad + 2 * square_grad * log_partition, zero)
        on_target = torch.where(counted, entropy_grad, zero)
        grad = (logits.to(log_partition.dtype) - log_partition[:, None]).exp_()
        grad.mul_(factor[:, None]).scatter_add_(-1, known, -on_target[:, None])
        grad.masked_fill_(~counted[:, None], 0)
        return grad.to(logits.dtype), None


def cross_entropy_sums(logits: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    """Sums of `logsumexp(l) - l[target]` and `logsumexp(l)^2` over targets that are not `IGNORED`.

    Args:
        logits: (T, V), any floating type; computed in fp32 (fp64 stays).
        targets: (T,) int64.

    Returns:
        Two scalars, fp32 (fp64 for fp64 logits).
    """
    return _CrossEntropySums.apply(logits, targets)


def _project_and_sum(hidden: Tensor, weight: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    return cross_entropy_sums(linear(hidden, weight), targets)


def linear_cross_entropy(
    hidden: Tensor, weight: Tensor, targets: Tensor, chunk_tokens: int | None = None
) -> tuple[Tensor, Tensor]:
    """`cross_entropy_sums(hidden @ weight.T, targets)`, holding the logits of one chunk at a time.

    Args:
        hidden: (T, D).
        weight: (V, D).
        targets: (T,) int64.
        chunk_tokens: positions a chunk; None keeps all logits. Chunks are recomputed in the
            backward pass.
    """
    if chunk_tokens is None or chunk_tokens >= len(targets):
        return _project_and_sum(hidden, weight, targets)
    entropies, squares = [], []
    for part, wanted in zip(hidden.split(chunk_tokens), targets.split(chunk_tokens), strict=True):
        entropy, square = checkpoint(
            _project_and_sum, part, weight, wanted, use_reentrant=False, preserve_rng_state=False
        )
        entropies.append(entropy)
        squares.append(square)
    return torch.stack(entropies).sum(), torch.stack(squares).sum()
