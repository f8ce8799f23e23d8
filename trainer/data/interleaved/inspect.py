"""What `weft data inspect` shows of documents with images and speech."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ....models.batch import IMAGE_SPANS, IMAGES, LATENTS, PackedBatch, positions_of, targets_of
from ....models.errors import DataError
from ..dataset import Dataset
from ..loader import PackedLoader
from .codecs import open_codec
from .images import write_image_grid

__all__ = ["ModalityCounts", "count_modalities", "decode_interleaved", "write_images"]

GRID_IMAGES = 64
ROWS_LOOKED_AT = 256


@dataclass
class ModalityCounts:
    """Positions, counted targets and images of some batches, padding apart."""

    positions: dict[str, int]
    targets: dict[str, int]
    images: int = 0
    padding: int = 0


def count_modalities(data: Dataset, batches: Iterator[PackedBatch]) -> ModalityCounts:
    """Sums over batches."""
    found = ModalityCounts(dict.fromkeys(data.modalities, 0), dict.fromkeys(data.modalities, 0))
    for batch in batches:
        for modality in data.modalities:
            found.positions[modality] += batch.host_counts[positions_of(modality)]
            found.targets[modality] += batch.host_counts[targets_of(modality)]
        found.images += batch.host_counts[IMAGES]
        found.padding += padding_positions(batch, data.vocabulary.eos_id)
    found.positions["text"] -= found.padding
    return found


def padding_positions(batch: PackedBatch, eos_id: int) -> int:
    """Positions of a batch that no document has: those that hold EOS, which is never an input of one."""
    return int((batch.tokens == eos_id).sum())


def decode_interleaved(data: Dataset, batch: PackedBatch, start: int, stop: int) -> str:
    """The text of a document, with a mark for each image and each stretch of speech.

    Args:
        start, stop: positions of the document.
    """
    assert batch.modality is not None
    kinds = batch.modality[start:stop].numpy()
    borders = [0, *(np.flatnonzero(np.diff(kinds)) + 1).tolist(), stop - start]
    parts = []
    for first, last in pairwise(borders):
        kind = data.modalities[kinds[first]]
        if kind == "text":
            parts.append(data.vocabulary.decode(batch.tokens[start + first : start + last].numpy()))
        elif kind == "image" and data.images is not None:
            parts.append(f" <image {data.images.grid[0]}x{data.images.grid[1]}> ")
        else:
            parts.append(f" <{kind} {last - first}> ")
    return "".join(parts).strip()


def write_images(data: Dataset, path: Path, seed: int, count: int = GRID_IMAGES) -> int:
    """Write the first images of a run's order as a PNG grid.

    Returns:
        How many there are.

    Raises:
        DataError: no images, or no codec that makes pictures of them.
    """
    settings = data.config.interleaved
    if data.images is None or settings is None:
        raise DataError("there are no images in this data; leave --images out")
    codec = open_codec(settings.image)
    if codec is None:
        raise DataError(
            "the data brought their images encoded and data.interleaved.image.codec is null, so nothing makes pictures of them; "
            "leave --images out"
        )
    if data.images.codec is not None and dict(data.images.codec) != codec.identity:
        raise DataError(
            f"the images were encoded with another codec than {settings.image.codec} is now; restore it, or leave --images out"
        )
    values = np.concatenate(list(_encoded_images(data, seed, count)))[:count]
    write_image_grid(codec.decode(values), path)
    return len(values)


def _encoded_images(data: Dataset, seed: int, count: int) -> Iterator[NDArray[Any]]:
    """Latents or codes, as the codec made them, of the first images of the order."""
    assert data.images is not None
    first_code = getattr(data.vocabulary, "first_image_code", 0)
    rows = min(ROWS_LOOKED_AT, sum(source.sequences for source in data.sources))
    yield (
        np.empty((0, *data.images.shape))
        if data.images.kind == "latents"
        else np.empty((0, data.images.positions), np.int64)
    )
    with PackedLoader(data, seed=seed, batch_rows=1, end_sample=rows) as loader:
        for _ in range(rows):
            batch = loader.next_step().micro_batches[0]
            found: NDArray[Any]
            if data.images.kind == "latents":
                found = data.images.from_model(batch.side[LATENTS].numpy())
            else:
                spans = batch.side[IMAGE_SPANS].tolist()
                codes = [batch.tokens[start:stop].numpy() - first_code for start, stop in spans]
                found = np.array(codes, np.int64).reshape(-1, data.images.positions)
            yield found
            count -= len(found)
            if count <= 0:
                return
