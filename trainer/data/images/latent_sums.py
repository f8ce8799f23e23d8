"""Sums over latents from which mean and standard deviation of each channel follow, whatever the parts they are taken of."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

__all__ = ["LatentSums"]

LOG_VARIANCES = (-30.0, 20.0)
"""Within which log variances are read, as the autoencoder itself does."""


@dataclass(frozen=True)
class LatentSums:
    """Of latents sampled from their posteriors, without sampling any.

    Args:
        images: how many.
        values: latents of one channel.
        first, second: expected value and expected square of each channel, summed.
    """

    images: int = 0
    values: int = 0
    first: Sequence[float] = ()
    second: Sequence[float] = ()

    @classmethod
    def of(cls, moments: NDArray[Any]) -> LatentSums:
        """Of (N, 2C, h, w) means and log variances."""
        mean, log_variance = np.split(moments.astype(np.float64), 2, axis=1)
        square = mean**2 + np.exp(log_variance.clip(*LOG_VARIANCES))
        count, _, height, width = mean.shape
        first, second = (part.sum(axis=(0, 2, 3)).tolist() for part in (mean, square))
        return cls(count, count * height * width, first, second)

    def __add__(self, other: LatentSums) -> LatentSums:
        if not self.values or not other.values:
            return other if not self.values else self
        return LatentSums(
            self.images + other.images,
            self.values + other.values,
            [a + b for a, b in zip(self.first, other.first, strict=True)],
            [a + b for a, b in zip(self.second, other.second, strict=True)],
        )

    def statistics(self) -> dict[str, Any]:
        """`mean` and `std` of each channel, and `images`."""
        mean = [value / self.values for value in self.first]
        variance = [
            square / self.values - m * m for square, m in zip(self.second, mean, strict=True)
        ]
        return {
            "mean": mean,
            "std": [math.sqrt(max(0.0, v)) for v in variance],
            "images": self.images,
        }
