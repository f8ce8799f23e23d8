"""The prepared form of a source: raw id files, document ends, and a manifest that lands last.

    DIR/shard_00000.ids     ids, little-endian uint16 or uint32, documents one after another
    DIR/shard_00000.ends    int64, where each document ends, counted from the shard's start
    DIR/shard_00000.patches one bit an id, where patches were stored: see patches.py
    DIR/shard_00000.spans   interleaved documents: int64 (start, length, modality, image number) of what is no text
    DIR/shard_00000.latents interleaved documents: raw float16 or float32 latents, image after image
    DIR/shard_00000.rows    images: class, height, width and SHA-256 of each; its .ids are the bytes of their files
    DIR/shard_00000.names   images: a JSON line of name and caption each
    DIR/manifest.json       counts and SHA-256 of every shard, vocabulary, held-out documents,
    fingerprint

Token files that were there before are named in the manifest and stay where they are.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
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
    "IMAGE_ROW",
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
INTERLEAVED_VERSION = 3
"""Of a dataset with images or speech."""
IMAGES_VERSION = 4
"""Of a dataset of images with classes, whose ids are the bytes of their files."""
VERSIONS = (FORMAT_VERSION, PATCHES_VERSION, INTERLEAVED_VERSION, IMAGES_VERSION)
IMAGE_ROW = np.dtype([("label", "<i8"), ("height", "<i4"), ("width", "<i4"), ("sha256", "V32")])
"""What is known of an image beside its file; a label of -1 is none."""
SPAN_COLUMNS = 4
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
        spans: file name of the stretches that are no text; empty in a dataset of text alone.
        span_count: how many there are.
        latents: file name of the latents; empty where there are none.
        images: images of the shard.
        latent_bytes: size of the latents' file.
        rows: file name of what is known of each image; empty where documents are no images.
        names: file name of the images' names and captions.
        name_bytes: its size.
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
    spans: str = ""
    spans_sha256: str = ""
    span_count: int = 0
    latents: str = ""
    latents_sha256: str = ""
    latent_bytes: int = 0
    images: int = 0
    rows: str = ""
    rows_sha256: str = ""
    names: str = ""
    names_sha256: str = ""
    name_bytes: int = 0

    def open_ids(self, folder: Path) -> NDArray[Any]:
        """(tokens,) memory-mapped."""
        return open_ids(str(folder / self.ids), TokenLayout(self.dtype, self.offset, self.tokens))

    def open_ends(self, folder: Path) -> NDArray[np.int64]:
        """(documents,) int64, memory-mapped."""
        return open_ids(str(folder / self.ends), TokenLayout("<i8", 0, self.documents))

    def open_patches(self, folder: Path) -> NDArray[np.uint8]:
        """(ceil(tokens / 8),) uint8, memory-mapped."""
        return open_ids(str(folder / self.patches), TokenLayout("|u1", 0, -(-self.tokens // 8)))

    def open_spans(self, folder: Path) -> NDArray[np.int64]:
        """(N, 4) int64, memory-mapped: start, length, modality (as `MODALITIES` has them), number of the image or -1."""
        layout = TokenLayout("<i8", 0, self.span_count * SPAN_COLUMNS)
        flat = open_ids(str(folder / self.spans), layout) if self.spans else np.empty(0, "<i8")
        return flat.reshape(-1, SPAN_COLUMNS)

    def open_latents(self, folder: Path, dtype: str, shape: Sequence[int]) -> NDArray[Any]:
        """(images, C, H, W), memory-mapped."""
        if not self.latents:
            return np.empty((0, *shape), dtype)
        layout = TokenLayout(np.dtype(dtype).str, 0, self.latent_bytes // np.dtype(dtype).itemsize)
        return open_ids(str(folder / self.latents), layout).reshape(-1, *shape)

    def open_rows(self, folder: Path) -> NDArray[Any]:
        """(documents,) of `IMAGE_ROW`, memory-mapped."""
        size = self.documents * IMAGE_ROW.itemsize
        return open_ids(str(folder / self.rows), TokenLayout("|u1", 0, size)).view(IMAGE_ROW)

    def read_names(self, folder: Path) -> list[tuple[str, str | None]]:
        """(name, caption) of each image."""
        with open(folder / self.names, encoding="utf-8") as lines:
            return [(name, caption) for name, caption in map(json.loads, lines)]

    def files(self) -> list[tuple[str, int, str]]:
        """(name, bytes, SHA-256) of each of its files but the ids, which may lie elsewhere."""
        found = [(self.ends, self.documents * 8, self.ends_sha256)]
        if self.patches:
            found.append((self.patches, -(-self.tokens // 8), self.patches_sha256))
        if self.spans:
            found.append((self.spans, self.span_count * SPAN_COLUMNS * 8, self.spans_sha256))
        if self.latents:
            found.append((self.latents, self.latent_bytes, self.latents_sha256))
        if self.rows:
            found.append((self.rows, self.documents * IMAGE_ROW.itemsize, self.rows_sha256))
            found.append((self.names, self.name_bytes, self.names_sha256))
        return found

    def dump(self) -> dict[str, Any]:
        """JSON-able; what is not there is left out."""
        optional = ("patches", "spans", "latents", "images", "latent_bytes", "rows", "name")
        return {
            name: value
            for name, value in asdict(self).items()
            if value or (not name.startswith(optional) and name != "span_count")
        }


@dataclass(frozen=True)
class Manifest:
    """Everything about a prepared dataset but its ids.

    Args:
        plan: hash of the inputs and settings it was made from.
        held_out: (shard, document, bytes) of documents that are kept for evaluation.
        dropped: documents left out, by reason.
        patches: identity of the patcher, the length of its rows included; None where no patches are stored.
        interleaved: what is stored of images and speech, see `interleaved/manifest.py`; None for text alone.
        images: classes and counts of a dataset of images, see `images/writer.py`; None for any other.
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
    interleaved: dict[str, Any] | None = None
    images: dict[str, Any] | None = None

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
        version = version if self.interleaved is None else INTERLEAVED_VERSION
        version = version if self.images is None else IMAGES_VERSION
        data = {"format": FORMAT, "version": version, **asdict(self)}
        data["shards"] = [shard.dump() for shard in self.shards]
        for name in ("patches", "interleaved", "images"):
            if data[name] is None:
                del data[name]
        data["totals"] = {"tokens": self.tokens, "documents": self.documents, "bytes": self.bytes}
        write_json(folder / MANIFEST, data)


