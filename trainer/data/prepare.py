"""Turns a source into shards, in parallel, restartable at any instant, the same for any number of
workers.

Work happens in a hidden folder beside the result, one unit at a time; a finished unit has a record,
written last. The folder gets its real name when all is done, so a dataset is there in full or not
at all.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import shutil
import signal
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import FIRST_EXCEPTION, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path
from typing import TYPE_CHECKING, Any

from numpy.typing import NDArray

from ...models.errors import DataError
from ..files import free_bytes, sync_directory
from .config import HeldOutConfig, RepeatFilterConfig, SourceConfig
from .images.config import ImagesConfig
from .interleaved.config import InterleavedConfig
from .patches import PatchJob, write_patches
from .shard_writer import UnitJob, unit_identity, write_unit
from .shards import FORMAT_VERSION, MANIFEST, Manifest, Shard, content_fingerprint, read_manifest
from .sources import INTERLEAVED_KINDS, Listing, Unit, is_prepared_source, list_inputs, plan_units
from .vocabulary import open_vocabulary

if TYPE_CHECKING:
    from ...models.batch import PackedBatch

__all__ = ["IMAGE_IDENTITY", "Preparation", "plan_preparation", "prepare_source"]

# Below this a pool of processes costs more than it saves.
POOL_FROM_BYTES = 32 << 20
PARENT_LOOK_S = 1.0
SPARE_BYTES = 16 << 20
LARGEST_HELD_OUT_SHARE = 10
IMAGE_IDENTITY = {"kind": "images", "size": 0}
"""Of data whose samples are no text: what stands where others have their vocabulary."""


@dataclass(frozen=True)
class Preparation:
    """What preparing a source will do, worked out without reading any of its text.

    Args:
        key: hash of the inputs (names, sizes, times) and of every setting that changes the result.
        patches: patches to store with the ids, or None.
        max_bad_share: of images: refuse more unreadable ones.
    """

    listing: Listing
    units: tuple[Unit, ...]
    job: UnitJob
    key: str
    patches: PatchJob | None = None
    max_bad_share: float = 0.0


def plan_preparation(
    source: SourceConfig,
    vocabulary: str,
    *,
    held_out: HeldOutConfig,
    repeats: RepeatFilterConfig,
    drop_repetitive: bool = False,
    patches: PatchJob | None = None,
    interleaved: InterleavedConfig | None = None,
    images: ImagesConfig | None = None,
) -> Preparation:
    """List the inputs and cut them into units.

    Args:
        interleaved: how documents of several modalities are encoded; sources of text alone take no notice.
        images: how images with classes are read; None for documents.

    Raises:
        DataError: nothing to read, or it cannot be read.
    """
    if images is not None and not is_prepared_source(source):
        # Images need no vocabulary, and text no image library.
        from .images.planning import plan_images

        return plan_images(source, held_out, images)
    listing = list_inputs(source)
    settings = _interleaved_of(source, listing, interleaved)
    if settings is not None and patches is not None:
        raise DataError(
            f"{source.path} holds images or speech, and patches are of bytes of text; leave --patches-from out"
        )
    job = UnitJob(
        kind=listing.kind,
        text_key=source.text_key,
        token_dtype=source.token_dtype,
        vocabulary=vocabulary,
        vocabulary_identity=open_vocabulary(vocabulary).identity(),
        repeats=repeats if drop_repetitive else None,
        held_out=held_out,
        interleaved=settings,
        codec=_codec_identity(settings),
    )
    units = tuple(plan_units(listing, source.token_dtype))
    inputs = [[file.name, file.size, file.mtime_ns] for file in listing.files]
    parts = [FORMAT_VERSION, job.identity(), inputs]
    if patches is not None:
        parts.append(patches.identity())
    payload = json.dumps(parts, sort_keys=True)
    return Preparation(listing, units, job, hashlib.sha256(payload.encode()).hexdigest(), patches)


def _interleaved_of(
    source: SourceConfig, listing: Listing, given: InterleavedConfig | None
) -> InterleavedConfig | None:
    if listing.kind not in INTERLEAVED_KINDS:
        return None
    if given is None:
        raise DataError(
            f"source {source.name!r}: {source.path} holds documents of several modalities; say which, and what images become, "
            "with data.interleaved"
        )
    return given


def _codec_identity(settings: InterleavedConfig | None) -> dict[str, Any] | None:
    if settings is None or "image" not in settings.modalities:
        return None
    from .interleaved.codecs import open_codec

    codec = open_codec(settings.image)
    return codec.identity if codec else None


def prepare_source(
    preparation: Preparation, out: Path, *, workers: int | None = None, quiet: bool = False
) -> Manifest:
    """Prepare a source into `out`, or go on where an earlier attempt stopped.

    Args:
        workers: processes; None is one a core for large inputs and this one for small.
        quiet: show no progress.

    Raises:
        DataError: `out` holds something else, an input is bad, or the disk is too small.
    """
    out = out.absolute()
    if _is_prepared(out):
        return _existing(preparation, out)
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise DataError(
            f"{out} exists and is not a prepared dataset; give another --out or remove it"
        )
    partial = out.with_name(f".{out.name}.partial")
    with _only_one(partial, out, quiet):
        if _is_prepared(out):
            # Another process finished it while this one waited; what this one made is empty.
            if partial.is_dir() and not any(partial.iterdir()):
                partial.rmdir()
            return _existing(preparation, out)
        try:
            manifest = _finished_before(preparation, partial)
            if manifest is None:
                _run_units(preparation, partial, workers, quiet)
                manifest = _finish(preparation, partial)
                if preparation.patches is not None:
                    manifest = _add_patches(
                        preparation, preparation.patches, partial, manifest, quiet
                    )
                manifest.write(partial)
        except DataError:
            if not any(partial.glob("*.record")):
                shutil.rmtree(partial, ignore_errors=True)
            raise
        _leave_only(partial, manifest)
        os.replace(partial, out)
        sync_directory(out.parent)
    return manifest


def _is_prepared(folder: Path) -> bool:
    return (folder / MANIFEST).is_file()


def _finished_before(preparation: Preparation, partial: Path) -> Manifest | None:
    """The manifest, where an attempt was stopped between writing it and giving the folder its
    name.
    """
    if not _is_prepared(partial):
        return None
    manifest = read_manifest(partial)
    return manifest if manifest.plan == preparation.key else None


def _leave_only(folder: Path, manifest: Manifest) -> None:
    """Remove records and what other attempts left."""
    wanted = {
        MANIFEST,
        *(shard.ids for shard in manifest.shards),
        *(name for shard in manifest.shards for name, _, _ in shard.files()),
        *((manifest.interleaved or {}).get("files") or {}),
        *((manifest.images or {}).get("files") or {}),
    }
    for path in folder.iterdir():
        if path.name not in wanted:
            path.unlink()


def _existing(preparation: Preparation, out: Path) -> Manifest:
    manifest = read_manifest(out)
    if manifest.plan != preparation.key:
        raise DataError(
            f"{out} holds a dataset made from other files or settings ({manifest.source}); "
            "give another --out, or remove it to prepare again"
        )
    return manifest


def _make_folder(folder: Path) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise DataError(
            f"cannot create {folder}: {error.strerror}; choose another place (--out, "
            "data.cache_dir)"
        ) from error


@contextmanager
def _only_one(folder: Path, out: Path, quiet: bool) -> Iterator[None]:
    """Hold the folder's lock; the system lets go of it when a process dies, however it dies."""
    while True:
        _make_folder(folder)
        descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
        try:
            _lock(descriptor, folder, quiet)
            # The one that held it may have renamed or removed the folder.
            if _is_prepared(out) or (
                folder.is_dir() and os.path.samestat(os.fstat(descriptor), folder.stat())
            ):
                yield
                return
        finally:
            os.close(descriptor)


