"""Images of a source, one after another, with their classes: image folders, WebDataset tars, Parquet, built-in sets.

What cannot be told to be an image is found when it is decoded, see `writer.py`; here whole files that cannot be read,
and labels that are none, are errors.
"""

from __future__ import annotations

import os
import tarfile
from collections.abc import Iterator
from pathlib import Path, PurePosixPath
from typing import Any, NamedTuple

from ....models.errors import DataError
from ..config import SourceConfig
from ..interleaved.documents import IMAGE_ENDINGS, tar_samples
from ..readers import count_row_groups, import_pyarrow, naming_unreadable_files, open_parquet
from ..sources import InputFile, Listing, Unit, distinct_names, group_files, stat_file, walk_files
from .builtin import open_image_builtin, to_png
from .job import ImageJob

__all__ = ["ImageFile", "ImageListing", "list_images", "plan_image_units", "read_images"]

SMALLEST_UNIT_BYTES = 1 << 20
LARGEST_UNIT_BYTES = 256 << 20
UNITS_AIMED_AT = 256
BUILTIN_IMAGE_BYTES = 1 << 10
BUILTIN_UNIT_IMAGES = 1024
UNLABELLED = -1
FORMATS = "an image folder (a folder a class), .tar, .parquet or builtin:NAME"


class ImageFile(NamedTuple):
    """An encoded image.

    Args:
        name: unique in its source, the same wherever the source lies.
        label: number of its class, -1 for none.
        raw: the file's bytes.
        caption: what it shows in words, where the data say.
        may_be_held_out: whether it may be kept for evaluation.
    """

    name: str
    label: int
    raw: bytes
    caption: str | None = None
    may_be_held_out: bool = True


class ImageListing(NamedTuple):
    """Files of a source, and the classes that its folders name."""

    listing: Listing
    classes: tuple[str, ...] | None


def list_images(source: SourceConfig) -> ImageListing:
    """Find and order the files of a source of images.

    Raises:
        DataError: nothing is there, it is no source of images, or a class has none.
    """
    if source.path.startswith("builtin:"):
        return _list_builtin(source)
    path = Path(source.path).expanduser()
    if not path.exists():
        from glob import glob

        matches = [(Path(m), os.path.basename(m)) for m in sorted(glob(str(path), recursive=True))]
        if not matches:
            raise DataError(
                f"source {source.name!r}: {source.path} does not exist; check data.sources path"
            )
        return _list_archives(source, distinct_names(matches))
    if path.is_file():
        return _list_archives(source, [(path, path.name)])
    found = list(walk_files(path))
    images = [(p, name) for p, name in found if name.lower().endswith(IMAGE_ENDINGS)]
    return _list_folder(source, path, images) if images else _list_archives(source, found)


def _list_builtin(source: SourceConfig) -> ImageListing:
    import json

    made = open_image_builtin(source.path)
    version = json.dumps(made.identity, sort_keys=True)
    file = InputFile(source.path, version, made.count * BUILTIN_IMAGE_BYTES, 0)
    return ImageListing(Listing("image-builtin", source.path, (file,)), made.classes)


def _list_archives(source: SourceConfig, paths: list[tuple[Path, str]]) -> ImageListing:
    kinds = {"image-tar": (".tar", ".tar.gz"), "image-parquet": (".parquet",)}
    for kind, endings in kinds.items():
        files = tuple(stat_file(p, name) for p, name in paths if name.endswith(endings))
        if any(file.size for file in files):
            return ImageListing(Listing(kind, source.path, files), None)
    raise DataError(
        f"source {source.name!r}: {source.path} holds no images; expected {FORMATS}, or set data.images=null for text"
    )


def _list_folder(source: SourceConfig, root: Path, images: list[tuple[Path, str]]) -> ImageListing:
    """Classes are the folders in the order of their names; without any folder there are no classes."""
    flat = [name for _, name in images if "/" not in name]
    if flat and len(flat) < len(images):
        raise DataError(
            f"source {source.name!r}: {root / flat[0]} lies beside the classes' folders; put it into its class's, or take it out"
        )
    files = tuple(stat_file(path, name) for path, name in images)
    listing = Listing("image-folder", source.path, files)
    if flat:
        return ImageListing(listing, None)
    classes = sorted({name.partition("/")[0] for _, name in images}, key=os.fsencode)
    for folder in sorted(root.iterdir()):
        if folder.is_dir() and not folder.name.startswith(".") and folder.name not in classes:
            raise DataError(
                f"source {source.name!r}: class {folder.name!r} has no images; put some into {folder}, or remove the folder"
            )
    return ImageListing(listing, tuple(classes))


