"""Jobs on a real SLURM, disturbed in every way it can: each ends with the losses and samples of the run that was left alone."""

from __future__ import annotations

import json
import socket
import subprocess
import sys

import pytest
from lab import STEPS, Job, Lab, batch_output
from weft.trainer.slurm import rendezvous_port

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def short_of_time(lab: Lab) -> tuple[Job, Job]:
    """Two jobs held until their time is nearly up; submitted first, because a limit has whole minutes.

    SLURM sends its signal up to 30 s early, so at 30 to 60 s here; the clock of the second stands at 35 s, long before its signal.
    """
    limit = ("--time", "2", "--cluster")
    by_signal = lab.submit("by-signal", *limit, lab.profile("early", "signal_s: 60"), hold_at=6)
    margin, late = "run.deadline_margin_s=85", lab.profile("late", "signal_s: 10")
    by_clock = lab.submit("by-clock", *limit, late, margin, hold_at=6)
    return by_signal, by_clock


def test_two_nodes_train_together(lab: Lab, short_of_time: object, undisturbed: Job) -> None:
    [attempt] = undisturbed.attempts
    assert (attempt.world_size, attempt.nodes) == (2, "n[1-2]")
    assert attempt.job_id == undisturbed.id
    logs = sorted(p.name for p in (undisturbed.run / f"logs/{undisturbed.id}_0").iterdir())
    assert logs == ["rank_00000.log", "rank_00001.log"]
    assert len(undisturbed.trace) == STEPS


