"""Saving in the background and loading on any number of ranks.

A save is a copy to host buffers, then a thread that writes, and on rank 0 a commit: wait for all ranks' reports (small files, no
collective, so a dead rank is a clear timeout), write the manifest, rename the folder, move `latest`, remove what is no longer kept.
Until the rename nothing with a final name exists; after it the checkpoint is whole.
"""

from __future__ import annotations

import errno
import json
import logging
import math
import os
import shutil
import threading
import time
import uuid
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ...models.errors import CheckpointError, WeftError
from ..distributed import Topology
from ..engines.protocol import TensorShard
from ..files import free_bytes, sync_directory, write_json
from .config import CheckpointConfig
from .layout import DTYPES, MANIFEST, Manifest, checkpoints_folder, step_folder
from .reading import (
    CheckpointInfo,
    list_checkpoints,
    manifest_problem,
    read_manifest,
    read_range,
    structure_problem,
    verify_files,
)
from .writing import CODES, Piece, build_manifest, move_latest, write_pieces

__all__ = ["CheckpointManager", "LoadedCheckpoint"]

log = logging.getLogger("weft.checkpoint")

POLL_S = 0.02
OPTIONAL_STATE = ("optimizer/skip_step/", "ema/")
"""State that may be absent from a checkpoint: a rule that was switched on since starts with an empty window, averages of
weights start from the weights.
"""


@dataclass(frozen=True)
class LoadedCheckpoint:
    """What was loaded besides tensors. `rank_state` is this rank's, None if the world had fewer ranks then."""

    path: Path
    step: int
    state: dict[str, Any]
    rank_state: dict[str, Any] | None


