"""Documents of a unit, one after another, from text files, JSONL (plain, gzip, zstd) and Parquet.

A document is its bytes and a key; the key is what a held-out choice hashes, the name of a file or
the text of a record. A file that is not text (it has a NUL byte early on) is reported with no
bytes.
"""

from __future__ import annotations

import gzip
import json
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

from ...models.errors import DataError, LaunchError
from .sources import InputFile, Unit

__all__ = [
    "Document",
    "count_row_groups",
    "import_pyarrow",
    "line_number",
    "naming_unreadable_files",
    "open_parquet",
    "read_documents",
    "read_lines",
]

LOOK_FOR_NUL_BYTES = 8192
COMPRESSED_BLOCK_BYTES = 1 << 17


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
    with naming_unreadable_files():
        yield from readers[kind](unit, text_key)


@contextmanager
def naming_unreadable_files() -> Iterator[None]:
    """A file that the system does not let us read becomes a DataError that names it."""
    try:
        yield
    except OSError as error:
        if error.filename is None:
            raise
        raise DataError(
            f"cannot read {error.filename}: {error.strerror}; mend its permissions or remove it"
        ) from error


def _read_text(unit: Unit, text_key: str) -> Iterator[Document]:
    for file in unit.files:
        with open(file.path, "rb") as stream:
            text = stream.read()
        is_binary = b"\0" in text[:LOOK_FOR_NUL_BYTES]
        yield Document(file.name.encode("utf-8", "surrogateescape"), None if is_binary else text)


def _read_jsonl(unit: Unit, text_key: str) -> Iterator[Document]:
    for position, line in read_lines(unit):
        text = _text_of_line(unit.files[0], position, line, text_key)
        yield Document(text, text)


def read_lines(unit: Unit) -> Iterator[tuple[int, bytes]]:
    """Lines of a unit of JSONL that are not blank, with positions of which `line_number` makes line numbers."""
    file = unit.files[0]
    if file.path.endswith((".gz", ".zst")):
        lines: Iterator[tuple[int, bytes]] = enumerate(_compressed_lines(file), start=1)
    else:
        lines = _lines_of_range(file, unit.start, unit.stop)
    for position, line in lines:
        if line.strip():
            yield position, line


def _lines_of_range(file: InputFile, start: int, stop: int) -> Iterator[tuple[int, bytes]]:
    """Lines that begin in [start, stop), each with -1 - (the offset it begins at).

    Negative, so that an error can tell an offset, of which it makes a line number, from one.
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
        raise DataError(
            f"{file.path} is not a whole gzip file: {error}; fetch or write it again"
        ) from error


def _zstd_lines(file: InputFile) -> Iterator[bytes]:
    carried = b""
    for block in _zstd_blocks(file):
        lines = (carried + block).split(b"\n")
        carried = lines.pop()
        yield from lines
    if carried:
        yield carried


def _zstd_blocks(file: InputFile) -> Iterator[bytes]:
    """Decompressed pieces. By hand, because zstandard's stream reader takes a truncated file for a
    whole one.
    """
    try:
        import zstandard
    except ImportError as error:
        raise LaunchError(
            f"{file.name} needs the zstandard package; install it with: pip install 'weft[data]'"
        ) from error
    frame = None
    try:
        with open(file.path, "rb") as raw:
            while block := raw.read(COMPRESSED_BLOCK_BYTES):
                while block:
                    frame = frame or zstandard.ZstdDecompressor().decompressobj()
                    yield frame.decompress(block)
                    block = frame.unused_data if frame.eof else b""
                    frame = None if frame.eof else frame
    except zstandard.ZstdError as error:
        raise DataError(
            f"{file.path} is not a whole zstd file: {error}; fetch or write it again"
        ) from error
    if frame is not None:
        raise DataError(
            f"{file.path} is not a whole zstd file: it ends inside a frame; fetch or write it again"
        )


def _text_of_line(file: InputFile, position: int, line: bytes, text_key: str) -> bytes:
    """The text of one record; an empty one where the field is null."""
    try:
        record = json.loads(line)
    except ValueError as error:
        raise DataError(
            f"{file.path} line {line_number(file, position)} is not JSON: {error}; mend the line "
            "or the file"
        ) from error
    if not isinstance(record, dict) or text_key not in record:
        fields = (
            ", ".join(sorted(record)[:8]) if isinstance(record, dict) else type(record).__name__
        )
        raise DataError(
            f"{file.path} line {line_number(file, position)} has no field {text_key!r} (it has: "
            f"{fields}); "
            "set text_key to the field that holds the text"
        )
    text = record[text_key]
    if text is not None and not isinstance(text, str):
        raise DataError(
            f"{file.path} line {line_number(file, position)}: field {text_key!r} is "
            f"{type(text).__name__}, "
            "not text; set text_key to the field that holds the text"
        )
    return (text or "").encode("utf-8", "surrogatepass")


def line_number(file: InputFile, position: int) -> int:
    """Line of a position: itself where it counts lines, else the lines before a byte offset."""
    if position > 0:
        return position
    left, lines = -position - 1, 1
    with open(file.path, "rb") as stream:
        while left and (block := stream.read(min(left, 1 << 20))):
            lines += block.count(b"\n")
            left -= len(block)
    return lines


def import_pyarrow(file: InputFile) -> Any:
    """The package, with what reads Parquet.

    Raises:
        LaunchError: it is missing.
    """
    try:
        import pyarrow
        import pyarrow.parquet
        import pyarrow.types
    except ImportError as error:
        raise LaunchError(
            f"{file.name} needs the pyarrow package; install it with: pip install 'weft[data]'"
        ) from error
    return pyarrow


def open_parquet(file: InputFile) -> Any:
    """The file as pyarrow's `ParquetFile`.

    Raises:
        DataError: it is damaged.
    """
    arrow = import_pyarrow(file)
    try:
        return arrow.parquet.ParquetFile(file.path)
    except (arrow.ArrowInvalid, EOFError) as error:
        reason = str(error).splitlines()[0]
        raise DataError(
            f"{file.path} is not a whole Parquet file: {reason}; fetch or write it again"
        ) from error


def count_row_groups(file: InputFile) -> int:
    """Row groups of a Parquet file: the smallest parts that can be read alone."""
    with open_parquet(file) as table:
        return int(table.num_row_groups)


def _read_parquet(unit: Unit, text_key: str) -> Iterator[Document]:
    file = unit.files[0]
    arrow = import_pyarrow(file)
    with open_parquet(file) as table:
        _check_column(arrow, file, table.schema_arrow, text_key)
        for group in range(unit.start, unit.stop):
            try:
                column = table.read_row_group(group, columns=[text_key]).column(0)
            except (arrow.ArrowInvalid, OSError) as error:
                reason = str(error).splitlines()[0]
                raise DataError(
                    f"{file.path}: row group {group} is damaged: {reason}; fetch or write it again"
                ) from error
            for value in column.cast(arrow.large_binary()).to_pylist():
                yield Document(value or b"", value or b"")


def _check_column(arrow: Any, file: InputFile, schema: Any, text_key: str) -> None:
    if text_key not in schema.names:
        raise DataError(
            f"{file.path} has no column {text_key!r} (it has: {', '.join(schema.names[:8])}); "
            "set text_key to the column that holds the text"
        )
    kind, types = schema.field(text_key).type, arrow.types
    if not any(
        is_kind(kind)
        for is_kind in (
            types.is_string,
            types.is_large_string,
            types.is_binary,
            types.is_large_binary,
        )
    ):
        raise DataError(
            f"{file.path}: column {text_key!r} is {kind}, not text; set text_key to a text column"
        )
