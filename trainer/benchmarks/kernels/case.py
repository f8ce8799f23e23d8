"""What is measured: one op at one size, with what it is compared with."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor

__all__ = ["Case", "Inputs", "Run", "missing", "on", "randn"]

Inputs = dict[str, Any]
"""Arguments by name. Tensors that require a gradient are what the backward pass is timed for."""
Run = Callable[[Inputs], Tensor]


@dataclass(frozen=True)
class Case:
    """One op at one size.

    Args:
        op: the public name.
        size: shown beside it.
        make: inputs on a device; `small` ones are for the accuracy column, where the float64 reference runs.
        ours: the op.
        oracle: what the accuracy column compares with, given the same inputs in float64: `face` is the op's own
            definition, None is nothing (the result is ids).
        peers: by name; a string is the reason why one is not here.
        forward_bytes, backward_bytes: what has to be read and written at least, from the inputs; None where memory is
            not the limit.
        has_backward: whether the op has a gradient.
        host_free: whether it must not wait for the device.
    """

    op: str
    size: str
    make: Callable[[torch.device, bool], Inputs]
    ours: Run
    oracle: Run | Literal["face"] | None = "face"
    peers: Mapping[str, Run | str] = field(default_factory=dict)
    forward_bytes: Callable[[Inputs], int] | None = None
    backward_bytes: Callable[[Inputs], int] | None = None
    has_backward: bool = True
    host_free: bool = True


def on(device: torch.device) -> torch.dtype:
    """Type of activations: bf16 on a GPU, fp32 on the CPU, where 16-bit arithmetic is emulated."""
    return torch.bfloat16 if device.type == "cuda" else torch.float32


def randn(
    *shape: int, device: torch.device, dtype: torch.dtype | None = None, scale: float = 1.0
) -> Tensor:
    """A leaf that wants a gradient."""
    values = torch.randn(*shape, device=device) * scale
    return values.to(dtype or on(device)).requires_grad_()


def missing(package: str) -> str | None:
    """Why a peer cannot be measured, or None if its package is here."""
    import importlib.util

    return None if importlib.util.find_spec(package) else f"{package} is not installed"
