"""The definition of the norm, differentiated by autograd, and its two halves as the op needs them.

D channels. The statistics are of fp32 (fp64 for fp64), whatever the type of the input: a bf16 mean of squares over
thousands of channels loses the digits that keep training stable.
"""

from __future__ import annotations

from typing import overload

import torch
from torch import Tensor
from torch.nn.functional import silu

__all__ = ["norm_backward", "norm_forward", "rms_norm_reference", "statistics_dtype", "sum_dtype"]


def sum_dtype(x: Tensor, residual: Tensor | None) -> torch.dtype:
    """Type of x + residual."""
    return x.dtype if residual is None else torch.promote_types(x.dtype, residual.dtype)


def statistics_dtype(source: torch.dtype) -> torch.dtype:
    return torch.promote_types(source, torch.float32)


def norm_forward(
    x: Tensor, weight: Tensor, residual: Tensor | None, gate: Tensor | None, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    """The result in the type of x, what was normalised in the type of the sum, and 1 / rms, (..., 1)."""
    dtype = statistics_dtype(sum_dtype(x, residual))
    total = x if residual is None else (x.to(dtype) + residual.to(dtype)).to(sum_dtype(x, residual))
    wide = total.to(dtype)
    scale = torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)
    y = wide * scale * weight.to(dtype)
    return (y if gate is None else y * silu(gate.to(dtype))).to(x.dtype), total, scale


def norm_backward(
    grad: Tensor,
    total_grad: Tensor | None,
    total: Tensor,
    weight: Tensor,
    gate: Tensor | None,
    scale: Tensor,
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Gradients of what was normalised, of weight and of gate, in their types.

    With n = total * scale and g the gradient of the norm (of y * silu(z): dy silu(z)):
    `dtotal = scale * (g w - n mean(g w n))`, `dweight = sum over rows of g n`, `dz = dy n w silu'(z)`.
    """
    dtype = scale.dtype
    grad, wide_weight = grad.to(dtype), weight.to(dtype)
    normalised = total.to(dtype) * scale
    gate_grad = None
    if gate is not None:
        z = gate.to(dtype)
        opening = z.sigmoid()
        slope = opening * (1 + z * (1 - opening))
        gate_grad = (grad * normalised * wide_weight * slope).to(gate.dtype)
        grad = grad * z * opening
    product = grad * normalised
    weight_grad = torch.atleast_2d(product).flatten(0, -2).sum(0).to(weight.dtype)
    mean = product.mul_(wide_weight).mean(-1, keepdim=True)
    out = (grad * wide_weight).addcmul_(normalised, mean, value=-1).mul_(scale)
    if total_grad is not None:
        out += total_grad
    return out.to(total.dtype), weight_grad, gate_grad


@overload
def rms_norm_reference(
    x: Tensor, weight: Tensor, eps: float, residual: None = None, gate: Tensor | None = None
) -> Tensor: ...


@overload
def rms_norm_reference(
    x: Tensor, weight: Tensor, eps: float, residual: Tensor, gate: Tensor | None = None
) -> tuple[Tensor, Tensor]: ...


def rms_norm_reference(
    x: Tensor,
    weight: Tensor,
    eps: float,
    residual: Tensor | None = None,
    gate: Tensor | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """The definition, differentiated by autograd; arguments and result as in `rms_norm`."""
    y, total, _ = norm_forward(x, weight, residual, gate, eps)
    return y if residual is None else (y, total)
