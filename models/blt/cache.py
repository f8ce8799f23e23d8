"""What a BLT keeps of texts under generation, so that a byte costs one step of the local models and a patch one of the latent.

Everything of bytes lies by position and everything of patches by number, for the whole text: taking bytes back is only a
shorter length. Attention looks no further back than its window all the same.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ..generation import GenerationCache
from ..transformer.cache import KVCache as TransformerCache
from .config import Config

__all__ = ["KVCache", "PatchMemory"]


class PatchMemory:
    """What the decoder reads of the patches: for each of its cross-attentions, or once where it has none.

    Attributes:
        keys, values: for each layer (B, patches, k, H, hd); without cross-attention no keys, and values (B, patches, h_D).
    """

    def __init__(
        self, config: Config, batch_size: int, patches: int, device: torch.device | str, dtype: torch.dtype
    ) -> None:  # fmt: skip
        part, layers = config.decoder, config.cross_layers[1]
        heads = part.cross_heads or part.n_heads
        shape: tuple[int, ...] = (config.patch_vectors, heads, part.d_model // heads)
        if not layers:
            shape = (part.d_model,)

        def empty(count: int) -> list[Tensor]:
            size = (batch_size, patches, *shape)
            return [torch.zeros(size, device=device, dtype=dtype) for _ in range(count)]

        self.keys, self.values = empty(layers), empty(max(1, layers))

    def write(self, layer: int, rows: Tensor, numbers: Tensor, keys: Tensor, values: Tensor) -> None:  # fmt: skip
        """Note patches `numbers` (C,) of sequences `rows` (C,): keys and values (C * k, H, hd)."""
        for store, new in ((self.keys[layer], keys), (self.values[layer], values)):
            store[rows, numbers] = new.view(-1, *store.shape[2:]).to(store.dtype)

    def write_vectors(self, rows: Tensor, numbers: Tensor, vectors: Tensor) -> None:
        """The same where the decoder has no cross-attention: one vector (C, h_D) a patch."""
        self.values[0][rows, numbers] = vectors.to(self.values[0].dtype)

    def attend(self, layer: int, q: Tensor, reads: Tensor) -> Tensor:
        """Attention of bytes q (B, t, H, hd) to the k vectors of the patches that `reads` (B, t) names, 0 for none."""
        keys, values = (self._read(store[layer], reads) for store in (self.keys, self.values))
        wide = torch.promote_types(q.dtype, torch.float32)
        scores = torch.einsum("bthd,btkhd->btkh", q.to(wide), keys.to(wide)) * q.shape[-1] ** -0.5
        found = torch.einsum("btkh,btkhd->bthd", scores.softmax(2), values.to(wide))
        return torch.where(reads[..., None, None] >= 0, found, 0).to(q.dtype)

    def read(self, reads: Tensor) -> Tensor:
        """(B, t, h_D) the one vector of each byte's patch, 0 where it has none."""
        return torch.where(reads[..., None] >= 0, self._read(self.values[0], reads), 0)

    def _read(self, store: Tensor, reads: Tensor) -> Tensor:
        rows = torch.arange(len(reads), device=reads.device)[:, None]
        return store[rows, reads.clamp(min=0)]

    def select(self, rows: Tensor) -> None:
        self.keys = [k[rows] for k in self.keys]
        self.values = [v[rows] for v in self.values]

    def grow(self, patches: int) -> None:
        self.keys = [widened(k, patches) for k in self.keys]
        self.values = [widened(v, patches) for v in self.values]


