"""The network of the Mamba family: what all generative multimodal models are, and states that are made again after a rewind."""

from __future__ import annotations

import torch

from ..multimodal.generation import GenerativeModel, InterleavedCache
from .backbone import Backbone
from .cache import KVCache
from .config import Config

__all__ = ["Mamba"]


class Mamba(GenerativeModel):
    """Embedding, Mamba blocks, heads; each position goes through the weights of its own modality."""

    config: Config

    def __init__(self, config: Config) -> None:
        super().__init__(config, Backbone(config))

    def _read_again(self, cache: InterleavedCache) -> None:
        assert isinstance(cache, KVCache)
        if not cache.pending:
            return
        device = cache.lengths.device
        slots = torch.tensor(list(cache.pending), device=device)
        counts = [len(ids) for ids in cache.pending.values()]
        longest = max(counts)
        fresh = cache.fresh(len(counts))
        if longest:
            tokens = torch.zeros(len(counts), longest, dtype=torch.int64)
            for row, ids in enumerate(cache.pending.values()):
                tokens[row, : len(ids)] = torch.tensor(ids, dtype=torch.int64)
            # Past the end of a shorter sequence anything may stand, even what no id makes.
            modality = cache.modality[slots, :longest].cpu()
            modality = torch.where(modality < len(self.config.modalities), modality, 0)
            lengths = torch.tensor(counts, device=device)
            self._read(tokens.to(device), lengths, fresh, modality)
        cache.adopt(slots, fresh)
        cache.pending = {}
