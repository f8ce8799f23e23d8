"""Prepared sources as token streams one can read anywhere in, split into training and held-out documents.

Held-out documents stay in the shards they were prepared into; a stream is the list of stretches
between them. `open_data` prepares what is not prepared yet.
"""

from __future__ import annotations

import functools
import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from ...models.errors import DataError, WeftError
from ..distributed import Topology
from .config import DataConfig, SourceConfig
from .prepare import MANIFEST, default_folder, prepare_source
from .vocabulary import Vocabulary, open_vocabulary

__all__ = ["Dataset", "Source", "TokenStream", "open_data"]


class TokenStream:
    """The ids of some documents of a source, end to end, without loading them.

    Args:
        folder: of the prepared dataset.
        shards: the manifest's entries.
        stretches: (n, 3) int64: shard, first id, one past the last; whole documents.
    """

    def __init__(self, folder: Path, shards: Sequence[dict[str, Any]], stretches: np.ndarray) -> None:
        self.folder, self.shards = folder, shards
        self.stretches = stretches
        lengths = stretches[:, 2] - stretches[:, 1]
        self.ends = lengths.cumsum()
        self.starts = self.ends - lengths

    def __len__(self) -> int:
        return int(self.ends[-1]) if len(self.ends) else 0

    @functools.lru_cache(maxsize=None)  # noqa: B019 - a memory map a shard, for as long as the stream
    def _shard(self, number: int) -> tuple[np.ndarray, np.ndarray]:
        shard = self.shards[number]
        path = self.folder / shard["data"]
        try:
            ids = np.memmap(path, shard["dtype"], mode="r", offset=shard["offset"], shape=(shard["tokens"],))
            ends = np.load(self.folder / f"shard-{number:05d}.index.npy", mmap_mode="r")[:, 0]
        except (OSError, ValueError) as error:
            raise DataError(f"shard {path} is missing or shorter than its manifest says ({error}); prepare the dataset again") from error
        return ids, ends

    def read(self, start: int, count: int) -> tuple[np.ndarray, np.ndarray]:
        """Ids `[start, start + count)` as int64, and the places in (0, count] where a document ends."""
        pieces, borders, position = [], [], start
        place = int(np.searchsorted(self.ends, start, side="right"))
        while position < start + count:
            shard, first, _ = (int(v) for v in self.stretches[place])
            ids, ends = self._shard(shard)
            low = first + position - int(self.starts[place])
            high = min(low + start + count - position, int(self.stretches[place, 2]))
            pieces.append(ids[low:high])
            found = ends[np.searchsorted(ends, low, side="right") : np.searchsorted(ends, high, side="right")]
            borders.append(found - low + (position - start))
            position += high - low
            place += 1
        return np.concatenate(pieces).astype(np.int64), np.concatenate(borders)

    def document_lengths(self) -> np.ndarray:
        """(D,) int64."""
        found = []
        for shard, first, last in self.stretches.tolist():
            ends = self._shard(shard)[1]
            inside = ends[np.searchsorted(ends, first, side="right") : np.searchsorted(ends, last, side="right")]
            found.append(np.diff(inside, prepend=first))
        return np.concatenate(found) if found else np.zeros(0, np.int64)


