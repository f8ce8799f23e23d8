"""Cross-attention of bytes and patches in plain torch: under a dense mask (the definition), and by gathers (fast).

All work in the wide type and return it. Notation: s scores, p probabilities, `delta = sum g out = sum p (g v)`, `ds = p (g v - delta)`.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from ..faces import wide_dtype

__all__ = [
    "attend_by_bytes",
    "attend_by_bytes_backward",
    "attend_under_mask",
    "attend_under_mask_backward",
    "pool_bytes",
    "pool_bytes_backward",
]


def _widened(*tensors: Tensor) -> tuple[Tensor, ...]:
    return tuple(tensor.to(wide_dtype(tensor)) for tensor in tensors)


def _probabilities(q: Tensor, k: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
    """(H, queries, keys) softmax of the scores under the mask, 0 where nothing is seen, and (queries, H) its log-sums."""
    scores = torch.einsum("qhd,khd->hqk", q, k) / math.sqrt(q.shape[2])
    scores = scores.masked_fill(~mask, -math.inf)
    sees_nothing = ~mask.any(1)
    p = scores.softmax(-1).masked_fill(sees_nothing[:, None], 0)
    return p, scores.logsumexp(-1).masked_fill(sees_nothing, 0).T


def attend_under_mask(q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
    """The definition, differentiable by autograd: queries (N, H, hd), keys (M, H, hd), mask (N, M) bool."""
    q, k, v = _widened(q, k, v)
    p, lse = _probabilities(q, k, mask)
    return torch.einsum("hqk,khd->qhd", p, v), lse


def attend_under_mask_backward(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, mask: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    grad, q, k, v = _widened(grad, q, k, v)
    p, _ = _probabilities(q, k, mask)
    p_grad = torch.einsum("qhd,khd->hqk", grad, v)
    s_grad = p * (p_grad - (p * p_grad).sum(-1, keepdim=True)) / math.sqrt(q.shape[2])
    return (
        torch.einsum("hqk,khd->qhd", s_grad, k),
        torch.einsum("hqk,qhd->khd", s_grad, q),
        torch.einsum("hqk,qhd->khd", p, grad),
    )


def _of_patches(x: Tensor, patch: Tensor, patches: int) -> Tensor:
    """The K rows of each byte's patch: (P * K, ...) to (T, K, ...); `patch` (T,) int from 0 to P - 1."""
    return x.unflatten(0, (patches, -1)).index_select(0, patch)


def _sum_by_patch(rows: Tensor, patch: Tensor, patches: int) -> Tensor:
    """Sums of the rows of each patch: (T, ...) to (P, ...); rows of no patch have id P."""
    sums = rows.new_zeros(patches + 1, *rows.shape[1:])
    return sums.index_add_(0, patch, rows)[:-1]


def _dot(one: Tensor, several: Tensor) -> Tensor:
    """Products of (T, H, hd) with each of (T, K, H, hd): (T, K, H). For matrices this small einsum costs four times as much."""
    return (one[:, None] * several).sum(-1)


def _weigh(weights: Tensor, several: Tensor) -> Tensor:
    """Sum of (T, K, H, hd) under weights (T, K, H): (T, H, hd)."""
    return (weights[..., None] * several).sum(1)


def attend_by_bytes(
    q: Tensor, k: Tensor, v: Tensor, patch_ids: Tensor, vectors: int
) -> tuple[Tensor, Tensor]:
    """Each byte gathers the K vectors of its patch: T * K scores instead of T * P * K."""
    q, k, v = _widened(q, k, v)
    patches = k.shape[0] // vectors
    known = patch_ids.clamp(0, patches - 1)
    reads_nothing = ((patch_ids < 0) | (patch_ids >= patches))[:, None]
    scores = _dot(q, _of_patches(k, known, patches)) / math.sqrt(q.shape[2])
    out = _weigh(scores.softmax(1), _of_patches(v, known, patches))
    lse = scores.logsumexp(1)
    return out.masked_fill_(reads_nothing[..., None], 0), lse.masked_fill_(reads_nothing, 0)


def attend_by_bytes_backward(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, lse: Tensor, patch_ids: Tensor, vectors: int
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    grad, q, k, v = _widened(grad, q, k, v)
    patches, scale = k.shape[0] // vectors, 1 / math.sqrt(q.shape[2])
    reads_nothing = (patch_ids < 0) | (patch_ids >= patches)
    patch = patch_ids.masked_fill(reads_nothing, patches)
    known = patch_ids.clamp(0, patches - 1)
    keys, values = _of_patches(k, known, patches), _of_patches(v, known, patches)
    p = (_dot(q, keys) * scale - lse[:, None]).exp()
    p_grad = _dot(grad, values)
    s_grad = p * (p_grad - (p * p_grad).sum(1, keepdim=True)) * scale
    q_grad = _weigh(s_grad, keys).masked_fill_(reads_nothing[:, None, None], 0)
    k_grad = _sum_by_patch(s_grad[..., None] * q[:, None], patch, patches)
    v_grad = _sum_by_patch(p[..., None] * grad[:, None], patch, patches)
    return q_grad, k_grad.flatten(0, 1), v_grad.flatten(0, 1)


def pool_bytes(
    q: Tensor, k: Tensor, v: Tensor, patch: Tensor, patches: int
) -> tuple[Tensor, Tensor]:
    """A softmax over the bytes of each patch; `patch` (T,) is P for bytes of none, which land in an extra row."""
    q, k, v = _widened(q, k, v)
    queries = _of_patches(q, patch.clamp(max=patches - 1), patches)
    scores = _dot(k, queries) / math.sqrt(q.shape[2])
    slots = patch[:, None, None].expand_as(scores)
    shape = (patches + 1, *scores.shape[1:])
    # Empty patches keep -inf, which nothing reads; the log below is taken of 1 for them.
    peak = scores.new_full(shape, -math.inf).scatter_reduce_(0, slots, scores, "amax")
    weights = (scores - peak.index_select(0, patch)).exp()
    total = scores.new_zeros(shape).index_add_(0, patch, weights)[:-1]
    is_empty = torch.ones(patches + 1, dtype=torch.bool, device=q.device)
    is_empty = is_empty.index_fill_(0, patch, False)[:-1, None, None]
    sums = _sum_by_patch(weights[..., None] * v[:, None], patch, patches)
    total = total.masked_fill_(is_empty, 1)
    out = sums / total[..., None]
    lse = (peak[:-1] + total.log()).masked_fill(is_empty, 0)
    return out.flatten(0, 1), lse.flatten(0, 1)


def pool_bytes_backward(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, patch: Tensor, patches: int
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    grad, q, k, v, out = _widened(grad, q, k, v, out)
    scale = 1 / math.sqrt(q.shape[2])
    known = patch.clamp(max=patches - 1)
    queries, grads, delta, log_sums = (
        _of_patches(x, known, patches) for x in (q, grad, (grad * out).sum(-1), lse)
    )
    p = (_dot(k, queries) * scale - log_sums).exp()
    is_outside = (patch == patches)[:, None, None]
    s_grad = p * (_dot(v, grads) - delta) * scale
    k_grad = _weigh(s_grad, queries).masked_fill_(is_outside, 0)
    v_grad = _weigh(p, grads).masked_fill_(is_outside, 0)
    q_grad = _sum_by_patch(s_grad[..., None] * k[:, None], patch, patches)
    return q_grad.flatten(0, 1), k_grad, v_grad