class CheckpointManager:
    """The checkpoints of one run. Methods marked Collective are called by every rank.

    Args:
        on_commit: told (step, seconds from the call of `save`) on rank 0, from the thread that writes.
    """

    def __init__(
        self,
        run_dir: Path,
        config: CheckpointConfig,
        topology: Topology,
        on_commit: Callable[[int, float], None] | None = None,
    ) -> None:
        self.run_dir, self.config, self.topology = run_dir, config, topology
        self.failed_saves = 0
        self.save_seconds = 0.0
        """How long the longest of this attempt's saves took to its commit, on rank 0."""
        self._on_commit = on_commit
        self._is_abandoned = threading.Event()
        self.resumed_from: Path | None = None
        self._buffers: dict[str, Tensor] = {}
        self._thread: threading.Thread | None = None
        self._failure: BaseException | None = None
        self._verified: set[Path] = set()
        self._is_first_save = True

    # Saving

    def save(
        self,
        step: int,
        shards: Sequence[TensorShard],
        state: dict[str, Any],
        rank_state: dict[str, Any],
        *,
        kind: str = "periodic",
        blocking: bool | None = None,
    ) -> None:
        """Collective: save; returns as soon as the tensors are copied unless `blocking`.

        Args:
            state: plain data, the same on all ranks; rank 0's is written. A number called `score` (lower is better)
                is what `keep_best` goes by.
            rank_state: plain data of this rank.
            kind: `permanent` is never removed.

        Raises:
            CheckpointError: this save, or the one before in the background, failed; on all ranks alike.
        """
        earlier = self._settle()
        begin = time.monotonic()
        folder = self._open_folder(step, shards)
        pieces = [self._snapshot(shard) for shard in shards if shard.is_writer]
        if self.topology.device.type == "cuda":
            torch.cuda.synchronize()
        self._thread = threading.Thread(
            target=self._write,
            args=(folder, step, pieces, state, rank_state, kind, begin),
            name="weft-checkpoint",
        )
        self._thread.start()
        if blocking or (blocking is None and not self.config.asynchronous):
            self.wait()
        if earlier:
            raise CheckpointError(earlier)

    def wait(self) -> None:
        """Collective: until the save in the background is committed.

        Raises:
            CheckpointError: it failed, on whichever rank.
        """
        problem = self._settle()
        if problem:
            raise CheckpointError(problem)

    def close(self, *, abandon: bool = False) -> None:
        """Let this rank's writer finish; not collective, for the way out of an error.

        Args:
            abandon: do not wait for other ranks' parts, because one is gone; what is written so far is removed.
        """
        if abandon:
            self._is_abandoned.set()
        if self._thread is not None:
            self._thread.join()

    def _settle(self) -> str | None:
        """Collective: join the writer and agree on how it went; counts failures in a row."""
        if self._thread is None:
            return None
        self._thread.join()
        self._thread = None
        failure, self._failure = self._failure, None
        if failure is not None and not isinstance(failure, (OSError, WeftError)):
            raise failure
        message = None if failure is None else _explain(failure)
        messages = [m for m in self.topology.gather_json(message) if m]
        self.failed_saves = self.failed_saves + 1 if messages else 0
        return messages[0] if messages else None

    def _open_folder(self, step: int, shards: Sequence[TensorShard]) -> Path:
        """Collective: a temporary folder with room for the whole checkpoint, or the same error everywhere."""
        needed = sum(s.tensor.numel() * s.tensor.element_size() for s in shards if s.is_writer)
        (needed,) = self.topology.sum_integers([needed])
        answer: dict[str, str] = {}
        if self.topology.is_main:
            parent = checkpoints_folder(self.run_dir)
            folder = parent / f"step_{step:08d}.tmp-{uuid.uuid4().hex[:8]}"
            try:
                if self._is_first_save:
                    _remove_leftovers(parent)
                free = free_bytes(parent)
                if free < needed * 1.02:
                    answer = {
                        "error": f"{parent} has {free >> 20} MB free, step {step} needs {needed >> 20} MB; free some space or lower checkpoint.keep"
                    }
                else:
                    folder.mkdir(parents=True)
                    answer = {"folder": str(folder)}
            except OSError as error:
                answer = {"error": _explain(error)}
        self._is_first_save = False
        answer = self.topology.broadcast_json(answer)
        if "error" in answer:
            self.failed_saves += 1
            raise CheckpointError(answer["error"])
        return Path(answer["folder"])

    def _snapshot(self, shard: TensorShard) -> Piece:
        """A copy on the host, in a buffer that is used again by the next save."""
        source = shard.tensor.detach()
        buffer = self._buffers.get(shard.name)
        if buffer is None or buffer.shape != source.shape or buffer.dtype != source.dtype:
            buffer = torch.empty(source.shape, dtype=source.dtype, pin_memory=source.is_cuda)
            self._buffers[shard.name] = buffer
        buffer.copy_(source, non_blocking=True)
        return Piece(shard.name, shard.shape, shard.start, buffer)

    def _write(
        self,
        folder: Path,
        step: int,
        pieces: list[Piece],
        state: dict[str, Any],
        rank_state: dict[str, Any],
        kind: str,
        begin: float,
    ) -> None:
        rank = self.topology.rank
        try:
            entries = write_pieces(folder, f"rank_{rank:05d}", pieces)
            write_json(
                folder / f"rank_{rank:05d}.json", {"entries": entries, "rank_state": rank_state}
            )
            if rank == 0:
                self._commit(folder, step, state, kind)
                seconds = time.monotonic() - begin
                self.save_seconds = max(self.save_seconds, seconds)
                if self._on_commit is not None:
                    self._on_commit(step, seconds)
        except BaseException as error:
            self._failure = error
            if rank == 0:
                shutil.rmtree(folder, ignore_errors=True)
            elif folder.is_dir():
                # Rank 0 need not wait for the time limit to learn of it.
                (folder / f"rank_{rank:05d}.failed").write_text(_explain(error))

    def _commit(self, folder: Path, step: int, state: dict[str, Any], kind: str) -> None:
        reports = self._collect_reports(folder)
        manifest = build_manifest(folder, reports, step=step, kind=kind, state=state)
        for path in folder.glob("rank_*.json"):
            path.unlink()
        write_json(folder / MANIFEST, manifest.to_json())
        final = step_folder(self.run_dir, step)
        if final.exists():
            # A partial or older folder of the same step must not stand in the way.
            _to_trash(final)
        os.rename(folder, final)
        sync_directory(final.parent)
        self._verified.add(final)
        move_latest(final)
        self._remove_old(final)
        _remove_trash(final.parent)

    def _collect_reports(self, folder: Path) -> list[dict[str, Any]]:
        deadline = time.monotonic() + self.config.timeout_s
        waiting = set(range(self.topology.world_size))
        reports: dict[int, dict[str, Any]] = {}
        while waiting:
            for rank in sorted(waiting):
                failed = folder / f"rank_{rank:05d}.failed"
                if failed.exists():
                    raise CheckpointError(
                        f"rank {rank} could not write its part: {failed.read_text()}"
                    )
                report = folder / f"rank_{rank:05d}.json"
                if report.exists():
                    reports[rank] = json.loads(report.read_text())
            waiting -= reports.keys()
            if waiting and self._is_abandoned.is_set():
                raise CheckpointError("a rank was lost during the save")
            if waiting and time.monotonic() > deadline:
                names = ", ".join(map(str, sorted(waiting)))
                raise CheckpointError(
                    f"no part of the checkpoint from rank {names} within checkpoint.timeout_s={self.config.timeout_s:g}"
                )
            if waiting:
                time.sleep(POLL_S)
        return [reports[rank] for rank in range(self.topology.world_size)]

    def _remove_old(self, newest: Path) -> None:
        """Retention: over all attempts, after the commit, counting only sound checkpoints."""
        sound = [info for info in list_checkpoints(self.run_dir) if info.problem is None]
        kept = {info.path for info in sound[-self.config.keep :]} | {newest}
        kept |= {info.path for info in self._best(sound)}
        for info in sound:
            if info.path in kept or info.path == self.resumed_from or self._is_permanent(info):
                continue
            _to_trash(info.path)

    def _best(self, sound: Sequence[CheckpointInfo]) -> list[CheckpointInfo]:
        """Those of the lowest held-out loss; of equal ones the older, so that a plateau moves nothing."""
        scored = [i for i in sound if i.score is not None and math.isfinite(i.score)]
        return sorted(scored, key=lambda info: (info.score, info.step))[: self.config.keep_best]

    def _is_permanent(self, info: CheckpointInfo) -> bool:
        every = self.config.permanent_every
        is_named = info.manifest is not None and info.manifest.kind in ("permanent", "imported")
        return is_named or bool(every and info.step % every == 0)

    # Loading

    def find_latest(self, before: int | None = None) -> Path | None:
        """Collective: the newest checkpoint whose every byte is sound; damaged ones are named in the log.

        Rank 0 looks, all ranks check a share of the files, all get the same answer.

        Args:
            before: only those of steps below this one.
        """
        infos = list_checkpoints(self.run_dir) if self.topology.is_main else []
        infos = [i for i in infos if before is None or i.step < before]
        candidates = self.topology.broadcast_json(
            [[str(i.path), i.problem] for i in reversed(infos)]
        )
        for name, problem in candidates:
            path = Path(name)
            problems = [problem] if problem else self._verify_together(path)
            if not problems:
                return path
            if self.topology.is_main:
                log.warning(
                    "checkpoint %s is damaged (%s); trying the one before", path, problems[0]
                )
        return None

    def discard_after(self, path: Path) -> None:
        """Collective: a run that went back to this checkpoint must not be resumed from a later one."""
        if self.topology.is_main:
            move_latest(path)
            for info in list_checkpoints(self.run_dir):
                if info.path.name > path.name:
                    self._verified.discard(info.path)
                    shutil.rmtree(_to_trash(info.path), ignore_errors=True)
        self.topology.barrier()

    def _verify_together(self, path: Path) -> list[str]:
        """Collective: problems found by all ranks."""
        mine: list[str] = []
        try:
            manifest = read_manifest(path)
            rank, world = self.topology.rank, self.topology.world_size
            problem = structure_problem(path, manifest)
            mine = (
                [problem]
                if problem
                else list(verify_files(path, manifest, sorted(manifest.files)[rank::world]))
            )
        except CheckpointError as error:
            mine = [manifest_problem(path, error)]
        found = [line for lines in self.topology.gather_json(mine) for line in lines]
        if not found:
            self._verified.add(path)
        return found

    def load(
        self,
        path: Path,
        shards: Sequence[TensorShard],
        *,
        complete: bool = False,
        cast: bool = False,
    ) -> LoadedCheckpoint:
        """Collective: fill the shards in place from a checkpoint written on any number of ranks.

        Args:
            shards: what to fill; may be a part of what is stored.
            complete: refuse a checkpoint that holds more than that.
            cast: values may be stored in another type than a shard has.

        Raises:
            CheckpointError: damaged, or tensors missing or of another shape or type.
        """
        if path not in self._verified:
            problems = self._verify_together(path)
            if problems:
                raise CheckpointError(self._damaged(path, problems[0]))
        manifest = read_manifest(path)
        _check_names(path, manifest, shards, complete=complete, cast=cast)
        for shard in shards:
            stored = manifest.tensors.get(shard.name)
            if stored is None and shard.name.startswith("ema/"):
                stored = manifest.tensors[f"parameters/{shard.name.removeprefix('ema/')}"]
            if stored is not None:
                flat = torch.empty(shard.tensor.numel(), dtype=DTYPES[stored.dtype])
                read_range(path, stored, shard.start, flat)
                shard.tensor.detach().view(-1).copy_(flat)
        if path.is_relative_to(self.run_dir):
            self.resumed_from = path
        rank_states = manifest.ranks
        mine = rank_states[self.topology.rank] if self.topology.rank < len(rank_states) else None
        return LoadedCheckpoint(path, manifest.step, manifest.state, mine)

    def _damaged(self, path: Path, problem: str) -> str:
        sound = [
            i.path.name
            for i in list_checkpoints(path.parent.parent)
            if i.problem is None and i.path != path
        ]
        hint = f"the newest other one is {sound[-1]}" if sound else "there is no other one"
        return f"checkpoint {path} is damaged: {problem}; {hint}"


