"""Sums of cross-entropy and of squared log-partition over the targets that count, in fp32.

Sums, not means: the trainer divides by the count over all ranks and micro-batches. Source: OLMo 2 (arXiv
2501.00656) section 3.3.3 for the z-loss.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

__all__ = ["IGNORED", "cross_entropy_sums", "linear_cross_entropy"]

IGNORED = -100
"""Target of a position that carries no loss."""


def cross_entropy_sums(logits: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    """Sum of `logsumexp(l) - l[target]` and of `logsumexp(l)^2` over targets that are not `IGNORED`.

    Args:
        logits: (T, V), computed in fp32 (fp64 stays).
        targets: (T,) int64.
    """
    wide = logits if logits.dtype == torch.float64 else logits.float()
    counted = targets != IGNORED
    log_partition = torch.logsumexp(wide, dim=-1)
    picked = wide.gather(-1, targets.clamp_min(0)[:, None])[:, 0]
    # `where`, not a product: an ignored position that overflowed must not turn the sum into NaN.
    zero = torch.zeros((), dtype=wide.dtype, device=wide.device)
    entropy = torch.where(counted, log_partition - picked, zero).sum()
    return entropy, torch.where(counted, log_partition, zero).square().sum()


def linear_cross_entropy(
    hidden: Tensor, weight: Tensor, targets: Tensor, chunk_tokens: int | None = None
) -> tuple[Tensor, Tensor]:
    """`cross_entropy_sums(hidden @ weight.T, targets)` that holds the logits of one chunk at a time.

    Args:
        hidden: (T, D).
        weight: (V, D).
        targets: (T,) int64.
        chunk_tokens: positions a chunk; None keeps all logits. Chunks are recomputed in the backward pass.
    """
    if chunk_tokens is None or chunk_tokens >= len(targets):
        return cross_entropy_sums(torch.nn.functional.linear(hidden, weight), targets)

    def one(part: Tensor, wanted: Tensor) -> tuple[Tensor, Tensor]:
        return cross_entropy_sums(torch.nn.functional.linear(part, weight), wanted)

    pairs = [
        checkpoint(one, part, wanted, use_reentrant=False)
        for part, wanted in zip(hidden.split(chunk_tokens), targets.split(chunk_tokens), strict=True)
    ]
    return torch.stack([p[0] for p in pairs]).sum(), torch.stack([p[1] for p in pairs]).sum()
