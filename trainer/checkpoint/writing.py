"""Tensors into safetensors files, streamed, flushed to disk, with a checksum of each chunk.

safetensors: eight bytes of header length, a JSON header, raw little-endian data. Written here rather than by
its library because a chunk's checksum, its place in the file and the flush are wanted in the same pass.
"""

from __future__ import annotations

import hashlib
import json
import os
import time
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ...models.errors import CheckpointError
from ..files import sync_directory, write_json, write_text
from .layout import (
    DTYPES,
    MANIFEST,
    Chunk,
    Manifest,
    StoredTensor,
    data_starts,
    header_checksum,
    step_of,
)

__all__ = ["Piece", "build_manifest", "move_latest", "versions", "write_checkpoint", "write_pieces"]

FILE_BYTES = 2 << 30
CODES = {dtype: code for code, dtype in DTYPES.items()}


@dataclass(frozen=True)
class Piece:
    """A flat range of a logical tensor, on the host, about to be written."""

    name: str
    shape: tuple[int, ...]
    start: int
    tensor: Tensor


def write_pieces(folder: Path, prefix: str, pieces: Iterable[Piece]) -> list[dict[str, Any]]:
    """Write pieces into files of about 2 GB called PREFIX_NN.safetensors; each is on disk when this returns.

    Returns:
        One entry a piece: name, shape, dtype and its chunk, as plain data.
    """
    entries: list[dict[str, Any]] = []
    batch: list[Piece] = []
    size = number = 0
    for piece in pieces:
        batch.append(piece)
        size += piece.tensor.numel() * piece.tensor.element_size()
        if size >= FILE_BYTES:
            entries += _write_file(folder / f"{prefix}_{number:02d}.safetensors", batch)
            batch, size, number = [], 0, number + 1
    if batch:
        entries += _write_file(folder / f"{prefix}_{number:02d}.safetensors", batch)
    return entries


def _write_file(path: Path, pieces: list[Piece]) -> list[dict[str, Any]]:
    header: dict[str, Any] = {}
    position = 0
    for piece in pieces:
        count = piece.tensor.numel() * piece.tensor.element_size()
        key = piece.name if piece.name not in header else f"{piece.name}@{piece.start}"
        header[key] = {
            "dtype": _code(piece.tensor),
            "shape": _local_shape(piece),
            "data_offsets": [position, position + count],
        }
        position += count
    encoded = json.dumps(header).encode()
    encoded += b" " * (-len(encoded) % 8)
    entries = []
    with open(path, "wb") as file:
        file.write(len(encoded).to_bytes(8, "little"))
        file.write(encoded)
        for piece in pieces:
            offset = file.tell()
            raw = piece.tensor.contiguous().reshape(-1).view(torch.uint8).numpy().data
            file.write(raw)
            chunk = Chunk(
                piece.start,
                piece.tensor.numel(),
                path.name,
                offset,
                len(raw),
                hashlib.sha256(raw).hexdigest(),
            )
            entries.append(
                {
                    "name": piece.name,
                    "shape": list(piece.shape),
                    "dtype": _code(piece.tensor),
                    "chunk": asdict(chunk),
                }
            )
        file.flush()
        os.fsync(file.fileno())
    return entries


def _code(tensor: Tensor) -> str:
    if tensor.dtype not in CODES:
        raise CheckpointError(
            f"tensors of type {tensor.dtype} cannot be saved; known: {', '.join(map(str, CODES))}"
        )
    return CODES[tensor.dtype]


def _local_shape(piece: Piece) -> list[int]:
    """The piece's own shape: the whole tensor's, whole rows of it, or flat."""
    count, shape = piece.tensor.numel(), piece.shape
    if count == torch.Size(shape).numel():
        return list(shape)
    per_row = torch.Size(shape[1:]).numel()
    if per_row and count % per_row == 0 and piece.start % per_row == 0:
        return [count // per_row, *shape[1:]]
    return [count]


def build_manifest(
    folder: Path, reports: list[dict[str, Any]], *, step: int, kind: str, state: dict[str, Any]
) -> Manifest:
    """One manifest from the reports of all ranks: `{"entries": [...], "rank_state": {...}}`.

    Raises:
        CheckpointError: the ranks' chunks do not make up every tensor.
    """
    found: dict[str, dict[str, Any]] = {}
    for report in reports:
        for entry in report["entries"]:
            tensor = found.setdefault(
                entry["name"],
                {"shape": tuple(entry["shape"]), "dtype": entry["dtype"], "chunks": []},
            )
            if (tensor["shape"], tensor["dtype"]) != (tuple(entry["shape"]), entry["dtype"]):
                raise CheckpointError(f"ranks disagree about the shape or type of {entry['name']}")
            tensor["chunks"].append(Chunk(**entry["chunk"]))
    tensors = {
        n: StoredTensor(t["shape"], t["dtype"], tuple(sorted(t["chunks"], key=lambda c: c.start)))
        for n, t in found.items()
    }
    starts = data_starts(c for t in tensors.values() for c in t.chunks)
    names = sorted(starts)
    manifest = Manifest(
        step=step,
        kind=kind,
        world_size=len(reports),
        created=time.time(),
        files={name: (folder / name).stat().st_size for name in names},
        tensors=tensors,
        state=state,
        ranks=[report["rank_state"] for report in reports],
        versions=versions(),
        headers={name: header_checksum(folder / name, starts[name]) for name in names},
    )
    manifest.check_tiling()
    return manifest


def versions() -> dict[str, str]:
    import importlib.metadata

    found = {}
    for package in ("weft", "torch"):
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def move_latest(folder: Path) -> None:
    """Point `latest` at a committed folder, by atomic replace."""
    write_text(folder.parent / "latest", folder.name + "\n")


def write_checkpoint(
    path: Path, tensors: Mapping[str, Tensor], state: dict[str, Any], *, kind: str = "imported"
) -> None:
    """Write whole tensors as a checkpoint, in one process; they are taken from the mapping one at a time.

    Args:
        path: the final folder, `.../checkpoints/step_NNNNNNNN`; its `latest` pointer is moved too.

    Raises:
        CheckpointError: the folder exists, or cannot be written.
    """
    step = step_of(path)
    if step is None:
        raise CheckpointError(
            f"{path.name} is not a checkpoint's name; it is step_ and eight digits"
        )
    if path.exists():
        raise CheckpointError(f"{path} exists already; remove it or choose another run folder")
    temporary = path.with_name(f"{path.name}.tmp-import")
    temporary.mkdir(parents=True)
    pieces = (
        Piece(n, tuple(t.shape), 0, t.detach().cpu()) for n, t in ((n, tensors[n]) for n in tensors)
    )
    report = {"entries": write_pieces(temporary, "rank_00000", pieces), "rank_state": {}}
    manifest = build_manifest(temporary, [report], step=step, kind=kind, state=state)
    write_json(temporary / MANIFEST, manifest.to_json())
    os.rename(temporary, path)
    sync_directory(path.parent)
    move_latest(path)
