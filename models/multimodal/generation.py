"""Generation of models of text, images and speech: ids and images read one after another into a cache.

B sequences of t new positions, d model width, V vocabulary, images of n positions. An image is denoised from a cache that
ends with its BOI and is left as it was; the finished latents are then read once, at noise level 0, and stay.
Sources: Transfusion, arXiv 2408.11039, section 3.3; LMFusion, arXiv 2412.15188, section 3.
"""

from __future__ import annotations

from abc import abstractmethod
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import linear

from ...kernels import Routing, route_by_modality, route_one_modality
from ..batch import PackedBatch
from ..errors import ConfigError
from ..generation import GenerationCache
from .network import Backbone, MultimodalModel

__all__ = ["GenerativeBackbone", "GenerativeModel", "InterleavedCache"]


class InterleavedCache(GenerationCache):
    """State of B sequences whose positions may be no ids.

    Attributes:
        pending: slot -> ids that the next forward pass reads first, since its state was taken back; empty in families whose
            states can simply be cut off.
    """

    pending: dict[int, tuple[int, ...]]

    @abstractmethod
    def note(self, length: int, counts: Tensor, modality: Tensor | None = None) -> None:
        """Count new positions.

        Args:
            length: t, of each sequence.
            counts: (B,) int64, how many of them are real.
            modality: (B, t) uint8; None where they are no ids.
        """

    @abstractmethod
    def snapshot(self) -> Any:
        """The state as it is now, without a copy."""

    @abstractmethod
    def restore(self, snapshot: Any) -> None:
        """Go back to a snapshot of this cache, any number of times."""


class GenerativeBackbone(Backbone):
    """A backbone that also goes on after what a cache holds."""

    @abstractmethod
    def cached_context(
        self, cache: Any, length: int, new_lengths: Tensor | None, *, is_image: bool = False
    ) -> Any:
        """The context of `length` new positions of each of a cache's sequences, laid end to end.

        Args:
            new_lengths: (B,) int64, how many of each sequence's are real; None is all.
            is_image: they are one continuous image each.
        """


class GenerativeModel(MultimodalModel):
    """A multimodal model that generates. Everything runs through `forward`, so that hooks on the root see it."""

    backbone: GenerativeBackbone

    def forward(self, batch: PackedBatch | Tensor, output: Any = "losses", **cached: Any) -> Any:
        """As `MultimodalModel`; or what the methods below say."""
        if isinstance(batch, PackedBatch):
            return super().forward(batch, output)
        if not batch.is_floating_point():
            return self._forward_cached(batch, **cached)
        if batch.dim() == 3:
            return self._read_rows(batch, **cached)
        return self._read_image(batch, **cached)

    def forward_cached(
        self,
        tokens: Tensor,
        new_lengths: Tensor | None,
        cache: InterleavedCache,
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

    def read_rows(self, rows: Tensor, cache: InterleavedCache, modality: int) -> Tensor:
        """What the backbone makes of new positions that are no ids; advances the cache.

        Args:
            rows: (B, t, d), as a stem gives them: one image each.
            modality: of all of them.

        Returns:
            (B, t, d) after the final norm. To try one image's patches again and again, take `cache.snapshot()` before.

        Raises:
            ConfigError: the cache is full.
        """
        return self(rows, cache=cache, modality=modality)

    def denoise(self, noised: Tensor, t: Tensor, cache: InterleavedCache) -> Tensor:
        """What the model predicts of one image of each sequence; the cache is as before.

        Args:
            noised: (B, C, H, W) at noise levels t (B,) int64.

        Returns:
            (B, C, H, W) fp32, noise or v: `diffusion.prediction`.

        Raises:
            ConfigError: the model has no continuous images, or the cache is full.
        """
        before = cache.snapshot()
        try:
            return self(noised, t=t, cache=cache)
        finally:
            cache.restore(before)

    def read_image(self, latents: Tensor, cache: InterleavedCache) -> None:
        """Read one finished image of each sequence (B, C, H, W) into the cache, at noise level 0.

        Raises:
            ConfigError: as `denoise`.
        """
        self(latents, t=torch.zeros(len(latents), dtype=torch.int64), cache=cache)

    def _forward_cached(
        self,
        tokens: Tensor,
        new_lengths: Tensor | None,
        cache: InterleavedCache,
        modality: Tensor | None = None,
    ) -> Tensor:
        self._read_again(cache)
        batch, length = tokens.shape
        cache.reserve(length)
        if modality is None:
            modality = torch.zeros(batch, length, dtype=torch.uint8)
        x = self._read(tokens, new_lengths, cache, modality)
        counts = torch.full_like(cache.lengths, length) if new_lengths is None else new_lengths
        cache.note(length, counts, modality.to(tokens.device))
        return linear(x, self.head_weight).float().unflatten(0, (batch, length))

    def _read_rows(self, rows: Tensor, cache: InterleavedCache, modality: int) -> Tensor:
        self._read_again(cache)
        batch, length, _ = rows.shape
        cache.reserve(length)
        total, kinds = batch * length, len(self.config.modalities)
        routing = route_one_modality(total, kinds, modality, rows.device)
        context = self.backbone.cached_context(cache, length, None, is_image=True)
        x = self.backbone(rows.flatten(0, 1), routing, context)
        cache.note(length, torch.full_like(cache.lengths, length))
        return x.unflatten(0, (batch, length))

    def _read_image(self, images: Tensor, t: Tensor, cache: InterleavedCache) -> Tensor:
        if self.stem is None:
            raise ConfigError("this model has no continuous images; set model.image")
        t = t.to(images.device)
        entered, kept = self.stem.down(images, t)
        rows = entered.unflatten(0, (len(images), -1))
        place = self.config.modalities.index("image")
        x = self._read_rows(rows, cache, place).flatten(0, 1)
        return self.stem.up(x, entered.to(x.dtype), kept, t).float()

    def _read(
        self,
        tokens: Tensor,
        new_lengths: Tensor | None,
        cache: InterleavedCache,
        modality: Tensor,
    ) -> Tensor:
        """(B t, d) states of new ids, in their order."""
        routing = route_known(modality.flatten(), len(self.config.modalities), tokens.device)
        x = self.embedding(routing.permute(tokens.flatten()))
        context = self.backbone.cached_context(cache, tokens.shape[1], new_lengths)
        return routing.restore(self.backbone(x, routing, context))

    def _read_again(self, cache: InterleavedCache) -> None:
        """Make the states of sequences that were taken back, where the family has to."""


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
