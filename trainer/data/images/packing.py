"""Rows of images to packed batches: a row is an image, and its token is its class."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch
from numpy.typing import NDArray

from ....models.batch import (
    IGNORED,
    IMAGE_KEYS,
    IMAGES,
    PIXELS,
    RATIO,
    STAND_IN,
    PackedBatch,
    images_at,
)
from .augmentation import CENTER, decode_file, draw_view, fit_view
from .config import ImagesConfig
from .ratios import ratio_of_sample
from .rows import ImageRows

if TYPE_CHECKING:
    from .encoded_rows import EncodedRows

__all__ = ["ImageRow", "PixelAssembler", "image_batch", "ratio_counts"]


KEPT_BYTES = 256 << 20
"""Sources with fewer bytes of pixels are kept decoded: small files take longer to open than to train on."""


@dataclass(frozen=True)
class ImageRow:
    """An image to pack.

    Args:
        sample: its global index in the order of the run; of held-out images their own number.
        source: index of its source.
        number: in `rows`.
    """

    sample: int
    source: int
    rows: ImageRows | EncodedRows
    number: int


class PixelAssembler:
    """Decodes, crops and packs pictures.

    Args:
        seed: of the run; None is evaluation, which takes the middle of each picture as it is.
    """

    def __init__(self, config: ImagesConfig, seed: int | None) -> None:
        self._config, self._seed = config, seed
        self._kept: dict[tuple[str, int], NDArray[np.uint8]] = {}

    def pack(self, rows: Sequence[ImageRow], *, is_stand_in: bool = False) -> PackedBatch:
        """One batch of R images.

        Raises:
            DataError: an image cannot be decoded.
        """
        config = self._config
        labels = np.empty(len(rows), np.int64)
        pixels = np.empty((len(rows), config.channels, config.size, config.size), np.uint8)
        for place, row in enumerate(rows):
            assert isinstance(row.rows, ImageRows)
            image = row.rows[row.number]
            labels[place] = max(0, image.label)
            view = CENTER if self._seed is None else draw_view(config, self._seed, row.sample)
            decoded = self._decoded(row.rows, row.number, image.raw)
            pixels[place] = fit_view(decoded, config.size, view).transpose(2, 0, 1)
        side = {PIXELS: torch.from_numpy(pixels)}
        counts: dict[str, int] = {}
        if config.ratios is not None:
            places = self._ratios(rows)
            side[RATIO] = torch.from_numpy(places)
            counts = ratio_counts(config.ratios.values, places)
        return image_batch(rows, labels, side, counts, is_stand_in=is_stand_in)

    def _decoded(self, rows: ImageRows, number: int, raw: bytes) -> NDArray[np.uint8]:
        """(H, W, C) of an image; those of small sources are decoded once."""
        key = (rows.name, number)
        if key not in self._kept:
            # Names are looked up in a file, so messages have the number.
            pixels = decode_file(raw, f"{rows.name} image {number}", self._config.channels)
            if rows.pixels * self._config.channels > KEPT_BYTES:
                return pixels
            self._kept[key] = pixels
        return self._kept[key]

    def _ratios(self, rows: Sequence[ImageRow]) -> NDArray[np.uint8]:
        """(R,) index of the ratio of each image."""
        assert self._config.ratios is not None
        found = np.empty(len(rows), np.uint8)
        for place, row in enumerate(rows):

            def scored(row: ImageRow = row) -> int:
                assert isinstance(row.rows, ImageRows)
                assert row.rows.ratios is not None
                return int(row.rows.ratios[row.number])

            found[place] = ratio_of_sample(self._config.ratios, scored, self._seed, row.sample)
        return found


def ratio_counts(values: Sequence[int], places: NDArray[np.uint8]) -> dict[str, int]:
    """Host counts of the images at each ratio."""
    counts = np.bincount(places, minlength=len(values)).tolist()
    return {images_at(ratio): count for ratio, count in zip(values, counts, strict=True)}


def image_batch(
    rows: Sequence[ImageRow],
    labels: NDArray[np.int64],
    side: dict[str, torch.Tensor],
    counts: dict[str, int],
    *,
    is_stand_in: bool = False,
) -> PackedBatch:
    """A batch whose positions are images: no id is predicted, and every image counts as a target."""
    count = len(rows)
    keys = np.array([(row.sample, 0) for row in rows], np.int64).reshape(-1, 2)
    return PackedBatch(
        tokens=torch.from_numpy(labels),
        targets=torch.full((count,), IGNORED, dtype=torch.int64),
        position_ids=torch.zeros(count, dtype=torch.int64),
        cu_seqlens=torch.arange(count + 1, dtype=torch.int32),
        max_seqlen=1,
        row_length=1,
        sample_ids=tuple(row.sample for row in rows),
        source_ids=tuple(row.source for row in rows),
        target_count=0 if is_stand_in else count,
        side={IMAGE_KEYS: torch.from_numpy(keys), **side},
        host_counts={IMAGES: count, **counts, **({STAND_IN: 1} if is_stand_in else {})},
    )
