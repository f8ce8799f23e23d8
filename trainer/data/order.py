"""Which sequence is the i-th sample of a run: a pure function of (seed, i).

No list is kept and none is shuffled: a keyed Feistel network permutes the numbers below n in place, so any
sample can be asked for directly, whatever came before, on any rank. World size, workers and restarts do not enter.
"""

from __future__ import annotations

import functools
import hashlib
import math
from collections.abc import Sequence
from fractions import Fraction
from typing import NamedTuple

import numpy as np

__all__ = ["SampleOrder", "Located", "permute"]

ROUNDS = 6
BLOCK = 4096
"""Samples of one block of a weighted mixture, unless the weights' common denominator is smaller."""


def permute(index: np.ndarray, n: int, key: str) -> np.ndarray:
    """A keyed bijection of [0, n).

    Args:
        index: (k,) integers below n.
        n: size of the domain.
        key: names the permutation; another key gives another one.

    Returns:
        (k,) int64.
    """
    if n <= 1:
        return np.zeros(len(index), np.int64)
    half = max(1, ((n - 1).bit_length() + 1) // 2)
    keys = _round_keys(key)
    out = _feistel(index.astype(np.uint64), half, keys)
    # Cycle walking: what falls outside [0, n) is permuted again until it falls inside.
    while (outside := out >= n).any():
        out[outside] = _feistel(out[outside], half, keys)
    return out.astype(np.int64)


@functools.lru_cache(maxsize=256)
def _round_keys(key: str) -> tuple[np.uint64, ...]:
    digest = hashlib.blake2b(key.encode(), digest_size=8 * ROUNDS).digest()
    return tuple(np.frombuffer(digest, np.uint64))


def _feistel(value: np.ndarray, half: int, keys: Sequence[np.uint64]) -> np.ndarray:
    bits, mask = np.uint64(half), np.uint64((1 << half) - 1)
    left, right = value >> bits, value & mask
    for key in keys:
        left, right = right, left ^ (_mix(right ^ key) & mask)
    return (left << bits) | right


def _mix(value: np.ndarray) -> np.ndarray:
    """The finaliser of splitmix64; products wrap around on purpose."""
    value = (value ^ (value >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    value = (value ^ (value >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return value ^ (value >> np.uint64(31))


class Located(NamedTuple):
    """Of each sample: its source, the sequence within it, and how often the source was seen whole before. (k,) int64."""

    source: np.ndarray
    sequence: np.ndarray
    epoch: np.ndarray


class SampleOrder:
    """Order over several sources of so many sequences each.

    Without weights all sequences form one pool and a pass over it sees each exactly once. With weights each block of
    samples holds every source in fixed numbers, shuffled, and each source is gone through in whole passes.
    """

    def __init__(self, names: Sequence[str], sizes: Sequence[int], weights: Sequence[float] | None, seed: int) -> None:
        self.names, self.seed = tuple(names), seed
        self.sizes = np.array(sizes, np.int64)
        self.block_counts = None if weights is None else _apportion(weights)

    def share(self, source: int) -> float:
        """The share of samples that come from a source."""
        counts = self.sizes if self.block_counts is None else self.block_counts
        return float(counts[source] / counts.sum())

    def locate(self, samples: np.ndarray) -> Located:
        """Where the samples (k,) come from."""
        samples = np.asarray(samples, np.int64)
        if self.block_counts is None:
            return self._locate_in_pool(samples)
        return self._locate_in_blocks(samples)

    def _locate_in_pool(self, samples: np.ndarray) -> Located:
        total = int(self.sizes.sum())
        epochs = samples // total
        flat = np.empty(len(samples), np.int64)
        for epoch in np.unique(epochs):
            here = epochs == epoch
            flat[here] = permute(samples[here] % total, total, f"{self.seed}/pool/{epoch}")
        ends = self.sizes.cumsum()
        source = np.searchsorted(ends, flat, side="right")
        return Located(source, flat - (ends - self.sizes)[source], epochs)

    def _locate_in_blocks(self, samples: np.ndarray) -> Located:
        assert self.block_counts is not None
        length = int(self.block_counts.sum())
        source, draw = np.empty(len(samples), np.int64), np.empty(len(samples), np.int64)
        for block in np.unique(samples // length):
            here = samples // length == block
            sources, ordinals = self._block(int(block))
            place = samples[here] % length
            source[here] = sources[place]
            draw[here] = block * self.block_counts[sources[place]] + ordinals[place]
        epoch, within = np.divmod(draw, self.sizes[source])
        sequence = np.empty(len(samples), np.int64)
        for s, e in set(zip(source.tolist(), epoch.tolist(), strict=True)):
            here = (source == s) & (epoch == e)
            sequence[here] = permute(within[here], int(self.sizes[s]), f"{self.seed}/{self.names[s]}/{e}")
        return Located(source, sequence, epoch)

    @functools.lru_cache(maxsize=8)  # noqa: B019 - one order lives as long as its run
    def _block(self, block: int) -> tuple[np.ndarray, np.ndarray]:
        """Of each place in a block: its source, and how many places of that source come before it."""
        assert self.block_counts is not None
        length = int(self.block_counts.sum())
        slots = permute(np.arange(length), length, f"{self.seed}/mixture/{block}")
        sources = np.searchsorted(self.block_counts.cumsum(), slots, side="right")
        ordinals = np.empty(length, np.int64)
        for s in range(len(self.names)):
            here = sources == s
            ordinals[here] = np.arange(here.sum())
        return sources, ordinals


def _apportion(weights: Sequence[float]) -> np.ndarray:
    """Whole samples of each source in a block: exact where the weights have a small common denominator."""
    exact = [Fraction(str(w)) for w in weights]
    shares = [w / sum(exact) for w in exact]
    denominator = 1
    for share in shares:
        denominator = denominator * share.denominator // math.gcd(denominator, share.denominator)
        if denominator > BLOCK:
            denominator = BLOCK
            break
    counts = [max(1, int(share * denominator)) for share in shares]
    remainders = [float(share * denominator) - count for share, count in zip(shares, counts, strict=True)]
    for place in np.argsort(remainders)[::-1][: max(0, denominator - sum(counts))]:
        counts[place] += 1
    return np.array(counts, np.int64)
