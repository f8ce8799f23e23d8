"""From a source's files to memory-mapped shards, an index and a fingerprint.

Each unit of the plan becomes one shard, in any order, by any worker; a finished shard is a small JSON file that lands last, so
an interrupted preparation goes on where it was. `dataset.json` lands when all are there: without it there is no dataset.
Tokenised files are used where they are and only indexed. Imports no torch, so worker processes start fast.
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import numpy as np

from ...models.errors import DataError
from ..files import free_bytes, sync_file, write_json
from .config import DataConfig, RepeatFilterConfig, SourceConfig
from .readers import InputFile, iterate_documents, list_inputs, plan_units, resolve_format
from .repeats import has_repeats
from .vocabulary import Vocabulary, open_vocabulary

__all__ = ["MANIFEST", "cache_root", "default_folder", "prepare_source"]

MANIFEST = "dataset.json"
FORMAT = 1
POOL_THRESHOLD_BYTES = 64 << 20


@dataclass(frozen=True)
class UnitJob:
    """What a worker needs to make one shard."""

    folder: str
    number: int
    files: list[InputFile]
    kind: str
    text_key: str
    vocabulary: str
    token_dtype: str
    drop_repetitive: bool


def cache_root(config: DataConfig) -> Path:
    """Where prepared sources are kept."""
    chosen = config.cache_dir or os.environ.get("WEFT_CACHE") or "~/.cache/weft"
    return Path(chosen).expanduser() / "data"


def default_folder(source: SourceConfig, config: DataConfig) -> Path:
    """The cache folder of a source: named by what it is made of, so that edited files make another one."""
    return cache_root(config) / f"{source.name}-{_plan_key(source, config)}"


def _plan_key(source: SourceConfig, config: DataConfig) -> str:
    files = list_inputs(source)
    stamped = [(f.path, f.size, os.stat(f.path).st_mtime_ns) for f in files]
    settings = [resolve_format(source, files), source.text_key, source.token_dtype]
    about = [FORMAT, stamped, settings, open_vocabulary(config.vocabulary).identity(), _held_out_settings(config), config.drop_repetitive_documents]
    return hashlib.sha256(json.dumps(about).encode()).hexdigest()[:16]


def _held_out_settings(config: DataConfig) -> dict[str, Any]:
    return config.held_out.model_dump()


def prepare_source(
    source: SourceConfig, config: DataConfig, folder: Path, on_progress: Callable[[int, int], None] | None = None
) -> dict[str, Any]:
    """Prepare one source into `folder` unless it is complete already.

    Args:
        on_progress: called with (bytes read, bytes in all) after each unit.

    Returns:
        The manifest.

    Raises:
        DataError: unreadable or empty input, or no room.
    """
    if (folder / MANIFEST).is_file():
        return json.loads((folder / MANIFEST).read_text())
    files = list_inputs(source)
    kind = resolve_format(source, files)
    units = plan_units(files, kind)
    total = sum(f.size for f in files)
    vocabulary = open_vocabulary(config.vocabulary)
    _check_room(folder, total, kind, vocabulary)
    folder.mkdir(parents=True, exist_ok=True)
    jobs = [
        UnitJob(str(folder), i, unit, kind, source.text_key, config.vocabulary, source.token_dtype, config.drop_repetitive_documents)
        for i, unit in enumerate(units)
    ]
    _settle_plan(folder, jobs, _plan_key(source, config))
    shards: dict[int, dict[str, Any]] = {}
    done = 0
    for number, shard in _run_jobs(jobs, total, config.prepare_workers):
        shards[number] = shard
        done += sum(f.size for f in units[number])
        if on_progress:
            on_progress(done, total)
    ordered = [shards[i] for i in range(len(units))]
    manifest = _manifest(source, config, folder, ordered, vocabulary)
    write_json(folder / MANIFEST, manifest)
    return manifest


def _check_room(folder: Path, total: int, kind: str, vocabulary: Vocabulary) -> None:
    if kind == "tokens":
        return
    needed = total * vocabulary.dtype.itemsize
    free = free_bytes(folder)
    if free < needed:
        raise DataError(f"{folder} has {free >> 20} MB free, preparing needs up to {needed >> 20} MB; set data.cache_dir elsewhere")


def _settle_plan(folder: Path, jobs: list[UnitJob], key: str) -> None:
    """Shards of another plan in the same folder must not be taken for this one's."""
    path = folder / "plan.json"
    if path.is_file() and json.loads(path.read_text()).get("key") == key:
        return
    for stale in folder.glob("shard-*"):
        stale.unlink()
    write_json(path, {"key": key, "units": len(jobs)})


