"""Documents of a unit, one after another, from text files, JSONL (plain, gzip, zstd) and Parquet.

A document is its bytes and a key; the key is what a held-out choice hashes, the name of a file or the
text of a record. A file that is not text (it has a NUL byte early on) is reported with no bytes.
"""

from __future__ import annotations

import gzip
import io
import json
import zlib
from collections.abc import Iterator
from typing import IO, Any, NamedTuple

from ...models.errors import DataError, LaunchError
from .sources import InputFile, Unit

__all__ = ["Document", "count_row_groups", "read_documents"]

LOOK_FOR_NUL_BYTES = 8192


class Document(NamedTuple):
    """One document; `text` is None where the file turned out not to be text."""

    key: bytes
    text: bytes | None


def read_documents(kind: str, unit: Unit, text_key: str) -> Iterator[Document]:
    """Read one unit.

    Raises:
        DataError: a file that cannot be read; the message names file and line.
    """
    readers = {"text": _read_text, "jsonl": _read_jsonl, "parquet": _read_parquet}
    try:
        yield from readers[kind](unit, text_key)
    except OSError as error:
        if error.filename is None:
            raise
        raise DataError(f"cannot read {error.filename}: {error.strerror}; mend its permissions or remove it") from error


def _read_text(unit: Unit, text_key: str) -> Iterator[Document]:
    for file in unit.files:
        with open(file.path, "rb") as stream:
            text = stream.read()
        is_binary = b"\0" in text[:LOOK_FOR_NUL_BYTES]
        yield Document(file.name.encode("utf-8", "surrogateescape"), None if is_binary else text)


def _read_jsonl(unit: Unit, text_key: str) -> Iterator[Document]:
    file = unit.files[0]
    if file.path.endswith((".gz", ".zst")):
        lines = enumerate(_compressed_lines(file), start=1)
    else:
        lines = _lines_of_range(file, unit.start, unit.stop)
    for position, line in lines:
        if not line.strip():
            continue
        text = _text_of_line(file, position, line, text_key)
        yield Document(text, text)


def _lines_of_range(file: InputFile, start: int, stop: int) -> Iterator[tuple[int, bytes]]:
    """Lines that begin in [start, stop), each with the offset it begins at, as a negative number less one.

    Negative so that an error can tell an offset, which it turns into a line number, from a line number.
    """
    with open(file.path, "rb") as stream:
        if start:
            stream.seek(start - 1)
            stream.readline()
        offset = stream.tell()
        while offset < stop:
            line = stream.readline()
            if not line:
                return
            yield -offset - 1, line
            offset += len(line)


def _compressed_lines(file: InputFile) -> Iterator[bytes]:
    reader = _gzip_lines if file.path.endswith(".gz") else _zstd_lines
    yield from reader(file)


def _gzip_lines(file: InputFile) -> Iterator[bytes]:
    try:
        with gzip.open(file.path, "rb") as stream:
            yield from stream
    except (gzip.BadGzipFile, EOFError, zlib.error) as error:
        raise DataError(f"{file.path} is not a whole gzip file: {error}; fetch or write it again") from error


def _zstd_lines(file: InputFile) -> Iterator[bytes]:
    try:
        import zstandard
    except ImportError as error:
        raise LaunchError(
            f"{file.name} needs the zstandard package; install it with: pip install 'weft[data]'"
        ) from error
    try:
        with open(file.path, "rb") as raw:
            _check_zstd_end(file, raw, zstandard)
            raw.seek(0)
            reader = zstandard.ZstdDecompressor().stream_reader(raw, read_across_frames=True)
            yield from io.BufferedReader(reader, 1 << 20)
    except zstandard.ZstdError as error:
        raise DataError(f"{file.path} is not a whole zstd file: {error}; fetch or write it again") from error


def _check_zstd_end(file: InputFile, raw: IO[bytes], zstandard: Any) -> None:
    """A stream reader takes the end of a truncated file for the end of its text, so look before reading."""
    worker = zstandard.ZstdDecompressor().decompressobj()
    while block := raw.read(1 << 20):
        while block:
            worker.decompress(block)
            if not worker.eof:
                break
            block = worker.unused_data
            worker = zstandard.ZstdDecompressor().decompressobj()
            started = bool(block)
            if not started:
                break
    if raw.tell() and _is_inside_frame(worker):
        raise DataError(f"{file.path} is not a whole zstd file: it ends inside a frame; fetch or write it again")
