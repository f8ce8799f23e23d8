"""Opens what a recipe's data section names: prepares raw sources once, then maps them.

Rank 0 prepares while the others wait; its errors reach them. The result knows its fingerprint, so
that a run is never resumed on other data without being told.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from ...models.errors import DataError, WeftError
from ...models.modalities import MODALITIES
from .config import DataConfig, SourceConfig
from .document_rows import DocumentRows, ShardArrays
from .images.encoded_rows import EncodedRows
from .images.rows import ImageRows
from .images.source_opening import ImageData, folder_fingerprint, open_images
from .images.vocabulary import ImageVocabulary
from .interleaved.layout import ImageLayout, join_layouts
from .interleaved.manifest import check_interleaved
from .interleaved.vocabulary import InterleavedVocabulary, open_interleaved
from .order import SampleOrder, SourceShare
from .patches import BitStream, check_same_patcher, open_bits
from .prepare import plan_preparation, prepare_source
from .shards import Manifest, read_manifest
from .sources import is_prepared_source
from .spans import document_span, open_spans, split_spans
from .stream import TokenStream
from .vocabulary import Vocabulary

if TYPE_CHECKING:
    from ..distributed import Topology

__all__ = ["Dataset", "Source", "cache_folder", "open_data"]

# Well below any collective's time limit, so that ranks that wait for a long preparation live.
HEARTBEAT_S = 20.0
BASIC_PARTS = ("vocabulary", "sequence_length", "repeat_filter")
"""Of the fingerprint of any data; others are there where the data are interleaved, packed by documents, or images."""
OTHER_PARTS = ("packing", "interleaved", "latents", "images", "tokenizer", "scores")


Rows = TokenStream | DocumentRows | ImageRows | EncodedRows


@dataclass(frozen=True)
class Source:
    """One prepared source.

    Args:
        train: what is trained on: a stream of ids that rows are cut from, rows of whole documents, or images.
        held_out: ids of the documents kept for evaluation, alike.
        sequences: samples of one pass.
        train_patches, held_out_patches: stored patch starts of the same positions; None where there are none.
    """

    name: str
    index: int
    config: SourceConfig
    folder: Path
    manifest: Manifest
    train: Rows
    held_out: Rows
    sequences: int
    train_patches: BitStream | None = None
    held_out_patches: BitStream | None = None

    @property
    def held_out_bytes(self) -> int:
        return sum(size for _, _, size in self.manifest.held_out)

    def document_lengths(self) -> NDArray[np.int64]:
        """(documents,) ids of every document, held-out ones included."""
        parts = [np.diff(shard.open_ends(self.folder), prepend=0) for shard in self.manifest.shards]
        return np.concatenate(parts)

    def held_out_documents(self) -> Iterator[NDArray[Any]]:
        """(N,) ids of each held-out document."""
        for shard_number, document, _ in self.manifest.held_out:
            shard = self.manifest.shards[shard_number]
            start, stop = document_span(shard.open_ends(self.folder), document)
            yield shard.open_ids(self.folder)[start:stop]


class Dataset:
    """All sources of a run, and what they were when it started."""

    def __init__(
        self,
        config: DataConfig,
        vocabulary: Vocabulary,
        sources: list[Source],
        image_data: ImageData | None = None,
    ) -> None:
        self.config = config
        self.image_data = image_data
        """Of an image run: classes, ratios, and the tokenizer where images are encoded; None of any other."""
        self.vocabulary = vocabulary
        self.sources = sources
        self.sequence_length = config.sequence_length
        settings = config.interleaved
        images = {
            source.name: source.manifest.interleaved["image"]
            for source in sources
            if source.manifest.interleaved and "image" in source.manifest.interleaved
        }
        self.images: ImageLayout | None = None
        """Shape, scale and codec of the images of all sources; None where there are none."""
        if settings is not None:
            self.images = join_layouts(images, settings.image)

    @property
    def modalities(self) -> tuple[str, ...]:
        """What a batch's `modality` counts by."""
        return self.config.interleaved.modalities if self.config.interleaved else MODALITIES[:1]

    @property
    def patches(self) -> Mapping[str, Any] | None:
        """Identity of the patcher whose patches all sources have stored; None where none has any.

        Raises:
            DataError: the sources differ.
        """
        return check_same_patcher({source.name: source.manifest.patches for source in self.sources})

    def source(self, name: str) -> Source:
        """The source of this name.

        Raises:
            DataError: there is none.
        """
        for source in self.sources:
            if source.name == name:
                return source
        raise DataError(
            f"no source {name!r}; there is {', '.join(source.name for source in self.sources)}"
        )

    def held_out(self, name: str) -> Iterator[NDArray[Any]]:
        """(N,) ids of each document of a source that is kept out of training."""
        return self.source(name).held_out_documents()

    def with_held_out(self, documents: Mapping[str, Sequence[bytes]]) -> Dataset:
        """The same data with other held-out documents; stored patches, which would not fit them, are left out.

        Args:
            documents: raw text by source; sources that are not named hold nothing out.

        Raises:
            DataError: documents of several modalities, which raw text does not stand for.
        """
        if self.config.interleaved is not None or self.config.images is not None:
            held = "data.interleaved" if self.config.images is None else "data.images"
            raise DataError(
                f"held-out text can only be exchanged where all is text, and {held} is set"
            )
        sources = []
        for source in self.sources:
            ids = self.vocabulary.encode_documents(documents.get(source.name, ()))
            held_out = self._rows_of(source.name, ids)
            sources.append(replace(source, held_out=held_out, held_out_patches=None))
        return Dataset(self.config, self.vocabulary, sources)

    def _rows_of(self, name: str, documents: Sequence[NDArray[Any]]) -> TokenStream | DocumentRows:
        if not self.config.packs_documents:
            return TokenStream(documents, self.vocabulary.dtype)
        ids = np.concatenate([np.empty(0, self.vocabulary.dtype), *documents])
        ends = np.cumsum([len(part) for part in documents], dtype=np.int64)
        wanted = np.arange(len(documents))
        return DocumentRows([ShardArrays(ids, ends)], [wanted], self.sequence_length, name)

    def order(self, seed: int) -> SampleOrder:
        """Which sample comes when."""
        shares = [
            SourceShare(
                source.name, source.sequences, source.config.weight, source.config.max_epochs
            )
            for source in self.sources
        ]
        return SampleOrder(shares, seed)

    def check_samples(self, samples: int, seed: int = 0) -> None:
        """See that the sources hold out for a run of so many samples.

        Raises:
            DataError: too few samples under some source's `max_epochs`.
        """
        self.order(seed).check(samples)

    @property
    def fingerprint(self) -> dict[str, Any]:
        """JSON-able; two datasets with equal ones give the same samples for the same seed."""
        more: dict[str, Any] = {"packing": "documents"} if self.config.packs_documents else {}
        if self.config.interleaved is not None:
            more["interleaved"] = self.config.interleaved.order_settings()
        if self.images is not None and self.images.kind == "latents":
            more["latents"] = {"scale": self.images.scale, "shift": self.images.shift}
        if self.config.images is not None and self.image_data is not None:
            more["images"] = self.config.images.order_settings()
            more["tokenizer"] = {"fingerprint": self.image_data.tokenizer}
            more["scores"] = {"identity": self.image_data.scores}
        return more | {
            "vocabulary": self.vocabulary.identity(),
            "sequence_length": self.sequence_length,
            "repeat_filter": self.config.repeat_filter.model_dump(),
            "sources": [
                {
                    "name": source.name,
                    "content": source.manifest.fingerprint,
                    "sequences": source.sequences,
                    "weight": source.config.weight,
                }
                for source in self.sources
            ],
        }

    def check_fingerprint(self, saved: Mapping[str, Any]) -> None:
        """Refuse data that is not what a checkpoint was trained on, unless `data.allow_changed` is
        set.

        Raises:
            DataError: names everything that changed.
        """
        changes = list(_changes(saved, self.fingerprint))
        if changes and not self.config.allow_changed:
            raise DataError(
                f"the data changed since this run's checkpoint: {'; '.join(changes)}; restore it, "
                "or set data.allow_changed=true to go on with the data as it is now"
            )