def _lock(descriptor: int, folder: Path, quiet: bool) -> None:
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        _say(f"waiting for another process that prepares {folder.name}", quiet)
        fcntl.flock(descriptor, fcntl.LOCK_EX)


def _run_units(preparation: Preparation, partial: Path, workers: int | None, quiet: bool) -> None:
    job, units = preparation.job, preparation.units
    pending = [unit for unit in units if not _is_finished(job, unit, partial)]
    _check_space(preparation, partial, sum(unit.size_bytes for unit in pending))
    started, title = time.monotonic(), preparation.listing.title
    count = workers or (_cores() if preparation.listing.size >= POOL_FROM_BYTES else 1)
    with _progress(title, sum(unit.size_bytes for unit in units), quiet) as advance:
        advance(sum(unit.size_bytes for unit in units) - sum(unit.size_bytes for unit in pending))
        if count == 1 or len(pending) < 2:
            for unit in pending:
                write_unit(job, unit, partial)
                advance(unit.size_bytes)
        else:
            _run_pool(job, pending, partial, min(count, len(pending)), advance)
    if pending:
        _say(f"prepared {title}: {_rate(sum(u.size_bytes for u in pending), started)}", quiet)


def _rate(done: int, started: float) -> str:
    seconds = max(time.monotonic() - started, 1e-3)
    return f"{done / 1e6:.1f} MB in {seconds:.1f} s ({done / 1e6 / seconds:.2f} MB/s)"


