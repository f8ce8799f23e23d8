"""Convolutional layers of autoencoders: residual blocks, attention over places, changes of size.

N pictures, C channels, h x w places. Norms are group norms with eps 1e-6, activations SiLU. Source: LDM, arXiv 2112.10752.
"""

from __future__ import annotations

import itertools

from torch import Tensor, nn
from torch.nn.functional import interpolate, pad, scaled_dot_product_attention, silu

__all__ = ["Attention", "Downsample", "Level", "Middle", "ResidualBlock", "Upsample", "group_norm"]

EPS = 1e-6


def group_norm(groups: int, channels: int) -> nn.GroupNorm:
    return nn.GroupNorm(groups, channels, eps=EPS)


class ResidualBlock(nn.Module):
    """Norm, SiLU, 3x3 convolution, twice; a 1x1 convolution beside them where widths differ."""

    def __init__(self, inputs: int, outputs: int, groups: int) -> None:
        super().__init__()
        self.norm1 = group_norm(groups, inputs)
        self.conv1 = nn.Conv2d(inputs, outputs, 3, padding=1)
        self.norm2 = group_norm(groups, outputs)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, padding=1)
        self.shortcut = nn.Conv2d(inputs, outputs, 1) if inputs != outputs else None

    def forward(self, x: Tensor) -> Tensor:
        """(N, C, h, w) to (N, C', h, w)."""
        h = self.conv1(silu(self.norm1(x)))
        h = self.conv2(silu(self.norm2(h)))
        return h + (x if self.shortcut is None else self.shortcut(x))


class Attention(nn.Module):
    """One head over all places of a picture."""

    def __init__(self, channels: int, groups: int) -> None:
        super().__init__()
        self.norm = group_norm(groups, channels)
        self.q = nn.Linear(channels, channels)
        self.k = nn.Linear(channels, channels)
        self.v = nn.Linear(channels, channels)
        self.output = nn.Linear(channels, channels)

    def forward(self, x: Tensor) -> Tensor:
        places = self.norm(x).flatten(2).transpose(1, 2)[:, None]
        mixed = scaled_dot_product_attention(self.q(places), self.k(places), self.v(places))
        return x + self.output(mixed)[:, 0].transpose(1, 2).unflatten(2, x.shape[2:])


class Level(nn.Module):
    """Residual blocks at one size, each followed by attention where asked for."""

    def __init__(
        self, inputs: int, outputs: int, blocks: int, groups: int, *, attention: bool
    ) -> None:
        super().__init__()
        widths = [inputs, *[outputs] * blocks]
        self.blocks = nn.ModuleList(
            ResidualBlock(a, b, groups) for a, b in itertools.pairwise(widths)
        )
        self.attentions = nn.ModuleList(
            Attention(outputs, groups) for _ in range(blocks if attention else 0)
        )

    def forward(self, x: Tensor) -> Tensor:
        for place, block in enumerate(self.blocks):
            x = block(x)
            if len(self.attentions):
                x = self.attentions[place](x)
        return x


class Middle(nn.Module):
    """Residual blocks at the coarsest size, attention after the first."""

    def __init__(self, channels: int, blocks: int, groups: int, *, attention: bool) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(
            ResidualBlock(channels, channels, groups) for _ in range(blocks)
        )
        self.attention = Attention(channels, groups) if attention else None

    def forward(self, x: Tensor) -> Tensor:
        for place, block in enumerate(self.blocks):
            x = block(x)
            if place == 0 and self.attention is not None:
                x = self.attention(x)
        return x


class Downsample(nn.Conv2d):
    """Halves a picture: a row and a column of zeros at the far ends, then a 3x3 convolution with stride 2."""

    def __init__(self, channels: int) -> None:
        super().__init__(channels, channels, 3, stride=2)

    def forward(self, input: Tensor) -> Tensor:
        return super().forward(pad(input, (0, 1, 0, 1)))


class Upsample(nn.Conv2d):
    """Doubles a picture: the nearest place's values, then a 3x3 convolution."""

    def __init__(self, channels: int) -> None:
        super().__init__(channels, channels, 3, padding=1)

    def forward(self, input: Tensor) -> Tensor:
        # Nothing can be enlarged, though torch refuses to.
        size = (2 * input.shape[2], 2 * input.shape[3])
        if len(input) == 0:
            return super().forward(input.repeat_interleave(2, 2).repeat_interleave(2, 3))
        return super().forward(interpolate(input, size=size, mode="nearest"))
