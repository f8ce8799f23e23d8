"""How continuous images enter a model of positions and leave it: a linear stem, and a U-Net around the backbone.

I images of C x H x W latents, n positions an image, d model width. The way in gives rows in raster order of patches,
image after image; the way out turns what the backbone made of those rows into a prediction of the latents' shape.
Without images everything runs on nothing: gradients are zeros on a rank that has none, and no collective is missed.
Sources: Transfusion, arXiv 2408.11039, section 3 and 4.1; LMFusion, arXiv 2412.15188, equations 6 and 14.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.nn.functional import interpolate, scaled_dot_product_attention, silu

from .settings import ImageConfig, UNetConfig

__all__ = ["LinearStem", "PositionTable", "TimeEmbedding", "UNetStem", "build_stem", "patchify"]

LONGEST_PERIOD = 10_000.0


def patchify(images: Tensor, patch: int) -> Tensor:
    """(I, C, H, W) to (I n, C p p), patches in raster order; `unpatchify` undoes it."""
    count, channels, height, width = images.shape
    cut = images.reshape(count, channels, height // patch, patch, width // patch, patch)
    positions = count * (height // patch) * (width // patch)
    return cut.permute(0, 2, 4, 1, 3, 5).reshape(positions, channels * patch * patch)


def unpatchify(rows: Tensor, channels: int, size: int, patch: int) -> Tensor:
    """(I n, C p p) to (I, C, H, W)."""
    side = size // patch
    count = rows.shape[0] // side**2
    cut = rows.reshape(count, side, side, channels, patch, patch)
    return cut.permute(0, 3, 1, 4, 2, 5).reshape(count, channels, size, size)


class TimeEmbedding(nn.Module):
    """Noise levels (I,) int64 to (I, width): sines and cosines through a small MLP.

    Args:
        waves: how many sines and cosines there are.
        width: of the MLP.
        includes_longest: whether the last wave has the longest period itself, as diffusers' DiT, or is one step short of it.
    """

    def __init__(self, waves: int, width: int, includes_longest: bool = False) -> None:
        super().__init__()
        self.waves = waves
        self.steps = waves // 2 - int(includes_longest)
        self.input = nn.Linear(waves, width)
        self.output = nn.Linear(width, width)

    def forward(self, t: Tensor) -> Tensor:
        half = self.waves // 2
        place = torch.arange(half, device=t.device, dtype=torch.float32)
        angles = t.float()[:, None] * torch.exp(place * (-math.log(LONGEST_PERIOD) / self.steps))
        waves = torch.cat((angles.cos(), angles.sin()), 1).to(self.input.weight.dtype)
        return self.output(silu(self.input(waves)))


class PositionTable(nn.Module):
    """A learned vector for each row and each column of patches."""

    def __init__(self, side: int, width: int) -> None:
        super().__init__()
        self.rows = nn.Parameter(torch.empty(side, width))
        self.columns = nn.Parameter(torch.empty(side, width))

    def forward(self) -> Tensor:
        """(n, width) in raster order."""
        return (self.rows[:, None] + self.columns[None]).flatten(0, 1)


class LinearStem(nn.Module):
    """One linear map in and one out, for each patch alone."""

    def __init__(self, config: ImageConfig, d_model: int) -> None:
        super().__init__()
        self.config = config
        self.time = TimeEmbedding(config.time_width, d_model)
        self.input = nn.Linear(config.patch_values, d_model)
        self.position = PositionTable(config.side, d_model) if config.has_position_table else None
        self.output = nn.Linear(d_model * (2 if config.skip else 1), config.patch_values)

    def down(self, images: Tensor, t: Tensor) -> tuple[Tensor, list[Tensor]]:
        """Noised latents (I, C, H, W) at noise levels t (I,) to rows (I n, d), and what `up` wants back."""
        n = self.config.positions
        rows = self.input(patchify(images, self.config.patch).to(self.input.weight.dtype))
        rows = rows.unflatten(0, (-1, n)) + self.time(t)[:, None]
        if self.position is not None:
            rows = rows + self.position()
        return rows.flatten(0, 1), []

    def up(self, rows: Tensor, entered: Tensor, kept: list[Tensor], t: Tensor) -> Tensor:
        """What the backbone made of `entered`, both (I n, d), to a prediction (I, C, H, W)."""
        c = self.config
        values = self.output(torch.cat((rows, entered), 1) if c.skip else rows)
        return unpatchify(values, c.channels, c.size, c.patch)


class ResidualBlock(nn.Module):
    """Two normalised 3x3 convolutions, the noise level added between them."""

    def __init__(self, inputs: int, outputs: int, time: int, groups: int) -> None:
        super().__init__()
        self.norm1 = nn.GroupNorm(groups, inputs)
        self.conv1 = nn.Conv2d(inputs, outputs, 3, padding=1)
        self.time = nn.Linear(time, outputs)
        self.norm2 = nn.GroupNorm(groups, outputs)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, padding=1)
        self.shortcut = nn.Conv2d(inputs, outputs, 1) if inputs != outputs else None

    def forward(self, x: Tensor, time: Tensor) -> Tensor:
        h = self.conv1(silu(self.norm1(x))) + self.time(silu(time))[:, :, None, None]
        h = self.conv2(silu(self.norm2(h)))
        return h + (x if self.shortcut is None else self.shortcut(x))


class ImageAttention(nn.Module):
    """Self-attention among the places of one image."""

    def __init__(self, width: int, head_width: int, groups: int) -> None:
        super().__init__()
        self.head_width = head_width
        self.norm = nn.GroupNorm(groups, width)
        self.qkv = nn.Linear(width, 3 * width)
        self.o_proj = nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        places = self.norm(x).flatten(2).transpose(1, 2)
        q, k, v = (
            part.unflatten(-1, (-1, self.head_width)).transpose(1, 2)
            for part in self.qkv(places).chunk(3, -1)
        )
        mixed = scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
        return x + self.o_proj(mixed).transpose(1, 2).unflatten(2, x.shape[2:])


class UNetStem(nn.Module):
    """Residual blocks at the latents' size and at half of it; the way out mirrors the way in and sees what it kept."""

    def __init__(self, config: ImageConfig, d_model: int) -> None:
        super().__init__()
        self.config = config
        u, time = config.unet, config.unet.inner_width
        w, v = u.outer_width, u.inner_width
        self.time = TimeEmbedding(config.time_width, time)
        self.position = PositionTable(config.side, d_model) if config.has_position_table else None
        self.input = nn.Conv2d(config.channels, w, 3, padding=1)
        self.down_outer = _blocks(u, w, w, time)
        self.shrink = nn.Conv2d(w, v, 3, stride=2, padding=1)
        self.down_inner = _blocks(u, v, v, time)
        self.down_attention = _attentions(u)
        self.enter = nn.Conv2d(v, d_model, 1)
        self.leave = nn.Conv2d(d_model * (2 if config.skip else 1), v, 1)
        self.up_inner = _blocks(u, 2 * v, v, time)
        self.up_attention = _attentions(u)
        self.grow = nn.Conv2d(v, w, 3, padding=1)
        self.up_outer = _blocks(u, 2 * w, w, time)
        self.norm = nn.GroupNorm(u.groups, w)
        self.output = nn.Conv2d(w, config.channels, 3, padding=1)

    def down(self, images: Tensor, t: Tensor) -> tuple[Tensor, list[Tensor]]:
        """As `LinearStem.down`; keeps what each residual block gave."""
        time = self.time(t)
        x = self.input(images.to(self.input.weight.dtype))
        kept: list[Tensor] = []
        for block in self.down_outer:
            x = block(x, time)
            kept.append(x)
        x = self.shrink(x)
        for block, attention in zip(self.down_inner, self.down_attention, strict=True):
            x = attention(block(x, time))
            kept.append(x)
        rows = self.enter(x).flatten(2).transpose(1, 2)
        if self.position is not None:
            rows = rows + self.position()
        return rows.flatten(0, 1), kept

    def up(self, rows: Tensor, entered: Tensor, kept: list[Tensor], t: Tensor) -> Tensor:
        """As `LinearStem.up`."""
        time, kept = self.time(t), list(kept)
        joined = torch.cat((rows, entered), 1) if self.config.skip else rows
        side = self.config.side
        x = self.leave(joined.unflatten(0, (-1, side, side)).permute(0, 3, 1, 2))
        for block, attention in zip(self.up_inner, self.up_attention, strict=True):
            x = attention(block(torch.cat((x, kept.pop()), 1), time))
        x = self.grow(interpolate(x, scale_factor=2.0))
        for block in self.up_outer:
            x = block(torch.cat((x, kept.pop()), 1), time)
        return self.output(silu(self.norm(x)))


def _blocks(u: UNetConfig, inputs: int, outputs: int, time: int) -> nn.ModuleList:
    return nn.ModuleList(ResidualBlock(inputs, outputs, time, u.groups) for _ in range(u.blocks))


def _attentions(u: UNetConfig) -> nn.ModuleList:
    return nn.ModuleList(
        ImageAttention(u.inner_width, u.head_width, u.groups) for _ in range(u.blocks)
    )


def build_stem(config: ImageConfig, d_model: int) -> LinearStem | UNetStem:
    """The stem of a configuration."""
    return (LinearStem if config.stem == "linear" else UNetStem)(config, d_model)