@dataclass(frozen=True)
class Source:
    """One named source: its training documents, its held-out ones, and what is known of them."""

    name: str
    train: TokenStream
    held_out: TokenStream
    manifest: dict[str, Any]
    weight: float | None = None
    max_epochs: float | None = None

    def sequences(self, sequence_length: int) -> int:
        """Training sequences; each reads one id more than it has positions, for its last target."""
        return max(0, (len(self.train) - 1) // sequence_length)


@dataclass(frozen=True)
class Dataset:
    """All sources of a run."""

    config: DataConfig
    vocabulary: Vocabulary
    sources: tuple[Source, ...]

    @property
    def fingerprints(self) -> dict[str, str]:
        return {source.name: source.manifest["fingerprint"] for source in self.sources}

    def check_fingerprints(self, saved: dict[str, str]) -> None:
        """Refuse to go on with data that is not what the run has seen so far.

        Raises:
            DataError: a source was added, removed, renamed or changed.
        """
        now = self.fingerprints
        if now == saved or self.config.allow_changed:
            return
        changed = sorted(name for name in now.keys() | saved.keys() if now.get(name) != saved.get(name))
        raise DataError(
            f"data source {changed[0]!r} is not what this run was trained on (fingerprint {saved.get(changed[0])} then, "
            f"{now.get(changed[0])} now); restore it, or set data.allow_changed=true to go on with the new data"
        )


def open_data(config: DataConfig, topology: Topology | None = None, on_progress: Callable[[str, int, int], None] | None = None) -> Dataset:
    """Collective: open all sources, preparing on rank 0 what is not prepared yet while the others wait.

    Raises:
        DataError: a source cannot be prepared or is too small for one sequence.
    """
    topology = topology or Topology()
    if not config.sources:
        raise DataError("data.sources is empty; name at least one, such as path: builtin:python-stdlib")
    weights = [source.weight is None for source in config.sources]
    if any(weights) and not all(weights):
        raise DataError("data.sources: give every source a weight, or none")
    answer = topology.broadcast_json(_prepare_all(config, on_progress) if topology.is_main else None)
    if "error" in answer:
        raise DataError(answer["error"])
    vocabulary = open_vocabulary(config.vocabulary)
    sources = tuple(_open_source(s, Path(f), vocabulary) for s, f in zip(config.sources, answer["folders"], strict=True))
    for source in sources:
        if not source.sequences(config.sequence_length):
            raise DataError(
                f"data source {source.name!r}: too few samples: {len(source.train)} tokens to train on make no sequence of "
                f"data.sequence_length={config.sequence_length}; lower it, hold out fewer documents or add data"
            )
    return Dataset(config, vocabulary, sources)


def _prepare_all(config: DataConfig, on_progress: Callable[[str, int, int], None] | None) -> dict[str, Any]:
    folders = []
    try:
        for source in config.sources:
            folder = _prepared_folder(source) or default_folder(source, config)
            report = functools.partial(on_progress, source.name) if on_progress else None
            if not (folder / MANIFEST).is_file():
                prepare_source(source, config, folder, report)
            folders.append(str(folder))
    except WeftError as error:
        # The other ranks are waiting for an answer; they must fail with the same words.
        return {"error": str(error)}
    return {"folders": folders}


def _prepared_folder(source: SourceConfig) -> Path | None:
    path = Path(source.path).expanduser()
    is_prepared = (path / MANIFEST).is_file()
    if source.format == "prepared" and not is_prepared:
        raise DataError(f"data source {source.name!r}: {path} is not a prepared dataset; run weft data prepare SOURCE --out {path}")
    return path if is_prepared else None


def _open_source(source: SourceConfig, folder: Path, vocabulary: Vocabulary) -> Source:
    try:
        manifest = json.loads((folder / MANIFEST).read_text())
    except (OSError, json.JSONDecodeError) as error:
        raise DataError(f"{folder / MANIFEST} cannot be read ({error}); prepare the dataset again") from error
    if manifest["vocabulary"] != vocabulary.identity():
        raise DataError(
            f"data source {source.name!r} in {folder} was prepared with vocabulary {manifest['vocabulary']['kind']} "
            f"({manifest['vocabulary']['size']} ids), not this one; prepare it again"
        )
    train, held = _stretches(folder, manifest)
    shards = manifest["shards"]
    return Source(source.name, TokenStream(folder, shards, train), TokenStream(folder, shards, held), manifest, source.weight, source.max_epochs)


def _stretches(folder: Path, manifest: dict[str, Any]) -> tuple[np.ndarray, np.ndarray]:
    train: list[tuple[int, int, int]] = []
    held: list[tuple[int, int, int]] = []
    by_shard: dict[int, list[int]] = {}
    for shard, document in manifest["held_out"]:
        by_shard.setdefault(shard, []).append(document)
    for number, shard in enumerate(manifest["shards"]):
        position = 0
        for first, last in _document_ranges(folder, number, sorted(by_shard.get(number, []))):
            train.append((number, position, first))
            held.append((number, first, last))
            position = last
        train.append((number, position, shard["tokens"]))
    kept = [np.array([s for s in part if s[2] > s[1]], np.int64).reshape(-1, 3) for part in (train, held)]
    return kept[0], kept[1]


def _document_ranges(folder: Path, number: int, documents: list[int]) -> Iterator[tuple[int, int]]:
    if not documents:
        return
    ends = np.load(folder / f"shard-{number:05d}.index.npy", mmap_mode="r")[:, 0]
    for document in documents:
        yield int(ends[document - 1]) if document else 0, int(ends[document])