def _changes(saved: Mapping[str, Any], found: Mapping[str, Any]) -> Iterator[str]:
    for key in (*BASIC_PARTS, *OTHER_PARTS):
        if saved.get(key) != found.get(key):
            label = key.replace("_", " ")
            yield f"{label} was {_short(saved.get(key))} and is {_short(found.get(key))}"
    before = {item["name"]: item for item in saved.get("sources", ())}
    now = {item["name"]: item for item in found["sources"]}
    yield from (f"source {name!r} is gone" for name in before if name not in now)
    yield from (f"source {name!r} is new" for name in now if name not in before)
    for name in (name for name in now if name in before):
        old, new = before[name], now[name]
        if old["content"] != new["content"]:
            was, now_is = old["content"][:12], new["content"][:12]
            yield f"source {name!r} has other content (was {was}, is {now_is})"
        if old["weight"] != new["weight"]:
            yield f"the weight of source {name!r} was {old['weight']} and is {new['weight']}"
    if list(before) != list(now) and set(before) == set(now):
        yield f"the order of the sources was {', '.join(before)} and is {', '.join(now)}"


def _short(value: Any) -> str:
    if isinstance(value, Mapping):
        return ", ".join(f"{key} {str(item)[:12]}" for key, item in value.items())
    return str(value)