def _add_patches(
    preparation: Preparation, patches: PatchJob, partial: Path, manifest: Manifest, quiet: bool
) -> Manifest:
    """Store where patches start; one pass over all ids in the order of training's rows."""
    # Batches are torch's, and preparing text alone needs none of it.
    from .packing import RowAssembler, Rows

    vocabulary = open_vocabulary(preparation.job.vocabulary)
    assembler = RowAssembler(vocabulary.eos_id, vocabulary.token_byte_lengths(), None)

    def pack(ids: NDArray[Any], borders: list[tuple[int, int]]) -> PackedBatch:
        nothing = (0,) * len(ids)
        return assembler.pack(Rows(ids, borders, nothing, nothing))

    started = time.monotonic()
    with _progress(f"{preparation.listing.title}, patches", manifest.tokens, quiet) as advance:
        patched = write_patches(patches, partial, manifest, pack, vocabulary.dtype, advance)
    _say(f"patched {preparation.listing.title}: {_rate(manifest.bytes, started)}", quiet)
    return patched


def _cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _run_pool(
    job: UnitJob,
    pending: Sequence[Unit],
    partial: Path,
    workers: int,
    advance: Callable[[int], None],
) -> None:
    # Not fork: the parent may hold threads and a CUDA context.
    pool = ProcessPoolExecutor(workers, get_context("spawn"), _start_worker, (os.getpid(),))
    try:
        futures = {pool.submit(write_unit, job, unit, partial): unit for unit in pending}
        left = set(futures)
        while left:
            done, left = wait(left, timeout=0.5, return_when=FIRST_EXCEPTION)
            for future in done:
                future.result()
                advance(futures[future].size_bytes)
    except BrokenProcessPool as error:
        raise DataError(
            "a process that prepared data was killed, perhaps for want of memory; run the same "
            "command again "
            "with fewer workers (--workers, data.prepare_workers), finished shards are kept"
        ) from error
    finally:
        pool.shutdown(wait=True, cancel_futures=True)


def _start_worker(parent: int) -> None:
    """Leave signals to the parent, and do not outlive it."""
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    os.environ["TOKENIZERS_PARALLELISM"] = "false"

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(PARENT_LOOK_S)
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


def _record_of(unit: Unit, partial: Path) -> Path:
    return partial / f"shard_{unit.index:05d}.record"


def _is_finished(job: UnitJob, unit: Unit, partial: Path) -> bool:
    path = _record_of(unit, partial)
    if not path.is_file():
        return False
    record = json.loads(path.read_bytes())
    return record["unit"] == unit_identity(job, unit)


