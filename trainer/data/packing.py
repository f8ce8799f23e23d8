"""Rows of ids to the packed batch every model eats. All NumPy, no Python per token.

Row k of a source is its ids [k*S, k*S + S], one more than S, so that each of the S positions has
its target; rows overlap by that one id. Documents are cut at row borders. The target of a
document's last id would be the first id of an unrelated document, which it cannot see coming: it is ignored, in
every vocabulary. (OLMo-core trains on it even where attention is kept inside documents.)
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from ...models.batch import IGNORED, NEXT_STARTS_PATCH, PackedBatch
from .config import RepeatFilterConfig
from .repeats import find_repetitive_rows

__all__ = ["RowAssembler", "Rows", "position_ids"]


@dataclass(frozen=True)
class Rows:
    """Ids of some rows, before packing.

    Args:
        ids: (R, S + 1) in storage type.
        borders: (row, position) at which a document starts although no EOS stands before it.
        next_starts: (R, S), whether the position after each starts a patch, where that is stored.
    """

    ids: NDArray[Any]
    borders: Sequence[tuple[int, int]]
    sample_ids: tuple[int, ...]
    source_ids: tuple[int, ...]
    next_starts: NDArray[np.bool_] | None = None


class RowAssembler:
    """Packs rows.

    Args:
        eos_id: closes documents.
        byte_lengths: (V,) raw bytes an id stands for, or None where the vocabulary does not say.
        repeats: rows with such runs keep their place but carry no loss; None is off.
    """

    def __init__(
        self,
        eos_id: int,
        byte_lengths: NDArray[np.int32] | None,
        repeats: RepeatFilterConfig | None,
    ) -> None:
        self._eos_id = eos_id
        self._byte_lengths = byte_lengths
        self._first_byte_id = _first_byte_id(byte_lengths)
        self._repeats = repeats

    def pack(self, rows: Rows, *, ignore_all: bool = False) -> PackedBatch:
        """One batch of T = R * S positions.

        Args:
            ignore_all: no position carries a loss (a stand-in for ranks that have nothing to do).
        """
        count, length = rows.ids.shape[0], rows.ids.shape[1] - 1
        ends = self._document_ends(rows)
        starts = _document_starts(ends, count, length)
        lengths = np.diff(starts, append=count * length)
        silent = self._silent_rows(rows, ignore_all)
        counted_ends = ends[~silent[ends // length]]
        targets = np.empty((count, length), np.int64)
        targets[:] = rows.ids[:, 1:]
        target_bytes = self._count_bytes(rows.ids[~silent, 1:] if silent.any() else rows.ids[:, 1:])
        target_bytes -= self._count_bytes(targets.reshape(-1)[counted_ends])
        targets.reshape(-1)[ends] = IGNORED
        targets[silent] = IGNORED
        tokens = np.empty((count, length), np.int64)
        tokens[:] = rows.ids[:, :length]
        side = {}
        if rows.next_starts is not None:
            side[NEXT_STARTS_PATCH] = torch.from_numpy(rows.next_starts.reshape(-1))
        return PackedBatch(
            tokens=torch.from_numpy(tokens.reshape(-1)),
            targets=torch.from_numpy(targets.reshape(-1)),
            position_ids=torch.from_numpy(position_ids(starts, lengths)),
            cu_seqlens=torch.from_numpy(np.append(starts, count * length).astype(np.int32)),
            max_seqlen=int(lengths.max()),
            row_length=length,
            sample_ids=rows.sample_ids,
            source_ids=rows.source_ids,
            target_count=length * int(np.count_nonzero(~silent)) - len(counted_ends),
            target_bytes=target_bytes,
            side=side,
        )

    def _document_ends(self, rows: Rows) -> NDArray[np.int64]:
        """(E,) flat positions, of the T, that are the last of their document; sorted."""
        length = rows.ids.shape[1] - 1
        is_last = rows.ids[:, :length] == self._eos_id
        for row, position in rows.borders:
            is_last[row, position - 1] = True
        return np.flatnonzero(is_last)

    def _silent_rows(self, rows: Rows, ignore_all: bool) -> NDArray[np.bool_]:
        if ignore_all or self._repeats is None:
            return np.full(len(rows.ids), ignore_all)
        return find_repetitive_rows(rows.ids[:, :-1], self._repeats)

    def _count_bytes(self, ids: NDArray[Any]) -> int:
        """Raw bytes that some ids stand for."""
        if self._byte_lengths is None:
            return 0
        if self._first_byte_id is not None:
            return int(np.count_nonzero(ids >= self._first_byte_id))
        return int(self._byte_lengths[ids].sum())


def _first_byte_id(byte_lengths: NDArray[np.int32] | None) -> int | None:
    """The id from which on each is one byte and before which none is any; comparing beats looking up."""
    if byte_lengths is None:
        return None
    first = int(np.argmax(byte_lengths > 0))
    return first if (byte_lengths[first:] == 1).all() else None


def _document_starts(ends: NDArray[np.int64], count: int, length: int) -> NDArray[np.int64]:
    """(D,) flat positions at which a document, or the part of one in a row, starts; sorted."""
    after = ends + 1
    row_starts = np.arange(0, count * length, length)
    return np.sort(np.concatenate((row_starts, after[after % length != 0])))


def position_ids(starts: NDArray[np.int64], lengths: NDArray[np.int64]) -> NDArray[np.int64]:
    """(T,) position inside the document: steps of one that jump back at every start."""
    steps = np.ones(int(lengths.sum()), np.int64)
    steps[starts[1:]] -= lengths[:-1]
    steps[0] = 0
    return np.cumsum(steps, out=steps)
