"""The history of a run's attempts, and what follows from it: may it be started again, how much of its time was useful.

RUN/attempts.jsonl has one event a line, appended by rank 0 (`failed` by the rank that failed), so that what killed an attempt
can be read after it. Imports no torch: `weft status` and the job script read it on login nodes.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from .exit_codes import ExitCode
from .run_lock import read_lock

__all__ = [
    "ATTEMPTS_FILE",
    "Attempt",
    "AttemptLog",
    "Outcome",
    "Verdict",
    "attempts_so_far",
    "goodput",
    "judge",
    "read_attempts",
]

ATTEMPTS_FILE = "attempts.jsonl"
STARTS_OF_A_LOOP = 2
"""Starts in a row without a new checkpoint that make a crash loop: one may be a bad node, two are the run's own."""

Outcome = Literal[
    "finished",
    "stopped",
    "time_limit",
    "preempted",
    "policy",
    "error",
    "hang",
    "rank_lost",
    "interrupted",
    "died",
]
_WRONG: tuple[str | None, ...] = ("error", "hang", "rank_lost", "died")


@dataclass
class Attempt:
    """One start of a run. Times are unix seconds; `end` is the last sign of life of one that died.

    Args:
        outcome: None while it runs; `died` for one that ended without a word.
        first_step: where it took the run up.
        last_step: the last it told of.
        last_saved_step: newest checkpoint committed by it, None if it committed none.
        is_open: whether it came as far as to know where the run stands.
        train_seconds: training time of the run when it was opened, and when it was last told of.
    """

    number: int
    start: float
    job_id: str | None = None
    array_task_id: str | None = None
    restart: int = 0
    host: str = ""
    pid: int = 0
    nodes: list[str] = field(default_factory=list)
    world_size: int = 1
    engine: str = ""
    strategy: str = ""
    log_dir: str | None = None
    first_step: int = 0
    last_step: int = 0
    last_saved_step: int | None = None
    save_seconds: float | None = None
    seconds_to_first_step: float | None = None
    is_open: bool = False
    train_seconds: tuple[float, float] = (0.0, 0.0)
    end: float | None = None
    last_event: float = 0.0
    outcome: str | None = None
    exit_code: int | None = None
    reason: str = ""
    failures: list[dict[str, Any]] = field(default_factory=list)

    @property
    def is_failure(self) -> bool:
        """Whether it ended in a way that counts against the restart budget."""
        return self.outcome in _WRONG

    @property
    def made_progress(self) -> bool:
        """Whether a later start stands further on than this one did."""
        return self.last_saved_step is not None and self.last_saved_step > self.first_step

    @property
    def seconds(self) -> float:
        """Wall time from start to end, or to now."""
        return max(0.0, (time.time() if self.end is None else self.end) - self.start)


class AttemptLog:
    """Appends the events of one attempt; every rank may say that it failed."""

    def __init__(self, run_dir: Path, number: int) -> None:
        self.path, self.number = run_dir / ATTEMPTS_FILE, number

    def write(self, event: str, **values: Any) -> None:
        """One line, in one write, flushed to disk."""
        record = {"event": event, "attempt": self.number, "time": time.time(), **values}
        line = json.dumps(record).encode() + b"\n"
        # One write to a file opened for appending: lines of several ranks do not mix.
        descriptor = os.open(self.path, os.O_RDWR | os.O_APPEND | os.O_CREAT, 0o644)
        try:
            size = os.fstat(descriptor).st_size
            # A machine that went down may have left half a line, which must not swallow this one.
            is_torn = size > 0 and os.pread(descriptor, 1, size - 1) != b"\n"
            os.write(descriptor, b"\n" + line if is_torn else line)
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def attempts_so_far(run_dir: Path) -> int:
    """Number of attempts that were started."""
    return max((e["attempt"] for e in _events(run_dir)), default=0)


def _events(run_dir: Path) -> Iterator[dict[str, Any]]:
    path = run_dir / ATTEMPTS_FILE
    if not path.is_file():
        return
    for line in path.read_bytes().splitlines():
        try:
            event = json.loads(line)
        except ValueError:
            # The machine went down in the middle of the line.
            continue
        if isinstance(event, dict) and "event" in event and "attempt" in event:
            yield event


def read_attempts(run_dir: Path) -> list[Attempt]:
    """All attempts, oldest first."""
    attempts: dict[int, Attempt] = {}
    for event in _events(run_dir):
        number = event["attempt"]
        if event["event"] == "start":
            attempts[number] = _started(event)
            _bury(attempts.get(number - 1), event.get("previous_alive"))
        elif number in attempts:
            _take(attempts[number], event)
    found = [attempts[number] for number in sorted(attempts)]
    lock = read_lock(run_dir)
    if found and found[-1].end is None and not (lock and lock.is_alive):
        _bury(found[-1], lock.last_beat if lock and lock.attempt == found[-1].number else None)
    return found


def _started(event: dict[str, Any]) -> Attempt:
    names = ("job_id", "array_task_id", "restart", "host", "pid", "nodes", "world_size")
    values = {n: event[n] for n in (*names, "engine", "strategy", "log_dir") if n in event}
    return Attempt(event["attempt"], event["time"], **values, last_event=event["time"])


