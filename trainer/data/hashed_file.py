"""Files of a dataset: there in full or not at all, their SHA-256 taken while they are written."""

from __future__ import annotations

import hashlib
import os
from pathlib import Path
from typing import Any

from numpy.typing import NDArray

__all__ = ["HashedFile", "write_hashed"]


class HashedFile:
    """A file that appears under its name when closed without an error; knows its size and
    SHA-256.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._temporary = path.with_name(f"{path.name}.{os.getpid()}.tmp")
        self._hash = hashlib.sha256()
        self.size = 0

    @property
    def sha256(self) -> str:
        return self._hash.hexdigest()

    def __enter__(self) -> HashedFile:
        self._stream = open(self._temporary, "wb", buffering=1 << 20)
        return self

    def write(self, data: NDArray[Any] | bytes) -> None:
        view = data if isinstance(data, bytes) else data.data.cast("B")
        self._hash.update(view)
        self._stream.write(view)
        self.size += len(view)

    def __exit__(self, kind: object, *rest: object) -> None:
        if kind is not None:
            self._stream.close()
            self._temporary.unlink(missing_ok=True)
            return
        self._stream.flush()
        os.fsync(self._stream.fileno())
        self._stream.close()
        os.replace(self._temporary, self._path)


def write_hashed(path: Path, content: bytes) -> str:
    """Write a whole file and give its SHA-256."""
    with HashedFile(path) as out:
        out.write(content)
    return out.sha256
