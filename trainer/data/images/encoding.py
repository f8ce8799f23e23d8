"""Encodes a prepared source with a trained tokenizer: a job that any number of processes do, and any of them may die.

A unit of work is a shard, a fixed range of images, in fixed batches (the last is filled up, because another batch size may
choose other convolution algorithms, and those another code where two are about as near). So the result is the same for any
number of processes. Each one does every n-th shard; whoever finds all of them finished writes the manifest.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal, Protocol

import numpy as np
from numpy.typing import NDArray

from ....models.errors import ConfigError, DataError
from ...files import write_json
from ..hashed_file import HashedFile, write_hashed
from ..shards import Manifest, read_manifest
from .augmentation import View, decode_file, fit_view
from .encoded_format import (
    ENCODED_ROW,
    NO_RATIO,
    EncodePlan,
    part_name,
    read_plan,
    read_record,
    shard_name,
    write_plan,
)
from .latent_sums import LatentSums
from .rows import ImageRows, all_rows
from .sidecar import MISSING, read_sidecar

__all__ = [
    "EncodeOptions",
    "EncodingTokenizer",
    "encode_shards",
    "finish_encoding",
    "plan_encoding",
]

SHARD_IMAGES = 1024
BATCH_IMAGES = 32
THREADS = 8
PLACES = {
    "center": (0.5, 0.5),
    "top-left": (0.0, 0.0),
    "top-right": (0.0, 1.0),
    "bottom-left": (1.0, 0.0),
    "bottom-right": (1.0, 1.0),
}
VIEWS = {
    "center": ("center",),
    "flip": ("center", "center-flip"),
    "ten-crop": tuple(f"{place}{flip}" for place in PLACES for flip in ("", "-flip")),
}


class EncodingTokenizer(Protocol):
    """What encoding asks of a trained tokenizer.

    Attributes:
        kind: `codes` or `moments`.
        size, channels: of the pictures it takes.
        ratios: pixels a side of one code or latent, finest first.
        codes: how many there are, of kind codes.
        identity: JSON-able; its `fingerprint` changes with weights and settings that change what it makes of a picture.
    """

    kind: Literal["codes", "moments"]
    size: int
    channels: int
    ratios: tuple[int, ...]
    codes: int | None

    @property
    def identity(self) -> dict[str, Any]: ...

    def encode(self, pixels: NDArray[np.uint8], ratio: int) -> NDArray[Any]:
        """(N, size, size, channels) pictures to (N, n) int64 codes, or to (N, 2C, h, w) float32 means and log variances."""


@dataclass(frozen=True)
class EncodeOptions:
    """How a source is encoded.

    Args:
        views: which squares of each picture: `center`, `flip` (it and its mirror image) or `ten-crop` (the middle and the
            corners, and their mirror images).
        crop_scale: with ten-crop, pictures are resized to so many times the tokenizer's size.
        scores: folder of scores; each image is stored at the ratio they say.
        ratios: `auto` is scored where there are scores, else all; `all` stores every ratio, and scores stand beside.
        dtype: of moments.
    """

    views: Literal["center", "flip", "ten-crop"] = "flip"
    crop_scale: float = 1.1
    scores: str | None = None
    ratios: Literal["auto", "scored", "all"] = "auto"
    dtype: Literal["float16", "float32"] = "float32"
    shard_images: int = SHARD_IMAGES
    batch_images: int = BATCH_IMAGES


def plan_encoding(tokenizer: EncodingTokenizer, source: Path, options: EncodeOptions) -> EncodePlan:
    """What encoding a prepared source will make.

    Raises:
        ConfigError: options that do not go together.
        DataError: no prepared images, images smaller than the coarsest ratio, or no scores.
    """
    manifest = read_manifest(source)
    if manifest.images is None:
        raise DataError(f"{source} is a dataset of documents, not of images; name one of images")
    _check_smallest(source, manifest, tokenizer.ratios[-1])
    if tokenizer.kind == "codes" and (options.scores or options.ratios == "scored"):
        raise ConfigError("codes have one ratio; leave --scores and --ratios out")
    scores = read_sidecar(options.scores).identity if options.scores else None
    if options.ratios == "scored" and scores is None:
        raise ConfigError("--ratios scored needs --scores DIR; make them with weft data score")
    is_scored = scores is not None and options.ratios != "all"
    wide = tokenizer.codes is not None and tokenizer.codes > 1 << 16
    return EncodePlan(
        kind=tokenizer.kind,
        tokenizer={**tokenizer.identity, "size": tokenizer.size, "channels": tokenizer.channels},
        data=manifest.fingerprint,
        source=manifest.source,
        views=VIEWS[options.views],
        crop_scale=options.crop_scale if options.views == "ten-crop" else 1.0,
        ratios=tokenizer.ratios,
        stores="scored" if is_scored else "all",
        scores=scores,
        codes=tokenizer.codes,
        dtype=options.dtype if tokenizer.kind == "moments" else "uint32" if wide else "uint16",
        images=manifest.documents,
        shard_images=options.shard_images,
        batch_images=options.batch_images,
    )


def _check_smallest(source: Path, manifest: Manifest, coarsest: int) -> None:
    height, width, name = (manifest.images or {})["smallest"]
    if min(height, width) < coarsest:
        raise DataError(
            f"{source}: {name} has {width} x {height} pixels, fewer than the coarsest ratio {coarsest} takes; remove such images"
        )


def view_of(name: str, size: int, crop_scale: float) -> View:
    """The square that a view's name means."""
    top, left = PLACES[name.removesuffix("-flip")]
    return View(max(size, round(size * crop_scale)), top, left, name.endswith("-flip"))


