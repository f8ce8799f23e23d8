"""`weft logs`: what one rank of one start of a run has said, followed over restarts. Imports no torch."""

from __future__ import annotations

import re
import sys
import time
from pathlib import Path

import click

from ..models.errors import LaunchError
from ..trainer.attempts import read_attempts
from ..trainer.run_lock import read_lock
from .options import run_argument, run_folder

__all__ = ["command"]

LOOK_EVERY_S = 0.5
ASK_EVERY_S = 10.0

EXAMPLES = """\b
Examples:
  weft logs runs/first -f
  weft logs runs/first --rank 3 --attempt 2
  weft logs runs/first --list
"""


@click.command(epilog=EXAMPLES)
@run_argument
@click.option("-f", "--follow", is_flag=True, help="Go on, over restarts, until the run has ended.")
@click.option("--rank", type=click.IntRange(min=0), default=0, show_default=True)
@click.option(
    "--attempt", type=click.IntRange(min=1), help="Of this start; the newest if left out."
)
@click.option("--list", "list_files", is_flag=True, help="Name the log files there are.")
def command(run: str, follow: bool, rank: int, attempt: int | None, list_files: bool) -> None:
    """Print the log of a rank of RUN."""
    folder = run_folder(run)
    if list_files:
        for place in log_folders(folder):
            for file in sorted(place.glob("rank_*.log")):
                click.echo(file)
        for file in _batch_outputs(folder):
            click.echo(file)
        return
    if follow and attempt is None:
        _follow(folder, rank)
        return
    file = _file(folder, rank, attempt)
    with open(file, "rb") as log:
        _copy(log.read())


def log_folders(run: Path) -> list[Path]:
    """Folders of logs, one a start, oldest first."""
    found = [p for p in (run / "logs").glob("*_*") if p.is_dir() and any(p.glob("rank_*.log"))]
    return sorted(found, key=_age)


def _age(folder: Path) -> tuple[float, int]:
    # Folders of one job are told apart by the number of its restarts; times of files can be equal.
    restart = re.search(r"_(\d+)$", folder.name)
    newest = max(file.stat().st_mtime for file in folder.glob("rank_*.log"))
    return newest, int(restart[1]) if restart else 0


def _batch_outputs(run: Path) -> list[Path]:
    """What batch shells said, oldest first: all there is of a job that ended before its ranks began."""
    from .slurm.submission import read_job

    job = read_job(run)
    if job is None:
        return []
    home = Path(job.script).parent
    mine = f"*_{job.array_task_id}.out" if job.array_task_id is not None else "*.out"
    return sorted(home.glob(mine), key=lambda file: file.stat().st_mtime)


def _file(run: Path, rank: int, attempt: int | None) -> Path:
    """The log asked for.

    Raises:
        LaunchError: there is none; what there is instead is named.
    """
    place = _place(run, attempt)
    if place is None:
        outputs = _batch_outputs(run)
        if attempt is None and outputs:
            return outputs[-1]
        raise LaunchError(
            f"{run} has no logs: a run of weft train writes to its terminal; jobs and weft submit --local write files"
        )
    file = place / f"rank_{rank:05d}.log"
    if not file.is_file():
        ranks = len(list(place.glob("rank_*.log")))
        raise LaunchError(f"there is no {file}; that start has ranks 0 to {ranks - 1}")
    return file


def _place(run: Path, attempt: int | None) -> Path | None:
    if attempt is None:
        return next(reversed(log_folders(run)), None)
    attempts = {a.number: a for a in read_attempts(run)}
    if attempt not in attempts:
        known = f"1 to {max(attempts)}" if attempts else "none yet"
        raise LaunchError(f"{run} has no attempt {attempt}; there are {known}")
    log_dir = attempts[attempt].log_dir
    return run / log_dir if log_dir and (run / log_dir).is_dir() else None


def _follow(run: Path, rank: int) -> None:
    """Print what comes, from the newest log on; a restart's log is taken up when it appears."""
    current: Path | None = None
    offset, asked = 0, 0.0
    while True:
        newest = _newest(run, rank)
        if newest is not None and newest != current:
            if current is not None:
                offset = _print_from(current, offset)
                click.echo(f"==> {newest}", err=True)
            current, offset = newest, 0
        before = offset
        if current is not None:
            offset = _print_from(current, offset)
        if offset == before and time.monotonic() - asked > ASK_EVERY_S:
            if not _may_go_on(run):
                return
            asked = time.monotonic()
        time.sleep(LOOK_EVERY_S)


def _newest(run: Path, rank: int) -> Path | None:
    try:
        return _file(run, rank, None)
    except LaunchError:
        if _may_go_on(run):
            return None
        raise


def _print_from(file: Path, offset: int) -> int:
    with open(file, "rb") as log:
        log.seek(offset)
        data = log.read()
    _copy(data)
    return offset + len(data)


def _may_go_on(run: Path) -> bool:
    """Whether the run lives, or its job waits or runs."""
    from .slurm.scheduler import queued_jobs
    from .slurm.submission import read_job

    lock = read_lock(run)
    if lock is not None and lock.is_alive:
        return True
    job = read_job(run)
    return job is not None and job.name in (queued_jobs([job.job_id]) or {})


def _copy(data: bytes) -> None:
    sys.stdout.buffer.write(data)
    sys.stdout.flush()
