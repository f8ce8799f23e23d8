"""The i-th sample of a run as a function of (seed, i): which source, which pass over it, which
sequence.

Nothing is stored: sequences are permuted by a keyed Feistel network, and how many samples each
source has given after i of them is a closed form. So any position is reached at once, on any number
of ranks.

Dimensions: J sources of n_j sequences; blocks of `BLOCK` samples, inside which sources are
shuffled.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

from ...models.errors import DataError

__all__ = ["BLOCK", "Apportionment", "Located", "Permutation", "SampleOrder", "SourceShare"]

BLOCK = 1024
"""Samples among which the sources are shuffled. A block also ends where all sources have had their
whole weight.
"""

FEISTEL_ROUNDS = 8
# Products of a local time and a weight have to stay inside int64.
LARGEST_WEIGHT_SUM = 1 << 31


class Permutation:
    """A bijection of [0, n) that a key picks, computed element by element.

    An alternating Feistel network on the next power of two, walked until it comes back into the
    range (Black and Rogaway, Ciphers with arbitrary finite domains, 2002).

    Args:
        n: size of the range.
        key: any bytes; another key gives another permutation.
    """

    def __init__(self, n: int, key: bytes) -> None:
        self.n = n
        bits = max(2, (n - 1).bit_length())
        self._low_bits = np.uint64(bits - bits // 2)
        self._low_mask = np.uint64((1 << (bits - bits // 2)) - 1)
        self._high_mask = np.uint64((1 << (bits // 2)) - 1)
        digest = hashlib.blake2b(key, digest_size=8 * FEISTEL_ROUNDS).digest()
        self._round_keys = np.frombuffer(digest, "<u8")

    def __call__(self, values: NDArray[np.int64]) -> NDArray[np.int64]:
        """(N,) int64 in [0, n) to (N,) int64 in [0, n)."""
        if self.n == 1:
            return np.zeros_like(values)
        result = self._scramble(values.astype(np.uint64))
        while (outside := np.flatnonzero(result >= self.n)).size:
            result[outside] = self._scramble(result[outside])
        return result.astype(np.int64)

    def _scramble(self, values: NDArray[np.uint64]) -> NDArray[np.uint64]:
        high, low = values >> self._low_bits, values & self._low_mask
        for i, key in enumerate(self._round_keys):
            if i % 2:
                low ^= _mix(high, key) & self._low_mask
            else:
                high ^= _mix(low, key) & self._high_mask
        return (high << self._low_bits) | low


def _mix(values: NDArray[np.uint64], key: np.uint64) -> NDArray[np.uint64]:
    """A keyed hash whose low bits are good; products wrap around."""
    mixed = (values ^ key) * np.uint64(0x9E3779B97F4A7C15)
    mixed = (mixed ^ (mixed >> np.uint64(32))) * np.uint64(0xD6E8FEB86659FD93)
    return mixed >> np.uint64(32)


class Apportionment:
    """Splits 0, 1, 2, ... among sources by integer weights, never more than a few off.

    Sources are the leaves of a balanced binary tree. After t items at a node of weight w, its left
    child (weight l) has had floor(t * l / w) and the right one the rest: both never decrease, and
    after a multiple of the sum of all weights every source has had exactly its share.
    """

    def __init__(self, weights: Sequence[int]) -> None:
        self._weights = list(weights)
        self.total = sum(weights)

    def counts(self, items: int) -> list[int]:
        """Items each source has had after `items` of them. O(J), in exact integers."""
        found: list[int] = []

        def descend(first: int, stop: int, given: int) -> None:
            if stop - first == 1:
                found.append(given)
                return
            middle = (first + stop) // 2
            left, whole = sum(self._weights[first:middle]), sum(self._weights[first:stop])
            to_left = given * left // whole
            descend(first, middle, to_left)
            descend(middle, stop, given - to_left)

        descend(0, len(self._weights), items)
        return found

    def assign(self, items: NDArray[np.int64]) -> NDArray[np.int64]:
        """(N,) int64 item numbers to (N,) int64 sources."""
        sources = np.empty(len(items), np.int64)

        def descend(
            first: int, stop: int, where: NDArray[np.int64], times: NDArray[np.int64]
        ) -> None:
            if stop - first == 1:
                sources[where] = first
                return
            middle = (first + stop) // 2
            left, whole = sum(self._weights[first:middle]), sum(self._weights[first:stop])
            before = _scaled_floor(times, left, whole)
            goes_left = _scaled_floor(times + 1, left, whole) > before
            descend(first, middle, where[goes_left], before[goes_left])
            descend(middle, stop, where[~goes_left], (times - before)[~goes_left])

        descend(0, len(self._weights), np.arange(len(items)), items)
        return sources


def _scaled_floor(times: NDArray[np.int64], left: int, whole: int) -> NDArray[np.int64]:
    """floor(times * left / whole) without leaving int64."""
    rounds, rest = np.divmod(times, whole)
    return rounds * left + rest * left // whole


def integer_weights(weights: Sequence[float]) -> list[int]:
    """Weights as integers of a bounded sum, by largest remainder; integers that fit stay as they
    are.
    """
    exact = [Fraction(weight) for weight in weights]
    if all(weight.denominator == 1 for weight in exact) and sum(exact) <= LARGEST_WEIGHT_SUM:
        return [int(weight) for weight in exact]
    total = LARGEST_WEIGHT_SUM // 2
    quotas = [weight * total / sum(exact) for weight in exact]
    shares = [max(1, int(quota)) for quota in quotas]
    by_remainder = sorted(range(len(quotas)), key=lambda j: int(quotas[j]) - quotas[j])
    for j in by_remainder[: max(0, total - sum(shares))]:
        shares[j] += 1
    return shares


@dataclass(frozen=True)
class SourceShare:
    """What the order needs to know of a source: its name, sequences, weight and limit of passes."""

    name: str
    sequences: int
    weight: float | None = None
    max_epochs: float | None = None


def _mixture_weights(shares: Sequence[SourceShare]) -> list[int]:
    given = [share.weight for share in shares if share.weight is not None]
    if not given:
        return integer_weights([share.sequences for share in shares])
    if len(given) < len(shares):
        raise DataError(
            "some sources have a weight and some have none; give all of them one, or none"
        )
    weights = integer_weights(given)
    # A small sum would make the blocks small: 3 to 5 is taken as 3 million to 5 million.
    return [weight * max(1, LARGEST_WEIGHT_SUM // 2 // sum(weights)) for weight in weights]


@dataclass(frozen=True)
class Located:
    """Where samples come from; arrays of (N,) int64, in the order of the run."""

    sources: NDArray[np.int64]
    epochs: NDArray[np.int64]
    sequences: NDArray[np.int64]


class SampleOrder:
    """The order of a run over a mixture.

    Args:
        shares: the sources. Without weights each is taken in proportion to its size, so that all
            are through at the same sample.
        seed: of the run.
    """

    def __init__(self, shares: Sequence[SourceShare], seed: int) -> None:
        self.shares = list(shares)
        self.seed = seed
        self._split = Apportionment(_mixture_weights(self.shares))
        self._block = lru_cache(maxsize=8)(self._compute_block)

    def locate(self, first: int, stop: int) -> Located:
        """Samples [first, stop).

        Raises:
            DataError: a source would be repeated more often than its `max_epochs`.
        """
        start = self._block_start(first)
        blocks = [self._block(start)]
        while (reached := start + sum(len(block[0]) for block in blocks)) < stop:
            blocks.append(self._block(reached))
        window = slice(first - start, stop - start)
        joined = [np.concatenate(parts)[window] for parts in zip(*blocks, strict=True)]
        sources, ordinals, epochs, sequences = joined
        self._check_epochs(sources, ordinals)
        return Located(sources, epochs, sequences)

    def counts(self, stop: int) -> dict[str, int]:
        """Samples each source has given among the first `stop`; looks at no more than one block."""
        start = self._block_start(stop)
        counts = self._split.counts(start)
        if stop > start:
            extra = np.bincount(self._block(start)[0][: stop - start], minlength=len(counts))
            counts = [before + int(more) for before, more in zip(counts, extra, strict=True)]
        return {share.name: count for share, count in zip(self.shares, counts, strict=True)}

    def check(self, samples: int) -> None:
        """See that the sources hold out for a run of so many samples.

        Raises:
            DataError: a source would be repeated more often than its `max_epochs`.
        """
        counts = self.counts(samples)
        for share in self.shares:
            if (
                share.max_epochs is not None
                and counts[share.name] > share.max_epochs * share.sequences
            ):
                raise _too_few(share, counts[share.name])

    def _check_epochs(self, sources: NDArray[np.int64], ordinals: NDArray[np.int64]) -> None:
        for j, share in enumerate(self.shares):
            if share.max_epochs is None:
                continue
            taken = ordinals[sources == j]
            if len(taken) and taken[-1] >= share.max_epochs * share.sequences:
                raise _too_few(share, int(taken[-1]) + 1)

    def _block_start(self, sample: int) -> int:
        return sample - sample % self._split.total % BLOCK

    def _compute_block(self, start: int) -> tuple[NDArray[np.int64], ...]:
        """(sources, ordinals within the source, epochs, sequences) of the samples of the block that
        starts here.
        """
        length = min(BLOCK, self._split.total - start % self._split.total)
        slots = Permutation(length, self._key("block", start))(np.arange(length))
        sources = self._split.assign(start + slots)
        ordinals, epochs, sequences = (np.empty(length, np.int64) for _ in range(3))
        for j, given in enumerate(self._split.counts(start)):
            where = np.flatnonzero(sources == j)
            # Ordinals run in the order of the samples, so a pass ends before the next begins.
            ordinals[where] = given + np.arange(len(where))
            epochs[where], rest = np.divmod(ordinals[where], self.shares[j].sequences)
            sequences[where] = self._permute(j, epochs[where], rest)
        return sources, ordinals, epochs, sequences

    def _permute(
        self, source: int, epochs: NDArray[np.int64], places: NDArray[np.int64]
    ) -> NDArray[np.int64]:
        share = self.shares[source]
        found = np.empty_like(places)
        for epoch in np.unique(epochs):
            within = epochs == epoch
            found[within] = Permutation(share.sequences, self._key(share.name, int(epoch)))(
                places[within]
            )
        return found

    def _key(self, name: str, number: int) -> bytes:
        return f"weft order 1|{self.seed}|{name!r}|{number}".encode()


def _too_few(share: SourceShare, wanted: int) -> DataError:
    allowed = int((share.max_epochs or 0) * share.sequences)
    return DataError(
        f"too few samples: source {share.name!r} has {share.sequences} sequences, {allowed} "
        "samples with "
        f"max_epochs={share.max_epochs:g}, but the run takes {wanted} of it; "
        "lower train.steps, raise max_epochs, or add data"
    )
