"""What a family's cache of texts under generation gives whoever steers them; the state itself is the family's own.

A network that generates has `config` and `forward_cached(tokens, new_lengths, cache)`, and its package `cache.KVCache`,
which is one of these.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence

from torch import Tensor

from .errors import ConfigError

__all__ = ["GenerationCache"]


class GenerationCache(ABC):
    """State of B sequences.

    Attributes:
        lengths: (B,) int64, positions filled in each sequence.
        capacity: positions there is room for.
        used: host integer, an upper bound of `lengths`.
    """

    lengths: Tensor
    capacity: int
    used: int = 0

    def reserve(self, count: int) -> None:
        """Claim room for `count` more positions of every sequence.

        Raises:
            ConfigError: the cache is full.
        """
        if self.used + count > self.capacity:
            raise ConfigError(
                f"the cache holds {self.capacity} positions, {self.used + count} are needed; "
                "build it with a larger capacity"
            )
        self.used += count

    @abstractmethod
    def select(self, rows: Tensor) -> None:
        """Keep, copy or reorder sequences: `rows` (B',) int64."""

    @abstractmethod
    def rewind(self, slot: int, ids: Sequence[int]) -> None:
        """Go back to where a sequence was `ids` long, which it began with."""

    def patch_starts(self, slot: int) -> list[int] | None:
        """Positions that start a patch, of those filled and the one to come; None in a family without patches."""
        return None
