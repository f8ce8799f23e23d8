"""Runs of the tiny recipe on the cluster of the tests: submitted, held at a step, looked at."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from cluster import Cluster
from tiny_run import trace, write_recipe
from weft.trainer.attempts import Attempt, read_attempts

ROOT = Path(__file__).resolve().parents[2]
STEPS = 20
LIMIT_S = 120.0
"""Longer than anything takes here; another build may have the machine's two cores."""
ENDED = ("COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL", "PREEMPTED")


@dataclass(frozen=True)
class Job:
    """A run and the job it was submitted as."""

    run: Path
    id: str

    @property
    def steps(self) -> int:
        """Steps in its metrics."""
        path = self.run / "metrics.jsonl"
        return path.read_text().count('"loss"') if path.is_file() else 0

    @property
    def attempts(self) -> list[Attempt]:
        return read_attempts(self.run)

    @property
    def outcomes(self) -> list[str | None]:
        return [attempt.outcome for attempt in self.attempts]

    @property
    def trace(self) -> list[tuple[object, ...]]:
        return trace(self.run)

    def hold_at(self, step: int) -> None:
        """Let the first start of its job make `step` steps and wait before the next."""
        self._gate(str(step))

    def crash(self) -> None:
        """Kill its last rank before its next step, at every start."""
        self._gate("crash")

    def let_go(self) -> None:
        (self.run / "gate").unlink()

    def _gate(self, text: str) -> None:
        self.run.mkdir(parents=True, exist_ok=True)
        (self.run / "gate.new").write_text(text)
        (self.run / "gate.new").replace(self.run / "gate")

    def story(self) -> str:
        """Everything it said, for the message of a failed test."""
        files = [
            *self.run.parent.glob(f"{self.run.name}/slurm/*.out"),
            *self.run.glob("logs/*/*.log"),
        ]
        said = [
            f"{path.relative_to(self.run)}:\n{path.read_text(errors='replace')[-1500:]}"
            for path in sorted(files)
        ]
        return "\n".join([*(str(a) for a in self.attempts), *said])


class Lab:
    """The cluster, one recipe, and the commands a user would type."""

    def __init__(self, cluster: Cluster, folder: Path) -> None:
        self.cluster, self.folder = cluster, folder
        self.recipe = write_recipe(
            folder, train__steps=STEPS, checkpoint__every=2, run__deadline_margin_s=0
        )
        self.profiles = folder / "config"
        self.environment = {
            **{
                k: v
                for k, v in cluster.environment.items()
                if not k.startswith(("SLURM_JOB", "SBATCH_"))
            },
            "PYTHONPATH": os.pathsep.join(
                [str(ROOT / "tests" / "slurm" / "gate"), *filter(None, sys.path)]
            ),
            "XDG_CONFIG_HOME": str(self.profiles),
            "OMP_NUM_THREADS": "1",
        }

    def profile(self, name: str, text: str) -> str:
        """Write a cluster profile and return its name."""
        path = self.profiles / "weft" / "clusters" / f"{name}.yaml"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
        return name

    def weft(self, *arguments: str, expect: int = 0) -> str:
        """Run a weft command; its standard output."""
        done = subprocess.run(
            [sys.executable, "-m", "weft", *arguments],
            cwd=self.folder,
            env=self.environment,
            capture_output=True,
            text=True,
            timeout=LIMIT_S,
        )
        assert done.returncode == expect, (
            f"{arguments}: {done.returncode}\n{done.stdout}\n{done.stderr}"
        )
        return done.stdout

    def slurm(self, *command: str) -> str:
        """Run a command of SLURM; its standard output."""
        done = self.cluster.ask(*command)
        assert done.returncode == 0, f"{command}: {done.stdout}\n{done.stderr}"
        return done.stdout

    def submit(
        self, name: str, *options: str, hold_at: int | None = None, crash: bool = False
    ) -> Job:
        """Submit the recipe as a new run of two nodes, one rank each, held before a step."""
        held = Job(self.folder / name, "")
        if hold_at is not None:
            held.hold_at(hold_at)
        if crash:
            held.crash()
        shape = () if "--nodes" in options else ("--nodes", "2", "--ranks-per-node", "1")
        said = self.weft("submit", str(self.recipe), f"run.dir={held.run}", *shape, *options)
        return self._submitted(held.run, said)

    def submit_again(self, job: Job, *options: str) -> Job:
        said = self.weft("submit", str(job.run), "--nodes", "2", "--ranks-per-node", "1", *options)
        return self._submitted(job.run, said)

    @staticmethod
    def _submitted(run: Path, said: str) -> Job:
        found = re.search(r"submitted job (?:array )?(\d+)", said)
        assert found, said
        return Job(run, found[1])

    def state(self, job_id: str) -> dict[str, str]:
        """What scontrol says of a job, by name."""
        return dict(re.findall(r"(\w+)=(\S*)", self.slurm("scontrol", "show", "job", "-o", job_id)))

    def wait_for_step(self, job: Job, step: int, attempt: int = 1) -> None:
        """Wait until an attempt has made a step, and with it everything up to the gate."""
        self.until(lambda: len(job.attempts) >= attempt and job.steps >= step, job)

    def wait_for_end(self, job: Job) -> dict[str, str]:
        """Wait until the job is over for good; what scontrol says of it."""
        states: list[dict[str, str]] = []

        def is_over() -> bool:
            states.append(self.state(job.id))
            return states[-1]["JobState"] in ENDED and not self._is_queued(job.id)

        self.until(is_over, job)
        return states[-1]

    def _is_queued(self, job_id: str) -> bool:
        return bool(self.slurm("squeue", "--noheader", f"--jobs={job_id}").strip())

    def until(self, is_so: Callable[[], bool], job: Job) -> None:
        until = time.monotonic() + LIMIT_S
        while not is_so():
            if time.monotonic() > until:
                raise AssertionError(
                    f"{self.slurm('scontrol', 'show', 'job', job.id)}\n{job.story()}"
                )
            time.sleep(0.1)

    def finish(self, job: Job) -> None:
        """Wait for the end, which must be a good one with every step made."""
        ended = self.wait_for_end(job)
        assert (ended["JobState"], ended["ExitCode"]) == ("COMPLETED", "0:0"), job.story()
        assert job.steps == STEPS, job.story()
        assert job.outcomes[-1] == "finished", job.story()


def batch_output(job: Job) -> str:
    """What the batch shell said, over all starts."""
    return (job.run / "slurm" / f"{job.id}.out").read_text()


def records(run: Path) -> list[dict[str, object]]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
