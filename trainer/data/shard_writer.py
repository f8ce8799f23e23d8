"""What one worker does with one unit: read its documents, encode them, write a shard and then its
record.

Files get their names only when they are complete, the record last. Two processes that write the
same unit (an orphan of a killed attempt, say) write the same bytes to different temporary names.
"""

from __future__ import annotations

import errno
import hashlib
import json
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ...models.errors import DataError
from .config import HeldOutConfig, RepeatFilterConfig
from .hashed_file import HashedFile, write_hashed
from .images.job import ImageJob
from .interleaved.config import InterleavedConfig
from .readers import Document, read_documents
from .repeats import find_repetitive_rows
from .shards import Shard
from .sources import Unit
from .token_files import index_range, read_layout
from .vocabulary import Vocabulary, open_vocabulary

__all__ = ["Found", "UnitJob", "key_of", "unit_identity", "write_unit"]

DOCUMENTS_AT_ONCE = 64
BYTES_AT_ONCE = 4 << 20
COMPRESSION_ALLOWANCE = 4.0
"""Text is taken to be this much larger than its gzip, zstd or Parquet file when space is
checked.
"""


@dataclass(frozen=True)
class UnitJob:
    """What is the same for all units of a source.

    Args:
        interleaved: how documents of several modalities are encoded; None for text.
        codec: identity of the image codec, where there is one.
        images: how images with classes are read; None for documents.
    """

    kind: str
    text_key: str
    token_dtype: str
    vocabulary: str
    vocabulary_identity: dict[str, Any]
    repeats: RepeatFilterConfig | None
    held_out: HeldOutConfig
    interleaved: InterleavedConfig | None = None
    codec: dict[str, Any] | None = None
    images: ImageJob | None = None

    def identity(self) -> dict[str, Any]:
        """JSON-able settings that change the result; not where the tokenizer or the codec lies."""
        identity = {
            "kind": self.kind,
            "text_key": self.text_key,
            "token_dtype": self.token_dtype,
            "vocabulary": self.vocabulary_identity,
            "repeats": self.repeats.model_dump() if self.repeats else None,
            "held_out": self.held_out.model_dump(),
        }
        if self.interleaved is not None:
            settings = self.interleaved
            identity["interleaved"] = {
                "modalities": list(settings.modalities),
                "image": settings.image.model_dump(exclude={"codec", "scale", "shift", "clip"}),
                "codec": self.codec,
                "speech": settings.speech.model_dump(),
                "special_ids": settings.special_ids(),
            }
        if self.images is not None:
            identity["images"] = asdict(self.images)
        return identity

    def expansion(self) -> float:
        """Bytes written for a byte of input, about."""
        if self.kind == "tokens":
            return 0.05
        if self.images is not None:
            return 1.05
        id_bytes = 2.0 if self.vocabulary_identity["size"] <= 1 << 16 else 4.0
        ids_per_byte = 1.0 if self.vocabulary_identity["kind"] == "bytes" else 0.4
        return id_bytes * ids_per_byte * (1.0 if self.kind == "text" else COMPRESSION_ALLOWANCE)


@lru_cache(maxsize=2)
def _vocabulary(spec: str) -> Vocabulary:
    return open_vocabulary(spec)


def unit_identity(job: UnitJob, unit: Unit) -> str:
    """Hash of a unit's inputs and settings: a record that carries it need not be made again."""
    inputs = [[file.name, file.size, file.mtime_ns] for file in unit.files]
    payload = json.dumps([job.identity(), inputs, unit.start, unit.stop], sort_keys=True)
    return hashlib.sha256(payload.encode()).hexdigest()


def write_unit(job: UnitJob, unit: Unit, folder: Path) -> None:
    """Write one unit's shard and record into `folder`.

    Raises:
        DataError: a bad input, or no space left.
    """
    try:
        found = _encode(job, unit, folder)
        record = {
            "unit": unit_identity(job, unit),
            "shard": asdict(found.shard),
            "candidates": _smallest_keys(found.candidates, job.held_out),
            "dropped": found.dropped,
            **found.more,
        }
        write_hashed(folder / f"shard_{unit.index:05d}.record", json.dumps(record).encode())
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise DataError(
                f"no space left in {folder.parent}; free some and run the same command again, "
                "finished shards are kept"
            ) from error
        raise


def _encode(job: UnitJob, unit: Unit, folder: Path) -> Found:
    if job.images is not None:
        from .images.writer import store_images

        return store_images(job, unit, folder)
    if job.interleaved is not None:
        # Text alone needs no image library.
        from .interleaved.writer import encode_interleaved

        return encode_interleaved(job, unit, folder)
    return (_index_tokens if job.kind == "tokens" else _encode_text)(job, unit, folder)


@dataclass
class Found:
    """A shard, its documents that may be held out (key, index, bytes), what was left out by reason, and what
    else its record has to say.
    """

    shard: Shard
    candidates: list[tuple[int, int, int]] = field(default_factory=list)
    dropped: dict[str, int] = field(default_factory=dict)
    more: dict[str, Any] = field(default_factory=dict)


