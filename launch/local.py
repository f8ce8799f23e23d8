"""Ranks of one run as processes of this machine, as torchrun would start them."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Protocol

__all__ = ["LocalRanks", "environment_of"]


class _Process(Protocol):
    """What is used of a rank's process."""

    @property
    def pid(self) -> int: ...
    def poll(self) -> int | None: ...
    def wait(self) -> int: ...
    def send_signal(self, number: int) -> None: ...


def environment_of(rank: int, ranks: int, shared: dict[str, str]) -> dict[str, str]:
    """What a launcher tells one rank, over what it tells all."""
    place = {} if ranks == 1 else {"RANK": str(rank), "LOCAL_RANK": str(rank)}
    return {**shared, **place}


class LocalRanks:
    """`weft ARGUMENTS` on several ranks over gloo or NCCL; each rank's output goes to its own file.

    Args:
        arguments: of the `weft` command.
        ranks: processes; one runs without a process group.
        log_prefix: files are PREFIX_rank0.log and so on.
        logs: other files, one a rank.
    """

    def __init__(
        self,
        arguments: Sequence[str],
        ranks: int,
        log_prefix: Path,
        *,
        logs: Sequence[Path] | None = None,
    ) -> None:
        log_prefix.parent.mkdir(parents=True, exist_ok=True)
        named = [log_prefix.with_name(f"{log_prefix.name}_rank{r}.log") for r in range(ranks)]
        self.logs = list(logs or named)
        shared = self._shared(ranks)
        self.processes: list[_Process] = [
            self._start(arguments, r, ranks, log, shared) for r, log in enumerate(self.logs)
        ]

    @staticmethod
    def _shared(ranks: int) -> dict[str, str]:
        plain = {
            k: v
            for k, v in os.environ.items()
            if k not in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE")
        }
        if ranks == 1:
            return plain
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        return {
            **plain,
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": str(port),
            "WORLD_SIZE": str(ranks),
            "LOCAL_WORLD_SIZE": str(ranks),
        }

    @staticmethod
    def _start(
        arguments: Sequence[str], rank: int, ranks: int, log: Path, shared: dict[str, str]
    ) -> _Process:
        with open(log, "wb") as out:
            return subprocess.Popen(
                [sys.executable, "-m", "weft", *arguments],
                env=environment_of(rank, ranks, shared),
                stdout=out,
                stderr=subprocess.STDOUT,
            )

    def wait(self) -> list[int]:
        """Exit codes, in rank order."""
        return [process.wait() for process in self.processes]

    def is_running(self) -> bool:
        return any(process.poll() is None for process in self.processes)

    def kill(self) -> None:
        """kill -9 of every rank: no handler runs, nothing is flushed."""
        for process in self.processes:
            if process.poll() is None:
                process.send_signal(signal.SIGKILL)
        self.wait()

    def tail(self, lines: int = 15) -> str:
        """The end of the output of the first rank that failed, or of rank 0."""
        failed = next((i for i, p in enumerate(self.processes) if p.poll()), 0)
        return "\n".join(self.logs[failed].read_text(errors="replace").splitlines()[-lines:])
