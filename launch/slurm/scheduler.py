"""SLURM through its own commands, and its answers in one line.

Every function says what the scheduler said; none guesses. Imports no torch.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from collections.abc import Collection, Sequence
from dataclasses import dataclass

from ...models.errors import LaunchError

__all__ = [
    "QueuedJob",
    "accounted_states",
    "cancel_job",
    "find_sbatch",
    "queued_jobs",
    "requeue_job",
    "submit_script",
]

QUERY_TIMEOUT_S = 10
SUBMIT_TIMEOUT_S = 120
_ENV_NAMES = {"time": "TIMELIMIT", "array": "ARRAY_INX", "mem": "MEM_PER_NODE"}
"""Where the environment's name of an option of sbatch is another."""
_LIVE = ("RUNNING", "COMPLETING", "CONFIGURING", "SUSPENDED", "STAGE_OUT", "SIGNALING", "STOPPED")


@dataclass(frozen=True)
class QueuedJob:
    """A job the scheduler still has: not ended, or ending."""

    job_id: str
    state: str
    reason: str

    @property
    def is_pending(self) -> bool:
        return self.state in ("PENDING", "REQUEUED", "REQUEUE_HOLD", "SPECIAL_EXIT")

    @property
    def is_running(self) -> bool:
        return self.state in _LIVE


def find_sbatch() -> str:
    """The path of sbatch.

    Raises:
        LaunchError: there is none here.
    """
    path = shutil.which("sbatch")
    if path is None:
        raise LaunchError(
            "there is no sbatch on this machine's PATH; submit from a login node of the cluster, "
            "or use --local to run it here, or --dry-run to see the script"
        )
    return path


def submit_script(script: str, options: Sequence[str] = ()) -> str:
    """Hand a batch script in and return the job id.

    Raises:
        LaunchError: refused, in sbatch's own words.
    """
    sbatch = find_sbatch()
    try:
        done = subprocess.run(
            [sbatch, "--parsable", *options],
            input=script,
            capture_output=True,
            text=True,
            env=_environment_for(script),
            timeout=SUBMIT_TIMEOUT_S,
        )
    except subprocess.TimeoutExpired:
        raise LaunchError(
            f"sbatch has not answered within {SUBMIT_TIMEOUT_S} s; the job may be in the queue all the same: look with squeue --me"
        ) from None
    job_id = done.stdout.strip().partition(";")[0]
    if done.returncode != 0:
        raise LaunchError(f"sbatch refused the job: {_words(done.stderr)}; nothing was submitted")
    if not job_id.isdigit():
        raise LaunchError(f"sbatch answered {done.stdout.strip()!r}, expected a job id")
    return job_id


def _environment_for(script: str) -> dict[str, str]:
    """This environment without what would go before the script's own lines, or belongs to a job this shell is in."""
    options = re.findall(r"^#SBATCH --([a-z-]+)", script, re.M)
    ours = {"SBATCH_NO_REQUEUE", *(f"SBATCH_{_ENV_NAMES.get(o, o)}" for o in options)}
    ours = {name.upper().replace("-", "_") for name in ours}
    return {
        name: value
        for name, value in os.environ.items()
        if name not in ours
        and (not name.startswith(("SLURM_", "SRUN_")) or name in ("SLURM_CONF", "SLURM_CLUSTERS"))
    }


def queued_jobs(job_ids: Collection[str]) -> dict[str, QueuedJob] | None:
    """The jobs the scheduler still has, by id (`12`, `12_3` for a task of an array), in one call.

    Returns:
        None where the scheduler cannot be asked: its commands are not here, or do not answer.
    """
    if not job_ids:
        return {}
    wanted = sorted({job.partition("_")[0] for job in job_ids}, key=int)
    # --array: one line a task, pending ones too.
    command = ["squeue", "--noheader", "--array", f"--jobs={','.join(wanted)}"]
    answer = _ask([*command, "--states=all", "--format=%i|%T|%r"])
    if answer is None or (answer.returncode and "Invalid job id" not in answer.stderr):
        return None
    jobs = [QueuedJob(*line.split("|", 2)) for line in answer.stdout.splitlines() if "|" in line]
    return {job.job_id: job for job in jobs if job.is_pending or job.is_running}


def accounted_states(job_ids: Collection[str]) -> dict[str, str]:
    """How jobs ended, as accounting has it, by id; empty where there is no accounting."""
    if not job_ids:
        return {}
    jobs = ",".join(sorted(job_ids))
    answer = _ask(["sacct", "-X", "-n", "-P", "-j", jobs, "-o", "JobID,State"])
    if answer is None or answer.returncode:
        return {}
    rows = [line.split("|", 1) for line in answer.stdout.splitlines() if "|" in line]
    return {job: state.split()[0] for job, state in rows if state}


def requeue_job(job_id: str) -> None:
    """Put a job back into the queue; a running one is ended first.

    Raises:
        LaunchError: refused, in the scheduler's own words.
    """
    _order(["scontrol", "requeue", job_id])


def cancel_job(job_id: str) -> None:
    """Take a job out of the queue.

    Raises:
        LaunchError: refused, in the scheduler's own words.
    """
    _order(["scancel", job_id])


def _order(command: Sequence[str]) -> None:
    answer = _ask(command)
    if answer is None:
        raise LaunchError(f"{command[0]} is not here or does not answer; do it on a login node")
    if answer.returncode:
        raise LaunchError(f"{' '.join(command)}: {_words(answer.stderr)}")


def _ask(command: Sequence[str]) -> subprocess.CompletedProcess[str] | None:
    if shutil.which(command[0]) is None:
        return None
    try:
        return subprocess.run(command, capture_output=True, text=True, timeout=QUERY_TIMEOUT_S)
    except subprocess.TimeoutExpired:
        return None


def _words(text: str) -> str:
    """What a command of SLURM complained about, as one line without its prefixes."""
    lines = [re.sub(r"^\w+: (error|fatal): ", "", line.strip()) for line in text.splitlines()]
    return "; ".join(dict.fromkeys(line for line in lines if line)) or "no reason given"