def cache_folder(config: DataConfig) -> Path:
    """Where prepared sources are kept."""
    chosen = config.cache_dir or os.environ.get("WEFT_CACHE")
    return (Path(chosen).expanduser() if chosen else Path.home() / ".cache" / "weft") / "data"


def open_data(config: DataConfig, topology: Topology | None = None) -> Dataset:
    """Collective: open the sources of a run; raw ones are prepared into the cache on first use.

    Args:
        topology: this process among the others; None is a process on its own.

    Raises:
        DataError: a source that is missing, empty, unreadable, changed or too small, on any rank.
    """
    if not config.sources:
        raise DataError(
            "data.sources is empty; name at least one, such as {name: code, path: "
            "builtin:python-stdlib}"
        )
    vocabulary: Vocabulary = (
        ImageVocabulary()
        if config.images is not None
        else open_interleaved(config.vocabulary, config.interleaved)
    )
    prepare = partial(_prepare_all, config)
    found = (
        prepare()
        if topology is None or topology.world_size == 1
        else _on_rank_zero(prepare, topology)
    )
    if config.images is not None:
        return _open_image_sources(config, vocabulary, found)
    sources = []
    for index, (item, (folder, fingerprint)) in enumerate(zip(config.sources, found, strict=True)):
        source = _open_source(config, vocabulary, index, item, Path(folder))
        _check_same_here(source, fingerprint)
        sources.append(source)
    return Dataset(config, vocabulary, sources)


def _check_same_here(source: Source, fingerprint: str) -> None:
    if source.manifest.fingerprint != fingerprint:
        raise DataError(
            f"source {source.name!r}: {source.folder} is not the same here as on rank 0; "
            "put data.cache_dir on a file system that all nodes share"
        )


def _open_image_sources(
    config: DataConfig, vocabulary: Vocabulary, found: Sequence[tuple[str, str]]
) -> Dataset:
    assert config.images is not None
    folders = {
        item.name: Path(folder) for item, (folder, _) in zip(config.sources, found, strict=True)
    }
    opened, image_data = open_images(config.images, config.sequence_length, folders)
    sources = []
    for index, item in enumerate(config.sources):
        image = opened[item.name]
        source = Source(
            item.name,
            index,
            item,
            folders[item.name],
            image.manifest,
            image.train,
            image.held_out,
            image.train.sequences,
        )
        _check_same_here(source, found[index][1])
        sources.append(source)
    return Dataset(config, vocabulary, sources, image_data)


def _prepare_all(config: DataConfig) -> list[tuple[str, str]]:
    """(folder, fingerprint) of every source, prepared."""
    found = []
    for source in config.sources:
        if config.images is not None and is_prepared_source(source):
            folder = Path(source.path).expanduser().absolute()
            found.append((str(folder), folder_fingerprint(folder)))
            continue
        preparation = plan_preparation(
            source,
            config.vocabulary,
            held_out=config.held_out,
            repeats=config.repeat_filter,
            drop_repetitive=config.drop_repetitive_documents,
            interleaved=config.interleaved,
            images=config.images,
        )
        if preparation.listing.kind == "prepared":
            folder = Path(source.path).expanduser().absolute()
            manifest = read_manifest(folder)
        else:
            folder = cache_folder(config).absolute() / f"{source.name}-{preparation.key[:16]}"
            manifest = prepare_source(preparation, folder, workers=config.prepare_workers)
        found.append((str(folder), manifest.fingerprint))
    return found


def _on_rank_zero(
    prepare: partial[list[tuple[str, str]]], topology: Topology
) -> list[tuple[str, str]]:
    """Collective: rank 0 prepares and tells the others; a broadcast now and then keeps them from
    timing out.
    """
    if not topology.is_main:
        while not (news := topology.broadcast_json(None))["done"]:
            pass
        if news["error"]:
            raise DataError(news["error"])
        return [(folder, fingerprint) for folder, fingerprint in news["found"]]
    with ThreadPoolExecutor(1, "weft-prepare") as pool:
        future: Future[list[tuple[str, str]]] = pool.submit(prepare)
        while not _is_done_within(future, HEARTBEAT_S):
            topology.broadcast_json({"done": False})
    problem = future.exception()
    text = (
        str(problem)
        if isinstance(problem, WeftError)
        else f"rank 0 failed to prepare the data: {problem!r}"
    )
    found = [] if problem else future.result()
    topology.broadcast_json({"done": True, "error": text if problem else None, "found": found})
    return future.result()


