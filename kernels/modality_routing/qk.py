"""Queries, keys and values from rows sorted by modality to their positions, in one pass.

Queries and keys are normalised by weights of their modality and turned by their position on the
way. T positions, M modalities, H query heads, K key/value heads, hd head width. A row is read
once and written once, where three ops would do so three times; what is kept for the gradient is
the input and the inverse roots, or nothing where nothing is normalised.
Sources: Henry et al., arXiv 2010.04245 (QK-norm); Su et al., arXiv 2104.09864 (rotary positions).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ..checks import check_dtype, check_same_device, check_shape
from ..faces import pick_face, wide_dtype
from ..rotary import RotaryTable
from .norm import WIDEST_ROW, normalise_slices, normalise_slices_backward, stack_rows
from .reference import turn_reference
from .routing import Routing, modality_of_rows

__all__ = ["qk_norm_rope_unpermute"]

Turned = tuple[Tensor, Tensor, Tensor, Tensor, Tensor]
"""Queries, keys and values at their positions, and inverse roots of sorted rows of q and k."""


def qk_norm_rope_unpermute(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    routing: Routing,
    table: RotaryTable | None = None,
    q_weights: Tensor | Sequence[Tensor] | None = None,
    k_weights: Tensor | Sequence[Tensor] | None = None,
    eps: float = 1e-6,
) -> tuple[Tensor, Tensor, Tensor]:
    """`q_t = rotate(norm(q_r; w_m), t)` with r the sorted row of position t and m its modality.

    The same for k; v is only moved. Equations: arXiv 1910.07467, 4, and arXiv 2104.09864, 34.

    Args:
        q: (T, H, hd), rows sorted by modality, hd even. May be a slice of wider rows.
        k, v: (T, K, hd) likewise.
        table: of positions, (T, hd / 2) cosines and sines; None turns nothing.
        q_weights: (M, hd) normalises each head, (M, H hd) the whole row, None neither; in one
            tensor or M of them.
        k_weights: the same with K for H.
        eps: added to mean squares.

    Returns:
        (T, H, hd), (T, K, hd), (T, K, hd) in the order of positions and the type of q.

    Raises:
        ValueError: shapes, types or devices that do not fit.
    """
    _check_heads(q, k, v, routing)
    q_rows = None if q_weights is None else _norm_rows("q_weights", q_weights, q, routing)
    k_rows = None if k_weights is None else _norm_rows("k_weights", k_weights, k, routing)
    cos = sin = None
    if table is not None:
        cos, sin = table.cos, table.sin
        check_shape("table.cos", cos, (routing.total, q.shape[2] // 2))
        check_shape("table.sin", sin, (routing.total, q.shape[2] // 2))
    check_same_device(
        routing=routing.order, q=q, k=k, v=v, q_weights=q_rows, k_weights=k_rows, table=cos
    )
    indices = (routing.order, routing.inverse, routing.offsets)
    return _turn_op(q, k, v, q_rows, k_rows, cos, sin, *indices, float(eps))[:3]


def _check_heads(q: Tensor, k: Tensor, v: Tensor, routing: Routing) -> None:
    check_shape("q", q, (routing.total, None, None))
    check_shape("k", k, (routing.total, None, q.shape[2]))
    check_shape("v", v, tuple(k.shape))
    if q.shape[2] % 2:
        raise ValueError(f"q has heads of width {q.shape[2]}, expected an even one")
    if not k.shape[1] or q.shape[1] % k.shape[1]:
        raise ValueError(f"q has {q.shape[1]} heads and k {k.shape[1]}, expected a multiple of k's")
    check_dtype("q", q)
    for name, tensor in (("k", k), ("v", v)):
        check_dtype(name, tensor, (q.dtype,))


def _norm_rows(
    name: str, weights: Tensor | Sequence[Tensor], heads: Tensor, routing: Routing
) -> Tensor:
    width, full = heads.shape[2], heads.shape[1] * heads.shape[2]
    found = weights.shape[-1] if isinstance(weights, Tensor) else weights[0].shape[-1]
    if found not in (width, full):
        raise ValueError(
            f"{name} has {found} channels, expected {width} (a head) or {full} (a row)"
        )
    return stack_rows(name, weights, routing, found)


def scales_of(x: Tensor, weights: Tensor | None) -> tuple[int, ...]:
    """Shape of the inverse roots: one a head, one a row, or none."""
    if weights is None:
        return (0,)
    # A single head is a whole row.
    return (x.shape[0], x.shape[1] if weights.shape[1] == x.shape[2] else 1)


@torch.library.custom_op("weft::qk_norm_rope_unpermute", mutates_args=())
def _turn_op(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    q_weights: Tensor | None,
    k_weights: Tensor | None,
    cos: Tensor | None,
    sin: Tensor | None,
    order: Tensor,
    inverse: Tensor,
    offsets: Tensor,
    eps: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    face = pick_face(q)
    if not q.numel():
        return _empty_turned(q, k, v, q_weights, k_weights)
    if face == "triton" and q.shape[1] * q.shape[2] <= WIDEST_ROW:
        from .triton import run_turn

        return run_turn(q, k, v, q_weights, k_weights, cos, sin, inverse, offsets, eps)
    turn = _turn if face == "cpu" and not q.is_cuda else turn_reference
    new_q, q_scale = turn(q, q_weights, cos, sin, inverse, offsets, eps)
    new_k, k_scale = turn(k, k_weights, cos, sin, inverse, offsets, eps)
    none = torch.empty(0, dtype=wide_dtype(q), device=q.device)
    return (
        new_q,
        new_k,
        v.index_select(0, inverse),
        none if q_scale is None else q_scale,
        none.clone() if k_scale is None else k_scale,
    )


@_turn_op.register_fake
def _(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    q_weights: Tensor | None,
    k_weights: Tensor | None,
    cos: Tensor | None,
    sin: Tensor | None,
    order: Tensor,
    inverse: Tensor,
    offsets: Tensor,
    eps: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    return _empty_turned(q, k, v, q_weights, k_weights)


def _empty_turned(
    q: Tensor, k: Tensor, v: Tensor, q_weights: Tensor | None, k_weights: Tensor | None
) -> Turned:
    def empty(shape: Sequence[int], dtype: torch.dtype) -> Tensor:
        return torch.empty(shape, dtype=dtype, device=q.device)

    q_out, k_out, v_out = (empty(x.shape, x.dtype) for x in (q, k, v))
    q_scale = empty(scales_of(q, q_weights), wide_dtype(q))
    return q_out, k_out, v_out, q_scale, empty(scales_of(k, k_weights), wide_dtype(q))


@torch.library.custom_op("weft::qk_norm_rope_unpermute_backward", mutates_args=())
def _turn_backward_op(
    q_grad: Tensor,
    k_grad: Tensor,
    v_grad: Tensor,
    q: Tensor | None,
    k: Tensor | None,
    q_weights: Tensor | None,
    k_weights: Tensor | None,
    cos: Tensor | None,
    sin: Tensor | None,
    order: Tensor,
    offsets: Tensor,
    q_scale: Tensor,
    k_scale: Tensor,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    face = pick_face(q_grad)
    if not q_grad.numel():
        grads = _empty_grads(q_grad, k_grad, v_grad, q_weights, k_weights)
        return (*grads[:3], grads[3].zero_(), grads[4].zero_())
    if face == "triton" and q_grad.shape[1] * q_grad.shape[2] <= WIDEST_ROW:
        from .triton import run_turn_backward

        q_side, k_side = (q_grad, q, q_weights, q_scale), (k_grad, k, k_weights, k_scale)
        return run_turn_backward(q_side, k_side, v_grad, cos, sin, order, offsets)
    is_sliced = face == "cpu" and not q_grad.is_cuda
    turns = (cos, sin, order, offsets)
    q_out, q_row_grads = _turn_back(q_grad, q, q_weights, *turns, q_scale, is_sliced)
    k_out, k_row_grads = _turn_back(k_grad, k, k_weights, *turns, k_scale, is_sliced)
    return q_out, k_out, v_grad.index_select(0, order), q_row_grads, k_row_grads


@_turn_backward_op.register_fake
def _(
    q_grad: Tensor,
    k_grad: Tensor,
    v_grad: Tensor,
    q: Tensor | None,
    k: Tensor | None,
    q_weights: Tensor | None,
    k_weights: Tensor | None,
    cos: Tensor | None,
    sin: Tensor | None,
    order: Tensor,
    offsets: Tensor,
    q_scale: Tensor,
    k_scale: Tensor,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    return _empty_grads(q_grad, k_grad, v_grad, q_weights, k_weights)


def _empty_grads(
    q_grad: Tensor,
    k_grad: Tensor,
    v_grad: Tensor,
    q_weights: Tensor | None,
    k_weights: Tensor | None,
) -> Turned:
    def empty(like: Tensor | None) -> Tensor:
        if like is None:
            return torch.empty(0, dtype=q_grad.dtype, device=q_grad.device)
        return torch.empty(like.shape, dtype=like.dtype, device=like.device)

    q_out, k_out, v_out = empty(q_grad), empty(k_grad), empty(v_grad)
    return q_out, k_out, v_out, empty(q_weights), empty(k_weights)


def _rows_to_normalise(x: Tensor, scales: int) -> Tensor:
    """(T, scales, hd) or (T, 1, H hd): what one mean square is taken over, last."""
    return x.reshape(x.shape[0], scales, -1)


def _turn(
    x: Tensor,
    weights: Tensor | None,
    cos: Tensor | None,
    sin: Tensor | None,
    inverse: Tensor,
    offsets: Tensor,
    eps: float,
) -> tuple[Tensor, Tensor | None]:
    """As the definition, a slice a modality and without copies of weights for each row."""
    wide, scale = x.to(wide_dtype(x)), None
    if weights is not None:
        scales = scales_of(x, weights)[1]
        rows = _rows_to_normalise(wide, scales).flatten(0, 1)
        normal, scale = normalise_slices(rows, weights, offsets * scales, eps)
        wide, scale = normal.view(x.shape), scale.view(-1, scales)
    wide = wide.index_select(0, inverse)
    if cos is not None and sin is not None:
        wide = _rotate(wide, cos, sin)
    return wide.to(x.dtype), scale


def _turn_back(
    grad: Tensor,
    x: Tensor | None,
    weights: Tensor | None,
    cos: Tensor | None,
    sin: Tensor | None,
    order: Tensor,
    offsets: Tensor,
    scale: Tensor,
    is_sliced: bool,
) -> tuple[Tensor, Tensor]:
    """Gradients of rows and weights; a rotation's transpose is the rotation back."""
    wide = grad.to(wide_dtype(grad))
    if cos is not None and sin is not None:
        wide = _rotate(wide, cos, -sin)
    wide = wide.index_select(0, order)
    if weights is None or x is None:
        return wide.to(grad.dtype), torch.empty(0, dtype=grad.dtype, device=grad.device)
    scales = scale.shape[1]
    rows, row_grads = _rows_to_normalise(x, scales), _rows_to_normalise(wide, scales)
    if is_sliced:
        flat = (row_grads.flatten(0, 1), rows.flatten(0, 1).to(wide.dtype))
        found = normalise_slices_backward(*flat, weights, offsets * scales, scale.flatten())
        return found[0].view(x.shape).to(x.dtype), found[1]
    modality = modality_of_rows(offsets, x.shape[0])
    normal = rows.to(wide.dtype) * scale[..., None]
    scaled = row_grads * weights[modality].to(wide.dtype)[:, None]
    mean = (scaled * normal).mean(2, keepdim=True)
    product = row_grads * normal
    parts = [
        torch.where((modality == m)[:, None, None], product, 0).sum((0, 1))
        for m in range(weights.shape[0])
    ]
    x_grad = (scaled - normal * mean) * scale[..., None]
    return x_grad.view(x.shape).to(x.dtype), torch.stack(parts).to(weights.dtype)


