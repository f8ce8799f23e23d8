"""Pieces of documents laid end to end, and the order of caption and image in them.

Dimensions: N ids of all pieces, P pieces, K spans of what is no text.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ...models.modalities import MODALITIES
from .document_rows import DocumentRows, ranges
from .interleaved.vocabulary import InterleavedVocabulary

__all__ = [
    "FlatPieces",
    "RowOf",
    "drop_captions",
    "find_caption_images",
    "first_of_row",
    "gather",
    "swap_halves",
    "uniform",
]

IMAGE = MODALITIES.index("image")


@dataclass(frozen=True)
class RowOf:
    """A row to pack.

    Args:
        sample: its global index in the order of the run.
        source: index of its source.
        sequence: the row's number in `rows`; None is a row of padding alone.
    """

    sample: int
    source: int
    rows: DocumentRows
    sequence: int | None


@dataclass(frozen=True)
class FlatPieces:
    """Ids of all pieces laid end to end, and the spans in them.

    Args:
        ids: (N,) int64.
        lengths: (P,) ids of each piece.
        rows: (P,) row of each.
        numbers, is_whole: (P,) of `Pieces`.
        begins, sizes, kinds, images: (K,) place in `ids`, length, modality as prepared data number it, image number.
        pieces: (K,) piece of each span.
        shards: (K,) of the piece's rows, which holds the span and its latents.
    """

    ids: NDArray[np.int64]
    lengths: NDArray[np.int64]
    rows: NDArray[np.int64]
    numbers: NDArray[np.int64]
    is_whole: NDArray[np.bool_]
    begins: NDArray[np.int64]
    sizes: NDArray[np.int64]
    kinds: NDArray[np.int64]
    images: NDArray[np.int64]
    pieces: NDArray[np.int64]
    shards: NDArray[np.int64]

    @property
    def firsts(self) -> NDArray[np.int64]:
        """(P,) place of each piece's first id."""
        return np.cumsum(self.lengths) - self.lengths


def gather(rows: Sequence[RowOf]) -> FlatPieces:
    """Ids and spans of all pieces of some rows."""
    ids: list[NDArray[Any]] = [np.empty(0, np.int64)]
    of_piece: list[list[NDArray[Any]]] = [[], [], [], []]
    of_span: list[NDArray[np.int64]] = [np.empty((0, 6), np.int64)]
    held = pieces_before = 0
    for number, row in enumerate(rows):
        if row.sequence is None:
            continue
        first, stop = row.rows.bounds(row.sequence)
        pieces = row.rows.pieces
        starts = pieces.starts[first:stop]
        lengths = pieces.positions[first:stop].astype(np.int64) + 1
        shards = pieces.shards[first:stop]
        for shard, start, end in _runs(shards, starts, starts + lengths):
            ids.append(row.rows.shards[shard].ids[start:end])
        firsts = held + np.cumsum(lengths) - lengths
        spans_from = pieces.first_spans[first:stop].astype(np.int64)
        spans_to = pieces.stop_spans[first:stop].astype(np.int64)
        for shard in np.unique(shards[spans_to > spans_from]).tolist():
            mine = np.flatnonzero(shards == shard)
            which = ranges(spans_from[mine], spans_to[mine])
            owner = np.repeat(mine, spans_to[mine] - spans_from[mine])
            spans = row.rows.shards[shard].spans[which]
            begins = np.maximum(spans[:, 0], starts[owner])
            ends = np.minimum(spans[:, 0] + spans[:, 1], starts[owner] + lengths[owner])
            columns = (
                begins - starts[owner] + firsts[owner],
                ends - begins,
                spans[:, 2],
                spans[:, 3],
                owner + pieces_before,
                np.full(len(which), shard),
            )
            of_span.append(np.stack(columns, axis=1))
        values: tuple[NDArray[Any], ...] = (
            lengths,
            np.full(len(starts), number),
            pieces.numbers[first:stop],
            pieces.is_whole[first:stop],
        )
        for held_values, more in zip(of_piece, values, strict=True):
            held_values.append(more)
        held += int(lengths.sum())
        pieces_before += len(starts)
    nothing = np.empty(0, np.int64)
    joined = [np.concatenate([nothing, *values]) for values in of_piece]
    lengths, numbers_of_row, numbers, is_whole = joined
    spans = np.concatenate(of_span)
    return FlatPieces(
        np.concatenate(ids).astype(np.int64),
        lengths.astype(np.int64),
        numbers_of_row.astype(np.int64),
        numbers.astype(np.int64),
        is_whole.astype(bool),
        *spans.T,
    )


