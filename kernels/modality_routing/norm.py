"""RMS norm of rows sorted by modality, each modality with weights of its own.

T rows of D channels, M modalities. Statistics are in fp32 (fp64 for fp64 rows); the inverse root,
one number a row, is all that is kept beside the input.
Source: Zhang and Sennrich, arXiv 1910.07467, equation 4, with epsilon inside the root.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ..checks import check_dtype, check_same_device, check_shape
from ..faces import pick_face, wide_dtype
from .linear import check_parts
from .reference import routed_rms_norm_reference
from .routing import Routing, modality_of_rows

__all__ = ["routed_rms_norm", "stack_rows"]

WIDEST_ROW = 16384
"""Channels that a Triton program holds in registers; wider rows run by the definition."""


def routed_rms_norm(
    x: Tensor, weights: Tensor | Sequence[Tensor], routing: Routing, eps: float
) -> Tensor:
    """`w_m x_r / sqrt(mean(x_r^2) + eps)`, where m is the modality of sorted row r.

    Args:
        x: (T, D), rows sorted by modality, any floating type.
        weights: (M, D), or M tensors (D,), which may be frozen one by one.
        eps: added to the mean square.

    Returns:
        (T, D) in the type of x.

    Raises:
        ValueError: shapes, types or devices that do not fit.
    """
    check_shape("x", x, (routing.total, None))
    check_dtype("x", x)
    rows = stack_rows("weights", weights, routing, x.shape[1])
    check_same_device(routing=routing.order, x=x, weights=rows)
    return _routed_rms_norm_op(x, rows, routing.offsets, float(eps))[0]


def stack_rows(
    name: str, rows: Tensor | Sequence[Tensor], routing: Routing, channels: int
) -> Tensor:
    """(M, channels) of rows given in one tensor or apart.

    Raises:
        ValueError: not one row of `channels` for each modality, or no floating type.
    """
    check_parts(name, rows, routing.n_modalities, (channels,))
    stacked = rows if isinstance(rows, Tensor) else torch.stack(list(rows))
    check_dtype(name, stacked)
    return stacked


@torch.library.custom_op("weft::routed_rms_norm", mutates_args=())
def _routed_rms_norm_op(
    x: Tensor, weights: Tensor, offsets: Tensor, eps: float
) -> tuple[Tensor, Tensor]:
    face = pick_face(x)
    if not x.numel():
        return torch.empty_like(x, memory_format=torch.contiguous_format), _no_rows(x)
    if face == "triton" and x.shape[1] <= WIDEST_ROW:
        from .triton import run_rms_norm

        return run_rms_norm(x, weights.contiguous(), offsets, eps)
    if face == "cpu" and not x.is_cuda:
        return normalise_slices(x, weights, offsets, eps)
    return routed_rms_norm_reference(x, weights, offsets, eps)


@_routed_rms_norm_op.register_fake
def _(x: Tensor, weights: Tensor, offsets: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    return torch.empty(x.shape, dtype=x.dtype, device=x.device), _no_rows(x)


def _no_rows(x: Tensor) -> Tensor:
    return torch.empty(x.shape[0], dtype=wide_dtype(x), device=x.device)


def normalise_slices(
    x: Tensor, weights: Tensor, offsets: Tensor, eps: float
) -> tuple[Tensor, Tensor]:
    """As the definition, without a copy of the weights for each row; offsets are on the CPU."""
    wide = x.to(wide_dtype(x))
    scale = torch.rsqrt(wide.square().mean(1).add_(eps))
    out, start = wide * scale[:, None], 0
    for modality, end in enumerate(offsets.tolist()):
        out[start:end].mul_(weights[modality].to(wide.dtype))
        start = end
    return out.to(x.dtype), scale


@torch.library.custom_op("weft::routed_rms_norm_backward", mutates_args=())
def _routed_rms_norm_backward_op(
    grad: Tensor, x: Tensor, weights: Tensor, offsets: Tensor, scale: Tensor
) -> tuple[Tensor, Tensor]:
    face = pick_face(x)
    if not x.numel():
        empty = torch.empty(x.shape, dtype=x.dtype, device=x.device)
        return empty, torch.zeros(weights.shape, dtype=weights.dtype, device=x.device)
    if face == "triton" and x.shape[1] <= WIDEST_ROW:
        from .triton import run_rms_norm_backward

        return run_rms_norm_backward(grad, x, weights.contiguous(), offsets, scale)
    if face == "cpu" and not x.is_cuda:
        return normalise_slices_backward(grad, x, weights, offsets, scale)
    modality = modality_of_rows(offsets, x.shape[0])
    normal = x.to(scale.dtype) * scale[:, None]
    product = grad.to(scale.dtype) * normal
    scaled = grad.to(scale.dtype) * weights[modality].to(scale.dtype)
    mean = (scaled * normal).mean(1, keepdim=True)
    grad_x = (scaled - normal * mean) * scale[:, None]
    # By selection: a product with 0 would carry the NaN of one modality to the next.
    parts = [
        torch.where((modality == m)[:, None], product, 0).sum(0) for m in range(weights.shape[0])
    ]
    return grad_x.to(x.dtype), torch.stack(parts).to(weights.dtype)


@_routed_rms_norm_backward_op.register_fake
def _(
    grad: Tensor, x: Tensor, weights: Tensor, offsets: Tensor, scale: Tensor
) -> tuple[Tensor, Tensor]:
    return (
        torch.empty(x.shape, dtype=x.dtype, device=x.device),
        torch.empty(weights.shape, dtype=weights.dtype, device=x.device),
    )


def normalise_slices_backward(
    grad: Tensor, x: Tensor, weights: Tensor, offsets: Tensor, scale: Tensor
) -> tuple[Tensor, Tensor]:
    """Gradients of `normalise_slices` for rows and weights; zeros for a modality without rows."""
    normal, scaled = x.to(scale.dtype).mul(scale[:, None]), grad.to(scale.dtype, copy=True)
    weight_grad = torch.empty(weights.shape, dtype=scale.dtype)
    start = 0
    for modality, end in enumerate(offsets.tolist()):
        part = slice(start, end)
        torch.sum(scaled[part] * normal[part], 0, out=weight_grad[modality])
        scaled[part].mul_(weights[modality].to(scale.dtype))
        start = end
    mean = (scaled * normal).mean(1, keepdim=True)
    grad_x = scaled.addcmul_(normal, mean, value=-1).mul_(scale[:, None])
    return grad_x.to(x.dtype), weight_grad.to(weights.dtype)


def _keep(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    x, weights, offsets, _ = inputs
    ctx.mark_non_differentiable(output[1])
    ctx.save_for_backward(x, weights, offsets, output[1])


def _backward(ctx: Any, grad: Tensor, _: Any) -> tuple[Tensor, Tensor, None, None]:
    x, weights, offsets, scale = ctx.saved_tensors
    grads = _routed_rms_norm_backward_op(grad.contiguous(), x, weights, offsets, scale)
    return *grads, None, None


_routed_rms_norm_op.register_autograd(_backward, setup_context=_keep)
