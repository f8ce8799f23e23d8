"""Interleaved documents as they stand in files: JSONL with a document a line, and WebDataset tar files.

A document is a list of parts. Paths in JSONL are relative to the folder of the file; members that a tar's JSON names
are members of the same tar. See docs/interleaved.md.
"""

from __future__ import annotations

import io
import json
import tarfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ....models.errors import DataError
from ..readers import line_number, naming_unreadable_files, read_lines
from ..sources import Unit
from .images import decode_image

__all__ = ["IMAGE_ENDINGS", "InterleavedDocument", "Part", "read_interleaved", "tar_samples"]

PART_KINDS = ("text", "image", "latent", "image_codes", "speech_codes")
IMAGE_ENDINGS = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif", ".tif", ".tiff")
OTHER_ENDINGS = (".txt", ".json", ".npy")

ReadMember = Callable[[str], bytes]


@dataclass(frozen=True)
class Part:
    """One part of a document.

    Args:
        kind: `text` (UTF-8 bytes), `image` ((H, W, C) uint8), `latent` ((C, H, W)), `image_codes` or `speech_codes` ((n,) int64).
        name: where it stands, for messages.
    """

    kind: str
    value: Any
    name: str

    @property
    def modality(self) -> str:
        return {"text": "text", "speech_codes": "speech"}.get(self.kind, "image")


@dataclass(frozen=True)
class InterleavedDocument:
    """Parts in order, and the key whose hash decides whether the document is held out."""

    key: bytes
    parts: tuple[Part, ...]


def read_interleaved(kind: str, unit: Unit) -> Iterator[InterleavedDocument]:
    """Read one unit of `interleaved` (JSONL) or `webdataset` (tar).

    Raises:
        DataError: a file, line or member that cannot be read; the message names it.
    """
    with naming_unreadable_files():
        yield from _read_jsonl(unit) if kind == "interleaved" else _read_tar(unit)


def _read_jsonl(unit: Unit) -> Iterator[InterleavedDocument]:
    file = unit.files[0]
    folder = Path(file.path).parent
    for position, line in read_lines(unit):

        def where(position: int = position) -> str:
            return f"{file.path} line {line_number(file, position)}"

        def read(name: str, where: Callable[[], str] = where) -> bytes:
            path = folder / name
            try:
                return path.read_bytes()
            except FileNotFoundError as error:
                raise DataError(
                    f"{where()} names {name}, which is not in {folder}; put it there or take the line out"
                ) from error

        yield InterleavedDocument(line.strip(), _parts_of(line, where, read))


def _parts_of(raw: bytes, where: Callable[[], str], read: ReadMember) -> tuple[Part, ...]:
    try:
        record = json.loads(raw)
    except ValueError as error:
        raise DataError(f"{where()} is not JSON: {error}; mend it") from error
    listed = record.get("parts") if isinstance(record, dict) else None
    if not isinstance(listed, list):
        raise DataError(
            f'{where()} has no list "parts"; a document is {{"parts": [{{"text": ...}}, {{"image": PATH}}]}}'
        )
    return tuple(_part(item, number, where, read) for number, item in enumerate(listed))


def _part(item: Any, number: int, where: Callable[[], str], read: ReadMember) -> Part:
    if not isinstance(item, dict) or len(item) != 1 or next(iter(item)) not in PART_KINDS:
        found = ", ".join(item) if isinstance(item, dict) else type(item).__name__
        raise DataError(
            f"{where()}: part {number} is ({found}); a part has one key of {', '.join(PART_KINDS)}"
        )
    kind, value = next(iter(item.items()))
    if kind.endswith("_codes"):
        return Part(kind, _codes(value, number, where), f"{where()} part {number}")
    if not isinstance(value, str):
        raise DataError(
            f"{where()}: {kind} of part {number} is {type(value).__name__}, not a string"
        )
    if kind == "text":
        return Part(kind, value.encode("utf-8", "surrogatepass"), f"{where()} part {number}")
    return _file_part(kind, value, read(value), where)


def _file_part(kind: str, name: str, raw: bytes, where: Callable[[], str]) -> Part:
    label = f"{where()}: {name}"
    return Part(kind, decode_image(raw, label) if kind == "image" else _latent(raw, label), label)


def _codes(value: Any, number: int, where: Callable[[], str]) -> NDArray[np.int64]:
    is_list = isinstance(value, list) and all(type(code) is int for code in value)
    if not is_list or not value:
        raise DataError(f"{where()}: codes of part {number} are no list of integers")
    return np.array(value, np.int64)


def _latent(raw: bytes, name: str) -> NDArray[Any]:
    try:
        values = np.load(io.BytesIO(raw), allow_pickle=False)
    except (ValueError, EOFError, OSError) as error:
        raise DataError(f"{name} is not a whole .npy file: {error}; write it again") from error
    if values.ndim != 3 or not np.issubdtype(values.dtype, np.floating):
        raise DataError(
            f"{name} is {values.dtype} of shape {values.shape}; a latent is floating point of (channels, height, width)"
        )
    return np.asarray(values)


def _read_tar(unit: Unit) -> Iterator[InterleavedDocument]:
    file = unit.files[0]
    try:
        # "r:*" also opens what is packed with gzip; members come in the order of the file.
        with tarfile.open(file.path, "r:*") as archive:
            for key, members in tar_samples(archive):
                yield _document_of_sample(file.path, file.name, key, members)
    except (tarfile.TarError, EOFError) as error:
        raise DataError(
            f"{file.path} is not a whole tar file: {error}; fetch or write it again"
        ) from error


def tar_samples(archive: tarfile.TarFile) -> Iterator[tuple[str, dict[str, bytes]]]:
    """(key, members by name) of neighbours that share the name up to the first dot of its last part."""
    key: str | None = None
    members: dict[str, bytes] = {}
    for info in archive:
        path = PurePosixPath(info.name)
        if not info.isfile() or path.name.startswith("."):
            continue
        own = str(path.with_name(path.name.partition(".")[0]))
        if own != key and members:
            yield str(key), members
            members = {}
        stream = archive.extractfile(info)
        key, members[info.name] = own, stream.read() if stream else b""
    if members:
        yield str(key), members


def _document_of_sample(
    path: str, file_name: str, key: str, members: dict[str, bytes]
) -> InterleavedDocument:
    def where() -> str:
        return f"{path} sample {key}"

    def read(name: str) -> bytes:
        for candidate in (name, str(PurePosixPath(key).parent / name), f"{key}.{name}"):
            if candidate in members:
                return members[candidate]
        raise DataError(
            f"{where()} names {name}, which is not beside it (there is {', '.join(sorted(members))}); pack it again"
        )

    by_ending = {PurePosixPath(name).suffix.lower(): name for name in members}
    identity = f"{file_name}/{key}".encode("utf-8", "surrogateescape")
    if ".json" in by_ending:
        return InterleavedDocument(identity, _parts_of(members[by_ending[".json"]], where, read))
    text, picture = (
        by_ending.get(".txt"),
        next(
            (name for ending, name in by_ending.items() if ending in (*IMAGE_ENDINGS, ".npy")), None
        ),
    )
    if text is None or picture is None:
        raise DataError(
            f"{where()} has {', '.join(sorted(members))}: a sample is KEY.txt with a picture (or .npy) of the same KEY, or "
            "KEY.json with parts; add what is missing or take the sample out"
        )
    kind = "latent" if picture.endswith(".npy") else "image"
    caption = Part("text", members[text].strip(), f"{where()}: {text}")
    return InterleavedDocument(
        identity, (caption, _file_part(kind, picture, members[picture], where))
    )
