"""Root-mean-square normalisation with statistics in fp32, whatever the type of the input.

Source: Zhang and Sennrich, arXiv 1910.07467, equation 4, with epsilon inside the root as OLMo 2 and Llama have it.
"""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["rms_norm"]


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """`weight * x / sqrt(mean(x^2) + eps)` over the last dimension.

    Args:
        x: (..., D), any floating type; fp64 is computed in fp64, all else in fp32.
        weight: (D,).

    Returns:
        (..., D) in the type of `x`.
    """
    wide = x if x.dtype == torch.float64 else x.float()
    scale = torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)
    return (wide * scale * weight.to(wide.dtype)).to(x.dtype)
