"""The prepared form of a source: raw id files, document ends, and a manifest that lands last.

    DIR/shard_00000.ids     ids, little-endian uint16 or uint32, documents one after another
    DIR/shard_00000.ends    int64, where each document ends, counted from the shard's start
    DIR/shard_00000.patches one bit an id, where patches were stored: see patches.py
    DIR/manifest.json       counts and SHA-256 of every shard, vocabulary, held-out documents,
    fingerprint

Token files that were there before are named in the manifest and stay where they are.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ...models.errors import DataError
from ..files import write_json
from .token_files import TokenLayout, open_ids

__all__ = [
    "FORMAT_VERSION",
    "MANIFEST",
    "Manifest",
    "Shard",
    "content_fingerprint",
    "read_manifest",
    "verify_prepared",
]

FORMAT = "weft-dataset"
FORMAT_VERSION = 1
PATCHES_VERSION = 2
"""Of a dataset with stored patches; one without them is written, and known, as it was before there were any."""
MANIFEST = "manifest.json"


@dataclass(frozen=True)
class Shard:
    """Whole documents in one id file.

    Args:
        ids: file name inside the dataset, or an absolute path where ids are used in place.
        ends: file name of the document ends.
        dtype: NumPy type of the ids.
        offset: byte at which the ids start.
        tokens, documents, bytes: totals; bytes are those of the text (0 where the vocabulary cannot
            say).
        file_bytes: size of the id file, to notice a change at once.
        patches: file name of the patch starts; empty where none are stored.
    """

    ids: str
    ends: str
    dtype: str
    offset: int
    tokens: int
    documents: int
    bytes: int
    file_bytes: int
    ids_sha256: str
    ends_sha256: str
    patches: str = ""
    patches_sha256: str = ""

    def open_ids(self, folder: Path) -> NDArray[Any]:
        """(tokens,) memory-mapped."""
        return open_ids(str(folder / self.ids), TokenLayout(self.dtype, self.offset, self.tokens))

    def open_ends(self, folder: Path) -> NDArray[np.int64]:
        """(documents,) int64, memory-mapped."""
        return open_ids(str(folder / self.ends), TokenLayout("<i8", 0, self.documents))

    def open_patches(self, folder: Path) -> NDArray[np.uint8]:
        """(ceil(tokens / 8),) uint8, memory-mapped."""
        return open_ids(str(folder / self.patches), TokenLayout("|u1", 0, -(-self.tokens // 8)))

    def dump(self) -> dict[str, Any]:
        return {name: value for name, value in asdict(self).items() if value != ""}


@dataclass(frozen=True)
class Manifest:
    """Everything about a prepared dataset but its ids.

    Args:
        plan: hash of the inputs and settings it was made from.
        held_out: (shard, document, bytes) of documents that are kept for evaluation.
        dropped: documents left out, by reason.
        patches: identity of the patcher, the length of its rows included; None where no patches are stored.
    """

    plan: str
    source: str
    kind: str
    vocabulary: dict[str, Any]
    shards: tuple[Shard, ...]
    held_out: tuple[tuple[int, int, int], ...]
    dropped: dict[str, int] = field(default_factory=dict)
    fingerprint: str = ""
    patches: dict[str, Any] | None = None

    @property
    def tokens(self) -> int:
        return sum(shard.tokens for shard in self.shards)

    @property
    def documents(self) -> int:
        return sum(shard.documents for shard in self.shards)

    @property
    def bytes(self) -> int:
        return sum(shard.bytes for shard in self.shards)

    def write(self, folder: Path) -> None:
        version = FORMAT_VERSION if self.patches is None else PATCHES_VERSION
        data = {"format": FORMAT, "version": version, **asdict(self)}
        data["shards"] = [shard.dump() for shard in self.shards]
        if self.patches is None:
            del data["patches"]
        data["totals"] = {"tokens": self.tokens, "documents": self.documents, "bytes": self.bytes}
        write_json(folder / MANIFEST, data)


def content_fingerprint(
    vocabulary: Mapping[str, Any],
    shards: tuple[Shard, ...],
    held_out: object,
    patches: Mapping[str, Any] | None = None,
) -> str:
    """SHA-256 over what training sees: ids, document ends, what is held out, what the ids mean, and
    stored patches with who made them.
    """
    content = [
        [shard.ids_sha256, shard.ends_sha256, shard.dtype] for shard in shards if shard.tokens
    ]
    parts: list[Any] = [FORMAT_VERSION, dict(vocabulary), content, held_out]
    if patches is not None:
        parts += [dict(patches), [shard.patches_sha256 for shard in shards if shard.tokens]]
    payload = json.dumps(parts, sort_keys=True)
    return hashlib.sha256(payload.encode()).hexdigest()


def read_manifest(folder: Path) -> Manifest:
    """Read and check a prepared dataset's manifest against the files beside it.

    Raises:
        DataError: no dataset, another version, or a file missing or of another size.
    """
    try:
        data = json.loads((folder / MANIFEST).read_bytes())
    except FileNotFoundError as error:
        raise DataError(
            f"{folder} is not a prepared dataset (no {MANIFEST}); make one with: weft data prepare "
            f"SOURCE --out {folder}"
        ) from error
    except (OSError, ValueError) as error:
        raise DataError(
            f"{folder / MANIFEST} cannot be read: {error}; prepare the dataset again"
        ) from error
    if (
        not isinstance(data, dict)
        or data.get("format") != FORMAT
        or data.get("version") not in (FORMAT_VERSION, PATCHES_VERSION)
    ):
        raise DataError(
            f"{folder / MANIFEST} is not a {FORMAT} manifest of version {FORMAT_VERSION} or "
            f"{PATCHES_VERSION}; prepare the dataset again"
        )
    shards = tuple(Shard(**item) for item in data["shards"])
    held_out = tuple((int(a), int(b), int(c)) for a, b, c in data["held_out"])
    names = ("plan", "source", "kind", "vocabulary", "dropped", "fingerprint")
    manifest = Manifest(
        shards=shards,
        held_out=held_out,
        patches=data.get("patches"),
        **{name: data[name] for name in names},
    )
    _check_sizes(folder, shards)
    return manifest


def _check_sizes(folder: Path, shards: tuple[Shard, ...]) -> None:
    for shard in shards:
        files = [(shard.ids, shard.file_bytes), (shard.ends, shard.documents * 8)]
        if shard.patches:
            files.append((shard.patches, -(-shard.tokens // 8)))
        for name, expected in files:
            path = folder / name
            found = path.stat().st_size if path.is_file() else None
            if found != expected:
                what = "is missing" if found is None else f"has {found} bytes, not {expected}"
                raise DataError(
                    f"{path} {what}: the dataset changed after it was prepared; restore the file "
                    "or prepare it again"
                )


def verify_prepared(folder: Path) -> Manifest:
    """Check every byte of a prepared dataset against its checksums.

    Raises:
        DataError: names the first file that differs.
    """
    manifest = read_manifest(folder)
    for shard in manifest.shards:
        files = [
            (shard.ids, shard.open_ids(folder), shard.ids_sha256),
            (shard.ends, shard.open_ends(folder), shard.ends_sha256),
        ]
        if shard.patches:
            files.append((shard.patches, shard.open_patches(folder), shard.patches_sha256))
        for name, array, expected in files:
            if hashlib.sha256(np.ascontiguousarray(array).data).hexdigest() != expected:
                raise DataError(
                    f"{folder / name} does not match its checksum; restore it or prepare it again"
                )
    return manifest
