"""`weft submit --local`: a job of this machine, in the foreground, restarted by the same judgement as on a cluster."""

from __future__ import annotations

import itertools
import os
import signal
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING

import click

from ..models.errors import ConfigError
from ..trainer.attempts import attempts_so_far
from .local import LocalRanks
from .requeue import judge_start

if TYPE_CHECKING:
    from .slurm.submission import Submission

__all__ = ["run_here"]

WAIT_FOR_OTHERS_S = 120
"""How long ranks may go on after the first has ended; what srun --wait does in a job."""
LOOK_EVERY_S = 0.2
_PASSED_ON = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGUSR2)


def run_here(submission: Submission) -> int:
    """Train the runs of a submission one after the other; returns the first exit code that is not 0.

    Raises:
        ConfigError: more than one node, or a folder that holds another run.
    """
    from .slurm.submission import Claim, writable

    if submission.cluster.nodes > 1:
        raise ConfigError(
            f"--local is this one machine, found --nodes {submission.cluster.nodes}; leave --nodes out"
        )
    submission.check()
    with writable(submission.folder), Claim() as claim:
        submission.write_runs(claim)
    codes = []
    for run in submission.runs:
        codes.append(_run_with_restarts(run, submission.cluster.ranks))
        if codes[-1] > 2:
            break
    return next((code for code in codes if code), 0)


def _run_with_restarts(run: Path, ranks: int) -> int:
    unopened = 0
    for start in itertools.count():
        before = attempts_so_far(run)
        code = _run_once(run, ranks, start)
        unopened = 0 if attempts_so_far(run) > before else unopened + 1
        verdict = judge_start(run, code, unopened)
        if not verdict.requeue:
            if verdict.exit_code:
                click.echo(f"weft: {run}: {verdict.reason}", err=True)
            return verdict.exit_code
        click.echo(f"weft: {run}: {verdict.reason}; starting it again", err=True)
    raise AssertionError("the count of starts has no end")


def _run_once(run: Path, ranks: int, start: int) -> int:
    """One start; rank 0's output is shown. Returns the code a job's srun would: the highest of the ranks."""
    name = f"logs/local{os.getpid()}_{start}"
    # Into the run's history, where `weft logs --attempt` finds it.
    os.environ["WEFT_LOG_DIR"] = name
    folder = run / name
    logs = [folder / f"rank_{rank:05d}.log" for rank in range(ranks)]
    group = LocalRanks(["train", "--resume", str(run)], ranks, folder / "rank", logs=logs)
    with _passed_on(group), open(logs[0], "rb") as log:
        first_end = None
        while group.is_running():
            _echo(log.read())
            if first_end is None and any(p.poll() is not None for p in group.processes):
                first_end = time.monotonic()
            if first_end is not None and time.monotonic() - first_end > WAIT_FOR_OTHERS_S:
                group.kill()
            time.sleep(LOOK_EVERY_S)
        _echo(log.read())
    return max(code if code >= 0 else 128 - code for code in group.wait())


def _echo(data: bytes) -> None:
    sys.stdout.buffer.write(data)
    sys.stdout.flush()


@contextmanager
def _passed_on(group: LocalRanks) -> Iterator[None]:
    """Signals go to the ranks, which save and end; this process waits for them."""

    def pass_on(number: int, frame: FrameType | None) -> None:
        for process in group.processes:
            if process.poll() is None:
                process.send_signal(number)

    previous = {number: signal.signal(number, pass_on) for number in _PASSED_ON}
    try:
        yield
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)