def encode_shards(
    tokenizer: EncodingTokenizer,
    plan: EncodePlan,
    source: Path,
    out: Path,
    *,
    scores: str | None = None,
    part: tuple[int, int] = (0, 1),
    advance: Callable[[int, int], None] = lambda shard, images: None,
) -> int:
    """Encode the unfinished shards of a part of the work.

    Args:
        source: the prepared images that the plan was made of.
        scores: the folder of scores that the plan was made with.
        part: (k, n): shards k, k + n, k + 2n, and so on.
        advance: called with a shard's number and images once it is there.

    Returns:
        Images encoded now.

    Raises:
        DataError: `out` was begun with another plan, or an image has no score.
    """
    write_plan(out, plan)
    shards = range(part[0], plan.shards, part[1])
    left = [shard for shard in shards if read_record(out, plan, shard) is None]
    if not left:
        return 0
    manifest = read_manifest(source)
    rows = all_rows("source", source, manifest)
    ratios = _ratios_of(rows, plan, scores)
    done = 0
    with ThreadPoolExecutor(THREADS, "weft-decode") as pool:
        for shard in left:
            start, stop = plan.range_of(shard)
            job = _ShardJob(tokenizer, plan, rows, ratios, pool, range(start, stop))
            _write_shard(job, manifest, out, shard)
            done += stop - start
            advance(shard, stop - start)
    return done


def _ratios_of(rows: ImageRows, plan: EncodePlan, scores: str | None) -> NDArray[np.uint8]:
    """(images,) index of each image's ratio; `NO_RATIO` without scores."""
    if scores is None:
        return np.full(rows.sequences, NO_RATIO, np.uint8)
    sidecar = read_sidecar(scores)
    if tuple(sidecar.ratios) != plan.ratios:
        raise DataError(
            f"{scores} has scores for ratios {sidecar.ratios} and the tokenizer has {list(plan.ratios)}; score the images again "
            f"with --ratios {','.join(map(str, plan.ratios))}"
        )
    digests = rows.known["sha256"]
    found = np.array([sidecar.places.get(d.tobytes(), MISSING) for d in digests], np.uint8)
    absent = np.flatnonzero(found == MISSING)
    if len(absent):
        raise DataError(
            f"{len(absent)} of {len(found)} images have no score in {scores}, such as {rows.describe(int(absent[0]))}; score this "
            "source with weft data score"
        )
    return found


