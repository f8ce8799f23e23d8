"""Root-mean-square normalisation with statistics in fp32, whatever the type of the input.

A bf16 mean of squares over thousands of channels loses the digits that keep training stable. The
gradient is written out: it keeps one number a row beside the input, where autograd would keep
three tensors of the input's size. Source: Zhang and Sennrich, arXiv 1910.07467, equation 4, with
epsilon inside the root as OLMo 2 and Llama have it.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

__all__ = ["rms_norm", "rms_norm_reference"]


def rms_norm_reference(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """The definition, differentiated by autograd; arguments and result as in `rms_norm`."""
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    scale = torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)
    return (wide * scale * weight.to(wide.dtype)).to(x.dtype)


class _RMSNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        wide = x.to(torch.promote_types(x.dtype, torch.float32))
        scale = torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)
        ctx.save_for_backward(x, weight, scale)
        return (wide * scale).mul_(weight.to(wide.dtype)).to(x.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, None]:
        x, weight, scale = ctx.saved_tensors
        wide_weight = weight.to(scale.dtype)
        normalised = x.to(scale.dtype) * scale
        product = grad.to(scale.dtype) * normalised
        weight_grad = product.flatten(0, -2).sum(0).to(weight.dtype)
        mean = product.mul_(wide_weight).mean(-1, keepdim=True)
        x_grad = (
            (grad.to(scale.dtype) * wide_weight).addcmul_(normalised, mean, value=-1).mul_(scale)
        )
        return x_grad.to(x.dtype), weight_grad, None


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """`weight * x / sqrt(mean(x^2) + eps)` over the last dimension.

    Args:
        x: (..., D), any floating type; fp64 is computed in fp64, all else in fp32.
        weight: (D,), any floating type.
        eps: added to the mean square.

    Returns:
        (..., D) in the type of `x`.
    """
    if x.is_cuda and x.dtype == weight.dtype:
        # One fused kernel with fp32 accumulators; autocast may widen its result, hence the cast.
        return torch.nn.functional.rms_norm(x, weight.shape, weight, eps).to(x.dtype)
    if torch.compiler.is_compiling():
        # The compiler fuses the definition itself.
        return rms_norm_reference(x, weight, eps)
    return _RMSNorm.apply(x, weight, eps)
