"""The definitions, in plain PyTorch and differentiated by autograd: slow, exact in float64.

T positions, M modalities, H query heads, K key/value heads, hd head width.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from ..faces import wide_dtype
from .routing import modality_of_rows

__all__ = [
    "mixed_attention_reference",
    "qk_norm_rope_unpermute_reference",
    "routed_linear_reference",
    "routed_rms_norm_reference",
    "turn_reference",
]


def routed_linear_reference(
    x: Tensor, weights: Tensor, offsets: Tensor, bias: Tensor | None = None
) -> Tensor:
    """Row r of x (T, K) by the weights (M, N, K) of its own modality: gives (T, N)."""
    modality = modality_of_rows(offsets, x.shape[0])
    out = torch.einsum("tk,tnk->tn", x, weights[modality])
    return out if bias is None else out + bias[modality]


def routed_rms_norm_reference(
    x: Tensor, weights: Tensor, offsets: Tensor, eps: float
) -> tuple[Tensor, Tensor]:
    """Rows of x (T, D) over their root mean square, by weights (M, D); also (T,) inverse roots."""
    wide = x.to(wide_dtype(x))
    scale = torch.rsqrt(wide.square().mean(1) + eps)
    modality = modality_of_rows(offsets, x.shape[0])
    return (wide * scale[:, None] * weights[modality].to(wide.dtype)).to(x.dtype), scale


def turn_reference(
    x: Tensor,
    weights: Tensor | None,
    cos: Tensor | None,
    sin: Tensor | None,
    inverse: Tensor,
    offsets: Tensor,
    eps: float,
) -> tuple[Tensor, Tensor | None]:
    """Sorted rows of heads, normalised, put at their positions, and turned by them.

    Args:
        x: (T, H, hd), sorted by modality.
        weights: (M, hd) to normalise each head, (M, H hd) the whole row, None neither.
        cos, sin: (T, hd / 2) of positions, None to turn nothing.
        inverse: (T,), the sorted row of each position.
        offsets: (M,), where each modality's rows end.

    Returns:
        (T, H, hd) at positions, and the inverse roots of sorted rows, (T, H) or (T, 1).
    """
    wide, scale = x.to(wide_dtype(x)), None
    if weights is not None:
        is_full = weights.shape[1] == x.shape[1] * x.shape[2]
        rows = wide.flatten(1)[:, None] if is_full else wide
        scale = torch.rsqrt(rows.square().mean(2) + eps)
        by_row = weights[modality_of_rows(offsets, x.shape[0])].to(wide.dtype)[:, None]
        wide = (rows * scale[..., None] * by_row).view(x.shape)
    wide = wide[inverse]
    if cos is not None and sin is not None:
        first, second = wide.chunk(2, dim=-1)
        cos, sin = cos.to(wide.dtype)[:, None], sin.to(wide.dtype)[:, None]
        wide = torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1)
    return wide.to(x.dtype), scale


def qk_norm_rope_unpermute_reference(
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
) -> tuple[Tensor, Tensor, Tensor]:
    """q, k through `turn_reference`, and v only put at its positions."""
    turned_q, _ = turn_reference(q, q_weights, cos, sin, inverse, offsets, eps)
    turned_k, _ = turn_reference(k, k_weights, cos, sin, inverse, offsets, eps)
    return turned_q, turned_k, v[inverse]


def mixed_attention_reference(
    q: Tensor, k: Tensor, v: Tensor, key_starts: Tensor, key_ends: Tensor
) -> Tensor:
    """Softmax written out: query i (T, H, hd) sees keys key_starts[i] to key_ends[i] - 1.

    What is hidden is set aside by selection, not by adding: a NaN in one document stays there.
    """
    key = torch.arange(q.shape[0], device=q.device)
    visible = (key >= key_starts[:, None]) & (key < key_ends[:, None])
    groups = q.shape[1] // k.shape[1]
    k, v = k.repeat_interleave(groups, dim=1), v.repeat_interleave(groups, dim=1)
    scores = torch.einsum("qhd,khd->hqk", q, k) / math.sqrt(q.shape[2])
    weights = scores.masked_fill(~visible, -math.inf).softmax(-1)
    # 0 * NaN is NaN, so hidden values must not be multiplied at all.
    parts = torch.where(
        visible[None, :, :, None], weights[..., None] * v.transpose(0, 1)[:, None], 0
    )
    return parts.sum(2).transpose(0, 1)