def test_plain_srun_finds_its_ranks(lab: Lab, undisturbed: Job) -> None:
    run = lab.folder / "srun"
    weft = [sys.executable, "-m", "weft", "train", str(lab.recipe), f"run.dir={run}"]
    done = subprocess.run(
        ["srun", "-N2", "-n2", *weft],
        env=lab.environment,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    job = Job(run, "")
    assert job.attempts[0].world_size == 2
    assert job.trace == undisturbed.trace


def test_a_port_that_another_program_has(lab: Lab, undisturbed: Job) -> None:
    job = lab.submit("port", "--cluster", lab.profile("held", "sbatch: [--hold]"))
    with socket.create_server(("127.0.0.1", rendezvous_port(int(job.id)))):
        lab.slurm("scontrol", "release", job.id)
        lab.finish(job)
    assert job.outcomes == ["finished"]
    assert job.trace == undisturbed.trace


def test_requeued_in_a_step(lab: Lab, undisturbed: Job) -> None:
    job = lab.submit("requeued", hold_at=7)
    lab.wait_for_step(job, 7)
    lab.slurm("scontrol", "requeue", job.id)
    lab.finish(job)
    assert job.trace == undisturbed.trace
    first, second = job.attempts
    assert (second.job_id, second.restart, second.log_dir) == (job.id, 1, f"logs/{job.id}_1")
    # The scheduler's SIGTERM leaves time to save.
    assert (first.outcome, first.last_saved_step, second.first_step) == ("preempted", 7, 7)


def test_signals_of_scancel(lab: Lab, undisturbed: Job) -> None:
    """USR1 is a person's stop, TERM without a preemption too: both are saved, neither goes on by itself."""
    job = lab.submit("signalled", hold_at=5)
    lab.wait_for_step(job, 5)
    lab.slurm("scancel", "--signal=USR1", job.id)
    assert lab.wait_for_end(job)["ExitCode"] == "75:0", job.story()
    job.hold_at(11)
    job = lab.submit_again(job)
    lab.wait_for_step(job, 11, attempt=2)
    lab.slurm("scancel", "--signal=TERM", job.id)
    assert lab.wait_for_end(job)["ExitCode"] == "77:0", job.story()
    job.let_go()
    job = Job(job.run, lab.weft("requeue", str(job.run)).split()[2])
    lab.finish(job)
    assert job.outcomes == ["stopped", "preempted", "finished"]
    assert [a.first_step for a in job.attempts] == [0, 5, 11]
    assert job.trace == undisturbed.trace


def test_a_crash_loop_ends(lab: Lab, undisturbed: Job) -> None:
    job = lab.submit("loop", crash=True)
    ended = lab.wait_for_end(job)
    found = ended["JobState"], ended["ExitCode"], ended["Restarts"]
    assert found == ("FAILED", "5:0", "1"), job.story()
    assert "crash loop: 2 starts in a row from step 0" in batch_output(job)
    job.let_go()
    job = lab.submit_again(job)
    lab.finish(job)
    assert job.trace == undisturbed.trace


def test_the_time_limit(lab: Lab, undisturbed: Job, short_of_time: tuple[Job, Job]) -> None:
    reasons = ("SIGUSR2", "the end of the job's time")
    for job, reason in zip(short_of_time, reasons, strict=True):
        lab.finish(job)
        # Where the machine is very busy the limit comes twice.
        first, second, *_ = job.attempts
        assert (first.outcome, first.exit_code) == ("time_limit", 76), job.story()
        assert first.reason == f"stopped by {reason}"
        assert second.first_step == 6
        assert "back into the queue" in batch_output(job)
        assert job.trace == undisturbed.trace


def test_nodes_that_are_lost(lab: Lab, undisturbed: Job) -> None:
    """One is set down by its administrator, one dies without a word; each job goes on on other nodes."""
    whole = lab.profile("whole", "sbatch: [--exclusive]")
    down = lab.submit("down", "--cluster", whole, hold_at=9)
    dead = lab.submit("dead", "--cluster", whole, hold_at=9)
    for job in (down, dead):
        lab.wait_for_step(job, 9)
    assert (down.attempts[0].nodes, dead.attempts[0].nodes) == ("n[1-2]", "n[3-4]")
    lab.cluster.kill_node("n4")
    lab.slurm("scontrol", "update", "nodename=n2", "state=down", "reason=test")
    try:
        for job in (down, dead):
            lab.finish(job)
            assert len(job.attempts) == 2, job.story()
            assert job.trace == undisturbed.trace
    finally:
        lab.cluster.start_node("n4")
        # ReturnToService has brought it back already, unless it is early.
        lab.cluster.ask("scontrol", "update", "nodename=n2", "state=resume")
    assert "n4" not in (dead.attempts[1].nodes or "")
    # Where the daemon of the node still ran, it told the ranks, and they saved; the dead one's could not.
    assert [job.attempts[1].first_step for job in (down, dead)] == [9, 8]


def test_preempted(lab: Lab, undisturbed: Job) -> None:
    """Without a grace time the scheduler ends and requeues the job; with one the ranks end in it, and the script requeues."""
    jobs = [
        lab.submit(partition, "--partition", partition, hold_at=9)
        for partition in ("normal", "grace")
    ]
    for job in jobs:
        lab.wait_for_step(job, 9)
    options = ["--partition=urgent", "--nodes=6", "--exclusive", "--output=/dev/null"]
    lab.slurm("sbatch", *options, "--wrap=sleep 1")
    for job in jobs:
        lab.finish(job)
        first, second = job.attempts
        assert (first.outcome, first.exit_code, second.first_step) == ("preempted", 77, 9)
        assert (second.job_id, second.restart) == (job.id, 1)
        assert job.trace == undisturbed.trace


def test_a_sweep_followed_and_stopped(lab: Lab, undisturbed: Job) -> None:
    sweep = lab.folder / "sweep"
    runs = [sweep / "lr=1e-2", sweep / "lr=2e-2"]
    for run in runs:
        Job(run, "").hold_at(5)
    options = ["--nodes", "1", "--ranks-per-node", "1", "--sweep", "optimizer.lr=1e-2,2e-2"]
    array = lab.submit("sweep", *options)
    same, other = (Job(run, f"{array.id}_{task}") for task, run in enumerate(runs))
    for job in (same, other):
        lab.wait_for_step(job, 5)

    told = {row["run"]: row for row in json.loads(lab.weft("status", str(sweep), "--json"))}
    assert {row["job"]: (row["state"], row["step"]) for row in told.values()} == {
        same.id: ("running", 5),
        other.id: ("running", 5),
    }
    lab.weft("stop", str(same.run), "--wait")
    assert "stopped by STOP file after step 5" in lab.weft("logs", str(same.run))
    assert lab.wait_for_end(same)["ExitCode"] == "75:0", same.story()
    for job in (same, other):
        job.let_go()
    lab.finish(other)
    same = Job(same.run, lab.weft("requeue", str(same.run)).split()[2])
    lab.finish(same)
    assert same.outcomes == ["stopped", "finished"]
    losses = [[float(row[0]) for row in job.trace] for job in (same, other, undisturbed)]  # type: ignore[arg-type]
    assert losses[0] == pytest.approx(losses[2], rel=1e-4)
    assert losses[0][-1] != pytest.approx(losses[1][-1], rel=1e-3)