def _is_done_within(future: Future[Any], seconds: float) -> bool:
    return bool(wait([future], timeout=seconds).done)


def _open_source(
    config: DataConfig, vocabulary: Vocabulary, index: int, item: SourceConfig, folder: Path
) -> Source:
    manifest = read_manifest(folder)
    text = vocabulary.base if isinstance(vocabulary, InterleavedVocabulary) else vocabulary
    if manifest.vocabulary != text.identity():
        raise DataError(
            f"source {item.name!r}: {folder} was prepared with vocabulary "
            f"{_short(manifest.vocabulary)} and the "
            f"recipe's is {_short(text.identity())}; set data.vocabulary to match, or "
            "prepare it again"
        )
    _check_modalities(config, vocabulary, item, manifest)
    _check_row_length(item.name, manifest, config)
    if config.packs_documents:
        return _open_documents(config, index, item, folder, manifest)
    spans, held_out_spans = split_spans(folder, manifest)
    train = open_spans(folder, manifest, spans, vocabulary.dtype)
    sequences = train.sequences(config.sequence_length)
    if not sequences:
        raise DataError(
            f"too few samples: source {item.name!r} has {train.tokens} ids to train on and one "
            "sample takes "
            f"{config.sequence_length} and the id after; lower data.sequence_length or add data"
        )
    return Source(
        item.name,
        index,
        item,
        folder,
        manifest,
        train,
        open_spans(folder, manifest, held_out_spans, vocabulary.dtype),
        sequences,
        open_bits(folder, manifest, spans),
        open_bits(folder, manifest, held_out_spans),
    )


def _open_documents(
    config: DataConfig, index: int, item: SourceConfig, folder: Path, manifest: Manifest
) -> Source:
    """A source whose rows hold whole documents."""
    image = (manifest.interleaved or {}).get("image")
    shards = []
    for shard in manifest.shards:
        latents = None
        if image is not None and image["kind"] == "latents":
            latents = shard.open_latents(folder, image["dtype"], image["shape"])
        arrays = shard.open_ids(folder), shard.open_ends(folder), shard.open_spans(folder)
        shards.append(ShardArrays(*arrays, latents))
    chosen: list[list[int]] = [[] for _ in shards]
    for number, document, _ in manifest.held_out:
        chosen[number].append(document)
    held_out = [np.array(sorted(documents), np.int64) for documents in chosen]
    train = [
        np.setdiff1d(np.arange(shard.documents), documents, assume_unique=True)
        for shard, documents in zip(manifest.shards, held_out, strict=True)
    ]
    rows = DocumentRows(shards, train, config.sequence_length, item.name)
    if not rows.sequences:
        raise DataError(
            f"too few samples: source {item.name!r} has no document of two ids or more to train on; add data"
        )
    held = DocumentRows(shards, held_out, config.sequence_length, item.name)
    return Source(item.name, index, item, folder, manifest, rows, held, rows.sequences)


def _check_modalities(
    config: DataConfig, vocabulary: Vocabulary, item: SourceConfig, manifest: Manifest
) -> None:
    if manifest.interleaved is None:
        return
    if config.interleaved is None or not isinstance(vocabulary, InterleavedVocabulary):
        held = ", ".join(manifest.interleaved["modalities"])
        raise DataError(
            f"source {item.name!r} holds {held}, and data.interleaved is null; set data.interleaved.modalities=[{held}]"
        )
    check_interleaved(item.name, manifest.interleaved, vocabulary, config.interleaved)


def _check_row_length(name: str, manifest: Manifest, config: DataConfig) -> None:
    """Patches are those of rows, and rows of another length, or of whole documents, are other rows."""
    length = config.sequence_length
    if manifest.patches is None:
        return
    stored = manifest.patches["sequence_length"]
    if config.packs_documents:
        raise DataError(
            f"source {name!r} has stored patches, which are those of a stream's rows; set data.packing=stream, or prepare it "
            "without patches"
        )
    if stored != length:
        raise DataError(
            f"source {name!r} was patched for data.sequence_length={stored} and the run's is {length}; set it to "
            f"{stored}, or prepare the source again with --sequence-length {length}"
        )
