"""`weft stop`: a run saves and ends, wherever it runs; one that only waits in the queue leaves it."""

from __future__ import annotations

import time
from pathlib import Path

import click

from ..models.errors import LaunchError, WeftError
from ..trainer.run_lock import read_lock
from .options import run_folder

__all__ = ["command"]

LOOK_EVERY_S = 1.0


@click.command(epilog="Example: weft stop runs/first --wait")
@click.argument("runs", metavar="RUN...", nargs=-1, required=True)
@click.option("--wait", is_flag=True, help="Return when it has ended.")
def command(runs: tuple[str, ...], wait: bool) -> None:
    """Ask RUN to save and end: at the next step boundary, on all its ranks, with exit code 75.

    Nothing is killed. A job that still waits in the queue is taken out of it. The run goes on with weft submit RUN.
    """
    errors = []
    for run in runs:
        try:
            _stop(run, run_folder(run))
        except WeftError as error:
            errors.append(str(error))
    if errors:
        raise LaunchError("\n".join(errors))
    while wait and any(_is_live(run_folder(run)) for run in runs):
        time.sleep(LOOK_EVERY_S)


def _stop(run: str, folder: Path) -> None:
    from .slurm.scheduler import cancel_job, queued_jobs
    from .slurm.submission import read_job

    lock, job = read_lock(folder), read_job(folder)
    queued = (queued_jobs([job.job_id]) or {}).get(job.name) if job else None
    if (lock is not None and lock.is_alive) or (queued is not None and queued.is_running):
        (folder / "STOP").touch()
        where = lock.describe() if lock is not None and lock.is_alive else f"job {job and job.name}"
        click.echo(f"{run} ({where}) saves after the step it is in and ends with exit code 75")
        click.echo(f"go on with it later: weft submit {run}")
    elif queued is not None:
        cancel_job(queued.job_id)
        click.echo(f"{run}: job {queued.job_id} waited in the queue and is taken out of it")
    else:
        raise LaunchError(f"{run} is not running and has no job in the queue; nothing to stop")


def _is_live(folder: Path) -> bool:
    from .slurm.scheduler import queued_jobs
    from .slurm.submission import read_job

    lock, job = read_lock(folder), read_job(folder)
    if lock is not None and lock.is_alive:
        return True
    return job is not None and job.name in (queued_jobs([job.job_id]) or {})
