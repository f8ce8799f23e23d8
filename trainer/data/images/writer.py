"""One unit of images to a shard of the files' own bytes, with what is known of each; and the manifest's entry of all.

The files are kept as they came: they are a fifth to a half of the pixels' size at the published resolutions, any crop and
any size can still be cut out of them, and a score or a code can be told to belong to exactly this picture. Every one is
decoded once here, so that training meets none that cannot be.

A picture that cannot be decoded is written into the quarantine log and replaced by the next one of its class in its unit
(the one before, the next of any class, where there is none), so that neither places nor shares of classes change.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from ....models.errors import DataError
from ..hashed_file import HashedFile, write_hashed
from ..interleaved.images import decode_image
from ..shard_writer import Found, UnitJob
from ..shards import IMAGE_ROW, Shard
from ..sources import Unit
from .reading import UNLABELLED, ImageFile, read_images

__all__ = ["QUARANTINE", "join_image_records", "store_images"]

QUARANTINE = "quarantine.jsonl"
KEY_BYTES = 8


@dataclass(frozen=True)
class _Read:
    """A picture that was read: its file without the bytes, their number and SHA-256, height and width, and why it cannot be
    decoded, "" where it can.
    """

    image: ImageFile
    size: int
    sha256: bytes
    shape: tuple[int, int]
    reason: str


def store_images(job: UnitJob, unit: Unit, folder: Path) -> Found:
    """Write the files, rows and names of one unit.

    Raises:
        DataError: the unit's files cannot be read.
    """
    assert job.images is not None
    name = f"shard_{unit.index:05d}"
    read: list[_Read] = []
    with HashedFile(folder / f"{name}.ids") as out:
        for image in read_images(job.kind, unit, job.images):
            read.append(_look_at(image))
            out.write(image.raw)
    chosen = _with_replacements(read)
    if chosen != list(range(len(read))):
        starts = np.cumsum([0, *(item.size for item in read)]).tolist()
        with (
            open(folder / f"{name}.ids", "rb") as before,
            HashedFile(folder / f"{name}.ids") as out,
        ):
            for place in chosen:
                before.seek(starts[place])
                out.write(before.read(read[place].size))
    return _record(folder, name, out, read, chosen)


def _look_at(image: ImageFile) -> _Read:
    digest, shape, reason = hashlib.sha256(image.raw).digest(), (0, 0), ""
    try:
        pixels = decode_image(image.raw, image.name)
        shape = (pixels.shape[0], pixels.shape[1])
    except DataError as error:
        reason = str(error).removeprefix(f"{image.name} is not an image that can be read: ")
        reason = reason.rpartition(";")[0]
    return _Read(image._replace(raw=b""), len(image.raw), digest, shape, reason)


def _record(
    folder: Path, name: str, out: HashedFile, read: Sequence[_Read], chosen: Sequence[int]
) -> Found:
    """Write what belongs to the files that were chosen."""
    stored = [read[place] for place in chosen]
    rows = np.array([(s.image.label, *s.shape, s.sha256) for s in stored], IMAGE_ROW)
    names = [json.dumps([s.image.name, s.image.caption], ensure_ascii=False) for s in stored]
    text = "".join(f"{line}\n" for line in names).encode()
    ends = np.cumsum([s.size for s in stored], dtype=np.int64)
    shard = Shard(
        ids=f"{name}.ids",
        ends=f"{name}.ends",
        dtype="|u1",
        offset=0,
        tokens=out.size,
        documents=len(stored),
        bytes=out.size,
        file_bytes=out.size,
        ids_sha256=out.sha256,
        ends_sha256=write_hashed(folder / f"{name}.ends", ends.astype("<i8").tobytes()),
        rows=f"{name}.rows",
        rows_sha256=write_hashed(folder / f"{name}.rows", rows.tobytes()),
        names=f"{name}.names",
        names_sha256=write_hashed(folder / f"{name}.names", text),
        name_bytes=len(text),
    )
    # By content: copies of a picture are held out together.
    candidates = [
        (int.from_bytes(s.sha256[:KEY_BYTES], "big"), i, s.size)
        for i, s in enumerate(stored)
        if s.image.may_be_held_out
    ]
    log = [
        {
            "shard": name,
            "place": place,
            "name": item.image.name,
            "class": item.image.label,
            "bytes": item.size,
            "reason": item.reason,
            "replaced_by": read[chosen[place]].image.name if chosen else None,
        }
        for place, item in enumerate(read)
        if item.reason
    ]
    smallest = min(stored, key=lambda s: min(s.shape), default=None)
    labels, counts = np.unique(rows["label"], return_counts=True)
    more = {
        "read": len(read),
        "quarantine": log,
        "class_counts": {str(k): int(n) for k, n in zip(labels, counts, strict=True)},
        "smallest": [*smallest.shape, smallest.image.name] if smallest else None,
    }
    return Found(shard, candidates, {}, more)


def _with_replacements(read: Sequence[_Read]) -> list[int]:
    """For each place the place of the picture that is stored there; none where no picture of the unit is good."""
    good = [place for place, item in enumerate(read) if not item.reason]
    if not good:
        return []

    def instead_of(place: int) -> int:
        label = read[place].image.label
        return min(good, key=lambda g: (read[g].image.label != label, g < place, abs(g - place)))

    return [instead_of(place) if item.reason else place for place, item in enumerate(read)]


def join_image_records(
    records: Sequence[Mapping[str, Any]],
    classes: Sequence[str] | None,
    title: str,
    max_bad_share: float,
    folder: Path,
) -> dict[str, Any]:
    """The manifest's entry from the records of all units; writes the quarantine log into `folder`.

    Raises:
        DataError: too many pictures cannot be read, or some have a class and others none.
    """
    quarantine = [item for record in records for item in record["quarantine"]]
    read = sum(record["read"] for record in records)
    if len(quarantine) > max_bad_share * read:
        first = quarantine[0]
        raise DataError(
            f"{title}: {len(quarantine)} of {read} images cannot be read, more than data.images.max_bad_share={max_bad_share:g} "
            f"allows; the first is {first['name']} ({first['reason']}); mend or remove them, or raise it"
        )
    counts: dict[int, int] = {}
    for record in records:
        for label, number in record["class_counts"].items():
            counts[int(label)] = counts.get(int(label), 0) + number
    if UNLABELLED in counts and len(counts) > 1:
        raise DataError(
            f"{title}: {counts[UNLABELLED]} images have no class and {read - counts[UNLABELLED]} have one; give all of them one, "
            "or none"
        )
    labelled = UNLABELLED not in counts
    number = len(classes) if classes else max(counts, default=-1) + 1
    log = "".join(f"{json.dumps(item)}\n" for item in quarantine).encode()
    return {
        "classes": list(classes) if classes else None,
        "class_counts": [counts.get(label, 0) for label in range(number)] if labelled else [],
        "smallest": min(
            (r["smallest"] for r in records if r["smallest"]), key=lambda s: min(s[:2])
        ),
        "quarantined": len(quarantine),
        "files": {QUARANTINE: write_hashed(folder / QUARANTINE, log)} if quarantine else {},
    }
