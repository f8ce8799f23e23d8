"""Losses of made pictures, taken apart from what made them.

Each loss and its gradient at the pictures are found first, on a copy that no network hangs on; the network then gets one
gradient. So the graphs of frozen networks are gone before the autoencoder's own backward pass begins, and the adaptive weight
costs two small products: it never differentiates a parameter, which may be sharded. Source of the weight: VQGAN,
arXiv 2012.09841, equation 7.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn.grad import conv2d_weight

__all__ = ["adaptive_weight", "attach_gradient", "measure"]

EPS = 1e-4
LARGEST = 1e4


class _AttachGradient(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, made: Tensor, value: Tensor, gradient: Tensor) -> Tensor:
        ctx.save_for_backward(gradient)
        ctx.dtype = made.dtype
        return value.clone()

    @staticmethod
    def backward(ctx: Any, factor: Tensor) -> tuple[Tensor, None, None]:  # type: ignore[override]
        (gradient,) = ctx.saved_tensors
        return (factor * gradient).to(ctx.dtype), None, None


def attach_gradient(made: Tensor, value: Tensor, gradient: Tensor) -> Tensor:
    """() `value`, whose gradient at `made` is known to be `gradient` (the shape of `made`)."""
    return _AttachGradient.apply(made, value, gradient)


def measure(
    loss: Callable[[Tensor], tuple[Tensor, ...]], made: Tensor
) -> tuple[Tensor, tuple[Tensor, ...]]:
    """A loss of pictures, taken there: parameters of what it calls get no gradient.

    Args:
        loss: gives its values (n,), whose sum is meant, and further ones.
        made: (n, C, S, S).

    Returns:
        The sum's gradient at `made`, fp32, and what the loss gave, detached.
    """
    with torch.enable_grad():
        leaf = made.detach().float().requires_grad_()
        values = loss(leaf)
        (gradient,) = torch.autograd.grad(values[0].sum(), leaf)
    return gradient, tuple(value.detach() for value in values)


@torch.no_grad()
def adaptive_weight(
    features: Tensor, kernel: int, reconstruction: Tensor, adversarial: Tensor
) -> Tensor:
    """Collective: () ratio of the norms that two losses' gradients have at the last convolution's weight.

    The same on every rank, and for any split of the same pictures over ranks: both gradients are means over all of them.

    Args:
        features: (n, C, P, P) that the convolution saw.
        kernel: its size, with padding to the same size.
        reconstruction, adversarial: (n, C', S, S) gradients of sums at what it made, S at most P.
    """
    shape = (reconstruction.shape[1], features.shape[1], kernel, kernel)
    parts = [reconstruction.new_full((1,), float(len(features)))]
    for gradient in (reconstruction, adversarial):
        parts.append(_weight_gradient(features, shape, gradient).flatten())
    packed = torch.cat(parts)
    if dist.is_initialized() and dist.get_world_size() > 1:
        dist.all_reduce(packed)
    first, second = (packed[1:] / packed[0].clamp_min(1.0)).chunk(2)
    return (first.norm() / (second.norm() + EPS)).clamp(0.0, LARGEST)


def _weight_gradient(features: Tensor, shape: tuple[int, ...], gradient: Tensor) -> Tensor:
    if not len(features):
        return gradient.new_zeros(shape)
    down, right = (features.shape[d] - gradient.shape[d] for d in (2, 3))
    whole = torch.nn.functional.pad(gradient, (0, right, 0, down))
    with torch.autocast(features.device.type, enabled=False):
        return conv2d_weight(features.float(), shape, whole, padding=shape[-1] // 2)
