"""Token files that are already there: raw uint16 or uint32 ids, or real .npy, documents closed by
EOS.

They are used in place; preparation only finds where documents end and takes a checksum. Source of
the
layout: OLMo's data files, headerless arrays that are called .npy all the same.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ...models.errors import DataError
from .sources import InputFile, Unit
from .vocabulary import Vocabulary

__all__ = ["TokenLayout", "TokenRange", "index_range", "open_ids", "read_layout"]

NPY_MAGIC = b"\x93NUMPY"
BLOCK_IDS = 1 << 22
ID_TYPES = ("<u2", "<u4", "<i4", "<i8", "<u8")


@dataclass(frozen=True)
class TokenLayout:
    """Where ids start in a file, of which type they are, and how many there are."""

    dtype: str
    offset: int
    count: int


@dataclass(frozen=True)
class TokenRange:
    """Whole documents of a token file: ids [start, stop), their ends relative to start, and
    checksums.
    """

    start: int
    stop: int
    ends: NDArray[np.int64]
    byte_ends: NDArray[np.int64] | None
    sha256: str


def read_layout(file: InputFile, token_dtype: str) -> TokenLayout:
    """Read a .npy header, or take the file for raw ids.

    Raises:
        DataError: the array has another shape or type, or the size is no multiple of the type's.
    """
    with open(file.path, "rb") as stream:
        if stream.read(len(NPY_MAGIC)) == NPY_MAGIC:
            stream.seek(0)
            return _read_header(file, stream)
    dtype = np.dtype(token_dtype).newbyteorder("<")
    if file.size % dtype.itemsize:
        raise DataError(
            f"{file.path} has {file.size} bytes, which is no multiple of {dtype.itemsize} "
            f"({token_dtype}); "
            "it is truncated or token_dtype is wrong"
        )
    return TokenLayout(dtype.str, 0, file.size // dtype.itemsize)


def _read_header(file: InputFile, stream: Any) -> TokenLayout:
    try:
        version = np.lib.format.read_magic(stream)
        read = (
            np.lib.format.read_array_header_1_0
            if version == (1, 0)
            else np.lib.format.read_array_header_2_0
        )
        shape, _, dtype = read(stream)
    except ValueError as error:
        raise DataError(
            f"{file.path} has a damaged .npy header: {error}; fetch or write it again"
        ) from error
    if len(shape) != 1 or dtype.str not in ID_TYPES:
        raise DataError(
            f"{file.path} is an array of {dtype} with shape {shape}; token files are "
            "one-dimensional integers"
        )
    offset = stream.tell()
    if file.size != offset + shape[0] * dtype.itemsize:
        raise DataError(
            f"{file.path} is truncated: its header promises {shape[0]} ids; fetch or write it again"
        )
    return TokenLayout(dtype.str, offset, shape[0])


def open_ids(path: str, layout: TokenLayout) -> NDArray[Any]:
    """(count,) ids, memory-mapped, as a plain array."""
    if not layout.count:
        return np.empty(0, layout.dtype)
    # Slicing a memmap runs Python code for every slice; its plain view does not.
    return np.asarray(np.memmap(path, layout.dtype, "r", layout.offset, (layout.count,)))


def index_range(
    file: InputFile, layout: TokenLayout, unit: Unit, vocabulary: Vocabulary
) -> TokenRange:
    """Documents that start in the unit's range; the last one may end behind it.

    Raises:
        DataError: an id is not of this vocabulary.
    """
    ids = open_ids(file.path, layout)
    start = _next_start(ids, unit.start, vocabulary.eos_id)
    stop = _next_start(ids, unit.stop, vocabulary.eos_id)
    lengths = vocabulary.token_byte_lengths()
    digest, ends, byte_ends, held_bytes = hashlib.sha256(), [], [], 0
    for first in range(start, stop, BLOCK_IDS):
        block = ids[first : min(first + BLOCK_IDS, stop)]
        _check_ids(file, block, first, vocabulary)
        digest.update(block.data)
        found = np.flatnonzero(block == vocabulary.eos_id) + 1
        ends.append(found + (first - start))
        if lengths is not None:
            running = np.cumsum(lengths[block], dtype=np.int64) + held_bytes
            byte_ends.append(running[found - 1])
            held_bytes = int(running[-1])
    all_ends = _join(ends)
    all_byte_ends = _join(byte_ends)
    if stop > start and (not len(all_ends) or all_ends[-1] != stop - start):
        # The file's last document is not closed; it ends with the file.
        all_ends = np.append(all_ends, stop - start)
        all_byte_ends = np.append(all_byte_ends, held_bytes)
    return TokenRange(
        start, stop, all_ends, all_byte_ends if lengths is not None else None, digest.hexdigest()
    )


def _join(parts: list[NDArray[Any]]) -> NDArray[np.int64]:
    return np.concatenate([np.empty(0, np.int64), *parts]).astype(np.int64)


def _next_start(ids: NDArray[Any], position: int, eos_id: int) -> int:
    """First position at or after `position` where a document starts (or the end of the file)."""
    if position == 0:
        return 0
    for first in _blocks(position - 1, len(ids)):
        found = np.flatnonzero(ids[first : first + BLOCK_IDS] == eos_id)
        if len(found):
            return first + int(found[0]) + 1
    return len(ids)


def _blocks(start: int, stop: int) -> Iterator[int]:
    yield from range(start, stop, BLOCK_IDS)


def _check_ids(file: InputFile, block: NDArray[Any], first: int, vocabulary: Vocabulary) -> None:
    top, low = int(block.max()), int(block.min())
    if top >= vocabulary.size or low < 0:
        bad = top if top >= vocabulary.size else low
        where = first + int(np.flatnonzero(block == bad)[0])
        raise DataError(
            f"{file.path}: id {bad} at position {where} is outside the vocabulary of "
            f"{vocabulary.size} ids; "
            "check data.vocabulary and the source's token_dtype"
        )
