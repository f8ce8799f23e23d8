"""Keys and values of what was generated so far: plain tensors a caller may edit between steps."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from ..errors import ConfigError
from .config import Config

__all__ = ["KVCache", "LayerCache"]


class KVCache:
    """State of B sequences under generation, with K key/value heads of width hd.

    Attributes:
        keys, values: for each layer (B, capacity, K, hd).
        lengths: (B,) int64, positions filled in each sequence.
        recent: (B, longest - 1) int64, the ids before the next one, newest last; what n-gram
            hashing needs.
        used: host integer, an upper bound of `lengths`.
    """

    def __init__(
        self,
        config: Config,
        batch_size: int,
        capacity: int,
        device: torch.device | str = "cpu",
        dtype: torch.dtype = torch.float32,
    ) -> None:
        shape = (batch_size, capacity, config.kv_heads, config.head_width)
        self.keys = [torch.zeros(shape, device=device, dtype=dtype) for _ in range(config.n_layers)]
        self.values = [
            torch.zeros(shape, device=device, dtype=dtype) for _ in range(config.n_layers)
        ]
        self.lengths = torch.zeros(batch_size, dtype=torch.int64, device=device)
        history = max(config.ngram.sizes) - 1 if config.ngram else 0
        self.missing_id = config.ngram.missing_id if config.ngram else 0
        self.recent = torch.full(
            (batch_size, history), self.missing_id, dtype=torch.int64, device=device
        )
        self.capacity = capacity
        self.used = 0

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

    def remember(self, tokens: Tensor, counts: Tensor) -> None:
        """Note the newest ids of each sequence: `tokens` (B, t), `counts` (B,) of them real."""
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


class LayerCache:
    """One layer of a cache and where its new positions go, for one forward.

    Args:
        cache: written in place.
        layer: which one.
        positions: (B, t) int64, of the new tokens, each below `cache.used`.
        window: positions that each one sees, itself among them; None is all before it.
    """

    def __init__(
        self, cache: KVCache, layer: int, positions: Tensor, window: int | None = None
    ) -> None:
        self.cache = cache
        self.window = window
        self.layer = layer
        self.positions = positions

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """Write k, v (B, t, K, hd); attention of q (B, t, H, hd) up to each query's position."""
        used, layer = self.cache.used, self.layer
        sequences = torch.arange(len(q), device=q.device)[:, None]
        self.cache.keys[layer][sequences, self.positions] = k.to(self.cache.keys[layer].dtype)
        self.cache.values[layer][sequences, self.positions] = v.to(self.cache.values[layer].dtype)
        keys, values = (
            store[layer][:, :used].to(q.dtype) for store in (self.cache.keys, self.cache.values)
        )
        groups = q.shape[2] // k.shape[2]
        if groups > 1:
            keys, values = keys.repeat_interleave(groups, 2), values.repeat_interleave(groups, 2)
        places, own = torch.arange(used, device=q.device), self.positions[:, None, :, None]
        mask = places <= own
        if self.window is not None:
            mask &= places > own - self.window
        q, keys, values = (x.transpose(1, 2) for x in (q, keys, values))
        return scaled_dot_product_attention(q, keys, values, attn_mask=mask).transpose(1, 2)
