"""Keys and values of what was generated so far: plain tensors a caller may edit between steps."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from ..generation import GenerationCache
from .config import Config

__all__ = ["KVCache", "LayerCache", "oldest_seen"]


class KVCache(GenerationCache):
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

    def rewind(self, slot: int, ids: Sequence[int]) -> None:
        self.lengths[slot] = len(ids)
        history = self.recent.shape[1]
        if history:
            recent = [self.missing_id] * history + list(ids)
            self.recent[slot] = torch.tensor(recent[-history:], device=self.recent.device)


class LayerCache:
    """One layer of a cache and where its new positions go, for one forward.

    Args:
        cache: written in place.
        layer: which one.
        positions: (B, t) int64, of the new tokens, each below `cache.used`.
        window: positions that each one sees, itself among them; None is all before it.
        rows: (B,) int64, which sequences of the cache these are; None is all of them.
        first_seen: (B, t) int64, the first position that each one may see; None is 0.
        last_seen: (B, t) or (B, 1) int64, the last one; None is itself.
        oldest: host integer, no position before it is seen by any.
    """

    def __init__(
        self,
        cache: KVCache,
        layer: int,
        positions: Tensor,
        window: int | None = None,
        rows: Tensor | None = None,
        first_seen: Tensor | None = None,
        oldest: int = 0,
        last_seen: Tensor | None = None,
    ) -> None:
        self.cache, self.layer, self.positions = cache, layer, positions
        self.last_seen = positions if last_seen is None else last_seen
        self.window, self.rows = window, rows
        self.first_seen, self.oldest = first_seen, oldest

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """Write k, v (B, t, K, hd); attention of q (B, t, H, hd) up to each query's position."""
        keys, values = (
            self._write(store[self.layer], new).to(q.dtype)
            for store, new in ((self.cache.keys, k), (self.cache.values, v))
        )
        groups = q.shape[2] // k.shape[2]
        if groups > 1:
            keys, values = keys.repeat_interleave(groups, 2), values.repeat_interleave(groups, 2)
        places = torch.arange(self.oldest, self.cache.used, device=q.device)
        own = self.positions[:, None, :, None]
        mask = places <= self.last_seen[:, None, :, None]
        if self.window is not None:
            mask &= places > own - self.window
        if self.first_seen is not None:
            mask &= places >= self.first_seen[:, None, :, None]
        q, keys, values = (x.transpose(1, 2) for x in (q, keys, values))
        return scaled_dot_product_attention(q, keys, values, attn_mask=mask).transpose(1, 2)

    def _write(self, store: Tensor, new: Tensor) -> Tensor:
        """What the new positions may see of a store (all sequences, capacity, K, hd), themselves included."""
        rows = self.rows
        if rows is None:
            rows = torch.arange(len(new), device=new.device)
        store[rows[:, None], self.positions] = new.to(store.dtype)
        seen = store[:, self.oldest : self.cache.used]
        return seen if self.rows is None else seen[self.rows]


def oldest_seen(positions: Tensor, window: int | None) -> int:
    """The first position that any of `positions` (B, t), ascending in each row, sees; waits for the device."""
    if window is None:
        return 0
    return max(0, int(positions[:, 0].min()) - window + 1)
