"""Finding, checking and reading checkpoints. Files are mapped, never unpickled."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from ...models.errors import CheckpointError
from .layout import (
    DTYPES,
    MANIFEST,
    Chunk,
    Manifest,
    StoredTensor,
    checkpoints_folder,
    data_starts,
    header_checksum,
    read_manifest_file,
    step_of,
)

__all__ = [
    "CheckpointInfo",
    "find_checkpoint",
    "list_checkpoints",
    "manifest_problem",
    "read_manifest",
    "read_range",
    "read_tensor",
    "structure_problem",
    "verify_checkpoint",
    "verify_files",
]


@dataclass(frozen=True)
class CheckpointInfo:
    """A folder with a final name; `problem` says what is wrong with its structure, without naming the folder; None if nothing is."""

    path: Path
    step: int
    manifest: Manifest | None
    problem: str | None

    @property
    def score(self) -> float | None:
        """Held-out loss at the step of the save, where it was measured."""
        return self.manifest.state.get("score") if self.manifest else None

    @property
    def bytes(self) -> int:
        return sum(self.manifest.files.values()) if self.manifest else 0


def read_manifest(path: Path) -> Manifest:
    """The manifest of a checkpoint folder.

    Raises:
        CheckpointError: incomplete or damaged.
    """
    return read_manifest_file(path / MANIFEST)


def manifest_problem(path: Path, error: CheckpointError) -> str:
    """The error of `read_manifest` without the folder, which whoever reports a checkpoint's problem has named already."""
    return str(error).removeprefix(f"{path} is ").removeprefix(f"{path}/")


def structure_problem(path: Path, manifest: Manifest) -> str | None:
    """What can be seen without reading data: missing files, wrong sizes, tensors with holes, a changed manifest."""
    for name, size in manifest.files.items():
        file = path / name
        if not file.is_file():
            return f"{name} is missing"
        if file.stat().st_size != size:
            return f"{name} has {file.stat().st_size} bytes instead of {size}"
    try:
        manifest.check_tiling()
    except CheckpointError as error:
        return str(error)
    if manifest.sha256 and manifest.sha256 != manifest.checksum():
        return f"{MANIFEST} does not match its own checksum"
    return None


def list_checkpoints(run_dir: Path) -> list[CheckpointInfo]:
    """All of a run's checkpoints, oldest first, sound or not."""
    found = []
    folder = checkpoints_folder(run_dir)
    for path in folder.iterdir() if folder.is_dir() else ():
        step = step_of(path)
        if step is None or not path.is_dir():
            continue
        try:
            manifest = read_manifest(path)
        except CheckpointError as error:
            found.append(CheckpointInfo(path, step, None, manifest_problem(path, error)))
            continue
        found.append(CheckpointInfo(path, step, manifest, structure_problem(path, manifest)))
    return sorted(found, key=lambda info: info.step)


def find_checkpoint(place: Path) -> Path | None:
    """The newest checkpoint of a run folder that is sound to the last byte, or `place` itself if it is one; None if there is none."""
    if (place / MANIFEST).is_file():
        return None if verify_checkpoint(place) else place
    for info in reversed(list_checkpoints(place)):
        if info.problem is None and not verify_checkpoint(info.path):
            return info.path
    return None


def verify_checkpoint(path: Path) -> list[str]:
    """Every byte against its checksum.

    Returns:
        One line for each problem; empty if the checkpoint is sound.
    """
    try:
        manifest = read_manifest(path)
    except CheckpointError as error:
        return [manifest_problem(path, error)]
    problem = structure_problem(path, manifest)
    return [problem] if problem else list(verify_files(path, manifest, sorted(manifest.files)))


def verify_files(path: Path, manifest: Manifest, names: Sequence[str]) -> Iterator[str]:
    """Problems of the headers and chunks in some of a checkpoint's files."""
    wanted = set(names)
    starts = data_starts(c for t in manifest.tensors.values() for c in t.chunks)
    for name in sorted(wanted & manifest.headers.keys()):
        if header_checksum(path / name, starts[name]) != manifest.headers[name]:
            yield f"{name}: its header does not match its checksum"
    for name, tensor in manifest.tensors.items():
        for chunk in tensor.chunks:
            if chunk.file not in wanted:
                continue
            raw = _map(path / chunk.file, chunk.offset, chunk.bytes)
            if raw is None:
                yield f"{chunk.file} is shorter than its manifest says"
            elif hashlib.sha256(raw.data).hexdigest() != chunk.sha256:
                yield f"{chunk.file}: tensor {name} does not match its checksum"


def _map(path: Path, offset: int, count: int) -> np.ndarray | None:
    if count == 0:
        return np.zeros(0, np.uint8)
    try:
        return np.memmap(path, np.uint8, mode="r", offset=offset, shape=(count,))
    except (OSError, ValueError):
        return None


def read_range(path: Path, stored: StoredTensor, start: int, out: Tensor) -> None:
    """Fill flat `out` with the elements `[start, start + out.numel())` of a stored tensor.

    Raises:
        CheckpointError: a file is missing or short.
    """
    stop = start + out.numel()
    for chunk in stored.chunks:
        low, high = max(start, chunk.start), min(stop, chunk.start + chunk.count)
        if low < high:
            out[low - start : high - start].copy_(_read_chunk(path, stored, chunk, low, high))


def _read_chunk(path: Path, stored: StoredTensor, chunk: Chunk, low: int, high: int) -> Tensor:
    dtype = DTYPES[stored.dtype]
    size = dtype.itemsize
    raw = _map(path / chunk.file, chunk.offset + (low - chunk.start) * size, (high - low) * size)
    if raw is None:
        raise CheckpointError(
            f"{path / chunk.file} is missing or too short; run weft checkpoint verify {path}"
        )
    return torch.from_numpy(np.array(raw)).view(dtype)


def read_tensor(path: Path, name: str) -> Tensor:
    """One whole tensor, on the CPU.

    Raises:
        CheckpointError: there is no such tensor.
    """
    manifest = read_manifest(path)
    if name not in manifest.tensors:
        raise CheckpointError(f"{path} holds no tensor {name}")
    stored = manifest.tensors[name]
    out = torch.empty(stored.shape, dtype=DTYPES[stored.dtype])
    read_range(path, stored, 0, out.view(-1))
    return out
