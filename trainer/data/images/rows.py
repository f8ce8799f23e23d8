"""Images of a prepared source, by their number among those trained on or held out."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from ....models.errors import DataError
from ..shards import IMAGE_ROW, Manifest

__all__ = ["ImageRows", "StoredImage", "all_rows", "check_classes", "open_rows"]


class StoredImage(NamedTuple):
    """An image as it is stored: the bytes of its file, its class (-1 for none), their SHA-256."""

    raw: bytes
    label: int
    sha256: bytes


class _Shard(NamedTuple):
    ids: NDArray[Any]
    ends: NDArray[np.int64]
    rows: NDArray[Any]


class ImageRows:
    """Some images of a source, in the order of its shards.

    Args:
        name: of the source.
        folder: the prepared dataset.
        places: (N, 2) int64, shard and place in it of each image.
    """

    def __init__(
        self, name: str, folder: Path, manifest: Manifest, places: NDArray[np.int64]
    ) -> None:
        self.name, self.folder = name, folder
        self._manifest, self._places = manifest, places
        self._shards = [
            _Shard(s.open_ids(folder), s.open_ends(folder), s.open_rows(folder))
            for s in manifest.shards
        ]
        self.ratios: NDArray[np.uint8] | None = None
        """(N,) index of each image's ratio by complexity, where scores were opened; 255 is none."""

    @property
    def sequences(self) -> int:
        return len(self._places)

    @property
    def tokens(self) -> int:
        """Positions: an image is one."""
        return self.sequences

    def __getitem__(self, number: int) -> StoredImage:
        shard, place = self._places[number]
        ids, ends, rows = self._shards[shard]
        start = int(ends[place - 1]) if place else 0
        raw = ids[start : int(ends[place])].tobytes()
        row = rows[place]
        return StoredImage(raw, int(row["label"]), row["sha256"].tobytes())

    def describe(self, number: int) -> str:
        """The name an image has in its source, for messages."""
        shard, place = self._places[number].tolist()
        return f"{self.name}: {self._manifest.shards[shard].read_names(self.folder)[place][0]}"

    @cached_property
    def known(self) -> NDArray[Any]:
        """(N,) of `IMAGE_ROW`: what is known of each image."""
        parts = [shard.rows for shard in self._shards]
        starts = np.cumsum([0, *(len(part) for part in parts)])
        joined = np.concatenate([np.empty(0, IMAGE_ROW), *parts])
        found: NDArray[Any] = joined[starts[self._places[:, 0]] + self._places[:, 1]]
        return found

    @cached_property
    def pixels(self) -> int:
        """Height times width of all images together."""
        known = self.known
        return int((known["height"].astype(np.int64) * known["width"]).sum())


def open_rows(name: str, folder: Path, manifest: Manifest) -> tuple[ImageRows, ImageRows]:
    """Images that are trained on, and those that are held out.

    Raises:
        DataError: a dataset of something else, or nothing left to train on.
    """
    if manifest.images is None:
        raise DataError(
            f"source {name!r}: {folder} is a dataset of documents, and data.images is set; set data.images=null, or prepare "
            "images with: weft data prepare SOURCE --images --out DIR"
        )
    counts, places = [shard.documents for shard in manifest.shards], _places(manifest)
    is_held_out = np.zeros(sum(counts), bool)
    starts = np.cumsum([0, *counts])
    for shard, place, _ in manifest.held_out:
        is_held_out[starts[shard] + place] = True
    train = ImageRows(name, folder, manifest, places[~is_held_out])
    if not train.sequences:
        raise DataError(f"too few samples: source {name!r} has no images to train on; add data")
    return train, ImageRows(name, folder, manifest, places[is_held_out])


def all_rows(name: str, folder: Path, manifest: Manifest) -> ImageRows:
    """All images of a dataset, those held out among them, in the order of its shards."""
    return ImageRows(name, folder, manifest, _places(manifest))


def _places(manifest: Manifest) -> NDArray[np.int64]:
    """(images, 2) shard and place in it."""
    counts = [shard.documents for shard in manifest.shards]
    shards = np.repeat(np.arange(len(counts)), counts)
    starts = np.cumsum([0, *counts])
    return np.stack([shards, np.arange(sum(counts)) - starts[shards]], axis=1)


def check_classes(
    counts: Sequence[Sequence[int]], names: Sequence[str], classes: int | None, allow_empty: bool
) -> int:
    """How many classes the sources of a run have together; 0 where their images have none.

    Args:
        counts: of each source, images by class; empty where they have no classes.
        names: of the sources.
        classes: data.images.classes.

    Raises:
        DataError: a label out of range, a class without images, or sources with and without classes.
    """
    with_classes = [name for name, found in zip(names, counts, strict=True) if found]
    if not with_classes:
        if classes is not None:
            raise DataError(
                f"data.images.classes is {classes} and the images of source {names[0]!r} have no classes; set it to null"
            )
        return 0
    if len(with_classes) < len(names):
        bare = next(name for name in names if name not in with_classes)
        raise DataError(
            f"the images of source {bare!r} have no classes and those of {with_classes[0]!r} have; leave one of them out"
        )
    largest = max(len(found) for found in counts)
    number = classes or largest
    for name, found in zip(names, counts, strict=True):
        if len(found) > number:
            raise DataError(
                f"source {name!r} has an image of class {len(found) - 1} and data.images.classes={number} allows 0 to {number - 1}; "
                "raise it, or mend the label"
            )
    total = np.zeros(number, np.int64)
    for found in counts:
        total[: len(found)] += found
    empty = np.flatnonzero(total == 0).tolist()
    if empty and not allow_empty:
        more = f" and {len(empty) - 1} others" if len(empty) > 1 else ""
        raise DataError(
            f"class {empty[0]}{more} of 0 to {number - 1} has no images in {', '.join(names)}; add some, mend the labels, or set "
            "data.images.allow_empty_classes=true"
        )
    return number
