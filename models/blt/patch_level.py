"""The level (threshold or rise) that gives a wanted mean patch size, and what patches a level gives.

All counts are made by the rule itself, on a sample of rows: forced starts, the longest patch and the second condition
of `both` are in them. A higher level never gives more patches, so that bisection finds the level.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ...kernels.entropy_patching import Patches, patch_boundaries
from ..batch import PackedBatch
from .patching import PatchMaker
from .patching_config import PatchingConfig

__all__ = [
    "PatchSample",
    "PatchSummary",
    "find_level",
    "level_curve",
    "sample_patches",
    "summarise",
]

CURVE_POINTS = 24


@dataclass(frozen=True)
class PatchSample:
    """Rows that were looked at.

    Args:
        tokens, position_ids: (T,) of all rows, laid end to end.
        entropy: (T,) fp32 nats, or None for rules that need none.
        row_length: positions of one row.
    """

    tokens: Tensor
    position_ids: Tensor
    entropy: Tensor | None
    row_length: int

    def patches(self, config: PatchingConfig, **levels: float) -> Patches:
        """All of the sample's patches by a rule, whose levels may be given here instead."""
        chosen = {"threshold": config.threshold, "rise": config.rise, **levels}
        return patch_boundaries(
            self.position_ids,
            len(self.tokens),
            config.scheme,
            entropy=self.entropy,
            tokens=self.tokens if config.scheme == "space" else None,
            threshold=chosen["threshold"],
            rise=chosen["rise"],
            stride=config.stride,
            max_length=config.max_length,
            forced_starts=config.forced_starts,
        )

    def mean_size(self, config: PatchingConfig, **levels: float) -> float:
        """Positions a patch."""
        return len(self.tokens) / int(self.patches(config, **levels).count)


@dataclass(frozen=True)
class PatchSummary:
    """Patches of a sample.

    Args:
        bytes: positions, special ids included.
        percentiles: 1, 10, 50, 90 and 99 % of the lengths.
        histogram: (length, patches of it).
    """

    bytes: int
    patches: int
    mean: float
    longest: int
    percentiles: tuple[int, ...]
    histogram: tuple[tuple[int, int], ...]


def sample_patches(maker: PatchMaker, batches: Iterable[PackedBatch]) -> PatchSample:
    """Look at some batches: ids, positions and, where the rule needs them, entropies, on the host."""
    tokens, positions, entropies, row_length = [], [], [], 0
    for batch in batches:
        tokens.append(batch.tokens.cpu())
        positions.append(batch.position_ids.cpu())
        row_length = batch.row_length
        if maker.config.needs_entropy:
            entropies.append(maker.entropy(batch).float().cpu())
    return PatchSample(
        torch.cat(tokens),
        torch.cat(positions),
        torch.cat(entropies) if entropies else None,
        row_length,
    )


def find_level(sample: PatchSample, config: PatchingConfig, name: str, wanted: float) -> float:
    """The level, among those that make a difference, whose mean patch size is nearest to the wanted one.

    Args:
        name: `threshold` or `rise`, the one to find.
    """
    values = _values(sample, name)
    # Between two neighbouring values all levels are one; the middle is furthest from rounding.
    edges = np.concatenate(([values[0] - 1], values, [values[-1] + 1]))
    levels = ((edges[:-1] + edges[1:]) / 2).tolist()
    low, high = 0, len(levels) - 1
    while high - low > 1:
        middle = (low + high) // 2
        if sample.mean_size(config, **{name: levels[middle]}) < wanted:
            low = middle
        else:
            high = middle
    return min(
        (levels[low], levels[high]),
        key=lambda level: abs(sample.mean_size(config, **{name: level}) - wanted),
    )


def level_curve(
    sample: PatchSample, config: PatchingConfig, name: str, points: int = CURVE_POINTS
) -> list[tuple[float, float]]:
    """(level, mean patch size) over the levels that occur, lowest first."""
    values = _values(sample, name)
    shares = np.linspace(0.02, 0.96, points)
    levels = np.unique(np.quantile(values, shares)).tolist()
    return [(level, sample.mean_size(config, **{name: level})) for level in levels]


def _values(sample: PatchSample, name: str) -> np.ndarray[Any, np.dtype[np.float64]]:
    """Sorted, distinct numbers that the level is compared with."""
    assert sample.entropy is not None
    entropy = sample.entropy
    if name == "rise":
        entropy = (entropy - entropy.roll(1))[sample.position_ids > 0]
    # A threshold below 0 is no threshold, and every entropy is above.
    values = entropy[torch.isfinite(entropy)].unique().double().numpy()
    return values if len(values) else np.zeros(1)


def summarise(lengths: Sequence[int] | Tensor) -> PatchSummary:
    """Of the lengths of all patches, none 0."""
    array = np.asarray(lengths, dtype=np.int64)
    counts = np.bincount(array)
    cuts = np.percentile(array, (1, 10, 50, 90, 99), method="inverted_cdf").astype(int).tolist()
    return PatchSummary(
        bytes=int(array.sum()),
        patches=len(array),
        mean=float(array.mean()),
        longest=int(array.max()),
        percentiles=tuple(cuts),
        histogram=tuple((int(n), int(counts[n])) for n in np.flatnonzero(counts)),
    )
