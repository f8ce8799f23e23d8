"""Writing so that a reader, or a crash, sees a file whole or not at all."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Any

__all__ = ["free_bytes", "sync_directory", "sync_file", "write_json", "write_text"]


def write_text(path: Path, text: str) -> None:
    """Write beside the target, flush to disk, rename over it."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with open(temporary, "w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    sync_directory(path.parent)


def write_json(path: Path, value: Any) -> None:
    write_text(path, json.dumps(value, indent=1) + "\n")


def sync_file(path: Path) -> None:
    """Flush a finished file's content to disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def sync_directory(path: Path) -> None:
    """Make the renames in a folder survive a power loss."""
    sync_file(path)


def free_bytes(path: Path) -> int:
    """Free space of the file system that holds `path`, or would."""
    while not path.exists():
        path = path.parent
    return shutil.disk_usage(path).free
