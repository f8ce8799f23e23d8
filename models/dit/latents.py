"""Latents between a tokenizer's scale and that of diffusion, and the noise of each ratio.

Latents of every ratio are brought to mean 0 and variance 1, so that one noise schedule means the same for all.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..diffusion import Diffusion
from .config import Config, RatioConfig

__all__ = ["diffusion_of", "posterior_sample", "restored", "standardised"]

LOG_VARIANCES = (-30.0, 20.0)


def diffusion_of(config: Config, ratio: RatioConfig) -> Diffusion:
    """The noise schedule of a ratio."""
    shift = config.reference_ratio / ratio.ratio if config.t_shift else 1.0
    return Diffusion(config.timesteps, config.schedule, "epsilon", shift)


def posterior_sample(moments: Tensor, noise: Tensor) -> Tensor:
    """Latents (I, C, h, w) fp32 from an encoder's means and log variances (I, 2C, h, w)."""
    mean, log_variance = moments.float().chunk(2, 1)
    return mean + (0.5 * log_variance.clamp(*LOG_VARIANCES)).exp() * noise


def standardised(latents: Tensor, ratio: RatioConfig) -> Tensor:
    """(I, C, h, w) in the scale that the model sees."""
    mean, std = _statistics(latents, ratio)
    return (latents - mean) / std


def restored(latents: Tensor, ratio: RatioConfig) -> Tensor:
    """(I, C, h, w) in the scale that the tokenizer decodes."""
    mean, std = _statistics(latents, ratio)
    return latents * std + mean


def _statistics(like: Tensor, ratio: RatioConfig) -> tuple[Tensor, Tensor]:
    """(1 or C, 1, 1) each; `Config.require_statistics` has looked that they are there."""
    assert ratio.mean is not None
    assert ratio.std is not None
    mean, std = (
        torch.tensor(values, dtype=like.dtype)[:, None, None].to(like.device, non_blocking=True)
        for values in (ratio.mean, ratio.std)
    )
    return mean, std
