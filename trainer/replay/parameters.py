"""What a step did to each parameter: its gradient, and its update against its size."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from .statistics import TensorStatistics

__all__ = ["ParameterReport", "named_parameters", "norm_of", "report_gradients"]


@dataclass
class ParameterReport:
    """One parameter. Norms are Euclidean.

    Args:
        gradient: None where none came.
        weight_non_finite: its elements that are not finite, before the update.
        update_ratio: norm of the update over that of the weights before it; None where no update was made.
    """

    name: str
    shape: tuple[int, ...]
    weight_norm: float
    weight_non_finite: int
    gradient_norm: float | None = None
    gradient: TensorStatistics | None = None
    update_ratio: float | None = None

    def to_dict(self) -> dict[str, Any]:
        gradient = self.gradient.to_dict() if self.gradient else None
        return {**vars(self), "shape": list(self.shape), "gradient": gradient}

    def take_gradient(self, gradient: Tensor) -> None:
        """Measure a whole gradient, dense or row-sparse."""
        self.gradient = TensorStatistics()
        self.gradient.add(gradient)
        self.gradient_norm = norm_of(gradient)


def norm_of(tensor: Tensor) -> float:
    """Euclidean norm, taken in fp32."""
    values = tensor.detach()
    values = values.coalesce().values() if values.is_sparse else values
    return float(torch.linalg.vector_norm(values, dtype=torch.float32))


def named_parameters(networks: Mapping[str, nn.Module]) -> dict[str, nn.Parameter]:
    """Parameters by logical name, `NETWORK/dotted.name`."""
    return {
        f"{network}/{dotted}": parameter
        for network, module in networks.items()
        for dotted, parameter in module.named_parameters()
    }


def weight_report(name: str, parameter: Tensor) -> ParameterReport:
    """A parameter before a step."""
    values = parameter.detach()
    bad = values.numel() - int(torch.isfinite(values).sum())
    return ParameterReport(name, tuple(parameter.shape), norm_of(values), bad)


def report_gradients(networks: Mapping[str, nn.Module]) -> dict[str, ParameterReport]:
    """Every parameter with the gradient it holds now."""
    found = {}
    for name, parameter in named_parameters(networks).items():
        found[name] = weight_report(name, parameter)
        if parameter.grad is not None:
            found[name].take_gradient(parameter.grad)
    return found