class KVCache(GenerationCache):
    """State of B texts under generation.

    Attributes:
        tokens: (B, capacity) int64, the ids so far.
        entropies: (B, capacity) fp32 nats, of the prediction made at each position; 0 where the rule asks for none.
        opens: (B, capacity) bool, whether the byte after each position starts a patch.
        sources: each (B, capacity, h_E), byte states that patches are made from when they close.
        entropy, encoder, decoder: keys and values of bytes; `entropy` is None where the rule asks for none.
        latent: keys and values of patches that have closed.
        memory: what the decoder reads of them.
    """

    def __init__(
        self,
        config: Config,
        batch_size: int,
        capacity: int,
        device: torch.device | str = "cpu",
        dtype: torch.dtype = torch.float32,
    ) -> None:
        self.capacity, self.patch_capacity = capacity, max(1, int(capacity / config.patch_size))
        self.lengths = torch.zeros(batch_size, dtype=torch.int64, device=device)
        by_byte = (batch_size, capacity)
        self.tokens = torch.zeros(by_byte, dtype=torch.int64, device=device)
        self.entropies = torch.zeros(by_byte, device=device)
        self.opens = torch.zeros(by_byte, dtype=torch.bool, device=device)
        self.sources = [
            torch.zeros((*by_byte, config.encoder.d_model), device=device, dtype=dtype)
            for _ in range(config.patch_sources)
        ]
        kind = {"device": device, "dtype": dtype}
        self.encoder = TransformerCache(config.stack("encoder"), *by_byte, **kind)  # type: ignore[arg-type]
        self.decoder = TransformerCache(config.stack("decoder"), *by_byte, **kind)  # type: ignore[arg-type]
        by_patch = (batch_size, self.patch_capacity)
        self.latent = TransformerCache(config.stack("latent"), *by_patch, **kind)  # type: ignore[arg-type]
        self.memory = PatchMemory(config, *by_patch, device, dtype)
        self.entropy: TransformerCache | None = None
        if config.patching.needs_entropy:
            assert config.patching.entropy is not None
            self.entropy = TransformerCache(config.patching.entropy, *by_byte, **kind)  # type: ignore[arg-type]

    def write(self, positions: Tensor, tokens: Tensor) -> None:
        """Note new ids (B, t) at `positions` (B, t), and that all of them are within `used`."""
        self._at(self.tokens, positions, tokens)
        self.encoder.used = self.decoder.used = self.used

    def write_entropies(self, positions: Tensor, entropies: Tensor) -> None:
        self._at(self.entropies, positions, entropies)

    def write_sources(self, positions: Tensor, sources: Sequence[Tensor]) -> None:
        for store, new in zip(self.sources, sources, strict=True):
            self._at(store, positions, new)

    def _at(self, store: Tensor, positions: Tensor, new: Tensor) -> None:
        rows = torch.arange(len(positions), device=positions.device)[:, None]
        store[rows, positions] = new.to(store.dtype)

    def windows(self, positions: Tensor, longest: int, missing: int) -> Tensor:
        """(longest, B, t) ids at and before each position, as `kernels.packed_windows` gives them."""
        lags = torch.arange(longest, device=positions.device)[:, None, None]
        places = positions - lags
        rows = torch.arange(len(positions), device=positions.device)[:, None]
        return torch.where(places >= 0, self.tokens[rows, places.clamp(min=0)], missing)

    def reserve_patches(self, count: int) -> None:
        """Have room for `count` patches in each sequence, and look no further than them."""
        if count > self.patch_capacity:
            self.patch_capacity = max(count, min(self.capacity, 2 * self.patch_capacity))
            self.memory.grow(self.patch_capacity)
            for stores in (self.latent.keys, self.latent.values):
                stores[:] = [widened(store, self.patch_capacity) for store in stores]
        self.latent.used = count

    def select(self, rows: Tensor) -> None:
        for name in ("lengths", "tokens", "entropies", "opens"):
            setattr(self, name, getattr(self, name)[rows])
        self.sources = [source[rows] for source in self.sources]
        for part in (self.encoder, self.decoder, self.latent, self.memory, self.entropy):
            if part is not None:
                part.select(rows)

    def rewind(self, slot: int, ids: Sequence[int]) -> None:
        self.lengths[slot] = len(ids)
        if self.entropy is not None:
            self.entropy.rewind(slot, ids)

    def patch_starts(self, slot: int) -> list[int]:
        opens = self.opens[slot, : int(self.lengths[slot])].nonzero()[:, 0]
        return [0, *(opens + 1).tolist()]


def widened(store: Tensor, count: int) -> Tensor:
    """A copy of (B, n, ...) with room for `count` in the second dimension."""
    wide = store.new_zeros((store.shape[0], count, *store.shape[2:]))
    wide[:, : store.shape[1]] = store
    return wide
