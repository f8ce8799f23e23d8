"""Hand runs to the scheduler: claim their folders, write what the job needs, submit; undo all of it where it is refused.

    RUN/config.yaml              what the job trains, complete
    RUN/slurm/code/DIGEST/       the code it runs from
    RUN/slurm/JOBID.sbatch       the script as it was submitted
    RUN/slurm/JOBID.out          what the batch shell said
    RUN/slurm/job.json           job_id, array_task_id, cluster, submitted, script, code

The runs of a sweep share script and code, which are in the sweep's folder. Imports no torch.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import shutil
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from types import TracebackType

from ...models.errors import ConfigError
from ...trainer.configuration.dump import dump_config
from ...trainer.configuration.schema import TrainingConfig
from ...trainer.files import write_json, write_text
from ...trainer.run_lock import read_lock
from .cluster import ClusterConfig
from .scheduler import find_sbatch, queued_jobs, submit_script
from .script import JobScript
from .snapshot import CodeSource, find_code

__all__ = [
    "Claim",
    "Submission",
    "SubmittedJob",
    "check_free",
    "newest_step",
    "read_job",
    "record_again",
    "resubmitted_script",
    "writable",
]

JOB_FILE = Path("slurm") / "job.json"


@dataclass(frozen=True)
class SubmittedJob:
    """What RUN/slurm/job.json holds; None for what is not known."""

    job_id: str
    array_task_id: int | None
    cluster: str | None
    submitted: float
    script: str
    code: str | None

    @property
    def name(self) -> str:
        """The job as the scheduler's commands take it: `12`, or `12_3` for a task of an array."""
        return self.job_id if self.array_task_id is None else f"{self.job_id}_{self.array_task_id}"


