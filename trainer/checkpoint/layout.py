"""What a checkpoint is on disk: its folder, its manifest, and the chunks of tensors in its files.

    RUN/checkpoints/latest                     one line: the newest committed folder
    RUN/checkpoints/step_00000500/manifest.json
                                  rank_00000_00.safetensors ...

The manifest lands last, in a temporary folder that is then renamed: a folder with its final name is complete.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch

from ...models.errors import CheckpointError

__all__ = [
    "DTYPES",
    "FORMAT",
    "MANIFEST",
    "Chunk",
    "Manifest",
    "StoredTensor",
    "checkpoints_folder",
    "data_starts",
    "header_checksum",
    "step_folder",
    "step_of",
]

FORMAT = 1
MANIFEST = "manifest.json"
DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
"""safetensors' names of types."""

_STEP = re.compile(r"step_(\d{8,})")


@dataclass(frozen=True)
class Chunk:
    """A flat range of one tensor: `count` elements from `start`, at byte `offset` of `file`."""

    start: int
    count: int
    file: str
    offset: int
    bytes: int
    sha256: str


@dataclass(frozen=True)
class StoredTensor:
    """A logical tensor and the chunks that make it up."""

    shape: tuple[int, ...]
    dtype: str
    chunks: tuple[Chunk, ...]


@dataclass(frozen=True)
class Manifest:
    """Everything about a checkpoint but the numbers.

    Args:
        kind: `periodic`, `permanent`, `final` or `imported`.
        files: size in bytes of each data file.
        state: what the trainer saved beside tensors; plain data.
        ranks: one entry a rank: the state of its random generators.
        headers: checksum of what each data file holds before its data; older checkpoints have none.
        sha256: checksum of everything above, as read from the file; empty where it has none.
    """

    step: int
    kind: str
    world_size: int
    created: float
    files: dict[str, int]
    tensors: dict[str, StoredTensor]
    state: dict[str, Any]
    ranks: list[dict[str, Any]]
    versions: dict[str, str] = field(default_factory=dict)
    headers: dict[str, str] = field(default_factory=dict)
    sha256: str = ""

    def to_json(self) -> dict[str, Any]:
        return {"format": FORMAT, **asdict(self), "sha256": self.checksum()}

    @staticmethod
    def from_json(data: dict[str, Any]) -> Manifest:
        values = {k: v for k, v in data.items() if k != "format"}
        values["tensors"] = {
            name: StoredTensor(
                tuple(t["shape"]), t["dtype"], tuple(Chunk(**c) for c in t["chunks"])
            )
            for name, t in data["tensors"].items()
        }
        return Manifest(**values)

    def checksum(self) -> str:
        """Of all that is written but the checksum itself; the same before and after a trip through JSON."""
        written = {name: value for name, value in asdict(self).items() if name != "sha256"}
        return hashlib.sha256(json.dumps(written).encode()).hexdigest()

    def check_tiling(self) -> None:
        """Check that the chunks of every tensor cover it exactly.

        Raises:
            CheckpointError: a hole or an overlap, named.
        """
        for name, tensor in self.tensors.items():
            position = 0
            for chunk in sorted((c for c in tensor.chunks if c.count), key=lambda c: c.start):
                if chunk.start != position:
                    what = (
                        "is missing elements" if chunk.start > position else "was written twice at"
                    )
                    raise CheckpointError(f"tensor {name} {what} {position} to {chunk.start}")
                position += chunk.count
            total = torch.Size(tensor.shape).numel()
            if position != total:
                raise CheckpointError(f"tensor {name} has {position} of {total} elements")


def data_starts(chunks: Iterable[Chunk]) -> dict[str, int]:
    """Where the data of each file begins, in bytes."""
    starts: dict[str, int] = {}
    for chunk in chunks:
        starts[chunk.file] = min(chunk.offset, starts.get(chunk.file, chunk.offset))
    return starts


def header_checksum(path: Path, data_start: int) -> str:
    """Of what a data file holds before its data."""
    with open(path, "rb") as file:
        return hashlib.sha256(file.read(data_start)).hexdigest()


def read_manifest_file(path: Path) -> Manifest:
    """Raises: CheckpointError: missing, not JSON, or of another format."""
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
        if data.get("format") != FORMAT:
            raise CheckpointError(
                f"{path} has format {data.get('format')}, this weft reads {FORMAT}; use the version that wrote it"
            )
        return Manifest.from_json(data)
    except OSError as error:
        raise CheckpointError(
            f"{path.parent} is not a complete checkpoint: its manifest cannot be read ({error.strerror})"
        ) from error
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(f"{path} is damaged: {error}") from error


def checkpoints_folder(run_dir: Path) -> Path:
    return run_dir / "checkpoints"


def step_folder(run_dir: Path, step: int) -> Path:
    return checkpoints_folder(run_dir) / f"step_{step:08d}"


def step_of(path: Path) -> int | None:
    """The step of a folder with a final name; None for temporary and other folders."""
    found = _STEP.fullmatch(path.name)
    return int(found.group(1)) if found else None