@dataclass(frozen=True)
class _ShardJob:
    """A shard to encode: `images` are numbers in `rows`."""

    tokenizer: EncodingTokenizer
    plan: EncodePlan
    rows: ImageRows
    ratios: NDArray[np.uint8]
    pool: ThreadPoolExecutor
    images: range

    def at(self, ratio: int | None) -> list[int]:
        """Numbers of the images whose values at a ratio are stored."""
        if self.plan.stores == "all" or ratio is None:
            return list(self.images)
        place = self.plan.ratios.index(ratio)
        return [i for i in self.images if self.ratios[i] == place]

    def encoded(self, numbers: Sequence[int], ratio: int | None) -> Iterator[NDArray[Any]]:
        """(n, views, ...) of images, a batch at a time; the next is decoded while one is encoded."""
        size = self.plan.batch_images
        batches = [numbers[first : first + size] for first in range(0, len(numbers), size)]
        coming = [self.pool.submit(self._views, i) for i in batches[0]] if batches else []
        for place, batch in enumerate(batches):
            pictures = np.stack([future.result() for future in coming])
            following = batches[place + 1] if place + 1 < len(batches) else []
            coming = [self.pool.submit(self._views, i) for i in following]
            yield self._encode(pictures, ratio)[: len(batch)]

    def _views(self, number: int) -> NDArray[np.uint8]:
        """(views, size, size, channels) of an image."""
        size, channels = self.tokenizer.size, self.tokenizer.channels
        pixels = decode_file(self.rows[number].raw, f"image {number}", channels)
        views = [view_of(name, size, self.plan.crop_scale) for name in self.plan.views]
        return np.stack([fit_view(pixels, size, view) for view in views])

    def _encode(self, pictures: NDArray[np.uint8], ratio: int | None) -> NDArray[Any]:
        """(n, views, ...) of (n, views, size, size, channels), in batches of one size."""
        full = self.plan.batch_images
        filled = pictures[np.arange(full) % len(pictures)]
        chosen = ratio or self.plan.ratios[0]
        found = [self.tokenizer.encode(filled[:, v], chosen) for v in range(filled.shape[1])]
        return np.stack(found, axis=1)[: len(pictures)]


def _write_shard(job: _ShardJob, manifest: Manifest, out: Path, shard: int) -> None:
    plan, stem = job.plan, shard_name(shard)
    files: dict[str, Any] = {}
    shapes: dict[str, list[int]] = {}
    sums: dict[str, Any] = {}
    rows = _rows_of(job, manifest)
    for ratio in plan.parts:
        name = f"{stem}.{part_name(ratio)}"
        numbers = job.at(ratio)
        total = LatentSums()
        is_trained = rows["held_out"][np.array(numbers, np.int64) - job.images.start] == 0
        with HashedFile(out / name) as file:
            place = 0
            for values in job.encoded(numbers, ratio):
                shapes[part_name(ratio)] = list(values.shape[2:])
                file.write(_stored(values, plan))
                if ratio is not None:
                    counted = is_trained[place : place + len(values)]
                    total += LatentSums.of(values[counted, 0])
                place += len(values)
        files[name] = {"bytes": file.size, "sha256": file.sha256}
        if ratio is not None:
            sums[str(ratio)] = asdict(total)
    name = f"{stem}.rows"
    content = rows.tobytes()
    files[name] = {"bytes": len(content), "sha256": write_hashed(out / name, content)}
    labels, counts = np.unique(rows["label"], return_counts=True)
    record = {
        "plan": plan.key,
        "tokenizer": plan.tokenizer["fingerprint"],
        "shard": shard,
        "first": job.images.start,
        "stop": job.images.stop,
        "files": files,
        "shapes": shapes,
        "sums": sums,
        "held_out": int(rows["held_out"].sum()),
        "class_counts": {str(k): int(n) for k, n in zip(labels, counts, strict=True) if k >= 0},
        "ratio_counts": np.bincount(rows["ratio"], minlength=NO_RATIO + 1)[
            : len(plan.ratios)
        ].tolist(),
    }
    write_json(out / f"{stem}.json", record)


