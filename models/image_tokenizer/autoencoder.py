"""Encoder, bottleneck and decoder of every kind of image tokenizer.

n pictures of S x S pixels, sorted by ratio: those of the finest come first, and `sizes` says how many each ratio has. A
nested encoder stops at an image's level, passes an adapter of that ratio, and then the middle, which all ratios share; the
decoder mirrors it. So a level is run once for all images that pass it, and with none it is run on nothing: gradients are zeros on a rank
without a ratio, and no collective is missed. The two other kinds have one ratio and no adapters.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.functional import pad, silu

from ..errors import DataError
from .config import Config
from .layers import Downsample, Level, Middle, ResidualBlock, Upsample, group_norm
from .quantizer import Quantized, Quantizer

__all__ = ["Autoencoder", "Reconstruction", "pad_pixels", "split_moments"]

LOGVAR_LIMITS = (-30.0, 20.0)


class Reconstruction(NamedTuple):
    """What came of pictures.

    Args:
        pixels: (n, C, S, S), of any type, about -1 to 1.
        features: (n, C', P, P) that the decoder's last convolution saw, P pixels a side after padding.
        means, logvars: of kl and nested by ratio: (n_r, z, h, w) fp32, else empty.
        encoded: of vq: latents (n, d, h, w) as the encoder gave them.
        quantized: of vq.
    """

    pixels: Tensor
    features: Tensor
    means: list[Tensor]
    logvars: list[Tensor]
    encoded: Tensor | None
    quantized: Quantized | None


class Encoder(nn.Module):
    """Pictures to what the bottleneck takes, by ratio."""

    def __init__(self, config: Config) -> None:
        super().__init__()
        widths, groups = config.channels, config.groups
        self.taps = [ratio.bit_length() - 1 for ratio in config.all_ratios]
        self.input = nn.Conv2d(config.in_channels, widths[0], 3, padding=1)
        pairs = zip((widths[0], *widths), widths, strict=False)
        last = len(widths) - 1
        self.levels = nn.ModuleList(
            Level(
                a,
                b,
                config.encoder_blocks,
                groups,
                attention=config.lowest_attention and level == last,
            )
            for level, (a, b) in enumerate(pairs)
        )
        self.downs = nn.ModuleList(Downsample(width) for width in widths[:-1])
        self.adapters = nn.ModuleDict(
            {
                str(ratio): ResidualBlock(widths[ratio.bit_length() - 1], widths[-1], groups)
                for ratio in config.ratios or ()
            }
        )
        self.middle = Middle(
            widths[-1], config.middle_blocks, groups, attention=config.middle_attention
        )
        self.norm = group_norm(groups, widths[-1])
        self.output = nn.Conv2d(widths[-1], config.moments, 3, padding=1)

    def forward(self, x: Tensor, sizes: Sequence[int]) -> list[Tensor]:
        """(n, C, P, P) to (n_r, moments, P/r, P/r) of each ratio."""
        x = self.input(x)
        found: list[Tensor] = []
        for level, module in enumerate(self.levels):
            x = module(x)
            if level in self.taps:
                size = sizes[len(found)]
                found.append(x[:size])
                x = x[size:]
            if level < len(self.downs):
                x = self.downs[level](x)
        adapters = self.adapters.values()
        if len(self.adapters):
            found = [adapter(rows) for adapter, rows in zip(adapters, found, strict=True)]
        return [self.output(silu(self.norm(self.middle(rows)))) for rows in found]


class Decoder(nn.Module):
    """Latents by ratio to pictures."""

    def __init__(self, config: Config) -> None:
        super().__init__()
        widths, groups = config.channels, config.groups
        last = len(widths) - 1
        self.taps = [ratio.bit_length() - 1 for ratio in config.all_ratios]
        self.input = nn.Conv2d(config.latent_channels, widths[-1], 3, padding=1)
        self.middle = Middle(
            widths[-1], config.middle_blocks, groups, attention=config.middle_attention
        )
        # A level's first block takes the channels of the level above it, so that is what enters there.
        self.adapters = nn.ModuleDict(
            {
                str(ratio): ResidualBlock(widths[-1], widths[min(ratio.bit_length(), last)], groups)
                for ratio in config.ratios or ()
            }
        )
        pairs = zip((*widths[1:], widths[-1]), widths, strict=True)
        self.levels = nn.ModuleList(
            Level(
                a,
                b,
                config.decoder_blocks,
                groups,
                attention=config.lowest_attention and level == last,
            )
            for level, (a, b) in enumerate(pairs)
        )
        self.ups = nn.ModuleList(Upsample(width) for width in widths[1:])
        self.norm = group_norm(groups, widths[0])
        self.output = nn.Conv2d(widths[0], config.in_channels, 3, padding=1)

    def forward(self, latents: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
        """(n_r, z, P/r, P/r) of each ratio to pictures (n, C, P, P), and what the last convolution saw."""
        entered = [self.middle(self.input(rows)) for rows in latents]
        adapters = self.adapters.values()
        if len(self.adapters):
            entered = [adapter(rows) for adapter, rows in zip(adapters, entered, strict=True)]
        x = None
        for level in reversed(range(len(self.levels))):
            if level in self.taps:
                rows = entered[self.taps.index(level)]
                x = rows if x is None else torch.cat((rows, x))
            x = self.levels[level](x)
            if level:
                x = self.ups[level - 1](x)
        assert x is not None
        features = silu(self.norm(x))
        return self.output(features), features


class Autoencoder(nn.Module):
    """The network `model` of every kind. Its last convolution's weight is `decoder.output.weight`."""

    def __init__(self, config: Config) -> None:
        super().__init__()
        self.config = config
        self.encoder = Encoder(config)
        is_vq, z = config.kind == "vq", config.latent_channels
        width = config.quantizer.width if is_vq else config.moments
        self.quant_conv = nn.Conv2d(config.moments, width, 1) if config.quant_conv else None
        self.quantizer = Quantizer(config.quantizer) if is_vq else None
        inner = config.quantizer.width if is_vq else z
        self.post_quant_conv = nn.Conv2d(inner, z, 1) if config.quant_conv else None
        self.decoder = Decoder(config)

    def forward(
        self, pixels: Tensor, sizes: Sequence[int], noise: Sequence[Tensor] | None = None
    ) -> Reconstruction:
        """There and back.

        Args:
            pixels: (n, C, S, S) fp32 from -1 to 1, sorted by ratio.
            sizes: images of each ratio.
            noise: of kl and nested, by ratio (n_r, z, h, w) fp32; None decodes the posteriors' means.

        Raises:
            DataError: pictures smaller than what they are filled up by.
        """
        encoded = self.encode(pixels, sizes)
        if self.quantizer is not None:
            (z,) = encoded
            quantized = self.quantizer(z)
            made, features = self.decode([quantized.values])
            return Reconstruction(_crop(made, pixels), features, [], [], z, quantized)
        moments = [split_moments(rows) for rows in encoded]
        means, logvars = [mean for mean, _ in moments], [logvar for _, logvar in moments]
        latents = means
        if noise is not None:
            sampled = zip(means, logvars, noise, strict=True)
            latents = [mean + (logvar / 2).exp() * eps for mean, logvar, eps in sampled]
        made, features = self.decode(latents)
        return Reconstruction(_crop(made, pixels), features, means, logvars, None, None)

    def encode(self, pixels: Tensor, sizes: Sequence[int]) -> list[Tensor]:
        """What the bottleneck takes, by ratio: latents (n_r, d, h, w), or moments (n_r, 2 z, h, w)."""
        x = pad_pixels(pixels, self.config.all_ratios[-1]).to(self.encoder.input.weight.dtype)
        found = self.encoder(x, sizes)
        return found if self.quant_conv is None else [self.quant_conv(rows) for rows in found]

    def decode(self, latents: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
        """Latents of each ratio to pictures (n, C, P, P), as they were before cropping, and the last features."""
        dtype = self.decoder.input.weight.dtype
        rows = [z.to(dtype) for z in latents]
        if self.post_quant_conv is not None:
            rows = [self.post_quant_conv(z) for z in rows]
        return self.decoder(rows)


def split_moments(moments: Tensor) -> tuple[Tensor, Tensor]:
    """(n, 2 z, h, w) to mean and clamped log-variance, fp32."""
    mean, logvar = moments.float().chunk(2, 1)
    return mean, logvar.clamp(*LOGVAR_LIMITS)


def pad_pixels(pixels: Tensor, multiple: int) -> Tensor:
    """(n, C, H, W) mirrored at the right and at the bottom up to multiples.

    Raises:
        DataError: there is less to mirror than is missing.
    """
    height, width = pixels.shape[2:]
    down, right = -height % multiple, -width % multiple
    if down >= height or right >= width:
        raise DataError(
            f"a picture of {height} x {width} pixels is too small for a ratio of {multiple}: at least {multiple // 2 + 1} a side "
            "are needed; enlarge it, or leave it out"
        )
    if not down and not right:
        return pixels
    if len(pixels) == 0:
        return pixels.new_zeros((0, pixels.shape[1], height + down, width + right))
    return pad(pixels, (0, right, 0, down), mode="reflect")


def _crop(made: Tensor, pixels: Tensor) -> Tensor:
    return made[:, :, : pixels.shape[2], : pixels.shape[3]]


def split_by_sizes(rows: Tensor, sizes: Sequence[int]) -> list[Tensor]:
    """(n, ...) sorted by ratio to the rows of each."""
    ends = list(itertools.accumulate(sizes))
    return [rows[end - size : end] for size, end in zip(sizes, ends, strict=True)]
