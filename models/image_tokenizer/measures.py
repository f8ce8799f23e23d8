"""What is measured of pictures, codes and latents: quality, use of the codebook, gain of a finer ratio, latents' scale."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from .autoencoder import Autoencoder, split_moments
from .config import Config

__all__ = ["LatentStatistics", "code_measures", "measured_gain", "psnr", "reconstruction_errors"]

LEAST_ERROR = 1e-10
"""Mean squared error below which pictures count as the same: 106 dB."""


def psnr(squares: Tensor) -> Tensor:
    """Peak signal-to-noise ratio in dB of mean squared errors, of pixels from -1 to 1."""
    return 10 * (4 / squares.clamp_min(LEAST_ERROR)).log10()


def code_measures(counts: Tensor) -> dict[str, Tensor]:
    """Of (K,) int64 uses: () codes used, perplexity, and entropy in nats of how often each was.

    Sums over all ranks go in here; perplexities of parts do not average to that of the whole.
    """
    shares = counts.double() / counts.sum().clamp_min(1)
    entropy = -torch.special.xlogy(shares, shares).sum()
    return {
        "codes_used": (counts > 0).sum().float(),
        "code_perplexity": entropy.exp().float(),
        "code_entropy": entropy.float(),
    }


@torch.no_grad()
def reconstruction_errors(model: nn.Module, config: Config, pixels: Tensor, ratio: int) -> Tensor:
    """(n,) mean squared errors of pictures at one ratio, without noise.

    Args:
        model: the network `model`.
        pixels: (n, C, S, S) uint8, on its device.
    """
    x = pixels.expand(-1, config.in_channels, -1, -1).float() / 127.5 - 1
    made = model(x, [len(x) * (r == ratio) for r in config.all_ratios]).pixels.float()
    # As files hold them.
    return (x - made.clamp(-1, 1)).square().mean((1, 2, 3))


def measured_gain(model: nn.Module, config: Config, pixels: Tensor) -> Tensor:
    """(n,) how much smaller a picture's error is at the finest ratio than at the coarsest: what more tokens buy.

    The score that pictures are ranked by once a nested autoencoder is trained at all ratios; those of noise gain nothing, however
    complex they look.
    """
    finest, *_, coarsest = config.all_ratios
    errors = [reconstruction_errors(model, config, pixels, r) for r in (coarsest, finest)]
    return errors[0] - errors[1]


class LatentStatistics:
    """Mean and spread of sampled latents, for each ratio: what a generator's inputs are scaled by.

    Sums are kept in fp64 on the host, so that the order of pictures does not matter; add `state()` of other ranks by `merge`.
    """

    def __init__(self, config: Config) -> None:
        self.config = config
        shape = (len(config.all_ratios), config.latent_channels)
        self.sums = torch.zeros(2, *shape, dtype=torch.float64)
        self.counts = torch.zeros(shape[0], dtype=torch.int64)
        self.images = torch.zeros(shape[0], dtype=torch.int64)

    @torch.no_grad()
    def add(self, model: Autoencoder, pixels: Tensor, ratio: int) -> None:
        """Pictures (n, C, S, S) uint8 at one ratio."""
        x = pixels.expand(-1, self.config.in_channels, -1, -1).float() / 127.5 - 1
        place = self.config.all_ratios.index(ratio)
        sizes = [len(x) * (r == ratio) for r in self.config.all_ratios]
        self.add_moments(model.encode(x, sizes)[place], ratio)

    def add_moments(self, moments: Tensor, ratio: int) -> None:
        """(n, 2 z, h, w)."""
        place = self.config.all_ratios.index(ratio)
        mean, logvar = (part.double().cpu() for part in split_moments(moments))
        # The mean square of what is sampled, without sampling it.
        squares = mean.square() + logvar.exp()
        self.sums[0, place] += mean.sum((0, 2, 3))
        self.sums[1, place] += squares.sum((0, 2, 3))
        self.counts[place] += mean[:, 0].numel()
        self.images[place] += len(mean)

    def merge(self, other: LatentStatistics) -> None:
        self.sums += other.sums
        self.counts += other.counts
        self.images += other.images

    def result(self) -> dict[int, dict[str, Any]]:
        """By ratio that was seen: `mean` and `std` of all elements, of each channel, and `images`."""
        found = {}
        for place, ratio in enumerate(self.config.all_ratios):
            count = int(self.counts[place])
            if not count:
                continue
            means, squares = self.sums[:, place] / count
            spread = (squares - means.square()).clamp_min(0).sqrt()
            mean = means.mean()
            found[ratio] = {
                "mean": float(mean),
                "std": float((squares.mean() - mean.square()).clamp_min(0).sqrt()),
                "channel_mean": means.tolist(),
                "channel_std": spread.tolist(),
                "images": int(self.images[place]),
            }
        return found
