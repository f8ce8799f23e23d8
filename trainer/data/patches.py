"""Patch starts beside the ids of a prepared source, one bit a position.

What is stored of position t is whether the position *after* it starts a patch: that a document's first position
starts one needs no bit, and the last position of a row asks about a byte that the next row holds.

Patches are made of rows, exactly as training sees them: a document that a row border cuts goes on as a document of
its own, for the entropy model as for the model that is trained. So what is stored holds for one `sequence_length`,
and patching while training gives the same.
"""

from __future__ import annotations

import hashlib
import json
import time
from bisect import bisect_right
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
from numpy.typing import NDArray

from ...models.errors import DataError
from ..files import write_json
from .shards import Manifest, content_fingerprint
from .spans import Span, open_spans, split_spans
from .stream import TokenStream

if TYPE_CHECKING:
    from torch import Tensor

    from ...models.batch import PackedBatch

__all__ = [
    "PROGRESS",
    "BitStream",
    "PatchJob",
    "Patcher",
    "check_same_patcher",
    "open_bits",
    "patcher_changes",
    "write_patches",
]

PROGRESS = "patches.progress"
SAVE_EVERY_S = 30.0


class Patcher(Protocol):
    """What decides where patches start."""

    @property
    def identity(self) -> Mapping[str, Any]:
        """JSON-able; equal exactly where the same ids get the same patches."""

    def next_starts(self, batch: PackedBatch) -> Tensor:
        """(T,) bool on any device: whether the position after each starts a patch."""


@dataclass(frozen=True)
class PatchJob:
    """Patches to store while a source is prepared.

    Args:
        request: JSON-able, what was asked for; decides whether a dataset is the one that is wanted.
        settle: from a sample of the source's batches to the patcher, whose level may depend on it.
        sequence_length: S, of the runs that will read them.
        batch_tokens: positions that are patched at a time.
        sample_tokens: positions of the sample, about.
    """

    request: Mapping[str, Any]
    settle: Callable[[Iterator[PackedBatch]], Patcher]
    sequence_length: int
    batch_tokens: int = 1 << 14
    sample_tokens: int = 1 << 18

    def identity(self) -> dict[str, Any]:
        """For the plan of a preparation."""
        return {**self.request, "sequence_length": self.sequence_length}