def _run_jobs(jobs: list[UnitJob], total: int, workers: int | None) -> Iterator[tuple[int, dict[str, Any]]]:
    workers = min(workers or os.cpu_count() or 1, len(jobs))
    if workers == 1 or total < POOL_THRESHOLD_BYTES:
        for job in jobs:
            yield job.number, _prepare_unit(job)
        return
    # Spawned, not forked: the parent may hold torch's threads. The workers import no torch.
    with ProcessPoolExecutor(workers, mp_context=get_context("spawn")) as pool:
        waiting = {pool.submit(_prepare_unit, job): job.number for job in jobs}
        try:
            for future in as_completed(waiting):
                yield waiting[future], future.result()
        except BaseException:
            pool.shutdown(wait=True, cancel_futures=True)
            raise


def _prepare_unit(job: UnitJob) -> dict[str, Any]:
    folder = Path(job.folder)
    marker = folder / f"shard-{job.number:05d}.json"
    if marker.is_file():
        return json.loads(marker.read_text())
    try:
        shard = _index_tokens(job) if job.kind == "tokens" else _tokenise(job)
    except OSError as error:
        if error.errno == errno.ENOSPC:
            raise DataError(f"no room left in {folder}; set data.cache_dir to a larger disk and run again") from error
        raise
    write_json(marker, shard)
    return shard


def _tokenise(job: UnitJob) -> dict[str, Any]:
    folder, vocabulary = Path(job.folder), open_vocabulary(job.vocabulary)
    data_path = folder / f"shard-{job.number:05d}.tokens"
    digest, ends, names, text_bytes, position, dropped = hashlib.sha256(), [], [], [], 0, 0
    temporary = data_path.with_suffix(".tmp")
    with open(temporary, "wb") as out:
        for name, text in iterate_documents(job.files, job.kind, job.text_key):
            if not text:
                continue
            raw_text = text if isinstance(text, bytes) else text.encode()
            ids = vocabulary.encode_documents([raw_text])[0]
            if job.drop_repetitive and has_repeats(ids[None], RepeatFilterConfig())[0]:
                dropped += 1
                continue
            raw = ids.tobytes()
            out.write(raw)
            digest.update(raw)
            position += len(ids)
            ends.append(position)
            names.append(_name_hash(name))
            text_bytes.append(len(raw_text))
        out.flush()
        os.fsync(out.fileno())
    os.replace(temporary, data_path)
    _save_index(folder, job.number, ends, names, text_bytes)
    return {
        "data": data_path.name,
        "dtype": vocabulary.dtype.name,
        "offset": 0,
        "tokens": position,
        "documents": len(ends),
        "bytes": sum(text_bytes),
        "dropped": dropped,
        "sha256": digest.hexdigest(),
    }


