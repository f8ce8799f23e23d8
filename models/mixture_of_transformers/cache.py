"""Keys and values of texts with images under generation.

A snapshot is a length: what lies past it is written over, and nothing looks at it.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from ..multimodal.generation import InterleavedCache
from ..transformer import cache as transformer
from .config import Config

__all__ = ["KVCache", "Snapshot"]


class Snapshot(NamedTuple):
    """What `KVCache.restore` goes back to."""

    lengths: Tensor
    used: int


class KVCache(transformer.KVCache, InterleavedCache):
    """A transformer's cache; a position is a position, of whatever modality."""

    def __init__(
        self,
        config: Config,
        batch_size: int,
        capacity: int,
        device: torch.device | str = "cpu",
        dtype: torch.dtype = torch.float32,
    ) -> None:
        super().__init__(config.dense, batch_size, capacity, device, dtype)
        self.pending = {}

    def note(self, length: int, counts: Tensor, modality: Tensor | None = None) -> None:
        self.lengths = self.lengths + counts

    def snapshot(self) -> Snapshot:
        return Snapshot(self.lengths, self.used)

    def restore(self, snapshot: Snapshot) -> None:
        self.lengths, self.used = snapshot