def _stored(values: NDArray[Any], plan: EncodePlan) -> NDArray[Any]:
    """In the type of the shard.

    Raises:
        DataError: a value that it does not hold.
    """
    dtype = np.dtype(plan.dtype).newbyteorder("<")
    if plan.codes is not None and (values.min() < 0 or values.max() >= plan.codes):
        raise DataError(
            f"the tokenizer gave code {int(values.max())} and says it has {plan.codes}; this is a fault of the tokenizer"
        )
    with np.errstate(over="ignore"):
        stored = np.ascontiguousarray(values, dtype)
    if plan.codes is None and not np.isfinite(stored).all():
        raise DataError(
            f"latents up to {float(np.abs(values).max()):g} do not fit {plan.dtype}; encode with --dtype float32, or look at the "
            "tokenizer's run where they are not finite"
        )
    return stored


def _rows_of(job: _ShardJob, manifest: Manifest) -> NDArray[Any]:
    known = job.rows.known[job.images.start : job.images.stop]
    rows = np.zeros(len(known), ENCODED_ROW)
    rows["label"], rows["sha256"] = known["label"], known["sha256"]
    rows["image"] = np.arange(job.images.start, job.images.stop)
    rows["ratio"] = job.ratios[job.images.start : job.images.stop]
    starts = np.cumsum([0, *(shard.documents for shard in manifest.shards)])
    for shard, place, _ in manifest.held_out:
        number = int(starts[shard]) + place - job.images.start
        if 0 <= number < len(rows):
            rows["held_out"][number] = 1
    return rows


def finish_encoding(out: Path, classes: Sequence[str] | None) -> dict[str, Any] | None:
    """Write the manifest where all shards are finished.

    Args:
        classes: their names.

    Returns:
        The manifest; None where shards are missing.
    """
    plan = read_plan(out)
    records = [read_record(out, plan, shard) for shard in range(plan.shards)]
    found = [record for record in records if record is not None]
    if len(found) < plan.shards:
        return None
    counts: dict[int, int] = {}
    sums: dict[str, LatentSums] = {}
    shapes: dict[str, list[int]] = {}
    for record in found:
        shapes |= record["shapes"]
        for label, number in record["class_counts"].items():
            counts[int(label)] = counts.get(int(label), 0) + number
        for ratio, values in record["sums"].items():
            sums[ratio] = sums.get(ratio, LatentSums()) + LatentSums(**values)
    _fill_shapes(plan, shapes)
    content = [plan.key, [record["files"] for record in found]]
    manifest = {
        "plan": plan.key,
        "tokenizer": plan.tokenizer["fingerprint"],
        "images": plan.images,
        "held_out": sum(record["held_out"] for record in found),
        "classes": list(classes) if classes else None,
        "class_counts": [counts.get(label, 0) for label in range(max(counts, default=-1) + 1)],
        "ratio_counts": np.sum([record["ratio_counts"] for record in found], axis=0).tolist(),
        "shapes": shapes,
        "sums": {ratio: asdict(total) for ratio, total in sums.items()},
        "statistics": {ratio: total.statistics() for ratio, total in sums.items() if total.values},
        "shards": [_of_manifest(record) for record in found],
        "fingerprint": hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest(),
    }
    write_json(out / "manifest.json", manifest)
    return manifest


def _of_manifest(record: Mapping[str, Any]) -> dict[str, Any]:
    return {name: record[name] for name in ("shard", "first", "stop", "tokenizer", "files")}


def _fill_shapes(plan: EncodePlan, shapes: dict[str, list[int]]) -> None:
    """Give a ratio that no image has the shape that the others' lead to."""
    missing = [ratio for ratio in plan.parts if part_name(ratio) not in shapes]
    for ratio in missing:
        (name, (channels, height, width)) = next(iter(shapes.items()))
        known = int(name.rpartition("_")[2])
        assert ratio is not None
        shapes[part_name(ratio)] = [channels, height * known // ratio, width * known // ratio]
