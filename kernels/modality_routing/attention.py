"""One softmax attention over all modalities, from and to rows sorted by modality.

T positions, H query heads, K key/value heads, hd head width. Text sees what came before, an image
also the rest of itself, and nobody sees another document (see `MixedLayout`).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ..checks import check_shape
from ..flex_blocks import flex_attend
from ..packed_attention import (
    PackedLayout,
    attend_rows,
    attention_problem,
    packed_attention,
    spread_heads,
)
from ..rotary import RotaryTable
from .layout import MixedLayout
from .qk import qk_norm_rope_unpermute
from .routing import Routing

__all__ = ["mixed_attention", "routed_attention"]


def routed_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    routing: Routing,
    layout: PackedLayout,
    *,
    table: RotaryTable | None = None,
    q_weights: Tensor | Sequence[Tensor] | None = None,
    k_weights: Tensor | Sequence[Tensor] | None = None,
    eps: float = 1e-6,
    backend: str = "auto",
) -> Tensor:
    """Shared attention of rows sorted by modality: arXiv 2411.04996, algorithm 1.

    Queries and keys are normalised, put at their positions and turned by `qk_norm_rope_unpermute`,
    attend by `mixed_attention`, and the result is gathered back.

    Args:
        q: (T, H, hd), rows sorted by modality; k, v (T, K, hd), H a multiple of K.
        layout: a `MixedLayout`, or a `PackedLayout` where nothing is an image.
        table, q_weights, k_weights, eps: as in `qk_norm_rope_unpermute`.
        backend: as in `mixed_attention`.

    Returns:
        (T, H, hd), rows sorted by modality.

    Raises:
        ValueError: shapes, types, devices or a backend that do not fit.
    """
    if layout.total != routing.total:
        raise ValueError(
            f"the routing has {routing.total} positions but the layout has {layout.total}"
        )
    turned = qk_norm_rope_unpermute(q, k, v, routing, table, q_weights, k_weights, eps)
    return routing.permute(mixed_attention(*turned, layout, backend))


def mixed_attention(
    q: Tensor, k: Tensor, v: Tensor, layout: PackedLayout, backend: str = "auto"
) -> Tensor:
    """`softmax(q k^T / sqrt(hd)) v` over what a layout shows to each position.

    A batch without images runs exactly as `packed_attention` does. On the CPU documents with
    images are computed one by one, so that a NaN in one cannot reach another; compiled there, or
    by `flex`, a NaN among values can, since a hidden weight of 0 still multiplies it.

    Args:
        q: (T, H, hd), in the order of positions.
        k, v: (T, K, hd), H a multiple of K.
        layout: a `MixedLayout` or a `PackedLayout`.
        backend: `sdpa`, `flex`, or `auto`: flex on a GPU, else sdpa. Without images as in
            `packed_attention`.

    Returns:
        (T, H, hd).

    Raises:
        ValueError: a backend that is unknown or does not run here, or shapes that do not fit.
    """
    check_shape("q", q, (layout.total, None, None))
    if not layout.total:
        # No kernel takes no rows; the zeros keep keys and values in the graph, for their weights.
        return q * 1 + (k.sum() + v.sum()) * 0
    if not isinstance(layout, MixedLayout) or layout.is_causal:
        return packed_attention(q, k, v, layout, backend)
    if backend == "auto":
        backend = "flex" if q.is_cuda else "sdpa"
    if backend == "varlen":
        raise ValueError("attention backend varlen is causal and the batch has images; use auto")
    needs_gradient = torch.is_grad_enabled() and q.requires_grad
    problem = attention_problem(backend, q.device, q.dtype, needs_gradient)
    if problem:
        raise ValueError(problem)
    return flex_attend(q, k, v, layout.block_mask) if backend == "flex" else _sdpa(q, k, v, layout)


def _sdpa(q: Tensor, k: Tensor, v: Tensor, layout: MixedLayout) -> Tensor:
    k, v = spread_heads(q, k), spread_heads(q, v)
    # Lengths are shapes: a wait on a GPU, and a recompilation when compiled.
    if q.device.type != "cpu" or torch.compiler.is_compiling():
        return attend_rows(q, k, v, layout.row_length, layout.row_mask)
    parts, start = [], 0
    for length, count, has_images in layout.mixed_runs:
        end = start + length * count
        mask = layout.mask_of(start, end, count) if has_images else None
        parts.append(attend_rows(q[start:end], k[start:end], v[start:end], length, mask))
        start = end
    return torch.cat(parts)
