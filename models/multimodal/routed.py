"""Layers with weights of their own for each modality, over rows sorted by modality; or with weights that all share.

Parameters are called `weight.text`, `weight.image` and so on, so that groups, freezing and start values go by name.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn.functional import linear

from ...kernels import Routing, rms_norm, routed_linear, routed_rms_norm

__all__ = ["RoutedLinear", "RoutedRMSNorm"]


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
        if isinstance(self.bias, nn.ParameterDict):
            return routed_linear(x, weights, routing, [self.bias[n] for n in self.modalities])
        return routed_linear(x, weights, routing)


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
        return routed_rms_norm(x, [self.weight[n] for n in self.modalities], routing, self.eps)


def _parameters(
    modalities: Sequence[str], shape: tuple[int, ...], is_split: bool
) -> nn.ParameterDict | nn.Parameter:
    if not is_split:
        return nn.Parameter(torch.empty(shape))
    return nn.ParameterDict({name: nn.Parameter(torch.empty(shape)) for name in modalities})