def read_job(run_dir: Path) -> SubmittedJob | None:
    """The job a run was last submitted as, or None."""
    try:
        return SubmittedJob(**json.loads((run_dir / JOB_FILE).read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError):
        return None


class Claim:
    """Makes run folders and files, and takes back exactly that where the block it guards fails."""

    def __init__(self) -> None:
        self._made: list[Path] = []
        self._replaced: dict[Path, str | None] = {}

    def __enter__(self) -> Claim:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if kind is None:
            return
        for path, text in self._replaced.items():
            with contextlib.suppress(OSError):
                path.unlink(missing_ok=True) if text is None else write_text(path, text)
        for folder in reversed(self._made):
            shutil.rmtree(folder, ignore_errors=True)

    def folder(self, path: Path) -> None:
        """Make a folder with those above it."""
        missing = [p for p in (path, *path.parents) if not p.exists()]
        for new in reversed(missing):
            new.mkdir(exist_ok=True)
            self._made.append(new)

    def made(self, path: Path) -> None:
        """Something that was made otherwise and goes if the claim fails."""
        self._made.append(path)

    def file(self, path: Path, text: str) -> None:
        self._replaced.setdefault(path, path.read_text() if path.is_file() else None)
        write_text(path, text)


@dataclass(frozen=True)
class Submission:
    """Runs that are submitted together.

    Args:
        configs: one a run.
        folder: of the script, the code and the batch output: the run's, or the sweep's.
        is_resubmission: the runs were given as folders, so that they may hold something.
        array: of sbatch, where it is a job array.
    """

    name: str
    configs: Sequence[TrainingConfig]
    folder: Path
    cluster: ClusterConfig
    cluster_name: str | None = None
    is_resubmission: bool = False
    array: str | None = None

    @property
    def runs(self) -> list[Path]:
        return [config.run_dir.absolute() for config in self.configs]

    def script(self, code: CodeSource) -> JobScript:
        slurm = self.folder.absolute() / "slurm"
        inside = "python3" if self.cluster.container else sys.executable
        return JobScript(
            name=" ".join(self.name.split()),
            runs=self.runs,
            folder=slurm,
            code=code.folder(slurm / "code"),
            cwd=Path.cwd(),
            python=self.cluster.python or inside,
            cluster=self.cluster,
            array=self.array,
        )

    def check(self) -> None:
        """What can be known before anything is written.

        Raises:
            ConfigError: a folder that holds another run, or one whose job is still there.
        """
        for config, run in zip(self.configs, self.runs, strict=True):
            check_free(run, is_resubmission=self.is_resubmission)
            step = newest_step(run)
            if step is not None and step >= config.train.steps:
                raise ConfigError(
                    f"{run} is finished: it stands at step {step} of train.steps={config.train.steps}; raise train.steps to go on"
                )
        jobs = {run: job for run in self.runs if (job := read_job(run)) is not None}
        queued = queued_jobs([job.job_id for job in jobs.values()]) or {}
        for run, job in jobs.items():
            if job.name in queued:
                state = queued[job.name].state.lower()
                raise ConfigError(
                    f"{run} is job {job.name} already ({state}); stop it first: weft stop {run}, or give run.dir another folder"
                )

    def submit(self) -> str:
        """Write everything, submit, and return the job id.

        Raises:
            ConfigError: see `check`; or a folder that cannot be written.
            LaunchError: the scheduler refused; nothing of what was written stays.
        """
        find_sbatch()
        with writable(self.folder):
            self.check()
        code = find_code()
        script = self.script(code)
        text = script.render()
        with writable(self.folder), Claim() as claim:
            self.write_runs(claim)
            claim.folder(script.folder / "code")
            if script.code is not None and not script.code.exists():
                claim.made(script.code)
                code.write(script.folder / "code")
            job_id = submit_script(text)
        self._record(job_id, script, text)
        return job_id

    def write_runs(self, claim: Claim) -> None:
        """The folders of the runs with their configurations."""
        for config, run in zip(self.configs, self.runs, strict=True):
            claim.folder(run / "logs")
            claim.folder(run / "slurm")
            # Found out here, not by the job.
            with tempfile.TemporaryFile(dir=run):
                pass
            claim.file(run / "config.yaml", dump_config(config))
            # Left by a job that ended before it saw it, it would stop this one at once.
            (run / "STOP").unlink(missing_ok=True)

    def _record(self, job_id: str, script: JobScript, text: str) -> None:
        path = script.folder / f"{job_id}.sbatch"
        write_text(path, text)
        for index, run in enumerate(self.runs):
            write_json(
                run / JOB_FILE,
                {
                    "job_id": job_id,
                    "array_task_id": None if self.array is None else index,
                    "cluster": self.cluster_name,
                    "submitted": time.time(),
                    "script": str(path),
                    "code": None if script.code is None else str(script.code),
                },
            )


def newest_step(run: Path) -> int | None:
    """Step of the newest committed checkpoint, or None where nothing was saved."""
    try:
        text = (run / "checkpoints" / "latest").read_text(encoding="utf-8")
    except OSError:
        return None
    found = re.search(r"step_(\d+)", text)
    return int(found[1]) if found else None


def check_free(run: Path, *, is_resubmission: bool) -> None:
    """Refuse a folder that holds a run, as `weft train` does, and one that is being trained.

    Raises:
        ConfigError: it does.
    """
    records = run / "metrics.jsonl"
    has_steps = records.is_file() and records.stat().st_size > 0
    if ((run / "checkpoints" / "latest").exists() or has_steps) and not is_resubmission:
        raise ConfigError(
            f"{run} already holds a run; go on with it: weft submit {_shown(run)}, or set run.dir to a new folder"
        )
    lock = read_lock(run)
    if lock is not None and lock.is_alive:
        raise ConfigError(
            f"{run} is being run by {lock.describe()}; stop it with: weft stop {_shown(run)}, or give run.dir another folder"
        )


def resubmitted_script(job: SubmittedJob) -> tuple[str, list[str]]:
    """The stored script of an ended job, and the options of sbatch that pick its task of an array.

    Raises:
        ConfigError: the script is gone.
    """
    path = Path(job.script)
    if not path.is_file():
        raise ConfigError(f"the script of job {job.name} is gone: {path}; submit the run anew")
    options = [] if job.array_task_id is None else [f"--array={job.array_task_id}"]
    return path.read_text(encoding="utf-8"), options


def record_again(run: Path, job: SubmittedJob, job_id: str, text: str) -> None:
    """A job that was submitted with a stored script, as the run's newest."""
    path = Path(job.script).with_name(f"{job_id}.sbatch")
    write_text(path, text)
    again = replace(job, job_id=job_id, submitted=time.time(), script=str(path))
    write_json(run / JOB_FILE, asdict(again))


def _shown(run: Path) -> str:
    return os.path.relpath(run) if run.is_relative_to(Path.cwd()) else str(run)


@contextlib.contextmanager
def writable(folder: Path) -> Iterator[None]:
    """Errors of the file system in a run folder as one line.

    Raises:
        ConfigError: instead of any OSError.
    """
    try:
        yield
    except OSError as error:
        raise ConfigError(
            f"run folder {folder} cannot be written: {error.strerror}; set run.dir elsewhere"
        ) from None