def _index_tokens(job: UnitJob) -> dict[str, Any]:
    """Index one file of ids: headerless as OLMo writes it, or a real .npy."""
    vocabulary, file = open_vocabulary(job.vocabulary), job.files[0]
    offset, dtype = 0, np.dtype(job.token_dtype)
    with open(file.path, "rb") as opened:
        if opened.read(6) == b"\x93NUMPY":
            opened.seek(0)
            version = np.lib.format.read_magic(opened)
            read = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
            shape, _, dtype = read(opened)
            offset = opened.tell()
            if len(shape) != 1:
                raise DataError(f"{file.path} holds an array of shape {shape}; token files have one dimension")
    if (file.size - offset) % dtype.itemsize:
        raise DataError(f"{file.path} is not a whole number of {dtype.name} ids; set data.sources.N.token_dtype")
    if vocabulary.eos_id is None:
        raise DataError(f"{file.path}: the vocabulary names no end-of-document id, so documents cannot be told apart")
    ids = np.memmap(file.path, dtype, mode="r", offset=offset)
    largest = int(ids.max()) if len(ids) else 0
    if largest >= vocabulary.size:
        raise DataError(f"{file.path} holds id {largest}, the vocabulary has {vocabulary.size}; check vocabulary and token_dtype")
    ends = [int(e) + 1 for e in np.flatnonzero(ids == vocabulary.eos_id)]
    if len(ids) and (not ends or ends[-1] != len(ids)):
        ends.append(len(ids))
    _save_index(Path(job.folder), job.number, ends, [_name_hash(f"{file.name}#{i}") for i in range(len(ends))], [0] * len(ends))
    return {
        "data": file.path,
        "dtype": dtype.name,
        "offset": offset,
        "tokens": len(ids),
        "documents": len(ends),
        "bytes": 0,
        "dropped": 0,
        "sha256": hashlib.sha256(memoryview(ids).cast("B") if len(ids) else b"").hexdigest(),
    }


def _save_index(folder: Path, number: int, ends: list[int], names: list[int], text_bytes: list[int]) -> None:
    """(documents, 3) int64: end of each document in ids, hash of its name, bytes of its text."""
    path = folder / f"shard-{number:05d}.index.npy"
    table = np.stack([np.array(column, np.int64) for column in (ends, names, text_bytes)], axis=1)
    temporary = path.with_suffix(".tmp")
    with open(temporary, "wb") as out:
        np.save(out, table)
    sync_file(temporary)
    os.replace(temporary, path)


def _name_hash(name: str) -> int:
    return int.from_bytes(hashlib.blake2b(name.encode(), digest_size=8).digest(), "little") >> 1


def _manifest(source: SourceConfig, config: DataConfig, folder: Path, shards: list[dict[str, Any]], vocabulary: Vocabulary) -> dict[str, Any]:
    held_out = _choose_held_out(folder, shards, config)
    totals = {key: sum(shard[key] for shard in shards) for key in ("tokens", "documents", "bytes", "dropped")}
    if not totals["tokens"]:
        raise DataError(f"data source {source.name!r}: {source.path} holds no text; check format and text_key")
    content = [vocabulary.identity(), [s["sha256"] for s in shards], held_out]
    return {
        "format": FORMAT,
        "name": source.name,
        "vocabulary": vocabulary.identity(),
        "settings": {"source": _plain(source), "held_out": _held_out_settings(config)},
        **totals,
        "held_out": held_out,
        "shards": shards,
        "fingerprint": hashlib.sha256(json.dumps(content).encode()).hexdigest()[:32],
    }


def _plain(source: SourceConfig) -> dict[str, Any]:
    return json.loads(source.model_dump_json())


def _choose_held_out(folder: Path, shards: list[dict[str, Any]], config: DataConfig) -> list[list[int]]:
    """[shard, document] of the documents with the smallest name hashes among those of a fitting size."""
    settings = config.held_out
    if not settings.documents:
        return []
    best: list[tuple[int, int, int]] = []
    for number in range(len(shards)):
        index = np.load(folder / f"shard-{number:05d}.index.npy")
        lengths = np.diff(index[:, 0], prepend=0)
        size = np.where(index[:, 2] > 0, index[:, 2], lengths)
        fits = (size >= settings.min_bytes) & (size <= (settings.max_bytes or np.iinfo(np.int64).max))
        # The hash alone decides, and the place breaks ties.
        chosen = np.flatnonzero(fits)
        chosen = chosen[np.argsort(index[chosen, 1], kind="stable")][: settings.documents]
        best.extend((int(index[d, 1]), number, int(d)) for d in chosen)
    return sorted([shard, document] for _, shard, document in sorted(best)[: settings.documents])