def content_fingerprint(
    vocabulary: Mapping[str, Any],
    shards: tuple[Shard, ...],
    held_out: object,
    patches: Mapping[str, Any] | None = None,
    interleaved: Mapping[str, Any] | None = None,
    images: Mapping[str, Any] | None = None,
) -> str:
    """SHA-256 over what training sees: ids, document ends, what is held out, what the ids mean,
    stored patches with who made them, and what is stored of images and speech.

    Args:
        images: names of the classes, of a dataset of images.
    """
    content = [
        [shard.ids_sha256, shard.ends_sha256, shard.dtype] for shard in shards if shard.tokens
    ]
    parts: list[Any] = [FORMAT_VERSION, dict(vocabulary), content, held_out]
    if patches is not None:
        parts += [dict(patches), [shard.patches_sha256 for shard in shards if shard.tokens]]
    if interleaved is not None:
        parts += [
            dict(interleaved),
            [[s.spans_sha256, s.latents_sha256] for s in shards if s.tokens],
        ]
    if images is not None:
        parts += [dict(images), [shard.rows_sha256 for shard in shards if shard.tokens]]
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
        or data.get("version") not in VERSIONS
    ):
        raise DataError(
            f"{folder / MANIFEST} is not a {FORMAT} manifest of version {VERSIONS[0]} to "
            f"{VERSIONS[-1]}; prepare the dataset again"
        )
    shards = tuple(Shard(**item) for item in data["shards"])
    held_out = tuple((int(a), int(b), int(c)) for a, b, c in data["held_out"])
    names = ("plan", "source", "kind", "vocabulary", "dropped", "fingerprint")
    manifest = Manifest(
        shards=shards,
        held_out=held_out,
        patches=data.get("patches"),
        interleaved=data.get("interleaved"),
        images=data.get("images"),
        **{name: data[name] for name in names},
    )
    _check_sizes(folder, shards)
    return manifest


def _check_sizes(folder: Path, shards: tuple[Shard, ...]) -> None:
    for shard in shards:
        files = [(shard.ids, shard.file_bytes, ""), *shard.files()]
        for name, expected, _ in files:
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
        files = [(shard.ids, shard.open_ids(folder), shard.ids_sha256)]
        for name, size, expected in shard.files():
            files.append(
                (name, open_ids(str(folder / name), TokenLayout("|u1", 0, size)), expected)
            )
        for name, array, expected in files:
            if hashlib.sha256(np.ascontiguousarray(array).data).hexdigest() != expected:
                raise DataError(
                    f"{folder / name} does not match its checksum; restore it or prepare it again"
                )
    return manifest
