"""The network of the Mamba family: what all multimodal models are, and generation from a recurrent state.

B sequences of t new positions, d model width, V vocabulary.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import linear

from ...kernels import Routing, route_by_modality, route_one_modality
from ..batch import PackedBatch
from ..multimodal.network import MultimodalModel
from .backbone import Backbone
from .cache import NO_ID, KVCache
from .config import Config
from .context import CachedContext

__all__ = ["Mamba"]


class Mamba(MultimodalModel):
    """Embedding, Mamba blocks, heads; each position goes through the weights of its own modality."""

    config: Config

    def __init__(self, config: Config) -> None:
        super().__init__(config, Backbone(config))

    def forward(self, batch: PackedBatch | Tensor, output: Any = "losses", **cached: Any) -> Any:
        """As `MultimodalModel`; or what `forward_cached` and `read_rows` say, which come this way so that hooks on the root run."""
        if isinstance(batch, PackedBatch):
            return super().forward(batch, output)
        if batch.is_floating_point():
            return self._read_rows(batch, **cached)
        return self._forward_cached(batch, **cached)

    def forward_cached(
        self,
        tokens: Tensor,
        new_lengths: Tensor | None,
        cache: KVCache,
        modality: Tensor | None = None,
    ) -> Tensor:
        """Logits of new positions after what the cache has read; advances the cache.

        Args:
            tokens: (B, t) int64, padded on the right with anything.
            new_lengths: (B,) int64, how many of each sequence's tokens are real; None is all.
            cache: of this batch.
            modality: (B, t) uint8 on the CPU, of each token; None is text.

        Returns:
            (B, t, V) fp32; rows past a sequence's new length mean nothing.

        Raises:
            ConfigError: the cache is full.
            ValueError: a modality without weights.
        """
        return self(tokens, new_lengths=new_lengths, cache=cache, modality=modality)

    def read_rows(self, rows: Tensor, cache: KVCache, modality: int) -> Tensor:
        """What the backbone makes of new positions that are no ids, such as patches of latents; advances the cache.

        Args:
            rows: (B, t, d), as a stem gives them.
            modality: of all of them.

        Returns:
            (B, t, d) after the final norm. To try one image's patches again and again, take `cache.snapshot()` before.

        Raises:
            ConfigError: the cache is full.
        """
        return self(rows, cache=cache, modality=modality)

    def _forward_cached(
        self,
        tokens: Tensor,
        new_lengths: Tensor | None,
        cache: KVCache,
        modality: Tensor | None = None,
    ) -> Tensor:
        self._read_again(cache)
        batch, length = tokens.shape
        cache.reserve(length)
        if modality is None:
            modality = torch.zeros(batch, length, dtype=torch.uint8)
        x = self._read(tokens, new_lengths, cache, modality)
        counts = torch.full_like(cache.lengths, length) if new_lengths is None else new_lengths
        cache.note(modality.to(tokens.device), counts)
        return linear(x, self.head_weight).float().unflatten(0, (batch, length))

    def _read_rows(self, rows: Tensor, cache: KVCache, modality: int) -> Tensor:
        self._read_again(cache)
        batch, length, _ = rows.shape
        cache.reserve(length)
        total, kinds = batch * length, len(self.config.modalities)
        routing = route_one_modality(total, kinds, modality, rows.device)
        x = self.backbone(rows.flatten(0, 1), routing, CachedContext(cache, length, None))
        unknown = torch.full((batch, length), NO_ID, dtype=torch.uint8, device=rows.device)
        cache.note(unknown, torch.full_like(cache.lengths, length))
        return x.unflatten(0, (batch, length))

    def _read(
        self, tokens: Tensor, new_lengths: Tensor | None, cache: KVCache, modality: Tensor
    ) -> Tensor:
        """(B t, d) states of new ids, in their order."""
        routing = route_known(modality.flatten(), len(self.config.modalities), tokens.device)
        x = self.embedding(routing.permute(tokens.flatten()))
        context = CachedContext(cache, tokens.shape[1], new_lengths)
        return routing.restore(self.backbone(x, routing, context))

    def _read_again(self, cache: KVCache) -> None:
        """Make the states of sequences that were taken back."""
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


def route_known(modality: Tensor, n_modalities: int, device: torch.device) -> Routing:
    """The routing on `device` of modalities (T,) that are on the CPU.

    Raises:
        ValueError: a modality without weights.
    """
    found = torch.unique(modality).tolist()
    if len(found) <= 1:
        only = int(found[0]) if found else 0
        return route_one_modality(len(modality), n_modalities, only, device)
    return route_by_modality(modality, n_modalities).to(device)
