"""The one batch that every model eats: a flat packed sequence of positions with document boundaries.

Dimensions: T positions of all rows laid end to end, D documents, R rows of S positions (T = R * S).
Nothing is padded. Documents never cross a row, and attention, scans and convolutions all stop at
`cu_seqlens`. Side tensors carry what is not a token (image latents, noise levels, patch starts).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

__all__ = ["IGNORED", "NEXT_STARTS_PATCH", "PackedBatch"]

IGNORED = -100
"""Target id of a position that carries no loss."""
NEXT_STARTS_PATCH = "next_starts_patch"
"""Side tensor of stored patches: (T,) bool, whether the byte after each position starts a patch. The first position of
a document always starts one; asked about the byte *after*, the last position of a row has an answer too."""


@dataclass(frozen=True)
class PackedBatch:
    """One micro-batch of one rank.

    Args:
        tokens: (T,) int64, ids.
        targets: (T,) int64, the id each position predicts, `IGNORED` where it predicts nothing.
        position_ids: (T,) int64, position inside its own document piece, starting at 0.
        cu_seqlens: (D + 1,) int32, starts at 0, ends at T, strictly increasing, includes every row border.
        max_seqlen: longest document piece, a host integer.
        row_length: S; T is a multiple of it.
        sample_ids: (R,) host integers: the global index of each row in the order of the run.
        source_ids: (R,) host integers: the index of the data source of each row.
        target_count: number of targets that are not `IGNORED`, a host integer, so that no device sync is needed.
        target_bytes: number of raw bytes the counted targets stand for (0 where the vocabulary does not say).
        modality: (T,) uint8, 0 for text, or None where all is text.
        side: tensors keyed by name; their first dimension is whatever their model documents.
    """

    tokens: Tensor
    targets: Tensor
    position_ids: Tensor
    cu_seqlens: Tensor
    max_seqlen: int
    row_length: int
    sample_ids: tuple[int, ...]
    source_ids: tuple[int, ...]
    target_count: int
    target_bytes: int = 0
    modality: Tensor | None = None
    side: dict[str, Tensor] = field(default_factory=dict)

    @property
    def rows(self) -> int:
        return len(self.sample_ids)

    def map_tensors(self, change: Callable[[Tensor], Tensor]) -> PackedBatch:
        """The same batch with `change` applied to every tensor."""
        values: dict[str, Any] = {}
        for item in dataclasses.fields(self):
            value = getattr(self, item.name)
            values[item.name] = change(value) if isinstance(value, Tensor) else value
        values["side"] = {name: change(value) for name, value in self.side.items()}
        return PackedBatch(**values)

    def to(self, device: torch.device | str) -> PackedBatch:
        """Copy to `device`; asynchronous when the source is pinned."""
        return self.map_tensors(lambda tensor: tensor.to(device, non_blocking=True))

    def pin_memory(self) -> PackedBatch:
        return self.map_tensors(lambda tensor: tensor.pin_memory())
