"""Withholding updates whose loss or gradient norm is an outlier, without waiting for the device.

Source: OLMo 2 (arXiv 2501.00656) 32B and OLMo-core: the newest value against mean + 6 standard deviations of up to 128
earlier ones, once 64 are held. Skipped steps stay in the window. The window is part of the checkpoint.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .config import OptimizerConfig

__all__ = ["SkipStep"]


class SkipStep:
    """The windows of past losses and norms, on the device.

    Attributes:
        values: (2, window) fp32: losses, gradient norms; a ring.
        count: () fp32, values seen so far.
    """

    def __init__(self, config: OptimizerConfig, device: torch.device) -> None:
        self.config = config
        self.values = torch.zeros(2, config.skip_step_window, device=device)
        self.count = torch.zeros((), device=device)

    def keep(self, loss: Tensor, grad_norm: Tensor) -> Tensor:
        """() fp32: 0 if this step is an outlier, else 1; notes the values."""
        c, newest = self.config, torch.stack((loss.float(), grad_norm.float()))
        window = self.values.shape[1]
        held = torch.arange(window, device=newest.device) < self.count
        number = held.sum().clamp_min(2)
        mean = torch.where(held, self.values, 0).sum(1) / number
        variance = torch.where(held, (self.values - mean[:, None]).square(), 0).sum(1) / (
            number - 1
        )
        is_outlier = (newest > mean + c.skip_step_std * variance.sqrt()).any()
        applies = self.count + 1 >= c.skip_step_minimum
        place = (self.count % window).long()
        # A value that is not finite would make every later comparison false.
        finite = torch.isfinite(newest).all()
        self.values[:, place] = torch.where(finite, newest, self.values[:, place])
        self.count += finite
        return (~(is_outlier & applies)).float()
