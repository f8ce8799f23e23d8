"""Rows of whole documents to the packed batch: order of caption and image, targets, modalities, what models need on the side.

What is left of a row is one document of padding: id EOS, no targets, text. All NumPy, no Python per token.

Dimensions: N ids of all pieces, P pieces, K spans, I images, R rows of S positions, T = R * S.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from ...models.batch import (
    AFTER_IMAGE,
    CAPTION_TARGETS,
    IGNORED,
    IMAGE_FIRST,
    IMAGE_KEYS,
    IMAGE_SPANS,
    IMAGES,
    LATENTS,
    TARGET_MODALITY,
    PackedBatch,
    positions_of,
    targets_of,
)
from ...models.modalities import MODALITIES
from .config import RepeatFilterConfig
from .document_rows import DocumentRows, ranges
from .interleaved.config import InterleavedConfig
from .interleaved.layout import ImageLayout
from .interleaved.vocabulary import InterleavedVocabulary
from .packing import position_ids
from .repeats import find_repetitive_rows
from .vocabulary import Vocabulary

__all__ = ["DocumentAssembler", "RowOf"]

IMAGE, SPEECH = MODALITIES.index("image"), MODALITIES.index("speech")


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
class _Flat:
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


class DocumentAssembler:
    """Packs rows of whole documents.

    Args:
        config: order and modalities; None for text alone.
        layout: of images, where the run has any.
        repeats: rows with such runs of text keep their place but carry no loss on ids; None is off.
        seed: of the run; None is evaluation, where even documents have the caption first, odd ones the image, and none
            loses its caption.
    """

    def __init__(
        self,
        vocabulary: Vocabulary,
        length: int,
        config: InterleavedConfig | None = None,
        layout: ImageLayout | None = None,
        repeats: RepeatFilterConfig | None = None,
        seed: int | None = None,
    ) -> None:
        self._vocabulary, self._length = vocabulary, length
        self._config, self._layout = config, layout
        self._repeats, self._seed = repeats, seed
        self._byte_lengths = vocabulary.token_byte_lengths()
        self._modalities = config.modalities if config else ("text",)
        # From the numbering of prepared data to the run's own.
        numbers = [self._modalities.index(m) if m in self._modalities else 0 for m in MODALITIES]
        self._local = np.array(numbers, np.uint8)

    def pack(self, rows: Sequence[RowOf]) -> PackedBatch:
        """One batch of T = R * S positions."""
        flat = _gather(rows)
        if self._config is not None:
            flat = self._arrange(flat, [row.sample for row in rows])
        return self._lay_out(flat, rows)

    def _arrange(self, flat: _Flat, samples: Sequence[int]) -> _Flat:
        """Put caption and image in the order that is drawn for their document, and drop captions."""
        assert isinstance(self._vocabulary, InterleavedVocabulary)
        assert self._config is not None
        found = _caption_images(flat, self._vocabulary)
        places = np.arange(len(flat.lengths)) - _first_of_row(flat.rows)[flat.rows]
        of = found.pieces
        keys = np.array(samples, np.uint64)[flat.rows[of]], places[of].astype(np.uint64)
        if self._seed is None:
            wants_image_first = flat.numbers[of] % 2 == 1
            drops = np.zeros(len(of), bool)
        else:
            wants_image_first = _uniform(self._seed, 0, *keys) < self._config.image_first
            drops = _uniform(self._seed, 1, *keys) < self._config.caption_dropout
            drops &= ~wants_image_first
        swapped = found.take(wants_image_first != found.is_image_first)
        flat = _swap(flat, swapped)
        # Where the image now comes second, the caption lies before it, whatever it was.
        dropped = found.take(drops)
        captions = np.where(
            dropped.is_image_first,
            dropped.stops - dropped.middles,
            dropped.middles - dropped.starts,
        )
        return _drop(flat, dropped, captions)

    def _lay_out(self, flat: _Flat, rows: Sequence[RowOf]) -> PackedBatch:
        length, count = self._length, len(rows)
        inputs, places, starts, lengths = _place(flat, length, count)
        tokens = np.full(count * length, self._vocabulary.eos_id, np.int64)
        targets = np.full(count * length, IGNORED, np.int64)
        tokens[places], targets[places] = flat.ids[inputs], flat.ids[inputs + 1]
        kinds = np.zeros(len(flat.ids), np.int64)
        inside = ranges(flat.begins, flat.begins + flat.sizes)
        kinds[inside] = np.repeat(flat.kinds, flat.sizes)
        ignored = self._unscored(flat, kinds, inputs)
        silent = self._silent_rows(flat, kinds, inputs, places, count)
        ignored |= silent[places // length]
        targets[places[ignored]] = IGNORED
        batch = PackedBatch(
            tokens=torch.from_numpy(tokens),
            targets=torch.from_numpy(targets),
            position_ids=torch.from_numpy(position_ids(starts, lengths)),
            cu_seqlens=torch.from_numpy(np.append(starts, count * length).astype(np.int32)),
            max_seqlen=int(lengths.max()),
            row_length=length,
            sample_ids=tuple(row.sample for row in rows),
            source_ids=tuple(row.source for row in rows),
            target_count=int(np.count_nonzero(~ignored)),
            target_bytes=self._count_bytes(flat.ids[inputs + 1][~ignored]),
        )
        if self._config is None:
            return batch
        return self._add_modalities(batch, flat, kinds, inputs, places, ~ignored, rows)

    def _unscored(
        self, flat: _Flat, kinds: NDArray[np.int64], inputs: NDArray[np.int64]
    ) -> NDArray[np.bool_]:
        """(M,) of the inputs: those whose target carries no loss on ids."""
        ignored = np.zeros(len(inputs), bool)
        if self._layout is not None and self._layout.kind == "latents":
            # A position that opens an image has a patch for its target, so it is among these.
            ignored |= (kinds[inputs] == IMAGE) | (kinds[inputs + 1] == IMAGE)
        if self._config is not None and not self._config.score_boi:
            assert isinstance(self._vocabulary, InterleavedVocabulary)
            ignored |= flat.ids[inputs + 1] == self._vocabulary.boi_id
        return ignored

    def _silent_rows(
        self,
        flat: _Flat,
        kinds: NDArray[np.int64],
        inputs: NDArray[np.int64],
        places: NDArray[np.int64],
        count: int,
    ) -> NDArray[np.bool_]:
        if self._repeats is None:
            return np.zeros(count, bool)
        # What is no text, and padding, becomes ids that never repeat.
        seen = -1 - np.arange(count * self._length)
        is_text = kinds[inputs] == 0
        seen[places[is_text]] = flat.ids[inputs[is_text]]
        return find_repetitive_rows(seen.reshape(count, self._length), self._repeats)

    def _count_bytes(self, ids: NDArray[np.int64]) -> int:
        return 0 if self._byte_lengths is None else int(self._byte_lengths[ids].sum())

    def _add_modalities(
        self,
        batch: PackedBatch,
        flat: _Flat,
        kinds: NDArray[np.int64],
        inputs: NDArray[np.int64],
        places: NDArray[np.int64],
        counted: NDArray[np.bool_],
        rows: Sequence[RowOf],
    ) -> PackedBatch:
        total = len(batch.tokens)
        modality, target_modality = np.zeros(total, np.uint8), np.zeros(total, np.uint8)
        local = self._local[kinds]
        modality[places] = local[inputs]
        target_modality[places] = np.where(counted, local[inputs + 1], 0)
        after = _after_image(flat)
        after_image = np.zeros(total, bool)
        after_image[places] = after[inputs]
        # Ids of a piece lie one further apart from positions with each piece before it.
        place_of = np.full(len(flat.ids), -1, np.int64)
        place_of[inputs] = places
        is_image = flat.kinds == IMAGE
        begins = place_of[flat.begins[is_image]]
        order = np.argsort(begins, kind="stable")
        which = np.flatnonzero(is_image)[order]
        begins, sizes = begins[order], flat.sizes[which]
        spans = np.stack((begins, begins + sizes), axis=1).astype(np.int32)
        side = {
            TARGET_MODALITY: torch.from_numpy(target_modality),
            AFTER_IMAGE: torch.from_numpy(after_image),
            IMAGE_SPANS: torch.from_numpy(spans),
        }
        if self._layout is not None and self._layout.kind == "latents":
            side |= self._continuous(flat, which, rows)
        by_input = np.bincount(modality, minlength=len(self._modalities))
        by_target = np.bincount(local[inputs + 1][counted], minlength=len(self._modalities))
        captions = counted & after[inputs] & (kinds[inputs + 1] == 0)
        counts = {CAPTION_TARGETS: int(np.count_nonzero(captions)), IMAGES: len(which)}
        for number, name in enumerate(self._modalities):
            counts[positions_of(name)] = int(by_input[number])
            counts[targets_of(name)] = int(by_target[number])
        return replace(batch, modality=torch.from_numpy(modality), side=side, host_counts=counts)

    def _continuous(
        self, flat: _Flat, which: NDArray[np.int64], rows: Sequence[RowOf]
    ) -> dict[str, torch.Tensor]:
        """Side tensors of the images `which` spans are."""
        assert self._layout is not None
        of_row = flat.rows[flat.pieces[which]]
        latents = np.empty((len(which), *self._layout.shape), np.float32)
        homes = np.stack((of_row, flat.shards[which]), axis=1)
        for row, shard in np.unique(homes, axis=0).tolist():
            stored = rows[row].rows.shards[shard].latents
            assert stored is not None
            mine = np.flatnonzero((of_row == row) & (flat.shards[which] == shard))
            latents[mine] = stored[flat.images[which[mine]]]
        numbers = np.arange(len(which)) - np.searchsorted(of_row, of_row, "left")
        samples = np.array([row.sample for row in rows], np.int64)[of_row]
        keys = np.stack((samples, numbers), axis=1).astype(np.int64)
        return {
            LATENTS: torch.from_numpy(self._layout.to_model(latents)),
            IMAGE_FIRST: torch.from_numpy(self._has_text_after(flat)[which]),
            IMAGE_KEYS: torch.from_numpy(keys),
        }

    def _has_text_after(self, flat: _Flat) -> NDArray[np.bool_]:
        """(K,) whether text, and not only ids that open and close, follows a span in its piece."""
        assert isinstance(self._vocabulary, InterleavedVocabulary)
        marks = [*self._vocabulary.special_ids, self._vocabulary.eos_id]
        is_text = ~np.isin(flat.ids, marks)
        is_text[ranges(flat.begins, flat.begins + flat.sizes)] = False
        before = np.concatenate(([0], np.cumsum(is_text)))
        piece_ends = (flat.firsts + flat.lengths)[flat.pieces]
        following: NDArray[np.bool_] = before[piece_ends] > before[flat.begins + flat.sizes]
        return following


def _gather(rows: Sequence[RowOf]) -> _Flat:
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
    return _Flat(
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
class _CaptionImages:
    """Documents of one image and one text: their content is [starts, middles) and [middles, stops), in `ids`."""

    pieces: NDArray[np.int64]
    starts: NDArray[np.int64]
    middles: NDArray[np.int64]
    stops: NDArray[np.int64]
    is_image_first: NDArray[np.bool_]
    spans: NDArray[np.int64]

    def take(self, which: NDArray[np.bool_]) -> _CaptionImages:
        return _CaptionImages(
            *(getattr(self, name)[which] for name in _CaptionImages.__dataclass_fields__)
        )


def _caption_images(flat: _Flat, vocabulary: InterleavedVocabulary) -> _CaptionImages:
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
    found = _CaptionImages(
        pieces, starts, np.where(has_after, after, opens), stops, has_after, candidates
    )
    return found.take(has_before != has_after)


def _swap(flat: _Flat, found: _CaptionImages) -> _Flat:
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


def _drop(flat: _Flat, found: _CaptionImages, captions: NDArray[np.int64]) -> _Flat:
    """Take the first so many ids of content out of some documents."""
    keeps = np.ones(len(flat.ids), bool)
    keeps[ranges(found.starts, found.starts + captions)] = False
    lengths = flat.lengths.copy()
    lengths[found.pieces] -= captions
    moved = np.cumsum(keeps) - 1
    return replace(flat, ids=flat.ids[keeps], lengths=lengths, begins=moved[flat.begins])


def _first_of_row(rows: NDArray[np.int64]) -> NDArray[np.int64]:
    """(R,) index of each row's first piece."""
    return np.searchsorted(rows, np.arange(int(rows.max(initial=-1)) + 1))


