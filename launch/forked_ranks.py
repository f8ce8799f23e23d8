"""Ranks of one run as forks of this process, which has imported torch already: a start takes a fraction of a second.

For tools that start a run many times on CPUs. A fork has the imports, and nothing else, of its parent: the parent never runs
a kernel, joins a process group or asks for a GPU, for threads and CUDA contexts do not survive a fork.
"""

from __future__ import annotations

import atexit
import gc
import importlib
import os
import signal
import sys
import threading
import traceback
from collections.abc import Mapping, Sequence
from pathlib import Path

from ..models.errors import LaunchError
from .local import LocalRanks, environment_of

__all__ = ["ForkedRanks", "import_trainer"]

_MODULES = (
    "torch._dynamo",
    "numpy",
    "..models.transformer.task",
    "..trainer.train",
    "..trainer.engines.torch_engine",
    ".train",
)


def import_trainer() -> None:
    """Import, once and in this process, what every rank would import for itself, some of it only when it is used."""
    for name in _MODULES:
        importlib.import_module(name, __package__)
    # A rank collects its own garbage, not what the imports left: that would cost each start a third of a second.
    gc.collect()
    gc.freeze()
    atexit.register(gc.unfreeze)


class ForkedRanks(LocalRanks):
    """`weft ARGUMENTS` on several ranks over gloo, each a fork; see LocalRanks.

    Raises:
        LaunchError: this process has threads, whose locks a fork would find held by nobody.
    """

    @staticmethod
    def _start(
        arguments: Sequence[str], rank: int, ranks: int, log: Path, shared: dict[str, str]
    ) -> _Fork:
        return _Fork(arguments, environment_of(rank, ranks, shared), log)


class _Fork:
    """A forked process with the part of Popen's interface that ranks need."""

    def __init__(self, arguments: Sequence[str], environment: Mapping[str, str], log: Path) -> None:
        self.returncode: int | None = None
        if threading.active_count() > 1:
            names = ", ".join(t.name for t in threading.enumerate()[1:])
            raise LaunchError(
                f"ranks cannot be forked beside threads ({names}); start them as processes: --no-fork"
            )
        # What is still buffered would be written by both.
        sys.stdout.flush()
        sys.stderr.flush()
        self.pid = os.fork()
        if self.pid == 0:
            _run_command(arguments, environment, log)

    def poll(self) -> int | None:
        return self._reap(os.WNOHANG)

    def wait(self) -> int:
        code = self._reap(0)
        assert code is not None
        return code

    def send_signal(self, number: int) -> None:
        if self.poll() is None:
            os.kill(self.pid, number)

    def _reap(self, options: int) -> int | None:
        if self.returncode is None:
            pid, status = os.waitpid(self.pid, options)
            if pid:
                self.returncode = os.waitstatus_to_exitcode(status)
        return self.returncode


def _run_command(arguments: Sequence[str], environment: Mapping[str, str], log: Path) -> None:
    """The rest of a child's life; never returns."""
    code = 1
    try:
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, signal.SIG_DFL)
        out = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o644)
        for stream in (1, 2):
            os.dup2(out, stream)
        os.environ.clear()
        os.environ.update(environment)
        sys.argv = ["weft", *arguments]
        from .cli import main

        main()
    except SystemExit as end:
        code = end.code if isinstance(end.code, int) else 1
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        # Not the parent's clean-up: handlers at exit, temporary folders, buffers.
        os._exit(code)
