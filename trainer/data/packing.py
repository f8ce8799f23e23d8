"""From stretches of a token stream to packed batches.

Sequence k of a stream is positions `[k*S, (k+1)*S)`; it reads one id more, so that every position has a target and
every id of a stream but the first is a target exactly once in a pass. The last id of a document predicts nothing: what follows belongs
to another document, which attention cannot see.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from ...models.batch import IGNORED, PackedBatch
from .config import RepeatFilterConfig
from .dataset import TokenStream
from .repeats import has_repeats

__all__ = ["Row", "collate", "read_row"]


@dataclass(frozen=True)
class Row:
    """One sample: S + 1 ids, and the places in (0, S] where a document ends. `sample` is its index in the run's order."""

    ids: np.ndarray
    borders: np.ndarray
    sample: int
    source: int


def read_row(stream: TokenStream, sequence: int, sequence_length: int, *, sample: int = 0, source: int = 0) -> Row:
    """Sequence `sequence` of a stream; shorter at the stream's end, where the id past the last is missing too."""
    start = sequence * sequence_length
    count = min(sequence_length + 1, len(stream) - start)
    ids, borders = stream.read(start, count)
    return Row(ids, borders[borders < len(ids)], sample, source)


def collate(rows: Sequence[Row], repeat_filter: RepeatFilterConfig | None, byte_lengths: np.ndarray | None) -> PackedBatch:
    """Rows of equal length into one packed batch.

    Args:
        repeat_filter: rows with long repeats lose their targets; None keeps all.
        byte_lengths: (V,) bytes of each id, or None where ids do not say.
    """
    ids = np.stack([row.ids for row in rows])
    length = ids.shape[1] - 1
    targets = ids[:, 1:].copy()
    for place, row in enumerate(rows):
        targets[place, row.borders - 1] = IGNORED
    if repeat_filter is not None and repeat_filter.enabled:
        targets[has_repeats(ids[:, :-1], repeat_filter)] = IGNORED
    borders = [np.append(row.borders[row.borders < length], length) + place * length for place, row in enumerate(rows)]
    cu_seqlens = np.concatenate([[0], *borders]).astype(np.int32)
    lengths = np.diff(cu_seqlens)
    positions = np.arange(cu_seqlens[-1]) - np.repeat(cu_seqlens[:-1], lengths)
    flat = targets.reshape(-1)
    counted = flat[flat != IGNORED]
    return PackedBatch(
        tokens=torch.from_numpy(np.ascontiguousarray(ids[:, :-1]).reshape(-1)),
        targets=torch.from_numpy(flat),
        position_ids=torch.from_numpy(positions.astype(np.int64)),
        cu_seqlens=torch.from_numpy(cu_seqlens),
        max_seqlen=int(lengths.max()),
        row_length=length,
        sample_ids=tuple(row.sample for row in rows),
        source_ids=tuple(row.source for row in rows),
        target_count=len(counted),
        target_bytes=int(byte_lengths[counted].sum()) if byte_lengths is not None else 0,
    )
