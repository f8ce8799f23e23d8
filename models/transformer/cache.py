"""Keys and values of what was generated so far, as plain tensors a caller may edit between steps."""

from __future__ import annotations

import torch
from torch import Tensor

from ..errors import ConfigError
from .config import Config

__all__ = ["KVCache"]


class KVCache:
    """State of a batch of sequences under generation. B sequences, K key/value heads, hd head width.

    Attributes:
        keys, values: for each layer (B, capacity, K, hd).
        lengths: (B,) int64, positions filled in each sequence.
        recent: (B, longest - 1) int64, the ids before the next one, newest last; what n-gram hashing needs.
        used: host integer, an upper bound of `lengths`.
    """

    def __init__(self, config: Config, batch_size: int, capacity: int, device: torch.device | str = "cpu", dtype: torch.dtype = torch.float32) -> None:
        shape = (batch_size, capacity, config.kv_heads, config.head_width)
        self.keys = [torch.zeros(shape, device=device, dtype=dtype) for _ in range(config.n_layers)]
        self.values = [torch.zeros(shape, device=device, dtype=dtype) for _ in range(config.n_layers)]
        self.lengths = torch.zeros(batch_size, dtype=torch.int64, device=device)
        history = max(config.ngram.sizes) - 1 if config.ngram else 0
        self.recent = torch.zeros(batch_size, history, dtype=torch.int64, device=device)
        self.capacity = capacity
        self.used = 0

    def reserve(self, count: int) -> None:
        """Claim room for `count` more positions of every sequence.

        Raises:
            ConfigError: the cache is full.
        """
        if self.used + count > self.capacity:
            raise ConfigError(f"the cache holds {self.capacity} positions, {self.used + count} are needed; build it larger")
        self.used += count

    def remember(self, tokens: Tensor, counts: Tensor) -> None:
        """Note the newest ids of each sequence: `tokens` (B, t), of which `counts` (B,) are real."""
        if self.recent.shape[1]:
            joined = torch.cat((self.recent, tokens), dim=1)
            index = counts[:, None] + torch.arange(self.recent.shape[1], device=tokens.device)
            self.recent = joined.gather(1, index)
        self.lengths = self.lengths + counts

    def select(self, rows: Tensor) -> None:
        """Keep, copy or reorder sequences: `rows` (B',) int64."""
        self.keys = [k[rows] for k in self.keys]
        self.values = [v[rows] for v in self.values]
        self.lengths, self.recent = self.lengths[rows], self.recent[rows]
