"""The state of texts under generation: a convolution window and a recurrent state of each block, however long the text.

A forward pass puts new tensors in the place of the old ones and writes into none, so a snapshot is free and stays what it is.
States cannot be taken back: after `rewind` the ids that stay are read again by the next forward pass.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ..errors import ConfigError
from ..multimodal.generation import InterleavedCache
from .config import Config

__all__ = ["NO_ID", "KVCache", "Snapshot"]

NO_ID = 255
"""Stands in `KVCache.modality` for a position that no id can make again, such as a patch of continuous latents."""


@dataclass(frozen=True)
class Snapshot:
    """What `KVCache.restore` goes back to."""

    windows: tuple[Tensor, ...]
    states: tuple[Tensor, ...]
    lengths: Tensor
    modality: Tensor
    used: int
    pending: dict[int, tuple[int, ...]]


class KVCache(InterleavedCache):
    """State of B sequences under generation, with E inner channels, N states and W taps.

    Attributes:
        windows: for each block (B, W - 1, E), the newest inputs of the convolution, oldest first.
        states: for each block (B, E, N). Both fp32, or fp64 where `dtype` is.
        lengths: (B,) int64, positions read.
        modality: (B, capacity) uint8, of each position read, or `NO_ID`.
        pending: slot -> ids that the next forward pass reads first, since its states were taken back.
    """

    def __init__(
        self,
        config: Config,
        batch_size: int,
        capacity: int,
        device: torch.device | str = "cpu",
        dtype: torch.dtype = torch.float32,
    ) -> None:
        self.config, self.capacity, self.used = config, capacity, 0
        dtype = torch.promote_types(dtype, torch.float32)
        window = (batch_size, config.d_conv - 1, config.d_inner)
        state = (batch_size, config.d_inner, config.d_state)
        blocks = range(config.n_blocks)
        self.windows = [torch.zeros(window, device=device, dtype=dtype) for _ in blocks]
        self.states = [torch.zeros(state, device=device, dtype=dtype) for _ in blocks]
        self.lengths = torch.zeros(batch_size, dtype=torch.int64, device=device)
        self.modality = torch.zeros(batch_size, capacity, dtype=torch.uint8, device=device)
        self.pending: dict[int, tuple[int, ...]] = {}

    def note(self, length: int, counts: Tensor, modality: Tensor | None = None) -> None:
        if modality is None:
            modality = self.modality.new_full((len(counts), length), NO_ID)
        places = self.lengths[:, None] + torch.arange(length, device=modality.device)
        # What is past a sequence's end is written over when that is reached.
        inside = places.clamp(max=self.capacity - 1)
        self.modality = self.modality.scatter(1, inside, modality)
        self.lengths = self.lengths + counts

    def select(self, rows: Tensor) -> None:
        self.windows = [window[rows] for window in self.windows]
        self.states = [state[rows] for state in self.states]
        self.lengths, self.modality = self.lengths[rows], self.modality[rows]
        kept = enumerate(rows.tolist())
        self.pending = {new: self.pending[old] for new, old in kept if old in self.pending}

    def rewind(self, slot: int, ids: Sequence[int]) -> None:
        """See `GenerationCache.rewind`; the next forward pass reads the ids again, which takes as long as a prompt.

        Raises:
            ConfigError: there is a position among them that no id can make again.
        """
        if (self.modality[slot, : len(ids)] == NO_ID).any():
            raise ConfigError(
                "a text cannot go back to behind an image of latents; take a snapshot() there and restore() it"
            )
        lengths = self.lengths.clone()
        lengths[slot] = len(ids)
        self.lengths = lengths
        self.pending = {**self.pending, slot: tuple(ids)}

    def snapshot(self) -> Snapshot:
        """The state as it is now, without a copy."""
        lengths, modality = self.lengths, self.modality
        states = (tuple(self.windows), tuple(self.states))
        return Snapshot(*states, lengths, modality, self.used, dict(self.pending))

    def restore(self, snapshot: Snapshot) -> None:
        """Go back to a snapshot of this cache, any number of times."""
        self.windows, self.states = list(snapshot.windows), list(snapshot.states)
        self.lengths, self.modality = snapshot.lengths, snapshot.modality
        self.used, self.pending = snapshot.used, dict(snapshot.pending)

    def fresh(self, batch_size: int) -> KVCache:
        """An empty cache of other sequences beside this one's."""
        state = self.states[0]
        return KVCache(self.config, batch_size, self.capacity, state.device, state.dtype)

    def adopt(self, slots: Tensor, other: KVCache) -> None:
        """Take the states of another cache's sequences for those at `slots` (B',) int64."""
        for mine, theirs in ((self.windows, other.windows), (self.states, other.states)):
            mine[:] = [a.index_copy(0, slots, b) for a, b in zip(mine, theirs, strict=True)]
