"""One job a run folder: a lock that a living job holds and a dead one does not.

RUN/lock names its holder; its modification time is a heartbeat. On the holder's own host its process is looked for. From
another host the heartbeat is watched, so that no clocks are compared. Imports no torch.
"""

from __future__ import annotations

import json
import os
import socket
import time
import uuid
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..models.errors import LaunchError

__all__ = ["LOCK_FILE", "LockInfo", "RunLock", "read_lock"]

LOCK_FILE = "lock"
BEAT_S = 10.0
STALE_S = 60.0
"""Seconds without a heartbeat after which a reader takes the holder for dead."""
WATCH_S = 3.5 * BEAT_S
"""How long a starting job watches for a heartbeat before it takes the lock of a silent holder over."""


@dataclass(frozen=True)
class LockInfo:
    """A lock as it was found."""

    token: str
    host: str
    pid: int
    started: str
    space: str
    job_id: str | None
    restart: int
    attempt: int
    last_beat: float

    @property
    def is_here(self) -> bool:
        """Whether its process, were it alive, could be seen from here."""
        return self.host == socket.gethostname() and self.space == _pid_space()

    @property
    def is_alive(self) -> bool:
        """Whether its holder lives, as far as can be said at once."""
        if self.is_here:
            return _start_of(self.pid) == self.started
        return time.time() - self.last_beat < STALE_S

    @property
    def is_succeeded(self) -> bool:
        """Whether this process is a later start of the same job: the scheduler has ended the earlier one."""
        job = os.environ.get("SLURM_JOB_ID")
        restart = int(os.environ.get("SLURM_RESTART_COUNT", "0") or 0)
        return job is not None and job == self.job_id and restart > self.restart

    def describe(self) -> str:
        job = f"job {self.job_id}, " if self.job_id else ""
        return f"{job}process {self.pid} on {self.host}"


def read_lock(run_dir: Path) -> LockInfo | None:
    """The lock of a run folder, or None where there is none."""
    path = run_dir / LOCK_FILE
    try:
        last_beat = path.stat().st_mtime
        return LockInfo(**json.loads(path.read_text(encoding="utf-8")), last_beat=last_beat)
    except FileNotFoundError:
        return None
    except (ValueError, TypeError):
        # Being written at this moment, or torn by a crash: nobody's, unless it is fresh.
        return LockInfo("", "?", 0, "", "", None, 0, 0, last_beat)


class RunLock:
    """Held by rank 0 from before the first write to the run folder until after the last."""

    def __init__(self, run_dir: Path) -> None:
        self.run_dir, self.path = run_dir, run_dir / LOCK_FILE
        self.token = uuid.uuid4().hex
        self.is_held = False
        self.previous_alive: float | None = None
        """Last sign of life of a dead holder whose lock was taken over."""

    def acquire(self, attempt: int, *, watch_s: float = WATCH_S) -> None:
        """Take the lock.

        Raises:
            LaunchError: another job that lives holds it.
            OSError: the folder cannot be written.
        """
        deadline = time.monotonic() + 4 * watch_s
        while not self._create(attempt):
            found = read_lock(self.run_dir)
            if found is None:
                continue
            if self._lives(found, watch_s) or time.monotonic() > deadline:
                raise LaunchError(
                    f"{self.run_dir} is being run by {found.describe()}; stop it with: weft stop {self.run_dir}, or give run.dir another folder"
                )
            self._take_away(found)

    def _create(self, attempt: int) -> bool:
        """Write a file of one's own and link it to the lock's name: it appears whole, and only if there was none."""
        mine = self.path.with_name(f".lock.{self.token}")
        mine.write_text(json.dumps(self._identity(attempt)), encoding="utf-8")
        try:
            os.link(mine, self.path)
        except FileExistsError:
            return False
        finally:
            mine.unlink()
        self.is_held = True
        return True

    def _identity(self, attempt: int) -> dict[str, Any]:
        return {
            "token": self.token,
            "host": socket.gethostname(),
            "pid": os.getpid(),
            "started": _start_of(os.getpid()),
            "space": _pid_space(),
            "job_id": os.environ.get("SLURM_JOB_ID"),
            "restart": int(os.environ.get("SLURM_RESTART_COUNT", "0") or 0),
            "attempt": attempt,
        }

    def _lives(self, found: LockInfo, watch_s: float) -> bool:
        if found.is_succeeded:
            return False
        if found.is_here:
            return found.is_alive
        until = time.monotonic() + watch_s
        while time.monotonic() < until:
            time.sleep(min(1.0, watch_s / 10))
            now = read_lock(self.run_dir)
            if now is None:
                return False
            if now.token != found.token or now.last_beat != found.last_beat:
                return True
        return False

    def _take_away(self, found: LockInfo) -> None:
        """Remove a dead holder's lock, unless another job was faster and this is its lock already."""
        aside = self.path.with_name(f".lock.dead-{self.token}")
        try:
            os.rename(self.path, aside)
        except FileNotFoundError:
            return
        try:
            if aside.read_text(encoding="utf-8").find(found.token) < 0:
                os.link(aside, self.path)
                return
        except OSError:
            return
        finally:
            aside.unlink(missing_ok=True)
        self.previous_alive = found.last_beat

    def beat(self) -> bool:
        """Show a sign of life; False where another job has taken the lock, and this one must not write any more."""
        try:
            held = json.loads(self.path.read_text(encoding="utf-8"))["token"] == self.token
            if held:
                os.utime(self.path)
        except (OSError, ValueError, KeyError):
            # A file system that fails for a moment is no other job.
            return True
        return bool(held)

    def release(self) -> None:
        if self.is_held:
            self.is_held = False
            found = read_lock(self.run_dir)
            if found is not None and found.token == self.token:
                self.path.unlink(missing_ok=True)


def _start_of(pid: int) -> str:
    """When a process was started, by the kernel's clock: a number that was given again is told apart. Empty if there is none."""
    try:
        text = Path(f"/proc/{pid}/stat").read_text()
    except OSError:
        return "" if not _exists(pid) else "running"
    fields = text.rpartition(")")[2].split()
    # A zombie has died; nobody has asked how.
    return "" if fields[0] in ("Z", "X") else fields[19]


def _exists(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return pid > 0


def _pid_space() -> str:
    """Processes of two containers on one host do not see each other though their numbers may be equal."""
    try:
        return f"{Path('/proc/sys/kernel/random/boot_id').read_text().strip()} {os.readlink('/proc/self/ns/pid')}"
    except OSError:
        return ""
