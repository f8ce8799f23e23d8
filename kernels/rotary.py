"""Rotary positions, half-split layout: the first half of a head rotates with the second (NeoX, Hugging Face).

Angles and rotation are in fp32 (fp64 for fp64 inputs): in bf16 neighbouring positions beyond a few
hundred would share an angle. Source: Su et al., arXiv 2104.09864; the stretch is Llama 3's.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

__all__ = ["apply_rotary", "rotary_angles", "rotary_frequencies"]


def rotary_frequencies(
    head_dim: int,
    theta: float,
    *,
    factor: float | None = None,
    low_freq_factor: float = 1.0,
    high_freq_factor: float = 4.0,
    original_max_positions: int = 8192,
    device: torch.device | None = None,
) -> Tensor:
    """(head_dim / 2,) fp32 angular frequencies `theta^(-2i / head_dim)`, stretched as Llama 3 does if `factor` is given.

    Wavelengths under `original / high` stay, those over `original / low` are multiplied by `factor`, and those between
    are interpolated in between.
    """
    exponent = torch.arange(0, head_dim, 2, dtype=torch.int64, device=device).float() / head_dim
    frequencies = 1.0 / theta**exponent
    if factor is None:
        return frequencies
    wavelength = 2 * math.pi / frequencies
    low, high = original_max_positions / low_freq_factor, original_max_positions / high_freq_factor
    smooth = (original_max_positions / wavelength - low_freq_factor) / (high_freq_factor - low_freq_factor)
    between = (1 - smooth) * frequencies / factor + smooth * frequencies
    stretched = torch.where(wavelength > low, frequencies / factor, frequencies)
    return torch.where((wavelength <= low) & (wavelength >= high), between, stretched)


def rotary_angles(positions: Tensor, frequencies: Tensor) -> tuple[Tensor, Tensor]:
    """Cosine and sine of every position's angles: two (..., head_dim / 2) fp32 tensors."""
    angles = positions.to(frequencies.dtype)[..., None] * frequencies
    return angles.cos(), angles.sin()


def apply_rotary(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate (..., H, head_dim) by angles (..., head_dim / 2); returns the type of `x`."""
    wide = x if x.dtype == torch.float64 else x.float()
    first, second = wide.chunk(2, dim=-1)
    cos, sin = cos[..., None, :], sin[..., None, :]
    return torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1).to(x.dtype)
