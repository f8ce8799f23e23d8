"""Layers with weights of their own for each modality, over rows sorted by modality; or with weights that all share.

Parameters are called `weight.text`, `weight.image` and so on, so that groups, freezing and start values go by name.
Where all rows are of one modality, a layer does what a layer without modalities does, operation for operation, and the
weights that met no row have gradients of zero: a rank that lacks a modality joins every collective.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import linear

from ...kernels import Routing, rms_norm, routed_linear, routed_rms_norm

__all__ = ["RoutedLinear", "RoutedRMSNorm", "only_modality", "touch"]


class RoutedLinear(nn.Module):
    """`routed_linear` with its weights, or one linear map of all rows.

    Args:
        modalities: names, in the order of the routing.
        split: a weight for each modality; else one for all, and the routing is not looked at.
        bias: likewise; the sum is rounded to the type of the rows.
    """

    def __init__(
        self,
        inputs: int,
        outputs: int,
        modalities: Sequence[str] = ("text",),
        *,
        split: bool = True,
        bias: bool = False,
    ) -> None:
        super().__init__()
        self.modalities = tuple(modalities)
        self.is_split = split and len(self.modalities) > 1
        self.weight = _parameters(self.modalities, (outputs, inputs), self.is_split)
        self.bias = _parameters(self.modalities, (outputs,), self.is_split) if bias else None

    def forward(self, x: Tensor, routing: Routing) -> Tensor:
        """(T, inputs) to (T, outputs)."""
        if isinstance(self.weight, nn.Parameter):
            bias = self.bias
            assert bias is None or isinstance(bias, nn.Parameter)
            return linear(x, self.weight, bias)
        weights = [self.weight[name] for name in self.modalities]
        biases = None
        if isinstance(self.bias, nn.ParameterDict):
            biases = [self.bias[name] for name in self.modalities]
        only = only_modality(routing)
        if only is None:
            return routed_linear(x, weights, routing, biases)
        x = touch(x, _others(weights, only) + _others(biases or [], only))
        return linear(x, weights[only], biases[only] if biases else None)


class RoutedRMSNorm(nn.Module):
    """`routed_rms_norm` with its weights, or one norm of all rows."""

    def __init__(
        self,
        width: int,
        eps: float,
        modalities: Sequence[str] = ("text",),
        *,
        split: bool = True,
    ) -> None:
        super().__init__()
        self.eps = eps
        self.modalities = tuple(modalities)
        self.is_split = split and len(self.modalities) > 1
        self.weight = _parameters(self.modalities, (width,), self.is_split)

    def forward(self, x: Tensor, routing: Routing) -> Tensor:
        """(T, width), in the type of x."""
        if isinstance(self.weight, nn.Parameter):
            return rms_norm(x, self.weight, self.eps)
        weights = self.weights
        only = only_modality(routing)
        if only is None:
            return routed_rms_norm(x, weights, routing, self.eps)
        return rms_norm(touch(x, _others(weights, only)), weights[only], self.eps)

    @property
    def weights(self) -> list[Tensor]:
        """One for each modality, all the same where it is not split."""
        if isinstance(self.weight, nn.Parameter):
            return [self.weight] * len(self.modalities)
        return [self.weight[name] for name in self.modalities]


def only_modality(routing: Routing) -> int | None:
    """The modality that all rows are of, an index; None where there are several."""
    present = [place for place, size in enumerate(routing.sizes) if size]
    return present[0] if len(present) == 1 else None


def touch(x: Tensor, weights: Sequence[Tensor]) -> Tensor:
    """x, with weights in its graph that have nothing to do with it: their gradients are zeros, not missing."""
    wanted = [weight for weight in weights if weight.requires_grad]
    return _Touch.apply(x, *wanted) if wanted and torch.is_grad_enabled() else x


class _Touch(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, *weights: Tensor) -> Tensor:
        ctx.like = [(weight.shape, weight.dtype, weight.device) for weight in weights]
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, ...]:
        zeros = (torch.zeros(size, dtype=dtype, device=device) for size, dtype, device in ctx.like)
        return grad, *zeros


def _others(weights: Sequence[Tensor], only: int) -> list[Tensor]:
    return [weight for place, weight in enumerate(weights) if place != only]


def _parameters(
    modalities: Sequence[str], shape: tuple[int, ...], is_split: bool
) -> nn.ParameterDict | nn.Parameter:
    if not is_split:
        return nn.Parameter(torch.empty(shape))
    return nn.ParameterDict({name: nn.Parameter(torch.empty(shape)) for name in modalities})
