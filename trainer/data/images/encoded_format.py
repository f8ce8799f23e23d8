"""The form of encoded images: what a trained tokenizer made of a source, in shards, and a manifest that lands last.

    DIR/plan.json                what is made: tokenizer, data, views, sizes of shards and batches; lands first
    DIR/shard_00000.codes        (images, views, codes) uint16 or uint32; or
    DIR/shard_00000.moments_8    (images at this ratio, views, 2C, h, w) float32 or float16, means then log variances
    DIR/shard_00000.rows         class, number in the source, SHA-256 of the picture's file, ratio, held out or not
    DIR/shard_00000.json         checksums of these and the fingerprint of the tokenizer; a shard without it is not there
    DIR/manifest.json            all of it together; a folder without it is not finished

A shard is a range of the source's images, so it is the same whoever makes it.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ....models.errors import DataError
from ...files import write_json
from ..token_files import TokenLayout, open_ids

__all__ = [
    "ENCODED_FORMAT",
    "ENCODED_ROW",
    "NO_RATIO",
    "EncodePlan",
    "is_encoded",
    "part_name",
    "read_encoded",
    "read_plan",
    "read_record",
    "shard_name",
    "verify_encoded",
    "write_plan",
]

ENCODED_FORMAT = "weft-encoded"
ENCODED_VERSION = 1
ENCODED_ROW = np.dtype(
    [("label", "<i8"), ("image", "<i8"), ("sha256", "V32"), ("ratio", "u1"), ("held_out", "u1")]
)
NO_RATIO = 255
LABELS = {
    "tokenizer": "another tokenizer",
    "data": "other images",
    "views": "other views",
    "scores": "other scores",
}


@dataclass(frozen=True)
class EncodePlan:
    """All that the result depends on; JSON-able.

    Args:
        kind: `codes` or `moments`.
        tokenizer: its identity, with `fingerprint`, `size` and `channels`.
        data, source: fingerprint of the prepared images, and where they came from.
        views: names of the squares taken of each picture, the middle first.
        crop_scale: pictures are resized to so many times the tokenizer's size, where views cut corners out.
        ratios: finest first; one where the tokenizer has one.
        stores: `all` ratios of each image, or that which the scores say (`scored`).
        scores: identity of the scores; None without any.
        codes: how many there are, of kind codes.
        dtype: of codes or moments.
        images, shard_images, batch_images: of the source, of a shard, of a call of the tokenizer.
    """

    kind: str
    tokenizer: dict[str, Any]
    data: str
    source: str
    views: tuple[str, ...]
    crop_scale: float
    ratios: tuple[int, ...]
    stores: str
    scores: str | None
    codes: int | None
    dtype: str
    images: int
    shard_images: int
    batch_images: int

    def content(self) -> dict[str, Any]:
        """What the result depends on; not where tokenizer and images lay."""
        content = {name: value for name, value in asdict(self).items() if name != "source"}
        known = ("fingerprint", "size", "channels")
        return content | {"tokenizer": {name: self.tokenizer[name] for name in known}}

    @property
    def key(self) -> str:
        content = self.content()
        return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()

    @property
    def shards(self) -> int:
        return -(-self.images // self.shard_images)

    def range_of(self, shard: int) -> tuple[int, int]:
        """Numbers [start, stop) of a shard's images."""
        start = shard * self.shard_images
        return start, min(start + self.shard_images, self.images)

    @property
    def parts(self) -> tuple[int | None, ...]:
        """Arrays of a shard: None is that of codes, else the ratio of moments."""
        return (None,) if self.kind == "codes" else self.ratios


def shard_name(shard: int) -> str:
    return f"shard_{shard:05d}"


def part_name(ratio: int | None) -> str:
    """Ending of the array's file."""
    return "codes" if ratio is None else f"moments_{ratio}"


def is_encoded(folder: Path) -> bool:
    return (folder / "plan.json").is_file()


