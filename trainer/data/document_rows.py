"""Rows of whole documents: where each begins, worked out when a source is opened.

A document of n ids takes n - 1 positions, its last id is only a target. Documents are taken in their order; one that does
not fit into what is left of a row opens the next (next-fit). One that is longer than a row is cut, as rows of a stream
are: the next piece begins with the id that was the last target. An image is never cut: the cut moves to before it.

Dimensions: P pieces, R rows of S positions.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ...models.errors import DataError
from ...models.modalities import MODALITIES

__all__ = ["DocumentRows", "Pieces", "ShardArrays", "ranges"]

IMAGE = MODALITIES.index("image")


@dataclass(frozen=True)
class ShardArrays:
    """What is stored of some documents.

    Args:
        ids: (N,) of all of them, one after another.
        ends: (D,) int64, where each ends.
        spans: (K, 4) int64, start, length, modality and image number of what is no text; ascending.
        latents: (images, C, H, W), or None where images have none.
    """

    ids: NDArray[Any]
    ends: NDArray[np.int64]
    spans: NDArray[np.int64] = field(default_factory=lambda: np.empty((0, 4), np.int64))
    latents: NDArray[Any] | None = None


@dataclass(frozen=True)
class Pieces:
    """Documents, or pieces of one that is longer than a row; arrays of (P,), 29 bytes a piece.

    Args:
        shards, starts: where the first id stands.
        positions: inputs; one id more is read.
        numbers: of the document among those of the rows.
        is_whole: whether it is all of its document.
        first_spans, stop_spans: spans of the shard that reach into the piece.
    """

    shards: NDArray[np.int32]
    starts: NDArray[np.int64]
    positions: NDArray[np.int32]
    numbers: NDArray[np.int32]
    is_whole: NDArray[np.bool_]
    first_spans: NDArray[np.int32]
    stop_spans: NDArray[np.int32]

    def __len__(self) -> int:
        return len(self.starts)


class DocumentRows:
    """Rows of some documents of a source.

    Args:
        shards: what is stored.
        documents: for each shard (n,) numbers of the documents that are wanted, ascending.
        length: S, positions of a row.
        name: of the source, for messages.

    Attributes:
        sequences: R.
        tokens: ids of the documents.

    Raises:
        DataError: an image that no row has room for.
    """

    def __init__(
        self,
        shards: Sequence[ShardArrays],
        documents: Sequence[NDArray[np.int64]],
        length: int,
        name: str,
    ) -> None:
        self.shards, self.length = list(shards), length
        parts = [
            _pieces_of(number, shard, wanted, length, name)
            for number, (shard, wanted) in enumerate(zip(shards, documents, strict=True))
        ]
        self.tokens = sum(ids for _, ids in parts)
        self.pieces = _join([pieces for pieces, _ in parts])
        self._first_piece = _next_fit(self.pieces.positions, length)
        self.sequences = len(self._first_piece) - 1

    def bounds(self, row: int) -> tuple[int, int]:
        """First piece of a row, and the one after its last."""
        return int(self._first_piece[row]), int(self._first_piece[row + 1])

    def used(self, row: int) -> int:
        """Positions of a row that are not padding."""
        first, stop = self.bounds(row)
        return int(self.pieces.positions[first:stop].sum())


def _pieces_of(
    number: int, shard: ShardArrays, wanted: NDArray[np.int64], length: int, name: str
) -> tuple[Pieces, int]:
    """Pieces of the documents of one shard, numbered from 0, and the ids of those documents."""
    stops = np.asarray(shard.ends)[wanted]
    starts = np.where(wanted > 0, np.asarray(shard.ends)[wanted - 1], 0)
    ids = int((stops - starts).sum())
    numbers = np.arange(len(wanted), dtype=np.int64)
    positions = stops - starts - 1
    _check_images(shard, starts, stops, length, name)
    # Columns: start, positions, number of the document, whether it is whole.
    table = np.stack((starts, positions, numbers, positions <= length), axis=1)
    if (positions > length).any():
        cut = [
            (start, size, document, 0)
            for document in np.flatnonzero(positions > length).tolist()
            for start, size in _cut(shard, int(starts[document]), int(positions[document]), length)
        ]
        table = np.concatenate((table[positions <= length], np.array(cut, np.int64)))
        table = table[np.argsort(table[:, 0], kind="stable")]
    # A document of one id has no target.
    starts, positions, numbers, is_whole = table[table[:, 1] > 0].T
    begins, ends = shard.spans[:, 0], shard.spans[:, 0] + shard.spans[:, 1]
    # A source may have hundreds of millions of documents: nothing here is wider than it has to be.
    pieces = Pieces(
        np.full(len(starts), number, np.int32),
        starts,
        positions.astype(np.int32),
        numbers.astype(np.int32),
        is_whole.astype(bool),
        np.searchsorted(ends, starts, "right").astype(np.int32),
        np.searchsorted(begins, starts + positions + 1, "left").astype(np.int32),
    )
    return pieces, ids


def _check_images(
    shard: ShardArrays,
    starts: NDArray[np.int64],
    stops: NDArray[np.int64],
    length: int,
    name: str,
) -> None:
    """See that every image has room in a row, and lies in one document."""
    images = shard.spans[shard.spans[:, 2] == IMAGE]
    if not len(images) or not len(starts):
        return
    first, last = images[:, 0] - 1, images[:, 0] + images[:, 1]
    document = np.searchsorted(stops, first, "right").clip(max=len(stops) - 1)
    is_ours = (starts[document] <= first) & (first < stops[document])
    if (last[is_ours] >= stops[document[is_ours]]).any():
        raise DataError(
            f"source {name!r}: an image reaches over the end of its document; the dataset is damaged, prepare it again"
        )
    largest = int(images[is_ours, 1].max(initial=0))
    if largest + 2 > length:
        raise DataError(
            f"source {name!r}: an image of {largest} positions and the two that open and close it do not fit into a row of "
            f"data.sequence_length={length}; raise it to {largest + 2} or more, or make images smaller"
        )


def _cut(shard: ShardArrays, start: int, positions: int, length: int) -> list[tuple[int, int]]:
    """(start, positions) of the pieces of a long document."""
    images = shard.spans[shard.spans[:, 2] == IMAGE]
    found, stop = [], start + positions
    while stop - start > length:
        cut = start + length
        image = int(np.searchsorted(images[:, 0], cut, "right")) - 1
        # A cut may stand right before what opens an image, or right after what closes it.
        if image >= 0 and images[image, 0] <= cut <= images[image, 0] + images[image, 1]:
            cut = int(images[image, 0]) - 1
        found.append((start, cut - start))
        start = cut
    return [*found, (start, stop - start)]


def _join(parts: Sequence[Pieces]) -> Pieces:
    """Pieces of all shards, their documents numbered on."""
    if not parts:
        few, none = np.empty(0, np.int32), np.empty(0, bool)
        return Pieces(few, few.astype(np.int64), few, few, none, few, few)
    before, numbers = 0, []
    for part in parts:
        numbers.append(part.numbers + np.int32(before))
        before += int(part.numbers.max(initial=-1)) + 1
    return Pieces(
        *(
            np.concatenate(
                numbers if name == "numbers" else [getattr(part, name) for part in parts]
            )
            for name in Pieces.__dataclass_fields__
        )
    )


def _next_fit(positions: NDArray[np.int32], length: int) -> NDArray[np.int64]:
    """(R + 1,) first piece of each row, and the number of pieces."""
    before = np.concatenate(([0], np.cumsum(positions)))
    # What would follow a row that began with each piece.
    following = np.searchsorted(before, before[:-1] + length, "right") - 1
    chain, piece = [0], 0
    while piece < len(following):
        piece = int(following[piece])
        chain.append(piece)
    return np.array(chain, np.int64)


def ranges(first: NDArray[np.int64], stop: NDArray[np.int64]) -> NDArray[np.int64]:
    """All integers of several ranges, range after range."""
    lengths = stop - first
    ends = np.cumsum(lengths)
    total = int(ends[-1]) if len(ends) else 0
    return np.arange(total) + np.repeat(first - (ends - lengths), lengths)