def _smallest_keys(
    candidates: list[tuple[int, int, int]], held_out: HeldOutConfig
) -> list[tuple[int, int, int]]:
    """Those that may be among the source's smallest; documents with one key (copies) stay
    together.
    """
    limit = held_out.max_bytes
    fitting = [
        c for c in candidates if c[2] >= held_out.min_bytes and (limit is None or c[2] <= limit)
    ]
    keys = set(sorted({key for key, _, _ in fitting})[: held_out.documents])
    return sorted(c for c in fitting if c[0] in keys)


def _encode_text(job: UnitJob, unit: Unit, folder: Path) -> Found:
    vocabulary = _vocabulary(job.vocabulary)
    name = f"shard_{unit.index:05d}"
    candidates: list[tuple[int, int, int]] = []
    dropped: dict[str, int] = {}
    lengths: list[int] = []
    text_bytes = 0
    with HashedFile(folder / f"{name}.ids") as out:
        for batch in _batches(read_documents(job.kind, unit, job.text_key), dropped):
            encoded = vocabulary.encode_documents([document.text or b"" for document in batch])
            for document, ids in zip(batch, encoded, strict=True):
                if job.repeats and find_repetitive_rows(ids[None, :], job.repeats)[0]:
                    dropped["repetitive"] = dropped.get("repetitive", 0) + 1
                    continue
                size = len(document.text or b"")
                candidates.append((key_of(document.key), len(lengths), size))
                lengths.append(len(ids))
                text_bytes += size
                out.write(ids)
    ends = np.cumsum(np.array(lengths, np.int64), dtype=np.int64)
    shard = Shard(
        ids=f"{name}.ids",
        ends=f"{name}.ends",
        dtype=vocabulary.dtype.str,
        offset=0,
        tokens=int(ends[-1]) if len(ends) else 0,
        documents=len(ends),
        bytes=text_bytes,
        file_bytes=out.size,
        ids_sha256=out.sha256,
        ends_sha256=write_hashed(folder / f"{name}.ends", ends.astype("<i8").tobytes()),
    )
    return Found(shard, candidates, dropped)


def _batches(documents: Iterator[Document], dropped: dict[str, int]) -> Iterator[list[Document]]:
    """Documents with text in them, some at a time; counts the others."""
    batch: list[Document] = []
    held = 0
    for document in documents:
        if not document.text:
            reason = "binary" if document.text is None else "empty"
            dropped[reason] = dropped.get(reason, 0) + 1
            continue
        batch.append(document)
        held += len(document.text)
        if len(batch) == DOCUMENTS_AT_ONCE or held >= BYTES_AT_ONCE:
            yield batch
            batch, held = [], 0
    if batch:
        yield batch


def key_of(value: bytes) -> int:
    """What a document is chosen to be held out by."""
    return int.from_bytes(hashlib.blake2b(value, digest_size=8).digest(), "big")


def _index_tokens(job: UnitJob, unit: Unit, folder: Path) -> Found:
    file = unit.files[0]
    layout = read_layout(file, job.token_dtype)
    found = index_range(file, layout, unit, _vocabulary(job.vocabulary))
    name = f"shard_{unit.index:05d}.ends"
    shard = Shard(
        ids=file.path,
        ends=name,
        dtype=layout.dtype,
        offset=layout.offset + found.start * np.dtype(layout.dtype).itemsize,
        tokens=found.stop - found.start,
        documents=len(found.ends),
        bytes=int(found.byte_ends[-1]) if found.byte_ends is not None and len(found.ends) else 0,
        file_bytes=file.size,
        ids_sha256=found.sha256,
        ends_sha256=write_hashed(folder / name, found.ends.astype("<i8").tobytes()),
    )
    return Found(shard, _token_candidates(job, file.name, found.start, found.ends, found.byte_ends))


def _token_candidates(
    job: UnitJob,
    name: str,
    start: int,
    ends: NDArray[np.int64],
    byte_ends: NDArray[np.int64] | None,
) -> list[tuple[int, int, int]]:
    """Documents of a token file have no name; where they start in which file stands for one."""
    if not job.held_out.documents:
        return []
    starts = np.concatenate(([0], ends[:-1])) + start
    sizes = np.zeros(len(ends), np.int64) if byte_ends is None else np.diff(byte_ends, prepend=0)
    keys = _mix(starts.astype(np.uint64) + np.uint64(key_of(name.encode())))
    fits = sizes >= job.held_out.min_bytes
    if job.held_out.max_bytes is not None:
        fits &= sizes <= job.held_out.max_bytes
    where = np.flatnonzero(fits)
    smallest = where[np.argsort(keys[where], kind="stable")[: job.held_out.documents]]
    return [(int(keys[i]), int(i), int(sizes[i])) for i in smallest]


def _mix(values: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """The finaliser of splitmix64; a bijection, so no two documents of a file share a key."""
    values = (values ^ (values >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    values = (values ^ (values >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return values ^ (values >> np.uint64(31))