def read_plan(folder: Path) -> EncodePlan:
    """What a folder of encoded images is made by.

    Raises:
        DataError: it is none.
    """
    try:
        data = json.loads((folder / "plan.json").read_bytes())
        known = data.pop("format"), data.pop("version")
    except (OSError, ValueError, KeyError) as error:
        raise DataError(
            f"{folder} holds no encoded images; make them with: weft data encode RUN SOURCE --out {folder}"
        ) from error
    if known != (ENCODED_FORMAT, ENCODED_VERSION):
        raise DataError(
            f"{folder / 'plan.json'} is not a {ENCODED_FORMAT} plan of version {ENCODED_VERSION}; encode the images again"
        )
    return EncodePlan(**{**data, "views": tuple(data["views"]), "ratios": tuple(data["ratios"])})


def write_plan(folder: Path, plan: EncodePlan) -> None:
    """Write the plan, or see that the one there is the same.

    Raises:
        DataError: the folder was begun with another plan, or holds something else.
    """
    if is_encoded(folder):
        before = read_plan(folder)
        if before.key != plan.key:
            old, new = before.content(), plan.content()
            name = next(name for name in old if old[name] != new[name])
            was, now = (_short(side[name]) for side in (old, new))
            raise DataError(
                f"{folder} was begun with {LABELS.get(name, f'another {name}')} ({was}, now {now}); give another --out, or remove it"
            )
        return
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise DataError(
            f"{folder} exists and holds no encoded images; give another --out or remove it"
        )
    folder.mkdir(parents=True, exist_ok=True)
    header = {"format": ENCODED_FORMAT, "version": ENCODED_VERSION}
    write_json(folder / "plan.json", header | asdict(plan))


def _short(value: Any) -> str:
    if isinstance(value, Mapping):
        return str(value.get("fingerprint", value))[:12]
    return str(value)[:40]


def read_record(folder: Path, plan: EncodePlan, shard: int) -> dict[str, Any] | None:
    """A shard's record where the shard is finished, whole and of this plan."""
    path = folder / f"{shard_name(shard)}.json"
    try:
        record: dict[str, Any] = json.loads(path.read_bytes())
    except (OSError, ValueError):
        return None
    if record["plan"] != plan.key:
        return None
    for name, entry in record["files"].items():
        file = folder / name
        if not file.is_file() or file.stat().st_size != entry["bytes"]:
            return None
    return record


def read_encoded(folder: Path) -> tuple[EncodePlan, dict[str, Any]]:
    """Plan and manifest of a finished folder, checked against the sizes of its files.

    Raises:
        DataError: unfinished, or a file is missing, of another size, or of another tokenizer.
    """
    plan = read_plan(folder)
    try:
        manifest = json.loads((folder / "manifest.json").read_bytes())
    except (OSError, ValueError) as error:
        done = sum(read_record(folder, plan, shard) is not None for shard in range(plan.shards))
        raise DataError(
            f"{folder} is not finished: {done} of {plan.shards} shards are encoded; run weft data encode again to go on"
        ) from error
    for record in manifest["shards"]:
        if record["tokenizer"] != plan.tokenizer["fingerprint"]:
            raise DataError(
                f"{folder}: shard {record['shard']} is of another tokenizer ({record['tokenizer'][:12]}, the others "
                f"{plan.tokenizer['fingerprint'][:12]}); remove its .json and encode again"
            )
        for name, entry in record["files"].items():
            path = folder / name
            found = path.stat().st_size if path.is_file() else None
            if found != entry["bytes"]:
                what = "is missing" if found is None else f"has {found} bytes, not {entry['bytes']}"
                raise DataError(
                    f"{path} {what}: it changed after it was encoded; restore it or encode again"
                )
    return plan, manifest


def verify_encoded(folder: Path) -> None:
    """Check every byte against the checksums.

    Raises:
        DataError: names the first file that differs.
    """
    _, manifest = read_encoded(folder)
    for record in manifest["shards"]:
        for name, content in open_files(folder, record):
            if (
                hashlib.sha256(np.ascontiguousarray(content).data).hexdigest()
                != (record["files"][name]["sha256"])
            ):
                raise DataError(
                    f"{folder / name} does not match its checksum; restore it, or remove its shard's .json and manifest.json and "
                    "encode again"
                )


def open_files(folder: Path, record: Mapping[str, Any]) -> Iterator[tuple[str, NDArray[np.uint8]]]:
    """(name, bytes) of each file of a shard, memory-mapped."""
    for name, entry in record["files"].items():
        yield name, open_ids(str(folder / name), TokenLayout("|u1", 0, entry["bytes"]))