def _take(attempt: Attempt, event: dict[str, Any]) -> None:
    attempt.last_event = event["time"]
    attempt.last_step = max(attempt.last_step, event.get("step", 0))
    if "train_seconds" in event:
        attempt.train_seconds = (attempt.train_seconds[0], event["train_seconds"])
    match event["event"]:
        case "opened":
            attempt.first_step = attempt.last_step = event["step"]
            attempt.is_open, attempt.train_seconds = True, (event["train_seconds"],) * 2
        case "training":
            attempt.seconds_to_first_step = event["seconds_to_first_step"]
        case "saved":
            attempt.last_saved_step = event["step"]
            attempt.save_seconds = event["seconds"]
        case "failed":
            attempt.failures.append(event)
        case "end":
            attempt.end = event["time"]
            attempt.outcome, attempt.exit_code = event["outcome"], event["exit_code"]
            attempt.reason = event.get("reason", "")


def _bury(attempt: Attempt | None, last_alive: float | None) -> None:
    """An attempt that is over and did not say so."""
    if attempt is not None and attempt.end is None:
        attempt.end = max(attempt.last_event, last_alive or 0.0)
        attempt.outcome = "died"
        attempt.reason = "it ended without a word: killed, out of memory, or the node went down"


# Judgement


@dataclass(frozen=True)
class Verdict:
    """Whether a job goes back into the queue, and otherwise how its script ends."""

    requeue: bool
    exit_code: int
    reason: str


def judge(run_dir: Path, exit_code: int, max_restarts: int) -> Verdict:
    """What follows the end of an attempt whose processes ended with `exit_code` (128 + n for signal n).

    Time limits and preemptions do not count against the budget of restarts; starts without a new checkpoint are a crash loop,
    whatever ended them.
    """
    if exit_code == 0:
        return Verdict(False, 0, "finished")
    attempts = read_attempts(run_dir)
    last = attempts[-1] if attempts else None
    code, reason = _what_ended_it(last, exit_code)
    if code in (ExitCode.USER_ERROR, ExitCode.POLICY, ExitCode.STOPPED, ExitCode.INTERRUPTED):
        return Verdict(False, code, reason)
    if code == ExitCode.PREEMPTED:
        return Verdict(False, code, f"{reason}; the scheduler requeues what it preempts")
    idle = _starts_without_progress(attempts)
    if idle >= STARTS_OF_A_LOOP:
        step = last.first_step if last else 0
        return Verdict(
            False,
            ExitCode.CRASH_LOOP,
            f"crash loop: {idle} starts in a row from step {step} without a new checkpoint; the last one: {reason}; "
            f"look with: weft logs {run_dir}",
        )
    if code == ExitCode.TIME_LIMIT:
        return Verdict(True, code, reason)
    failures = sum(a.is_failure for a in attempts) if attempts else 1
    if failures > max_restarts:
        return Verdict(
            False,
            ExitCode.CRASH_LOOP,
            f"{failures} failures, more than run.max_restarts={max_restarts}; the last one: {reason}",
        )
    return Verdict(True, code, f"{reason}; failure {failures} of run.max_restarts={max_restarts}")


def _what_ended_it(last: Attempt | None, exit_code: int) -> tuple[int, str]:
    """The exit code that counts and its reason; what a failing rank said is nearer to the cause than what others saw of it."""
    if last is None:
        return exit_code, f"the processes ended with {exit_code} before the run was opened"
    for failure in last.failures:
        if failure["exit_code"] != ExitCode.MACHINE:
            return failure["exit_code"], f"rank {failure['rank']}: {failure['reason']}"
    if last.outcome in (None, "died") or last.exit_code is None:
        killed = f"killed by signal {exit_code - 128}" if exit_code > 128 else f"exit {exit_code}"
        return exit_code, f"{killed} after step {last.last_step}"
    return last.exit_code, last.reason


def _starts_without_progress(attempts: list[Attempt]) -> int:
    count = 0
    for attempt in reversed(attempts):
        if attempt.made_progress or attempt.outcome in ("finished", "stopped", "preempted"):
            break
        count += 1
    return count


def goodput(run_dir: Path, attempts: list[Attempt] | None = None) -> float | None:
    """Useful over allocated time of all attempts, in rank-seconds.

    Useful is the training time of steps that a later attempt did not have to repeat; None before anything was saved.
    """
    attempts = read_attempts(run_dir) if attempts is None else attempts
    useful = allocated = 0.0
    for place, this in enumerate(attempts):
        # What a later start took up is kept; what it repeats was lost.
        taken_up = (a.train_seconds[0] for a in attempts[place + 1 :] if a.is_open)
        if this.is_open:
            kept = next(taken_up, this.train_seconds[1])
            useful += max(0.0, kept - this.train_seconds[0]) * this.world_size
        until = this.last_event if this.end is None else this.end
        allocated += (until - this.start) * this.world_size
    return min(1.0, useful / allocated) if useful and allocated > 0 else None
