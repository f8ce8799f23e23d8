"""`weft requeue`: a run back into the queue, by a person or, with --after, by its own job script.

The job script asks after every end, while the scheduler may be ending the job, so nothing heavy is imported here.
"""

from __future__ import annotations

import os
import re
from pathlib import Path

import click

from ..models.errors import LaunchError
from ..trainer.attempts import STARTS_OF_A_LOOP, Verdict, judge, read_attempts
from ..trainer.exit_codes import ExitCode
from .options import max_restarts_of, run_argument, run_folder

__all__ = ["command", "decide", "judge_start"]

FINAL = (ExitCode.USER_ERROR, ExitCode.POLICY, ExitCode.STOPPED, ExitCode.INTERRUPTED)
ALIVE = ("RUNNING", "SUSPENDED", "STOPPED", "")
NOT_SET = ("", "None", "N/A", "Unknown", "UNLIMITED", "Partition_Limit")


@click.command(epilog="Example: weft requeue runs/first")
@run_argument
@click.option(
    "--after",
    type=int,
    hidden=True,
    help="Of the job script: the ranks ended with this code; answer what follows.",
)
@click.option("--job-state", default="", hidden=True, help="What scontrol show job says.")
def command(run: str, after: int | None, job_state: str) -> None:
    """Put RUN back into the queue.

    A running job ends and starts again from its newest checkpoint; an ended one is submitted again with its stored script, so
    with the code it had. To go on with today's code, or on other nodes: weft submit RUN.
    """
    folder = run_folder(run)
    if after is not None:
        _answer(folder, after, job_state)
    else:
        _requeue(run, folder)


def _answer(folder: Path, code: int, job_state: str) -> None:
    """One line for the job script: `requeue CODE` or `exit CODE`."""
    verdict = decide(judge_start(folder, code, _unopened_starts(folder)), job_state)
    left = "" if verdict.exit_code == ExitCode.PREEMPTED else "; not started again"
    if verdict.exit_code:
        end = "; back into the queue" if verdict.requeue else left
        click.echo(f"weft: {verdict.reason}{_where(verdict)}{end}", err=True)
    click.echo(f"{'requeue' if verdict.requeue else 'exit'} {verdict.exit_code}")


def _where(verdict: Verdict) -> str:
    """The nodes, where they may be what failed."""
    nodes = os.environ.get("SLURM_JOB_NODELIST")
    is_suspect = verdict.exit_code in (ExitCode.MACHINE, ExitCode.HANG)
    return f"; nodes {nodes}, to leave some out: --exclude" if nodes and is_suspect else ""


def _unopened_starts(folder: Path) -> int:
    """Starts of this job, this one included, since the last that came as far as to be in the run's history."""
    job = os.environ.get("SLURM_ARRAY_JOB_ID") or os.environ.get("SLURM_JOB_ID")
    restart = int(os.environ.get("SLURM_RESTART_COUNT") or 0)
    if job is None:
        return 0
    return restart - max((a.restart for a in read_attempts(folder) if a.job_id == job), default=-1)


def judge_start(folder: Path, code: int, unopened: int) -> Verdict:
    """The judgement of one start, which may have failed before it was in the run's history.

    Args:
        code: of the ranks.
        unopened: starts in a row, this one included, that are not in the history; of these it knows nothing.
    """
    if unopened == 0 or code == 0:
        return judge(folder, code, max_restarts_of(folder))
    reason = f"the ranks ended with {code} before the run was opened"
    if unopened >= STARTS_OF_A_LOOP:
        look = f"crash loop: {unopened} starts in a row; look with: weft logs {folder}"
        return Verdict(False, ExitCode.CRASH_LOOP, f"{reason}; {look}")
    return Verdict(code not in FINAL and code != ExitCode.PREEMPTED, code, reason)


def decide(verdict: Verdict, job_state: str) -> Verdict:
    """A verdict on the run, given what the scheduler does with the job.

    A job that is being ended (cancelled, or preempted and requeued by the scheduler itself) is left alone; one whose time is up is
    not. One that is being preempted with a grace time goes back by itself: had it merely ended, the scheduler would not requeue it.

    Args:
        job_state: the words of `scontrol show job`; empty where it cannot be asked.
    """
    facts = dict(re.findall(r"(\w+)=(\S*)", job_state))
    is_alive = facts.get("JobState", "") in ALIVE
    if verdict.exit_code == ExitCode.PREEMPTED:
        in_grace = is_alive and facts.get("PreemptTime", "") not in NOT_SET
        return Verdict(in_grace, verdict.exit_code, verdict.reason)
    if verdict.requeue and not is_alive and not _is_time_up(facts):
        state = facts["JobState"].lower()
        return Verdict(False, verdict.exit_code, f"{verdict.reason}; the job is {state} already")
    return verdict


def _is_time_up(facts: dict[str, str]) -> bool:
    if facts["JobState"] == "CANCELLED":
        return False
    ran, limit = _seconds(facts.get("RunTime", "")), _seconds(facts.get("TimeLimit", ""))
    return facts["JobState"] == "TIMEOUT" or (
        ran is not None and limit is not None and ran >= limit
    )


def _seconds(text: str) -> int | None:
    """SLURM's [DAYS-]HH:MM:SS in seconds."""
    found = re.fullmatch(r"(?:(\d+)-)?(\d+):(\d+):(\d+)", text)
    if found is None:
        return None
    days, hours, minutes, seconds = (int(part or 0) for part in found.groups())
    return ((days * 24 + hours) * 60 + minutes) * 60 + seconds


def _requeue(run: str, folder: Path) -> None:
    from .slurm.scheduler import queued_jobs, requeue_job, submit_script
    from .slurm.submission import check_free, read_job, record_again, resubmitted_script

    job = read_job(folder)
    if job is None:
        raise LaunchError(f"{run} was never submitted; do it with: weft submit {run}")
    queued = queued_jobs([job.job_id])
    if queued is None:
        raise LaunchError("squeue is not here or does not answer; requeue from a login node")
    if job.name in queued and queued[job.name].is_pending:
        found = queued[job.name]
        raise LaunchError(f"job {job.name} waits in the queue already ({found.reason})")
    if job.name in queued:
        requeue_job(job.name)
        click.echo(f"job {job.name} ends and goes back into the queue")
        return
    check_free(folder, is_resubmission=True)
    text, options = resubmitted_script(job)
    job_id = submit_script(text, options)
    record_again(folder, job, job_id, text)
    click.echo(f"submitted job {job_id} with the script of job {job.name}")
    click.echo(f"follow it: weft logs {run} -f")