def plan_image_units(listing: Listing) -> tuple[Unit, ...]:
    """Cut a listing into units of similar size. Depends on the listing only."""
    aim = min(LARGEST_UNIT_BYTES, max(SMALLEST_UNIT_BYTES, listing.size // UNITS_AIMED_AT))
    if listing.kind == "image-folder":
        return tuple(group_files(listing.files, aim))
    units: list[Unit] = []
    for file in listing.files:
        length = {"image-parquet": count_row_groups, "image-builtin": _made}.get(listing.kind)
        count = length(file) if length else 0
        step = BUILTIN_UNIT_IMAGES if listing.kind == "image-builtin" else 0
        step = step or max(1, count * aim // max(1, file.size)) if count else 1
        for start in range(0, max(count, 1), step):
            stop = min(start + step, count)
            share = file.size * (stop - start) // count if count else file.size
            units.append(Unit(len(units), (file,), share, start, stop))
    return tuple(units)


def _made(file: InputFile) -> int:
    return file.size // BUILTIN_IMAGE_BYTES


def read_images(kind: str, unit: Unit, job: ImageJob) -> Iterator[ImageFile]:
    """Read one unit.

    Raises:
        DataError: a file that cannot be read, or a label that is no number.
    """
    readers = {
        "image-folder": _read_folder,
        "image-tar": _read_tar,
        "image-parquet": _read_parquet,
        "image-builtin": _read_builtin,
    }
    with naming_unreadable_files():
        yield from readers[kind](unit, job)


def _read_folder(unit: Unit, job: ImageJob) -> Iterator[ImageFile]:
    numbers = {name: number for number, name in enumerate(job.classes or ())}
    for file in unit.files:
        label = numbers[file.name.partition("/")[0]] if numbers else UNLABELLED
        yield ImageFile(file.name, label, Path(file.path).read_bytes())


def _read_tar(unit: Unit, job: ImageJob) -> Iterator[ImageFile]:
    file = unit.files[0]
    try:
        with tarfile.open(file.path, "r:*") as archive:
            for key, members in tar_samples(archive):
                yield _image_of_sample(file, key, members)
    except (tarfile.TarError, EOFError) as error:
        raise DataError(
            f"{file.path} is not a whole tar file: {error}; fetch or write it again"
        ) from error


def _image_of_sample(file: InputFile, key: str, members: dict[str, bytes]) -> ImageFile:
    by_ending = {PurePosixPath(name).suffix.lower(): raw for name, raw in members.items()}
    raw = next((by_ending[ending] for ending in IMAGE_ENDINGS if ending in by_ending), None)
    if raw is None:
        raise DataError(
            f"{file.path} sample {key} has {', '.join(sorted(members))} and no image; a sample is KEY.jpg (or another image) with "
            "KEY.cls, and KEY.txt for a caption"
        )
    label, caption = UNLABELLED, by_ending.get(".txt")
    if ".cls" in by_ending:
        text = by_ending[".cls"].strip()
        if not text.isdigit():
            raise DataError(
                f"{file.path} sample {key}: its .cls is {text[:20]!r}, not the number of a class; write it as digits"
            )
        label = int(text)
    words = None if caption is None else caption.decode("utf-8", "replace").strip()
    return ImageFile(f"{file.name}/{key}", label, raw, words)


def _read_parquet(unit: Unit, job: ImageJob) -> Iterator[ImageFile]:
    file = unit.files[0]
    arrow = import_pyarrow(file)
    with open_parquet(file) as table:
        names = table.schema_arrow.names
        if job.image_key not in names:
            raise DataError(
                f"{file.path} has no column {job.image_key!r} (it has: {', '.join(names[:8])}); set data.images.image_key to the "
                "column that holds the images"
            )
        keys = (job.image_key, job.label_key, job.caption_key)
        columns = [key for key in keys if key in names]
        for group in range(unit.start, unit.stop):
            try:
                rows = table.read_row_group(group, columns=columns).to_pylist()
            except (arrow.ArrowInvalid, OSError) as error:
                reason = str(error).splitlines()[0]
                raise DataError(
                    f"{file.path}: row group {group} is damaged: {reason}; fetch or write it again"
                ) from error
            for number, row in enumerate(rows):
                yield _image_of_row(file, f"{file.name}/{group}-{number}", row, job)


def _image_of_row(file: InputFile, name: str, row: dict[str, Any], job: ImageJob) -> ImageFile:
    value = row[job.image_key]
    raw = value.get("bytes") if isinstance(value, dict) else value
    if not isinstance(raw, bytes | None):
        raise DataError(
            f"{file.path}: column {job.image_key!r} holds {type(raw).__name__}, not the bytes of images; set data.images.image_key"
        )
    label = row.get(job.label_key)
    if label is not None and not isinstance(label, int):
        raise DataError(
            f"{file.path}: column {job.label_key!r} holds {type(label).__name__}, not numbers of classes; set data.images.label_key"
        )
    caption = row.get(job.caption_key)
    return ImageFile(
        name,
        UNLABELLED if label is None else int(label),
        raw or b"",
        None if caption is None else str(caption),
    )


def _read_builtin(unit: Unit, job: ImageJob) -> Iterator[ImageFile]:
    made = open_image_builtin(unit.files[0].path)
    for image in made.images(unit.start, unit.stop, job.held_out):
        raw = to_png(image.pixels)
        yield ImageFile(image.name, image.label, raw, image.caption, image.may_be_held_out)