def _check_names(
    path: Path,
    manifest: Manifest,
    shards: Sequence[TensorShard],
    *,
    complete: bool,
    cast: bool,
) -> None:
    wanted = {shard.name: shard for shard in shards}
    missing = sorted(
        n for n in wanted if n not in manifest.tensors and not n.startswith(OPTIONAL_STATE)
    )
    if missing:
        raise CheckpointError(
            f"{path} holds no {missing[0]} ({len(missing)} tensors are missing); is the model section the one it was saved with?"
        )
    extra = sorted(
        n for n in manifest.tensors.keys() - wanted.keys() if not n.startswith(OPTIONAL_STATE)
    )
    if complete and extra:
        raise CheckpointError(
            f"{path} holds {extra[0]}, which this run has no place for ({len(extra)} tensors); is the model section the one it was saved with?"
        )
    for name, shard in wanted.items():
        stored = manifest.tensors.get(name)
        if stored is None:
            continue
        if stored.shape != tuple(shard.shape):
            raise CheckpointError(
                f"{name} in {path} has shape {list(stored.shape)}, this run's is {list(shard.shape)}"
            )
        if not cast and stored.dtype != CODES.get(shard.tensor.dtype):
            raise CheckpointError(
                f"{name} in {path} is {stored.dtype}, this run's is {shard.tensor.dtype}"
            )


def _explain(error: BaseException) -> str:
    if isinstance(error, OSError):
        where = f" ({error.filename})" if error.filename else ""
        hint = "; free some space or move run.dir" if error.errno == errno.ENOSPC else ""
        return f"the checkpoint cannot be written: {error.strerror or error}{where}{hint}"
    return str(error)


def _to_trash(path: Path) -> Path:
    """Out of the way in one step: a kill while it is removed must not leave half of it under a final name."""
    trash = path.with_name(f".trash-{path.name}-{uuid.uuid4().hex[:8]}")
    os.rename(path, trash)
    return trash


def _remove_leftovers(folder: Path) -> None:
    """What a killed attempt left behind."""
    if folder.is_dir():
        for path in [*folder.glob("step_*.tmp-*"), *folder.glob(".trash-*")]:
            shutil.rmtree(path, ignore_errors=True)


def _remove_trash(folder: Path) -> None:
    for path in folder.glob(".trash-*"):
        shutil.rmtree(path, ignore_errors=True)