def _runs(
    shards: NDArray[np.int32], starts: NDArray[np.int64], stops: NDArray[np.int64]
) -> list[tuple[int, int, int]]:
    """(shard, start, stop) of pieces, those that follow each other without a gap as one."""
    goes_on = (shards[1:] == shards[:-1]) & (starts[1:] == stops[:-1])
    firsts = np.flatnonzero(np.concatenate(([True], ~goes_on)))
    lasts = np.append(firsts[1:] - 1, len(starts) - 1)
    columns = shards[firsts], starts[firsts], stops[lasts]
    return list(zip(*(column.tolist() for column in columns), strict=True))


@dataclass(frozen=True)
class CaptionImages:
    """Documents of one image and one text: their content is [starts, middles) and [middles, stops), in `ids`."""

    pieces: NDArray[np.int64]
    starts: NDArray[np.int64]
    middles: NDArray[np.int64]
    stops: NDArray[np.int64]
    is_image_first: NDArray[np.bool_]
    spans: NDArray[np.int64]

    def take(self, which: NDArray[np.bool_]) -> CaptionImages:
        return CaptionImages(
            *(getattr(self, name)[which] for name in CaptionImages.__dataclass_fields__)
        )


def find_caption_images(flat: FlatPieces, vocabulary: InterleavedVocabulary) -> CaptionImages:
    """Whole documents that are one image with text on exactly one side of it."""
    count = len(flat.lengths)
    spans = np.bincount(flat.pieces, minlength=count)
    candidates = np.flatnonzero((flat.kinds == IMAGE) & (spans == 1)[flat.pieces])
    candidates = candidates[flat.is_whole[flat.pieces[candidates]]]
    pieces = flat.pieces[candidates]
    starts = flat.firsts[pieces] + (vocabulary.bos_id is not None)
    # The last id is EOS.
    stops = (flat.firsts + flat.lengths)[pieces] - 1
    opens = flat.begins[candidates] - 1
    after = flat.begins[candidates] + flat.sizes[candidates] + 1
    has_before, has_after = opens > starts, stops > after
    found = CaptionImages(
        pieces, starts, np.where(has_after, after, opens), stops, has_after, candidates
    )
    return found.take(has_before != has_after)


def swap_halves(flat: FlatPieces, found: CaptionImages) -> FlatPieces:
    """Exchange the two halves of some documents."""
    order = np.arange(len(flat.ids))
    sizes, first_half = found.stops - found.starts, found.middles - found.starts
    where = ranges(found.starts, found.stops)
    base, size, shift = (np.repeat(v, sizes) for v in (found.starts, sizes, first_half))
    order[where] = base + (where - base + shift) % size
    begins = flat.begins.copy()
    second_half = sizes - first_half
    begins[found.spans] += np.where(found.is_image_first, second_half, -first_half)
    return replace(flat, ids=flat.ids[order], begins=begins)


def drop_captions(
    flat: FlatPieces, found: CaptionImages, captions: NDArray[np.int64]
) -> FlatPieces:
    """Take the first so many ids of content out of some documents."""
    keeps = np.ones(len(flat.ids), bool)
    keeps[ranges(found.starts, found.starts + captions)] = False
    lengths = flat.lengths.copy()
    lengths[found.pieces] -= captions
    moved = np.cumsum(keeps) - 1
    return replace(flat, ids=flat.ids[keeps], lengths=lengths, begins=moved[flat.begins])


def first_of_row(rows: NDArray[np.int64]) -> NDArray[np.int64]:
    """(R,) index of each row's first piece."""
    return np.searchsorted(rows, np.arange(int(rows.max(initial=-1)) + 1))


def uniform(
    seed: int, stream: int, samples: NDArray[np.uint64], places: NDArray[np.uint64]
) -> NDArray[np.float64]:
    """(N,) numbers in [0, 1) that are a function of (seed, stream, sample, place of the document in its row)."""
    key = np.array([(seed * 2 + stream) & 0xFFFFFFFFFFFFFFFF], np.uint64)
    mixed = _mix(_mix(_mix(key) ^ samples) ^ places)
    return (mixed >> np.uint64(11)).astype(np.float64) / (1 << 53)


def _mix(values: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """splitmix64, one step."""
    values = values + np.uint64(0x9E3779B97F4A7C15)
    values = (values ^ (values >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    values = (values ^ (values >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return values ^ (values >> np.uint64(31))