def _rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """The half-split rotation of wide heads."""
    cos, sin = cos.to(x.dtype)[:, None], sin.to(x.dtype)[:, None]
    first, second = x.chunk(2, dim=-1)
    out = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    turned_first, turned_second = out.chunk(2, dim=-1)
    torch.mul(first, cos, out=turned_first).addcmul_(second, sin, value=-1)
    torch.mul(second, cos, out=turned_second).addcmul_(first, sin)
    return out


def _keep(ctx: Any, inputs: tuple[Any, ...], output: Turned) -> None:
    q, k, _, q_weights, k_weights, cos, sin, order, _, offsets, _ = inputs
    ctx.mark_non_differentiable(*output[3:])
    kept_q, kept_k = None if q_weights is None else q, None if k_weights is None else k
    ctx.save_for_backward(
        kept_q, kept_k, q_weights, k_weights, cos, sin, order, offsets, *output[3:]
    )


def _backward(
    ctx: Any, q_grad: Tensor, k_grad: Tensor, v_grad: Tensor, *_: Any
) -> tuple[Tensor | None, ...]:
    kept = ctx.saved_tensors
    grads = (x.contiguous() for x in (q_grad, k_grad, v_grad))
    q_out, k_out, v_out, q_rows, k_rows = _turn_backward_op(*grads, *kept)
    q_weights, k_weights = kept[2:4]
    row_grads = (
        None if q_weights is None else q_rows,
        None if k_weights is None else k_rows,
    )
    return q_out, k_out, v_out, *row_grads, None, None, None, None, None, None


_turn_op.register_autograd(_backward, setup_context=_keep)
