"""PatchGAN: a small convolutional network that scores overlapping parts of a picture as real or made.

Source: pix2pix, arXiv 1611.07004, as VQGAN (2012.09841) uses it. Batch norms always take the batch's own statistics: nothing
ever runs this network on one picture, and running ones would be state that no update explains.
"""

from __future__ import annotations

import itertools
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.functional import leaky_relu

from .config import AdversarialConfig

__all__ = ["Discriminator", "SyncBatchNorm", "hinge_loss"]

SLOPE = 0.2
EPS = 1e-5


class Discriminator(nn.Module):
    """Pictures (n, C, S, S) to scores (n, s, s) of parts."""

    def __init__(self, config: AdversarialConfig, in_channels: int) -> None:
        super().__init__()
        widths = [config.width * min(2**layer, 8) for layer in range(config.layers + 1)]
        self.input = nn.Conv2d(in_channels, widths[0], 4, stride=2, padding=1)
        self.convs = nn.ModuleList(
            nn.Conv2d(a, b, 4, stride=2 if layer < config.layers else 1, padding=1, bias=False)
            for layer, (a, b) in enumerate(itertools.pairwise(widths), 1)
        )
        self.norms = nn.ModuleList(_norm(config, width) for width in widths[1:])
        self.output = nn.Conv2d(widths[-1], 1, 4, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        x = leaky_relu(self.input(x), SLOPE)
        for conv, norm in zip(self.convs, self.norms, strict=True):
            x = leaky_relu(norm(conv(x)), SLOPE)
        return self.output(x)[:, 0]


def _norm(config: AdversarialConfig, channels: int) -> nn.Module:
    if config.norm == "group":
        return nn.GroupNorm(min(config.groups, channels), channels)
    if config.norm == "batch":
        return BatchNorm(channels)
    return SyncBatchNorm(channels)


class BatchNorm(nn.BatchNorm2d):
    """Statistics of the batch at hand, none of which are kept; nothing is nothing."""

    def __init__(self, channels: int) -> None:
        super().__init__(channels, eps=EPS, track_running_stats=False)

    def forward(self, input: Tensor) -> Tensor:
        if len(input) == 0:
            return input * self.weight[:, None, None] + self.bias[:, None, None]
        return super().forward(input)


class SyncBatchNorm(nn.Module):
    """Statistics of the batches of all ranks together; torch's own runs on GPUs alone."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(channels))
        self.bias = nn.Parameter(torch.empty(channels))

    def forward(self, x: Tensor) -> Tensor:
        """Collective: (n, C, h, w), n of any size on each rank."""
        values = x.float()
        count = values.new_full((1,), float(x.numel() // x.shape[1]))
        sums = _SumOverRanks.apply(torch.cat((values.sum((0, 2, 3)), count)))
        total = sums[-1].detach().clamp_min(1.0)
        mean = sums[:-1] / total
        centred = values - mean[:, None, None]
        # Around the mean in a second sum: a difference of squares loses what matters.
        square = _SumOverRanks.apply(centred.square().sum((0, 2, 3))) / total
        scale = self.weight.float() * (square + EPS).rsqrt()
        return (centred * scale[:, None, None] + self.bias.float()[:, None, None]).to(x.dtype)


class _SumOverRanks(torch.autograd.Function):
    """Every rank's loss depends on the sum, so the gradient is a sum too."""

    @staticmethod
    def forward(ctx: Any, values: Tensor) -> Tensor:
        return _summed(values)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:  # type: ignore[override]
        return _summed(gradient)


def _summed(values: Tensor) -> Tensor:
    values = values.clone()
    if dist.is_initialized() and dist.get_world_size() > 1:
        dist.all_reduce(values)
    return values


def hinge_loss(real: Tensor, made: Tensor) -> Tensor:
    """(n,) of scores (n, s, s): half of what real ones lack to 1 and made ones to -1."""
    lack = (1 - real.float()).relu().mean((1, 2)) + (1 + made.float()).relu().mean((1, 2))
    return lack / 2
