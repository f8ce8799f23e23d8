"""The run folder's disk, and where Triton keeps what it compiled. Imports no torch."""

from __future__ import annotations

import os
import time
from pathlib import Path

from ..files import free_bytes
from .context import Context
from .findings import Finding, fail, ok, warn

__all__ = [
    "check_disk_space",
    "check_disk_speed",
    "check_triton_cache",
    "file_system_of",
    "nearest_folder",
]

LOW_BYTES = 50e9
"""Room for a few checkpoints of a billion parameters."""
SLOW_BYTES_PER_S = 50e6
WRITE_BYTES, QUICK_WRITE_BYTES = 256 << 20, 32 << 20
CHUNK_BYTES = 4 << 20
NETWORK = (
    "nfs",
    "lustre",
    "gpfs",
    "beegfs",
    "ceph",
    "cifs",
    "smb",
    "fuse",
    "9p",
    "weka",
    "wekafs",
    "panfs",
    "pvfs",
    "afs",
    "virtiofs",
)


def nearest_folder(path: Path) -> Path:
    """The folder itself, or the nearest above it that is there."""
    path = path.absolute()
    while not path.is_dir():
        path = path.parent
    return path


def check_disk_space(context: Context) -> Finding:
    folder = nearest_folder(context.run_dir)
    free = free_bytes(folder)
    found = f"{free / 1e9:,.0f} GB free in {folder} ({file_system_of(folder)})"
    status = os.statvfs(folder)
    if status.f_files and not status.f_favail:
        return fail(
            "disk space",
            f"no inodes left in {folder}",
            "remove small files there, or set run.dir elsewhere",
            "configuration",
        )
    if free < 1e9:
        return fail(
            "disk space",
            found,
            "free some space, or set run.dir elsewhere; weft plan RECIPE gives a checkpoint's size",
            "configuration",
        )
    if free < LOW_BYTES:
        return warn(
            "disk space",
            found,
            "weft plan RECIPE gives a checkpoint's size; set checkpoint.keep lower, or run.dir elsewhere",
        )
    return ok("disk space", found)


def check_disk_speed(context: Context) -> Finding:
    folder = nearest_folder(context.run_dir)
    size = QUICK_WRITE_BYTES if context.is_quick else WRITE_BYTES
    path = folder / f".weft_doctor_{context.place.host}_{os.getpid()}.tmp"
    try:
        seconds = _write(path, size)
    except OSError as error:
        return fail(
            "disk speed",
            f"{folder} cannot be written: {error.strerror}",
            "set run.dir to a folder that you may write and that has room",
        )
    finally:
        path.unlink(missing_ok=True)
    speed = size / seconds
    found = f"{speed / 1e6:,.0f} MB/s written and synced to {folder} ({size >> 20} MiB)"
    if speed < SLOW_BYTES_PER_S:
        return warn(
            "disk speed",
            found,
            "checkpoints will stall: set run.dir on a faster file system, or checkpoint.every higher",
        )
    return ok("disk speed", found)


def _write(path: Path, size: int) -> float:
    # Not zeros: some file systems store those as nothing.
    chunk = os.urandom(CHUNK_BYTES)
    begin = time.perf_counter()
    with open(path, "wb", buffering=0) as file:
        for _ in range(size // CHUNK_BYTES):
            file.write(chunk)
        os.fsync(file.fileno())
    return time.perf_counter() - begin


def check_triton_cache(context: Context) -> Finding:
    given = context.environment.get("TRITON_CACHE_DIR")
    folder = Path(given) if given else Path.home() / ".triton" / "cache"
    kind = file_system_of(nearest_folder(folder))
    found = f"{folder} is on {kind}"
    if kind.startswith(NETWORK):
        return warn(
            "triton cache",
            f"{found}, which is slow and which several nodes corrupt",
            "export TRITON_CACHE_DIR=/tmp/$USER/triton (weft submit does)",
        )
    if not os.access(nearest_folder(folder), os.W_OK):
        return fail(
            "triton cache",
            f"{nearest_folder(folder)} cannot be written",
            "export TRITON_CACHE_DIR=/tmp/$USER/triton",
            "configuration",
        )
    return ok("triton cache", found)


def file_system_of(path: Path) -> str:
    """The type of the file system that holds a folder: ext4, nfs4, ...; `unknown` where the system does not say."""
    try:
        lines = Path("/proc/mounts").read_text().splitlines()
    except OSError:
        return "unknown"
    resolved, best, kind = path.resolve(), -1, "unknown"
    for line in lines:
        _, mount, type_, *_ = line.split()
        place = Path(mount.replace("\\040", " "))
        # Of two mounts on one folder the later one is seen.
        if (place == resolved or place in resolved.parents) and len(place.parts) >= best:
            best, kind = len(place.parts), type_
    return kind