def _check_space(preparation: Preparation, partial: Path, pending_bytes: int) -> None:
    needed = int(pending_bytes * preparation.job.expansion()) + SPARE_BYTES
    free = free_bytes(partial)
    if pending_bytes and free < needed:
        raise DataError(
            f"preparing {preparation.listing.title} needs about {needed / 1e9:.2f} GB and "
            f"{partial.parent} has "
            f"{free / 1e9:.2f} GB free; free some space or choose another place (--out, "
            "data.cache_dir)"
        )


def _finish(preparation: Preparation, partial: Path) -> Manifest:
    """Join the records into a manifest, which is not written yet."""
    records = [json.loads(_record_of(unit, partial).read_bytes()) for unit in preparation.units]
    kept = [record for record in records if record["shard"]["tokens"]]
    dropped: dict[str, int] = {}
    for record in records:
        for reason, number in record["dropped"].items():
            dropped[reason] = dropped.get(reason, 0) + number
    if not kept:
        shutil.rmtree(partial, ignore_errors=True)
        reasons = (
            ", ".join(f"{number} {reason}" for reason, number in sorted(dropped.items()))
            or "none found"
        )
        raise DataError(
            f"{preparation.listing.title} has no documents with text in them ({reasons}); check "
            "path and format"
        )
    shards = tuple(Shard(**record["shard"]) for record in kept)
    held_out = _choose_held_out(kept, preparation.job.held_out.documents)
    job = preparation.job
    identity, interleaved, images = job.vocabulary_identity, None, None
    if job.images is not None:
        from .images.writer import join_image_records

        title, share = preparation.listing.title, preparation.max_bad_share
        images = join_image_records(records, job.images.classes, title, share, partial)
        content = {"classes": images["classes"]}
        fingerprint = content_fingerprint(identity, shards, held_out, images=content)
    elif job.interleaved is not None:
        from .interleaved.manifest import content_of, join_records

        interleaved = join_records(kept, job.vocabulary, job.interleaved)
        fingerprint = content_fingerprint(
            identity, shards, held_out, interleaved=content_of(interleaved)
        )
    else:
        fingerprint = content_fingerprint(identity, shards, held_out)
    return Manifest(
        plan=preparation.key,
        source=preparation.listing.title,
        kind=preparation.listing.kind,
        vocabulary=identity,
        shards=shards,
        held_out=held_out,
        dropped=dropped,
        fingerprint=fingerprint,
        interleaved=interleaved,
        images=images,
    )


def _choose_held_out(
    records: Sequence[dict[str, Any]], wanted: int
) -> tuple[tuple[int, int, int], ...]:
    """(shard, document, bytes) of the documents with the smallest keys; copies of one text go
    together.
    """
    documents = sum(record["shard"]["documents"] for record in records)
    candidates = sorted(
        (key, shard, document, size)
        for shard, record in enumerate(records)
        for key, document, size in record["candidates"]
    )
    keys = sorted({key for key, *_ in candidates})[
        : min(wanted, documents // LARGEST_HELD_OUT_SHARE)
    ]
    chosen = set(keys)
    return tuple(
        sorted(
            (shard, document, size) for key, shard, document, size in candidates if key in chosen
        )
    )


@contextmanager
def _progress(title: str, total_bytes: int, quiet: bool) -> Iterator[Callable[[int], None]]:
    """A bar on a terminal, nothing elsewhere; yields the function that moves it on by some
    bytes.
    """
    from rich.console import Console
    from rich.progress import (
        BarColumn,
        DownloadColumn,
        Progress,
        TextColumn,
        TimeRemainingColumn,
        TransferSpeedColumn,
    )

    console = Console(stderr=True)
    columns = (
        TextColumn("preparing {task.description}"),
        BarColumn(),
        DownloadColumn(),
        TransferSpeedColumn(),
        TimeRemainingColumn(),
    )
    with Progress(
        *columns, console=console, transient=True, disable=quiet or not console.is_terminal
    ) as bar:
        task = bar.add_task(title, total=total_bytes)
        yield lambda done: bar.advance(task, done)


def _say(message: str, quiet: bool) -> None:
    if not quiet:
        from rich.console import Console

        Console(stderr=True, highlight=False, soft_wrap=True).print(message, markup=False)
