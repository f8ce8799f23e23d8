"""A hang is explained: every rank writes down where it stands, then the run ends with a code of its own.

A thread of each process looks at how long the current phase has lasted. Past its limit it writes the Python stacks of all
threads into RUN/logs, waits for the other ranks to do the same, and ends the process, because a rank that waits in a
collective cannot be woken. A rank within its own limit follows when it sees another's dump.
"""

from __future__ import annotations

import contextlib
import faulthandler
import os
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Literal

import torch
import torch.distributed as dist

from .configuration.run import WatchdogConfig
from .exit_codes import ExitCode

__all__ = ["Phase", "Watchdog"]

Phase = Literal["init", "compile", "step", "save", "evaluation"]
POLL_S = 2.0
LOOK_S = 10.0
"""Seconds between looks for other ranks' dumps, and between calls of `beat`."""
GRACE_S = 15.0
"""How long a rank with a dump waits for those of the others."""


class Watchdog:
    """Looks after one process of a run from start to `close`.

    Args:
        logs: folder of the dumps, the same for all ranks.
        on_hang: told the reason in one line before the process ends.
        beat: called every ten seconds.
    """

    def __init__(
        self,
        limits: WatchdogConfig,
        logs: Path,
        *,
        attempt: int,
        rank: int = 0,
        world_size: int = 1,
        on_hang: Callable[[str], None] = lambda reason: None,
        beat: Callable[[], object] = lambda: None,
        poll_s: float = POLL_S,
    ) -> None:
        self._limits = {
            "init": limits.init_s,
            "compile": limits.compile_s,
            "step": limits.step_s,
            "save": limits.save_s,
            "evaluation": limits.evaluation_s,
        }
        self._logs, self._attempt, self._rank, self._world = logs, attempt, rank, world_size
        self._on_hang, self._beat, self._poll_s = on_hang, beat, poll_s
        self._place: tuple[str, float] = ("init", time.monotonic())
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="weft-watchdog", daemon=True)

    def __enter__(self) -> Watchdog:
        self._arm(self._limits["init"])
        self._thread.start()
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def close(self) -> None:
        """Stop looking; may be called twice."""
        self._over.set()
        if self._thread.is_alive():
            self._thread.join()
        faulthandler.cancel_dump_traceback_later()

    def enter(self, phase: Phase) -> None:
        """A phase begins, or one of its rounds: the clock starts anew. Costs well under a microsecond."""
        self._place = (phase, time.monotonic())

    def dump_path(self, rank: int) -> Path:
        return self._logs / f"hang_{self._attempt:03d}_rank_{rank:05d}.txt"

    # The thread

    def _watch(self) -> None:
        looked = last = time.monotonic()
        while not self._over.wait(self._poll_s):
            now = time.monotonic()
            if now - last > 10 * self._poll_s:
                # The whole process stood still (a debugger, a suspended machine): that is no hang of the run.
                self._place = (self._place[0], self._place[1] + now - last)
            last = now
            phase, since = self._place
            limit = self._limits[phase]
            if limit is not None and now - since > limit:
                self._expire(
                    f"no progress in phase {phase} for {now - since:.0f} s (run.watchdog.{phase}_s={limit:g})"
                )
            if now - looked >= min(LOOK_S, 5 * self._poll_s):
                looked = now
                self._beat()
                if self._marker.exists():
                    self._expire("another rank hangs")
            self._arm(None if limit is None else max(0.0, since + limit - now))

    @property
    def _marker(self) -> Path:
        return self._logs / f"hang_{self._attempt:03d}"

    def _arm(self, left: float | None) -> None:
        """Code that never lets go of the interpreter stops this thread too; then a timer without Python dumps and ends."""
        if left is None:
            faulthandler.cancel_dump_traceback_later()
            return
        later = left + 10 * self._poll_s + GRACE_S
        faulthandler.dump_traceback_later(later, exit=True, file=sys.__stderr__ or sys.stderr)

    def _expire(self, reason: str) -> None:
        faulthandler.cancel_dump_traceback_later()
        with contextlib.suppress(OSError):
            self._write_dump(reason)
            self._marker.touch()
        self._wait_for_others()
        reason = f"hang: {reason}; {self._describe_absent()}the stacks of its ranks are in {self._logs}/hang_{self._attempt:03d}_rank_*.txt"
        with contextlib.suppress(Exception):
            self._on_hang(reason)
        print(f"weft: error: {reason}", file=sys.stderr, flush=True)
        os._exit(ExitCode.HANG)

    def _write_dump(self, reason: str) -> None:
        with open(self.dump_path(self._rank), "w", encoding="utf-8") as file:
            file.write(f"rank {self._rank} of {self._world}: {reason}\n\n")
            file.flush()
            faulthandler.dump_traceback(file, all_threads=True)
        if dist.is_initialized() and torch.cuda.is_available():
            with contextlib.suppress(Exception):
                recorder = torch._C._distributed_c10d._dump_fr_trace_json()  # type: ignore[attr-defined]
                self.dump_path(self._rank).with_suffix(".nccl.json").write_bytes(
                    recorder if isinstance(recorder, bytes) else recorder.encode()
                )

    def _wait_for_others(self) -> None:
        until = time.monotonic() + GRACE_S
        while self._absent() and time.monotonic() < until:
            time.sleep(0.2)

    def _absent(self) -> list[int]:
        return [r for r in range(self._world) if not self.dump_path(r).exists()]

    def _describe_absent(self) -> str:
        absent = self._absent()
        if not absent:
            return ""
        names = ", ".join(map(str, absent[:8])) + (" and more" if len(absent) > 8 else "")
        return f"nothing was heard of rank {names}; "
