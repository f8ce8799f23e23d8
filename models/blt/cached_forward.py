"""New bytes of texts under generation through a BLT, against what its cache holds.

B texts, t new bytes of each, C patches that close in them. `forward_cached` is the whole of it: encoder, latent steps of
the patches that close, decoder. It runs inside `BLT.forward`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import linear

from ..transformer.cache import KVCache as TransformerCache
from ..transformer.cache import LayerCache, oldest_seen
from .cache import KVCache, PatchMemory
from .layout import make_rotary

if TYPE_CHECKING:
    from .network import BLT

__all__ = ["ClosedPatches", "MemoryLayer", "forward_cached"]


class ClosedPatches(NamedTuple):
    """Patches that end in some new bytes, by sequence and number.

    Attributes:
        rows, numbers: (C,) int64, the sequence of each, and its number in it.
        first, last: (C,) int64, positions of their bytes.
        reads: (B, t) int64, the patch that each new byte reads; -1 for none.
        positions: (B, t) int64, of the new bytes.
    """

    rows: Tensor
    numbers: Tensor
    first: Tensor
    last: Tensor
    reads: Tensor
    positions: Tensor


class MemoryLayer:
    """What one cross-attention of the decoder reads and writes of a cache, for one forward."""

    def __init__(self, memory: PatchMemory, layer: int, closed: ClosedPatches) -> None:
        self.memory, self.layer, self.closed = memory, layer, closed

    def write(self, keys: Tensor, values: Tensor) -> None:
        """Note the patches that close: (C * k, H, hd)."""
        self.memory.write(self.layer, self.closed.rows, self.closed.numbers, keys, values)

    def attend(self, q: Tensor) -> Tensor:
        """(B, t, H, hd) to the same."""
        return self.memory.attend(self.layer, q, self.closed.reads)


def forward_cached(network: BLT, tokens: Tensor, closed: ClosedPatches, cache: KVCache) -> Tensor:
    """(B, t, 260) fp32 logits of new ids (B, t); fills the cache's states of bytes and patches."""
    config, positions = network.config, closed.positions
    windows = None
    if config.ngram is not None:
        windows = cache.windows(positions, max(config.ngram.sizes), config.ngram.missing_id)
    x = network.embedding(tokens, windows)
    oldest = oldest_seen(positions, config.window)

    def contexts(store: TransformerCache) -> list[LayerCache]:
        layers = range(len(store.keys))
        return [LayerCache(store, n, positions, config.window, oldest=oldest) for n in layers]

    rotary = make_rotary(positions, network.encoder.stack, x.dtype)
    x, sources = network.encoder.read_bytes(x, rotary, contexts(cache.encoder))
    cache.write_sources(positions, sources)
    vectors = None
    if len(closed.rows):
        vectors = network.decoder.make_vectors(latent_step(network, closed, cache))

    decoder = network.decoder
    if decoder.input_proj is not None:
        x = decoder.input_proj(x)
    if not decoder.cross:
        if vectors is not None:
            cache.memory.write_vectors(closed.rows, closed.numbers, vectors)
        x = x + cache.memory.read(closed.reads).to(x.dtype)
    readings = [
        (vectors, closed.reads, decoder.k, MemoryLayer(cache.memory, layer, closed))
        for layer in range(len(decoder.cross))
    ]
    rotary = make_rotary(positions, decoder.stack, x.dtype)
    x = decoder.run_blocks(x, rotary, contexts(cache.decoder), readings)
    return linear(x, network.head.weight).float()


def latent_step(network: BLT, closed: ClosedPatches, cache: KVCache) -> Tensor:
    """(C, h_G) latents of the patches that close; sequences in which none does take no part."""
    x = network.encoder.make_vectors(*bytes_of(closed, cache))
    rows, place, counts = torch.unique_consecutive(
        closed.rows, return_inverse=True, return_counts=True
    )
    ends = counts.cumsum(0)
    column = torch.arange(len(x), device=x.device) - (ends - counts)[place]
    longest = int(counts.max())
    padded = x.new_zeros(len(rows), longest, x.shape[-1])
    padded[place, column] = x
    begin = closed.numbers[ends - counts]
    # Padding lands where later patches will stand, which write before they read.
    numbers = begin[:, None] + torch.arange(longest, device=x.device)
    cache.reserve_patches(int(numbers.max()) + 1)
    some = None if len(rows) == len(cache.lengths) else rows
    contexts = [
        LayerCache(cache.latent, layer, numbers, rows=some)
        for layer in range(len(cache.latent.keys))
    ]
    return network.latent.run_blocks(padded, numbers, contexts)[place, column]


def bytes_of(closed: ClosedPatches, cache: KVCache) -> tuple[list[Tensor], Tensor, Tensor]:
    """States of the bytes of patches, laid end to end, with (C,) int32 starts and lengths of the patches among them."""
    lengths = closed.last - closed.first + 1
    ends = lengths.cumsum(0)
    starts = ends - lengths
    patch = torch.repeat_interleave(lengths)
    positions = (
        torch.arange(len(patch), device=lengths.device) - starts[patch] + closed.first[patch]
    )
    sources = [source[closed.rows[patch], positions] for source in cache.sources]
    return sources, starts.int(), lengths.int()
