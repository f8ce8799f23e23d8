"""Rows of whole documents to the packed batch: order of caption and image, targets, modalities, what models need on the side.

What is left of a row is one document of padding: id EOS, no targets, text. All NumPy, no Python per token.

Dimensions: N ids of all pieces, P pieces, K spans, I images, R rows of S positions, T = R * S.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

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
from .document_order import (
    FlatPieces,
    RowOf,
    drop_captions,
    find_caption_images,
    first_of_row,
    gather,
    swap_halves,
    uniform,
)
from .document_rows import ranges
from .interleaved.config import InterleavedConfig
from .interleaved.layout import ImageLayout
from .interleaved.vocabulary import InterleavedVocabulary
from .packing import position_ids
from .repeats import find_repetitive_rows
from .vocabulary import Vocabulary

__all__ = ["DocumentAssembler"]

IMAGE = MODALITIES.index("image")


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
        flat = gather(rows)
        if self._config is not None:
            flat = self._arrange(flat, [row.sample for row in rows])
        return self._lay_out(flat, rows)

    def _arrange(self, flat: FlatPieces, samples: Sequence[int]) -> FlatPieces:
        """Put caption and image in the order that is drawn for their document, and drop captions."""
        assert isinstance(self._vocabulary, InterleavedVocabulary)
        assert self._config is not None
        found = find_caption_images(flat, self._vocabulary)
        places = np.arange(len(flat.lengths)) - first_of_row(flat.rows)[flat.rows]
        of = found.pieces
        keys = np.array(samples, np.uint64)[flat.rows[of]], places[of].astype(np.uint64)
        if self._seed is None:
            wants_image_first = flat.numbers[of] % 2 == 1
            drops = np.zeros(len(of), bool)
        else:
            wants_image_first = uniform(self._seed, 0, *keys) < self._config.image_first
            drops = uniform(self._seed, 1, *keys) < self._config.caption_dropout
            drops &= ~wants_image_first
        swapped = found.take(wants_image_first != found.is_image_first)
        flat = swap_halves(flat, swapped)
        # Where the image now comes second, the caption lies before it, whatever it was.
        dropped = found.take(drops)
        captions = np.where(
            dropped.is_image_first,
            dropped.stops - dropped.middles,
            dropped.middles - dropped.starts,
        )
        return drop_captions(flat, dropped, captions)

    def _lay_out(self, flat: FlatPieces, rows: Sequence[RowOf]) -> PackedBatch:
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
        self, flat: FlatPieces, kinds: NDArray[np.int64], inputs: NDArray[np.int64]
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
        flat: FlatPieces,
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
        flat: FlatPieces,
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
        self, flat: FlatPieces, which: NDArray[np.int64], rows: Sequence[RowOf]
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

    def _has_text_after(self, flat: FlatPieces) -> NDArray[np.bool_]:
        """(K,) whether text, and not only ids that open and close, follows a span in its piece."""
        assert isinstance(self._vocabulary, InterleavedVocabulary)
        marks = [*self._vocabulary.special_ids, self._vocabulary.eos_id]
        is_text = ~np.isin(flat.ids, marks)
        is_text[ranges(flat.begins, flat.begins + flat.sizes)] = False
        before = np.concatenate(([0], np.cumsum(is_text)))
        piece_ends = (flat.firsts + flat.lengths)[flat.pieces]
        following: NDArray[np.bool_] = before[piece_ends] > before[flat.begins + flat.sizes]
        return following


def _place(
    flat: FlatPieces, length: int, count: int
) -> tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.int64], NDArray[np.int64]]:
    """(M,) ids that are inputs, their (M,) positions, and (D,) starts and lengths of documents, padding among them."""
    positions = flat.lengths - 1
    before = np.cumsum(positions) - positions
    row_before = before[first_of_row(flat.rows)[flat.rows]] if len(before) else before
    starts = flat.rows * length + before - row_before
    inputs = ranges(flat.firsts, flat.firsts + positions)
    places = ranges(starts, starts + positions)
    used = np.bincount(flat.rows, positions, minlength=count).astype(np.int64)
    padding = (np.arange(count) * length + used)[used < length]
    all_starts = np.sort(np.concatenate((starts, padding)))
    return inputs, places, all_starts, np.diff(all_starts, append=count * length)


def _after_image(flat: FlatPieces) -> NDArray[np.bool_]:
    """(N,) whether an image of the piece ends at or before the id."""
    is_image = flat.kinds == IMAGE
    ends = np.zeros(len(flat.ids) + 1, np.int64)
    np.add.at(ends, flat.begins[is_image] + flat.sizes[is_image], 1)
    seen = np.cumsum(ends)[:-1]
    # An image ends before the id that closes it, so none ends at the first id of the next piece.
    before = np.concatenate(([0], seen))[flat.firsts]
    result: NDArray[np.bool_] = seen > np.repeat(before, flat.lengths)
    return result
