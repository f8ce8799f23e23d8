"""From places in the order of a run to packed batches: rows cut from streams of ids, rows of whole documents, or images."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ...models.batch import PackedBatch
from .dataset import Dataset
from .dataset import Rows as SourceRows
from .document_order import RowOf
from .document_packing import DocumentAssembler
from .document_rows import DocumentRows
from .images.encoded_rows import EncodedRows
from .images.packing import ImageRow
from .images.rows import ImageRows
from .images.source_opening import Assembler
from .packing import RowAssembler, Rows
from .patches import BitStream
from .stream import TokenStream

__all__ = [
    "DocumentPacker",
    "ImagePacker",
    "StreamPacker",
    "document_assembler",
    "image_assembler",
    "image_rows",
    "open_packer",
    "stream_assembler",
    "stream_of",
]


class StreamPacker:
    """Packs rows that are cut from streams."""

    def __init__(self, dataset: Dataset) -> None:
        self._streams = [stream_of(source.train) for source in dataset.sources]
        self._patches = [source.train_patches for source in dataset.sources]
        self._length = dataset.sequence_length
        self._assembler = stream_assembler(dataset, is_training=True)

    def pack(
        self, samples: list[int], sources: NDArray[np.int64], sequences: NDArray[np.int64]
    ) -> PackedBatch:
        ids, borders = _gather(self._streams, sources, sequences, self._length)
        bits = _gather_patches(self._patches, sources, sequences, self._length)
        rows = Rows(ids, borders, tuple(samples), tuple(sources.tolist()), bits)
        return self._assembler.pack(rows)


class DocumentPacker:
    """Packs rows of whole documents."""

    def __init__(self, dataset: Dataset, seed: int) -> None:
        self._rows = [_document_rows(source.train) for source in dataset.sources]
        self._assembler = document_assembler(dataset, seed)

    def pack(
        self, samples: list[int], sources: NDArray[np.int64], sequences: NDArray[np.int64]
    ) -> PackedBatch:
        wanted = zip(samples, sources.tolist(), sequences.tolist(), strict=True)
        return self._assembler.pack(
            [RowOf(sample, j, self._rows[j], sequence) for sample, j, sequence in wanted]
        )


class ImagePacker:
    """Packs images."""

    def __init__(self, dataset: Dataset, seed: int) -> None:
        self._rows = [image_rows(source.train) for source in dataset.sources]
        self._assembler = image_assembler(dataset, seed)

    def pack(
        self, samples: list[int], sources: NDArray[np.int64], sequences: NDArray[np.int64]
    ) -> PackedBatch:
        wanted = zip(samples, sources.tolist(), sequences.tolist(), strict=True)
        return self._assembler.pack(
            [ImageRow(sample, j, self._rows[j], number) for sample, j, number in wanted]
        )


def open_packer(dataset: Dataset, seed: int) -> StreamPacker | DocumentPacker | ImagePacker:
    if dataset.config.images is not None:
        return ImagePacker(dataset, seed)
    if dataset.config.packs_documents:
        return DocumentPacker(dataset, seed)
    return StreamPacker(dataset)


def stream_of(rows: SourceRows) -> TokenStream:
    assert isinstance(rows, TokenStream)
    return rows


def _document_rows(rows: SourceRows) -> DocumentRows:
    assert isinstance(rows, DocumentRows)
    return rows


def image_rows(rows: SourceRows) -> ImageRows | EncodedRows:
    assert isinstance(rows, ImageRows | EncodedRows)
    return rows


def image_assembler(dataset: Dataset, seed: int | None) -> Assembler:
    """With a seed for training, without one for evaluation."""
    assert dataset.image_data is not None
    assert dataset.config.images is not None
    return dataset.image_data.assembler(dataset.config.images, seed)


def stream_assembler(dataset: Dataset, *, is_training: bool) -> RowAssembler:
    settings = dataset.config.repeat_filter
    return RowAssembler(
        dataset.vocabulary.eos_id,
        dataset.vocabulary.token_byte_lengths(),
        settings if is_training and settings.enabled else None,
    )


def document_assembler(dataset: Dataset, seed: int | None) -> DocumentAssembler:
    """With a seed for training, without one for evaluation."""
    settings = dataset.config.repeat_filter
    return DocumentAssembler(
        dataset.vocabulary,
        dataset.sequence_length,
        dataset.config.interleaved,
        dataset.images,
        settings if seed is not None and settings.enabled else None,
        seed,
    )


def _gather(
    streams: list[TokenStream],
    sources: NDArray[np.int64],
    sequences: NDArray[np.int64],
    length: int,
) -> tuple[NDArray[Any], list[tuple[int, int]]]:
    """(R, length + 1) ids of sequences of several streams, and the borders of pieces inside
    them.
    """
    used = np.unique(sources).tolist()
    ids = np.empty((len(sources), length + 1), np.result_type(*(streams[j].dtype for j in used)))
    borders: list[tuple[int, int]] = []
    for j in used:
        rows = np.flatnonzero(sources == j)
        starts = sequences[rows] * length
        borders.extend(streams[j].read_rows(ids, rows.tolist(), starts.tolist()))
    return ids, borders


def _gather_patches(
    streams: Sequence[BitStream | None],
    sources: NDArray[np.int64],
    sequences: NDArray[np.int64],
    length: int,
) -> NDArray[np.bool_] | None:
    """(R, length) stored patch starts of the same rows; None where a source has none."""
    found = [
        stream.read(sequence * length, length)
        for stream, sequence in zip(
            (streams[j] for j in sources.tolist()), sequences.tolist(), strict=True
        )
        if stream is not None
    ]
    return np.stack(found) if len(found) == len(sources) else None
