"""Generation with a BLT: the entropy model and the local models once a byte, the latent transformer once a patch.

Exact because boundaries are incremental: whether the next byte starts a patch is known before it is. Rows of a batch close
their patches at different bytes; those that close one together take their latent step together, and where none does the
latent transformer is not called. Read `forward_cached` first. Source: arXiv 2412.09871, section 2.3.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ..errors import ConfigError
from ..transformer.cache import KVCache as TransformerCache
from ..transformer.model import Transformer
from .cache import KVCache
from .cached_forward import ClosedPatches
from .network import BLT
from .patching import boundaries, line_starts

__all__ = ["BLTGenerator"]


class BLTGenerator(nn.Module):
    """A BLT and the entropy model that makes its patches, as one network for `generate`."""

    def __init__(self, model: BLT, entropy: Transformer | None = None) -> None:
        super().__init__()
        self.config = model.config
        if self.config.patching.needs_entropy and entropy is None:
            raise ConfigError(
                f"model.patching.scheme={self.config.patching.scheme} needs its entropy model to generate; give its network too"
            )
        self.model = model
        self.entropy = entropy

    def forward_cached(self, tokens: Tensor, new_lengths: Tensor | None, cache: KVCache) -> Tensor:
        """Logits of new positions after what the cache holds; fills and advances the cache.

        Args:
            tokens: (B, t) int64, padded on the right with anything.
            new_lengths: (B,) int64, how many of each sequence's tokens are real; None is all.
            cache: of this batch.

        Returns:
            (B, t, 260) fp32; rows past a sequence's new length mean nothing.

        Raises:
            ConfigError: the cache is full.
        """
        batch, length = tokens.shape
        if new_lengths is None:
            new_lengths = torch.full((batch,), length, dtype=torch.int64, device=tokens.device)
        cache.reserve(length)
        positions = cache.lengths[:, None] + torch.arange(length, device=tokens.device)
        cache.write(positions, tokens)
        if self.entropy is not None and cache.entropy is not None:
            self._ask_entropy_model(tokens, new_lengths, positions, cache, cache.entropy)
        closed = self._close_patches(new_lengths, positions, cache)
        logits = self.model(tokens, closed, cache=cache)
        cache.lengths = cache.lengths + new_lengths
        return logits

    def _ask_entropy_model(
        self,
        tokens: Tensor,
        new_lengths: Tensor,
        positions: Tensor,
        cache: KVCache,
        own: TransformerCache,
    ) -> None:
        assert self.entropy is not None
        first_seen = None
        if self.config.patching.newline_reset != "off":
            known, places, offsets = history(cache)
            first = line_starts(known, places, self.config.patching.newline_reset)
            first_seen = (first.view(len(tokens), -1) - offsets).gather(1, positions)
        own.used = cache.used - tokens.shape[1]
        entropies = self.entropy.entropy_cached(tokens, new_lengths, own, first_seen)
        cache.write_entropies(positions, entropies)

    def _close_patches(
        self, new_lengths: Tensor, positions: Tensor, cache: KVCache
    ) -> ClosedPatches:
        """Ask the rule about the texts so far, as it is asked in training; what a text's later bytes are makes no difference."""
        known, places, offsets = history(cache)
        entropies = cache.entropies[:, : cache.used].flatten()
        patches = boundaries(places, known, entropies, self.config.patching, len(known))
        shape = (len(positions), cache.used)
        opens = (patches.decoder_ids == patches.patch_ids).view(shape)
        numbers = patches.patch_ids.view(shape).long()
        first = patches.starts.long()[numbers] - offsets
        numbers = numbers - numbers[:, :1]
        cache.opens[:, : cache.used] = opens

        count = positions.shape[1]
        is_real = torch.arange(count, device=positions.device) < new_lengths[:, None]
        reads = (numbers - 1 + opens).gather(1, positions)
        rows, columns = (opens.gather(1, positions) & is_real).nonzero(as_tuple=True)
        last = positions[rows, columns]
        reads = torch.where(is_real, reads, -1)
        return ClosedPatches(rows, numbers[rows, last], first[rows, last], last, reads, positions)


def history(cache: KVCache) -> tuple[Tensor, Tensor, Tensor]:
    """(B * used,) ids and positions of all texts laid end to end, and (B, 1) where each begins."""
    tokens = cache.tokens[:, : cache.used]
    device = tokens.device
    places = torch.arange(cache.used, device=device).expand_as(tokens)
    offsets = torch.arange(len(tokens), device=device)[:, None] * cache.used
    return tokens.flatten(), places.flatten(), offsets
