"""Rotary positions, half-split: a head's first half turns with its second (NeoX, Hugging Face).

Angles and rotation are in fp32 (fp64 for fp64 inputs): in bf16 neighbouring positions beyond a few
hundred would share an angle. Source: Su et al., arXiv 2104.09864; the stretch is Llama 3's.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

__all__ = ["RotaryTable", "apply_rotary", "rotary_frequencies", "rotary_table"]


class RotaryTable:
    """Cosines and sines of a batch's positions, (..., head_dim / 2) each, shared by all layers.

    An opaque object on purpose: FSDP2 casts tensors and dataclass fields among a block's
    arguments to bf16, and angles must not be.
    """

    def __init__(self, cos: Tensor, sin: Tensor) -> None:
        self.cos = cos
        self.sin = sin


def rotary_frequencies(
    head_dim: int,
    theta: float,
    *,
    factor: float | None = None,
    low_freq_factor: float = 1.0,
    high_freq_factor: float = 4.0,
    original_max_positions: int = 8192,
    device: torch.device | None = None,
    dtype: torch.dtype = torch.float32,
) -> Tensor:
    """(head_dim / 2,) angular frequencies `theta^(-2i / head_dim)`, stretched if `factor` is given.

    Wavelengths under `original / high` stay, those over `original / low` are multiplied by
    `factor`, and those between are interpolated in between.
    """
    exponent = torch.arange(0, head_dim, 2, dtype=torch.int64, device=device).to(dtype) / head_dim
    frequencies = 1.0 / theta**exponent
    if factor is None:
        return frequencies
    wavelength = 2 * math.pi / frequencies
    low, high = original_max_positions / low_freq_factor, original_max_positions / high_freq_factor
    smooth = (original_max_positions / wavelength - low_freq_factor) / (
        high_freq_factor - low_freq_factor
    )
    between = (1 - smooth) * frequencies / factor + smooth * frequencies
    stretched = torch.where(wavelength > low, frequencies / factor, frequencies)
    return torch.where((wavelength <= low) & (wavelength >= high), between, stretched)


def rotary_table(positions: Tensor, frequencies: Tensor) -> RotaryTable:
    """The table of `positions` (...,) integers, in the type of `frequencies` (head_dim / 2,)."""
    angles = positions.to(frequencies.dtype)[..., None] * frequencies
    return RotaryTable(angles.cos(), angles.sin())


def _rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    first, second = x.to(cos.dtype).chunk(2, dim=-1)
    turned_first = (first * cos).addcmul_(second, sin, value=-1)
    turned_second = (second * cos).addcmul_(first, sin)
    return torch.cat((turned_first, turned_second), dim=-1).to(x.dtype)


class _Rotate(torch.autograd.Function):
    """The gradient of a rotation is the rotation back, so nothing of the input is kept."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        ctx.save_for_backward(cos, sin)
        return _rotate(x, cos, sin)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        cos, sin = ctx.saved_tensors
        return _rotate(grad, cos, -sin), None, None


def apply_rotary(x: Tensor, table: RotaryTable) -> Tensor:
    """Turn every head of every position by the position's angles.

    Args:
        x: (..., H, head_dim), any floating type; turned in the type of the table, or fp64 if it
            is fp64.
        table: of positions (...).

    Returns:
        (..., H, head_dim) in the type of `x`.
    """
    wide = torch.promote_types(x.dtype, table.cos.dtype)
    cos, sin = (angle.to(wide)[..., None, :] for angle in (table.cos, table.sin))
    if torch.compiler.is_compiling():
        # The compiler differentiates the definition as cheaply; torch 2.11's loses the gradient of a Function.
        return _rotate(x, cos, sin)
    return _Rotate.apply(x, cos, sin)