def _uniform(
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


def _place(
    flat: _Flat, length: int, count: int
) -> tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.int64], NDArray[np.int64]]:
    """(M,) ids that are inputs, their (M,) positions, and (D,) starts and lengths of documents, padding among them."""
    positions = flat.lengths - 1
    before = np.cumsum(positions) - positions
    first_of_row = _first_of_row(flat.rows)
    row_before = before[first_of_row[flat.rows]] if len(before) else before
    starts = flat.rows * length + before - row_before
    inputs = ranges(flat.firsts, flat.firsts + positions)
    places = ranges(starts, starts + positions)
    used = np.bincount(flat.rows, positions, minlength=count).astype(np.int64)
    padding = (np.arange(count) * length + used)[used < length]
    all_starts = np.sort(np.concatenate((starts, padding)))
    return inputs, places, all_starts, np.diff(all_starts, append=count * length)


def _after_image(flat: _Flat) -> NDArray[np.bool_]:
    """(N,) whether an image of the piece ends at or before the id."""
    is_image = flat.kinds == IMAGE
    ends = np.zeros(len(flat.ids) + 1, np.int64)
    np.add.at(ends, flat.begins[is_image] + flat.sizes[is_image], 1)
    seen = np.cumsum(ends)[:-1]
    # An image ends before the id that closes it, so none ends at the first id of the next piece.
    before = np.concatenate(([0], seen))[flat.firsts]
    result: NDArray[np.bool_] = seen > np.repeat(before, flat.lengths)
    return result
