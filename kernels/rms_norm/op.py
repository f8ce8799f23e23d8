"""Root-mean-square normalisation, with a residual added before it and a gate multiplied after it where given.

What runs when:

| | eager CPU | eager CUDA | compiled |
| --- | --- | --- | --- |
| plain | the written-out gradient below | torch's fused kernel; Triton where `use_kernels` asks for it | the definition, which the compiler fuses with its neighbours (torch's op on CUDA, which it takes apart the same way) |
| residual or gate | plain torch | Triton | as eager: a registered op |

The gradients are written out: they keep one number a row beside the input (with a residual: beside the sum, which the caller keeps
anyway), where autograd would keep three tensors of the input's size.
Source: Zhang and Sennrich, arXiv 1910.07467, equation 4, with epsilon inside the root as OLMo 2 and Llama have it.
"""

from __future__ import annotations

from typing import Any, overload

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from ..checks import check_dtype, check_same_device, check_shape
from ..faces import pick_face, wanted_face
from . import reference
from .reference import rms_norm_reference, statistics_dtype, sum_dtype

__all__ = ["rms_norm"]


class _RMSNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        wide = x.to(statistics_dtype(x.dtype))
        scale = torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)
        ctx.save_for_backward(x, weight, scale)
        return (wide * scale).mul_(weight.to(wide.dtype)).to(x.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, None]:
        x, weight, scale = ctx.saved_tensors
        x_grad, weight_grad, _ = reference.norm_backward(grad, None, x, weight, None, scale)
        return x_grad, weight_grad, None


@torch.library.custom_op("weft::rms_norm", mutates_args=())
def _norm(
    x: Tensor, weight: Tensor, residual: Tensor | None, gate: Tensor | None, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    """The result, the sum (empty without residual), and 1 / rms of each row, (..., 1)."""
    path: Any = reference
    if x.numel() and pick_face(x) == "triton":
        from . import triton

        path = triton
    y, total, scale = path.norm_forward(x, weight, residual, gate, eps)
    total = x.new_empty(0) if residual is None else total.contiguous()
    return y.contiguous(), total, scale.contiguous()


@_norm.register_fake
def _(
    x: Tensor, weight: Tensor, residual: Tensor | None, gate: Tensor | None, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    dtype = sum_dtype(x, residual)
    return (
        x.new_empty(x.shape),
        x.new_empty(0) if residual is None else x.new_empty(x.shape, dtype=dtype),
        x.new_empty((*x.shape[:-1], 1), dtype=statistics_dtype(dtype)),
    )


@torch.library.custom_op("weft::rms_norm_backward", mutates_args=())
def _norm_backward(
    grad: Tensor,
    total_grad: Tensor | None,
    total: Tensor,
    weight: Tensor,
    gate: Tensor | None,
    scale: Tensor,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of what was normalised, of weight, and of gate (empty without one)."""
    path: Any = reference
    if total.numel() and pick_face(total) == "triton":
        from . import triton

        path = triton
    if total_grad is not None:
        total_grad = total_grad.contiguous()
    dtotal, dweight, dgate = path.norm_backward(
        grad.contiguous(), total_grad, total, weight, gate, scale
    )
    dgate = total.new_empty(0) if dgate is None else dgate.contiguous()
    return dtotal.contiguous(), dweight, dgate


@_norm_backward.register_fake
def _(
    grad: Tensor,
    total_grad: Tensor | None,
    total: Tensor,
    weight: Tensor,
    gate: Tensor | None,
    scale: Tensor,
) -> tuple[Tensor, Tensor, Tensor]:
    return (
        total.new_empty(total.shape),
        weight.new_empty(weight.shape),
        total.new_empty(0) if gate is None else gate.new_empty(gate.shape),
    )


def _setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    x, weight, residual, gate, _ = inputs
    _, total, scale = output
    ctx.mark_non_differentiable(scale)
    ctx.x_dtype, ctx.residual_dtype = x.dtype, None if residual is None else residual.dtype
    ctx.save_for_backward(x if residual is None else total, weight, gate, scale)


def _gradient(ctx: Any, grad: Tensor, total_grad: Tensor, _: Any) -> tuple[Any, ...]:
    total, weight, gate, scale = ctx.saved_tensors
    has_residual = ctx.residual_dtype is not None
    dtotal, dweight, dgate = torch.ops.weft.rms_norm_backward(
        grad, total_grad if has_residual else None, total, weight, gate, scale
    )
    return (
        dtotal.to(ctx.x_dtype),
        dweight,
        dtotal.to(ctx.residual_dtype) if has_residual else None,
        None if gate is None else dgate,
        None,
    )


_norm.register_autograd(_gradient, setup_context=_setup)


@overload
def rms_norm(
    x: Tensor, weight: Tensor, eps: float, residual: None = None, gate: Tensor | None = None
) -> Tensor: ...


@overload
def rms_norm(
    x: Tensor, weight: Tensor, eps: float, residual: Tensor, gate: Tensor | None = None
) -> tuple[Tensor, Tensor]: ...


def rms_norm(
    x: Tensor,
    weight: Tensor,
    eps: float,
    residual: Tensor | None = None,
    gate: Tensor | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """`weight * s / sqrt(mean(s^2) + eps) * silu(gate)` over the last dimension, of `s = x + residual`.

    The gate comes after the norm: the mean square is of the ungated sum.

    Args:
        x: (..., D), any floating type; fp64 is computed in fp64, all else in fp32.
        weight: (D,), any floating type.
        eps: added to the mean square.
        residual: as `x` in shape, any floating type. The sum is rounded to the wider of the two types before it is normalised, so
            that the result is the norm of the sum that is returned.
        gate: as `x` in shape, any floating type.

    Returns:
        (..., D) in the type of `x`; with a residual also the sum.

    Raises:
        ValueError: shapes, types or devices that do not fit.
    """
    _check_arguments(x, weight, residual, gate)
    if residual is None and gate is None:
        return _plain(x, weight, eps)
    y, total, _ = torch.ops.weft.rms_norm(x, weight, residual, gate, eps)
    return y if residual is None else (y, total)


def _plain(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    is_compiling = torch.compiler.is_compiling()
    asked = "auto" if is_compiling else wanted_face()
    if asked == "triton":
        return torch.ops.weft.rms_norm(x, weight, None, None, eps)[0]
    if x.is_cuda and x.dtype == weight.dtype and asked != "reference":
        # One fused kernel with fp32 accumulators; autocast may widen its result, hence the cast.
        return torch.nn.functional.rms_norm(x, weight.shape, weight, eps).to(x.dtype)
    if is_compiling or asked == "reference":
        return rms_norm_reference(x, weight, eps)
    return _RMSNorm.apply(x, weight, eps)


def _check_arguments(
    x: Tensor, weight: Tensor, residual: Tensor | None, gate: Tensor | None
) -> None:
    if x.dim() == 0:
        raise ValueError("x has no dimensions, expected (..., D)")
    check_dtype("x", x)
    check_shape("weight", weight, (x.shape[-1],))
    check_dtype("weight", weight)
    for name, tensor in (("residual", residual), ("gate", gate)):
        if tensor is not None:
            check_shape(name, tensor, x.shape)
            check_dtype(name, tensor)
    check_same_device(x=x, weight=weight, residual=residual, gate=gate)
