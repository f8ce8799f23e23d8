"""How runs stand, from their folders and one question to the scheduler. Imports no torch; reads only the end of long files."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from ..trainer.attempts import Attempt, goodput, read_attempts
from ..trainer.metrics.records import METRICS_FILE, decode_record
from ..trainer.run_lock import read_lock
from .options import looks_like_run, plain_config
from .slurm.scheduler import QueuedJob, accounted_states, queued_jobs
from .slurm.submission import SubmittedJob, newest_step, read_job

__all__ = ["RunState", "find_runs", "run_states"]

DEEPEST = 3
TAIL_BYTES = 64 * 1024
JUST_S = 60
OUTCOMES = {"time_limit": "time limit", "rank_lost": "rank lost", "policy": "stopped by policy"}


@dataclass(frozen=True)
class RunState:
    """One run. None where something is not known (yet).

    Args:
        state: in words: pending, starting, running, finished, stopped, died, ...
        reason: why, where somebody said so.
        saved_step: of the newest committed checkpoint, every byte of which was checked.
        goodput: useful over allocated time, in [0, 1].
    """

    run: str
    job: str | None
    state: str
    reason: str
    attempt: int
    step: int
    steps: int | None
    loss: float | None
    tokens_per_s: float | None
    eta_s: float | None
    saved_step: int | None
    goodput: float | None

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


def find_runs(folder: Path, depth: int = DEEPEST) -> Iterator[Path]:
    """Run folders at or below a folder, by name."""
    if looks_like_run(str(folder)):
        yield folder
        return
    if depth == 0 or not folder.is_dir():
        return
    for entry in sorted(os.scandir(folder), key=lambda e: e.name):
        if entry.is_dir() and not entry.name.startswith("."):
            yield from find_runs(Path(entry.path), depth - 1)


def run_states(folders: Sequence[Path]) -> list[RunState]:
    """The state of each run; the scheduler is asked once for all."""
    jobs = {folder: job for folder in folders if (job := read_job(folder)) is not None}
    queued = queued_jobs([job.job_id for job in jobs.values()])
    attempts = {folder: read_attempts(folder) for folder in folders}
    unexplained = [
        job.name
        for folder, job in jobs.items()
        if job.name not in (queued or {}) and _is_newer(job, attempts[folder])
    ]
    ended = accounted_states(unexplained)
    return [_state(f, jobs.get(f), queued, ended, attempts[f]) for f in folders]


def _is_newer(job: SubmittedJob, attempts: Sequence[Attempt]) -> bool:
    """Whether nothing of the run was heard since its job was submitted."""
    return not attempts or attempts[-1].start < job.submitted - 1


def _state(
    folder: Path,
    job: SubmittedJob | None,
    queued: Mapping[str, QueuedJob] | None,
    ended: Mapping[str, str],
    attempts: Sequence[Attempt],
) -> RunState:
    config = plain_config(folder)
    train = config.get("train") or {}
    steps = train.get("steps")
    record = _last_record(folder)
    step, speed = record.get("step", 0), record.get("tokens_per_s")
    state, reason = _words(folder, job, queued, ended, attempts)
    eta = None
    if state == "running" and steps and speed:
        eta = max(0, steps - step) * train.get("batch_tokens", 0) / speed
    return RunState(
        run=str(folder),
        job=job.name if job else None,
        state=state,
        reason=reason,
        attempt=len(attempts),
        step=step,
        steps=steps,
        loss=record.get("loss"),
        tokens_per_s=speed if state == "running" else None,
        eta_s=eta,
        saved_step=newest_step(folder),
        goodput=goodput(folder, list(attempts)),
    )


def _words(
    folder: Path,
    job: SubmittedJob | None,
    queued: Mapping[str, QueuedJob] | None,
    ended: Mapping[str, str],
    attempts: Sequence[Attempt],
) -> tuple[str, str]:
    lock = read_lock(folder)
    is_alive = lock is not None and lock.is_alive
    found = (queued or {}).get(job.name) if job else None
    if found is not None and found.is_pending:
        return "pending", found.reason
    if is_alive:
        return "running", ""
    if found is not None:
        is_over = found.state == "COMPLETING" or _has_just_ended(found, attempts)
        return ("ending" if is_over else "starting"), ""
    if job is not None and _is_newer(job, attempts):
        if queued is None:
            return "submitted", "the scheduler cannot be asked here"
        state = ended.get(job.name, "failed to start").lower()
        return state, f"the run was not opened; see {Path(job.script).parent}"
    if attempts:
        last = attempts[-1]
        outcome = last.outcome or "died"
        return OUTCOMES.get(outcome, outcome), "" if outcome == "finished" else last.reason
    if not (folder / METRICS_FILE).is_file():
        return "not started", ""
    # A run from before there was a history of attempts.
    steps = (plain_config(folder).get("train") or {}).get("steps")
    return ("finished" if newest_step(folder) == steps else "ended"), ""


def _has_just_ended(job: QueuedJob, attempts: Sequence[Attempt]) -> bool:
    """Whether the job's ranks are through, and its shell is not yet."""
    last = attempts[-1] if attempts else None
    if last is None or last.end is None or last.job_id != job.job_id.partition("_")[0]:
        return False
    return time.time() - last.end < JUST_S


def _last_record(folder: Path) -> dict[str, Any]:
    """Step, loss and speed of the last training record."""
    path = folder / METRICS_FILE
    try:
        with open(path, "rb") as file:
            size = file.seek(0, os.SEEK_END)
            file.seek(max(0, size - TAIL_BYTES))
            lines = file.read().split(b"\n")
    except OSError:
        return {}
    # The last line is empty or torn; the first may be torn.
    for line in reversed(lines[:-1]):
        record = decode_record(line)
        if record is not None and "loss" in record:
            return record
    return {}
