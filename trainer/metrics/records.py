"""The file metrics.jsonl: strict JSON, one object a record, repaired and cut when a run goes on.

Infinities and NaN, which JSON has no words for, are written as the strings `Infinity`, `-Infinity`
and `NaN` and read back as floats. One record is one write, so a killed process leaves at most one
torn line, and only at the end.
"""

from __future__ import annotations

import json
import logging
import math
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from ..files import sync_directory

__all__ = [
    "METRICS_FILE",
    "RecordFile",
    "encode_record",
    "plain_json",
    "read_metrics",
    "truncate_records",
]

METRICS_FILE = "metrics.jsonl"

_NON_FINITE = {"NaN": math.nan, "Infinity": math.inf, "-Infinity": -math.inf}
_logger = logging.getLogger(__name__)


def encode_record(record: Mapping[str, Any]) -> bytes:
    """One line of strict JSON, newline included; floats keep every bit."""
    return json.dumps(plain_json(record), allow_nan=False, separators=(", ", ": ")).encode() + b"\n"


def plain_json(value: Any) -> Any:
    """The value in strict JSON's terms: numbers that are not finite become words, scalars plain numbers."""
    if value is None or isinstance(value, (bool, int, str)):
        return value
    if isinstance(value, float):
        if math.isfinite(value):
            return float(value)
        return "NaN" if math.isnan(value) else ("Infinity" if value > 0 else "-Infinity")
    if isinstance(value, Mapping):
        return {str(key): plain_json(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain_json(item) for item in value]
    # NumPy and torch scalars know their own Python type.
    return plain_json(value.item())


def decode_record(line: bytes) -> dict[str, Any] | None:
    """The record of a line, or None where the line is torn or is no record."""
    try:
        record = json.loads(line)
    except ValueError:
        return None
    if not isinstance(record, dict) or not isinstance(record.get("step"), int):
        return None
    return {
        key: _NON_FINITE.get(value, value) if isinstance(value, str) else value
        for key, value in record.items()
    }


def iterate_records(path: Path) -> Iterator[tuple[bytes, dict[str, Any] | None]]:
    """Every line with its record; a last line without its newline counts as torn."""
    with open(path, "rb") as file:
        for line in file:
            yield line, decode_record(line) if line.endswith(b"\n") else None


def read_metrics(run_dir: Path | str, *, merge: bool = True) -> list[dict[str, Any]]:
    """Records of a run by step; a run that is being written to can be read.

    Args:
        run_dir: the run folder.
        merge: join the records of one step (training values, then evaluation) into one.

    Returns:
        Records in order of step; empty where there is no metrics file yet.
    """
    path = Path(run_dir) / METRICS_FILE
    if not path.is_file():
        return []
    records = [record for _, record in iterate_records(path) if record is not None]
    if not merge:
        return records
    by_step: dict[int, dict[str, Any]] = {}
    for record in records:
        by_step.setdefault(record["step"], {}).update(record)
    return [by_step[step] for step in sorted(by_step)]


def truncate_records(path: Path, last_step: int) -> Iterator[dict[str, Any]]:
    """Drop what is torn and what is past a step; the file changes whole or not at all.

    Yields:
        Each record that stays. The file is replaced when the last was taken.
    """
    if not path.is_file():
        return
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    dropped = 0
    try:
        with open(temporary, "wb") as kept:
            for line, record in iterate_records(path):
                if record is None:
                    dropped += 1
                elif record["step"] <= last_step:
                    kept.write(line)
                    yield record
            kept.flush()
            os.fsync(kept.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
    sync_directory(path.parent)
    if dropped > 1:
        _logger.warning("%s: dropped %d lines that were no records", path, dropped)


class RecordFile:
    """Appends records. A disk that is full costs records and a warning, never the run."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._file = open(path, "ab", buffering=0)  # noqa: SIM115 - open as long as the run
        self._size = self._file.tell()
        self._lost = 0

    def append(self, record: Mapping[str, Any]) -> None:
        """Write one record, unbuffered: what was appended survives a kill."""
        line = encode_record(record)
        try:
            written = self._file.write(line)
            if written != len(line):
                raise OSError(f"wrote {written} of {len(line)} bytes")
        except OSError as error:
            # Half a line would swallow the next record too.
            os.truncate(self.path, self._size)
            self._lost += 1
            if self._lost == 1:
                _logger.warning(
                    "%s: a record was lost (%s); free space on this disk", self.path, error
                )
            return
        self._size += len(line)

    def close(self) -> None:
        if self._lost:
            _logger.warning("%s: %d records were lost", self.path, self._lost)
        self._file.close()