class BitStream:
    """Bits of a source's positions as one long sequence over the shards' packed bits; a `TokenStream`'s twin.

    Args:
        packed: for each shard (B,) uint8, eight positions a byte, the first in the highest bit.
        spans: which positions of which shard follow each other, none empty.
    """

    def __init__(self, packed: Sequence[NDArray[np.uint8]], spans: Sequence[Span]) -> None:
        self._packed, self._spans = packed, spans
        ends = np.cumsum([span.stop - span.start for span in spans], dtype=np.int64)
        self._starts: list[int] = [0, *ends.tolist()]

    def read(self, start: int, count: int) -> NDArray[np.bool_]:
        """(count,) bool from a position on."""
        parts = [np.empty(0, np.bool_)]
        for packed, first, stop in self._pieces(start, count):
            bits = np.unpackbits(packed[first // 8 : -(-stop // 8)])
            parts.append(bits[first % 8 : first % 8 + stop - first].view(np.bool_))
        return parts[-1] if len(parts) == 2 else np.concatenate(parts)

    def count(self, start: int, count: int) -> int:
        """Bits that are set from a position on."""
        return int(np.count_nonzero(self.read(start, count)))

    def write(self, start: int, bits: NDArray[np.bool_]) -> None:
        """Put bits at a position; the arrays behind have to be writable."""
        done = 0
        for packed, first, stop in self._pieces(start, len(bits)):
            touched = packed[first // 8 : -(-stop // 8)]
            held = np.unpackbits(touched)
            held[first % 8 : first % 8 + stop - first] = bits[done : done + stop - first]
            touched[:] = np.packbits(held)
            done += stop - first

    def _pieces(self, start: int, count: int) -> Iterator[tuple[NDArray[np.uint8], int, int]]:
        """(packed bits, first, stop) of every run inside one shard."""
        number = bisect_right(self._starts, start) - 1
        while count:
            span, skipped = self._spans[number], start - self._starts[number]
            taken = min(count, span.stop - span.start - skipped)
            first = span.start + skipped
            yield self._packed[span.shard], first, first + taken
            start, count, number = start + taken, count - taken, number + 1


def open_bits(folder: Path, manifest: Manifest, spans: Sequence[Span]) -> BitStream | None:
    """The stored patches of some stretches of a source; None where it has none."""
    if manifest.patches is None:
        return None
    return BitStream([shard.open_patches(folder) for shard in manifest.shards], spans)


def patcher_changes(stored: Mapping[str, Any], wanted: Mapping[str, Any]) -> list[str]:
    """How two patchers' identities differ, one phrase a difference."""
    return [
        f"{name.replace('_', ' ')} {_short(stored.get(name))}, not {_short(wanted.get(name))}"
        for name in dict.fromkeys((*wanted, *stored))
        if stored.get(name) != wanted.get(name)
    ]


def _short(value: Any) -> str:
    if value is None:
        return "none"
    return value[:12] if isinstance(value, str) else json.dumps(value)


def write_patches(
    job: PatchJob,
    folder: Path,
    manifest: Manifest,
    pack: Callable[[NDArray[Any], list[tuple[int, int]]], PackedBatch],
    dtype: np.dtype,
    on_advance: Callable[[int], None] = lambda done: None,
) -> Manifest:
    """Store the patches of every position of a prepared source, or go on where an earlier attempt stopped.

    Args:
        folder: of the dataset, whose manifest is not written yet.
        pack: (R, N + 1) ids and the borders in them to a batch.
        on_advance: told the positions that were done.

    Returns:
        The manifest with the patches in it.
    """
    names = [f"{Path(shard.ends).stem}.patches" for shard in manifest.shards]
    packed = [
        _map_bits(folder / name, shard.tokens)
        for name, shard in zip(names, manifest.shards, strict=True)
    ]
    trained, held_out = split_spans(folder, manifest)
    key = hashlib.sha256(f"{manifest.plan}{manifest.fingerprint}".encode()).hexdigest()
    done = _read_progress(folder / PROGRESS, key)
    saved = time.monotonic()
    patcher = job.settle(_sample(job, open_spans(folder, manifest, trained, dtype), pack))
    for number, spans in enumerate((trained, held_out)):
        stream = open_spans(folder, manifest, spans, dtype)
        bits = BitStream(packed, spans)
        for start, rows, length in _blocks(stream, job):
            if (number, start + rows * length) > done:
                batch = _batch(stream, start, rows, length, pack)
                bits.write(start, patcher.next_starts(batch).cpu().numpy())
            on_advance(rows * length)
            if time.monotonic() - saved > SAVE_EVERY_S:
                _write_progress(folder / PROGRESS, key, (number, start + rows * length), packed)
                saved = time.monotonic()
    _flush(packed)
    shards = tuple(
        replace(shard, patches=name, patches_sha256=hashlib.sha256(bits.data).hexdigest())
        for shard, name, bits in zip(manifest.shards, names, packed, strict=True)
    )
    identity = {**patcher.identity, "sequence_length": job.sequence_length}
    fingerprint = content_fingerprint(manifest.vocabulary, shards, manifest.held_out, identity)
    (folder / PROGRESS).unlink(missing_ok=True)
    return replace(manifest, shards=shards, patches=identity, fingerprint=fingerprint)


def _blocks(stream: TokenStream, job: PatchJob) -> Iterator[tuple[int, int, int]]:
    """(first position, rows, positions a row) of what is patched at a time; a shorter row comes last."""
    length = job.sequence_length
    total, at_once = stream.sequences(length), max(1, job.batch_tokens // length)
    for row in range(0, total, at_once):
        yield row * length, min(at_once, total - row), length
    rest = stream.tokens - 1 - total * length
    if rest > 0:
        yield total * length, 1, rest


def _sample(job: PatchJob, stream: TokenStream, pack: Any) -> Iterator[PackedBatch]:
    """Whole blocks of rows from all over a stream, or its one short row."""
    blocks = list(_blocks(stream, job))
    whole = [block for block in blocks if block[2] == job.sequence_length] or blocks
    wanted = max(1, job.sample_tokens // job.batch_tokens)
    for start, rows, length in whole[:: max(1, len(whole) // wanted)][:wanted]:
        yield _batch(stream, start, rows, length, pack)


def _batch(stream: TokenStream, start: int, rows: int, length: int, pack: Any) -> PackedBatch:
    ids = np.empty((rows, length + 1), stream.dtype)
    starts = [start + row * length for row in range(rows)]
    return pack(ids, stream.read_rows(ids, range(rows), starts))


def _map_bits(path: Path, positions: int) -> NDArray[np.uint8]:
    size = -(-positions // 8)
    if not path.is_file() or path.stat().st_size != size:
        path.write_bytes(bytes(size))
    return np.memmap(path, np.uint8, "r+", shape=(size,))


def _flush(packed: Sequence[NDArray[np.uint8]]) -> None:
    for bits in packed:
        assert isinstance(bits, np.memmap)
        bits.flush()


def _read_progress(path: Path, key: str) -> tuple[int, int]:
    if not path.is_file():
        return 0, 0
    found = json.loads(path.read_bytes())
    return (found["stream"], found["position"]) if found["key"] == key else (0, 0)


def _write_progress(
    path: Path, key: str, done: tuple[int, int], packed: Sequence[NDArray[np.uint8]]
) -> None:
    _flush(packed)
    write_json(path, {"key": key, "stream": done[0], "position": done[1]})


def check_same_patcher(found: Mapping[str, Mapping[str, Any] | None]) -> Mapping[str, Any] | None:
    """The patcher of all sources of a run (name -> identity), or None where none has stored patches.

    Raises:
        DataError: some have and some have not, or they differ.
    """
    (first, identity), *others = found.items()
    for name, other in others:
        if (other is None) != (identity is None):
            bare, patched = (first, name) if identity is None else (name, first)
            raise DataError(
                f"source {patched!r} has stored patches and {bare!r} has none; prepare {bare!r} with --patches-from too, "
                "or neither"
            )
        if identity is not None and other is not None and other != identity:
            raise DataError(
                f"sources {first!r} and {name!r} were patched differently "
                f"({'; '.join(patcher_changes(other, identity))}); prepare them with the same patcher"
            )
    return identity
