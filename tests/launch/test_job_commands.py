"""`weft status`, `logs`, `stop` and `requeue` over run folders of every kind, with a stand-in of the scheduler and without one."""

from __future__ import annotations

import json
import resource
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from fake_slurm import FakeSlurm
from weft.launch import cli, logs, stop
from weft.launch.run_state import find_runs
from weft.trainer.run_lock import RunLock

Weft = Callable[..., tuple[int, str, str]]


@pytest.fixture
def slurm(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> FakeSlurm:
    monkeypatch.chdir(tmp_path)
    return FakeSlurm(tmp_path / "bin", monkeypatch)


@pytest.fixture
def weft(monkeypatch: pytest.MonkeyPatch, capsysbinary: pytest.CaptureFixture[bytes]) -> Weft:
    def run(*arguments: str) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["weft", *arguments])
        code = cli._run()
        found = capsysbinary.readouterr()
        return code, found.out.decode(), found.err.decode()

    return run


def make_run(
    name: str,
    *events: dict[str, Any],
    job: str | None = None,
    task: int | None = None,
    submitted: float = 0.0,
    steps: int = 0,
    saved: int | None = None,
) -> Path:
    """A run folder under runs/, as a job leaves it."""
    run = Path("runs") / name
    (run / "slurm").mkdir(parents=True)
    config = {"run": {"max_restarts": 3}, "train": {"steps": 100, "batch_tokens": 1000}}
    (run / "config.yaml").write_text(yaml.safe_dump(config))
    lines = [json.dumps({"attempt": 1, "time": 1e9 + 10 * i, **e}) for i, e in enumerate(events)]
    if lines:
        (run / "attempts.jsonl").write_text("\n".join(lines) + "\n")
    records = [{"step": s, "loss": 3 - s / 100, "tokens_per_s": 500.0} for s in range(1, steps + 1)]
    if records:
        text = "".join(json.dumps(r) + "\n" for r in records)
        (run / "metrics.jsonl").write_text(
            text + json.dumps({"step": steps, "eval/loss": 1}) + "\n{"
        )
    if saved is not None:
        (run / "checkpoints").mkdir()
        (run / "checkpoints" / "latest").write_text(f"step_{saved:08d}\n")
    if job is not None:
        script = run.absolute() / "slurm" / f"{job}.sbatch"
        script.write_text("#!/bin/bash\n")
        record = {"job_id": job, "array_task_id": task, "cluster": None, "code": None}
        record |= {"submitted": submitted, "script": str(script)}
        (run / "slurm" / "job.json").write_text(json.dumps(record))
    return run


START = {"event": "start", "world_size": 4, "host": "n1", "job_id": "7", "restart": 0}


def ended(outcome: str, code: int, reason: str = "") -> tuple[dict[str, Any], ...]:
    opened = {"event": "opened", "step": 0, "train_seconds": 0.0}
    saved = {"event": "saved", "step": 40, "seconds": 0.5, "train_seconds": 12.0}
    end = {"event": "end", "outcome": outcome, "exit_code": code, "reason": reason, "step": 50}
    return START, opened, saved, end


def states(weft: Weft, *arguments: str) -> dict[str, dict[str, Any]]:
    code, out, err = weft("status", "--json", *arguments)
    assert code == 0, err
    return {Path(state["run"]).name: state for state in json.loads(out)}


# Status


def test_every_kind_of_end_has_its_state(slurm: FakeSlurm, weft: Weft) -> None:
    make_run("a-finished", *ended("finished", 0), steps=100, saved=100)
    make_run("b-stopped", *ended("stopped", 75, "stopped by STOP file"), steps=50, saved=50)
    make_run("c-limit", *ended("time_limit", 76), steps=50)
    make_run("d-died", START)
    make_run("e-new")
    make_run("f-old", steps=10)
    make_run("g-policy", *ended("policy", 3, "loss not finite"))
    found = states(weft)
    assert {name[0]: state["state"] for name, state in found.items()} == {
        "a": "finished",
        "b": "stopped",
        "c": "time limit",
        "d": "died",
        "e": "not started",
        "f": "ended",
        "g": "stopped by policy",
    }
    assert found["a-finished"]["step"] == found["a-finished"]["saved_step"] == 100
    assert found["a-finished"]["loss"] == pytest.approx(2.0)
    assert found["a-finished"]["goodput"] == pytest.approx(12 / 30)
    assert found["e-new"] | {"run": ""} == found["e-new"] | {"run": "", "loss": None, "attempt": 0}
    assert slurm.calls == []


def test_jobs_are_asked_for_in_one_call(slurm: FakeSlurm, weft: Weft) -> None:
    make_run("a", job="11")
    make_run("b", job="12")
    make_run("c", job="20", task=0)
    make_run("d", job="20", task=1)
    make_run("e", *ended("error", 1, "no"), job="30")
    make_run("f", job="31", submitted=2e9)
    slurm.answer(
        "squeue",
        "11|PENDING|Priority\n12|RUNNING|None\n20_0|COMPLETING|None\n20_1|PENDING|JobArrayTaskLimit\n30|FAILED|x",
    )
    slurm.answer("sacct", "31|CANCELLED by 0")
    found = states(weft)
    assert [found[n]["state"] for n in "abcdef"] == [
        "pending", "starting", "ending", "pending", "error", "cancelled",
    ]  # fmt: skip
    assert found["a"]["reason"] == "Priority"
    assert found["d"]["job"] == "20_1"
    assert len(slurm.calls_of("squeue")) == len(slurm.calls_of("sacct")) == 1
    assert "--jobs=11,12,20,30,31" in slurm.calls_of("squeue")[0]
    assert "-j 31" in slurm.calls_of("sacct")[0]


def test_a_scheduler_that_has_forgotten_the_job(slurm: FakeSlurm, weft: Weft) -> None:
    make_run("a", job="11", submitted=2e9)
    slurm.answer("squeue", error="slurm_load_jobs error: Invalid job id specified\n", code=1)
    slurm.answer("sacct", error="Slurm accounting storage is disabled\n", code=1)
    assert states(weft)["a"]["state"] == "failed to start"
    slurm.answer("squeue", error="Unable to contact slurm controller\n", code=1)
    assert states(weft)["a"]["state"] == "submitted"


def test_a_job_whose_ranks_are_through_is_ending(slurm: FakeSlurm, weft: Weft) -> None:
    now = [{**e, "time": time.time()} for e in ended("stopped", 75)]
    make_run("a", *now, job="7")
    slurm.answer("squeue", "7|RUNNING|None")
    assert states(weft)["a"]["state"] == "ending"


def test_watching_shows_it_again(
    slurm: FakeSlurm, weft: Weft, monkeypatch: pytest.MonkeyPatch
) -> None:
    make_run("a")
    naps = []

    def sleep(seconds: float) -> None:
        naps.append(seconds)
        if len(naps) == 2:
            raise KeyboardInterrupt

    monkeypatch.setattr("weft.launch.status.time.sleep", sleep)
    code, out, _ = weft("status", "--watch", "--every", "3")
    assert (code, naps, out.count("runs/a")) == (130, [3.0, 3.0], 2)


def test_a_running_run_has_speed_and_eta(slurm: FakeSlurm, weft: Weft) -> None:
    run = make_run("a", START, steps=40, saved=20)
    lock = RunLock(run)
    lock.acquire(1)
    state = states(weft)["a"]
    lock.release()
    assert (state["state"], state["tokens_per_s"], state["eta_s"]) == ("running", 500.0, 120.0)
    assert states(weft)["a"]["eta_s"] is None


def test_one_run_with_its_history(slurm: FakeSlurm, weft: Weft) -> None:
    second = [{**e, "attempt": 2, "restart": 1} for e in ended("rank_lost", 4, "lost [/a/b] rank")]
    make_run("a", *ended("error", 1, "ValueError: no"), *second)
    for place in ("runs/a", "a"):
        code, out, _ = weft("status", place)
        assert code == 0
        assert "rank lost: lost [/a/b] rank" in out
        assert "ValueError: no" in out
        assert "7 #1" in out
    history = json.loads(weft("status", "a", "--json")[1])["attempts"]
    assert [a["exit_code"] for a in history] == [1, 4]


def test_runs_of_sweeps_are_found_and_nothing_inside_runs(slurm: FakeSlurm) -> None:
    make_run("a")
    make_run("sweep/lr=1")
    make_run("sweep/lr=2")
    (Path("runs/a/slurm/code")).mkdir()
    (Path("runs/a/slurm/config.yaml")).touch()
    assert [str(p) for p in find_runs(Path("runs"))] == [
        "runs/a", "runs/sweep/lr=1", "runs/sweep/lr=2",
    ]  # fmt: skip


def test_no_runs_is_one_line(slurm: FakeSlurm, weft: Weft) -> None:
    code, _, err = weft("status")
    assert (code, "there are no runs in runs" in err) == (2, True)
    code, _, err = weft("status", "nowhere")
    assert (code, "nowhere is not a run" in err) == (2, True)


def test_fifty_runs_within_a_second_and_without_torch(slurm: FakeSlurm) -> None:
    for i in range(50):
        make_run(f"{i:02d}", *ended("finished", 0), steps=100, saved=100, job=str(i + 1))
        line = json.dumps({"step": 1, "loss": 1.0, "tokens_per_s": 1.0}) + "\n"
        path = Path("runs") / f"{i:02d}" / "metrics.jsonl"
        path.write_text(line * 20_000 + path.read_text())
    program = (
        "import atexit, sys\n"
        "atexit.register(lambda: print('torch' in sys.modules, file=sys.stderr))\n"
        "sys.argv = ['weft', 'status']\n"
        "from weft.launch.cli import main\n"
        "main()\n"
    )
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    assert done.returncode == 0, done.stderr
    assert done.stderr.splitlines()[-1] == "False"
    assert done.stdout.count("finished") == 50
    assert after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime < 1.0


# Logs


def write_log(run: Path, start: str, *ranks: str) -> Path:
    folder = run / "logs" / start
    folder.mkdir(parents=True)
    for rank, text in enumerate(ranks):
        (folder / f"rank_{rank:05d}.log").write_text(text)
    return folder


def test_logs_of_a_rank_and_an_attempt(slurm: FakeSlurm, weft: Weft) -> None:
    second = [{**e, "attempt": 2, "log_dir": "logs/7_1"} for e in ended("error", 1)]
    run = make_run("a", {**START, "log_dir": "logs/7_0"}, *second, job="7")
    write_log(run, "7_0", "first 0\n", "first 1\n")
    write_log(run, "7_1", "second 0\n", "second 1\n")
    assert weft("logs", "a")[1] == "second 0\n"
    assert weft("logs", "a", "--rank", "1", "--attempt", "1")[1] == "first 1\n"
    code, _, err = weft("logs", "a", "--rank", "5")
    assert (code, "has ranks 0 to 1" in err) == (2, True)
    code, _, err = weft("logs", "a", "--attempt", "9")
    assert (code, "has no attempt 9; there are 1 to 2" in err) == (2, True)
    assert len(weft("logs", "a", "--list")[1].splitlines()) == 4


def test_a_job_that_never_came_to_its_ranks_shows_its_shell(slurm: FakeSlurm, weft: Weft) -> None:
    run = make_run("a", job="7")
    (run / "slurm" / "7.out").write_text("module: not found\n")
    assert weft("logs", "a")[1] == "module: not found\n"
    make_run("b")
    code, _, err = weft("logs", "b")
    assert (code, "has no logs" in err) == (2, True)


def test_following_goes_over_a_restart_and_ends_with_the_run(
    slurm: FakeSlurm, weft: Weft, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(logs, "LOOK_EVERY_S", 0.02)
    monkeypatch.setattr(logs, "ASK_EVERY_S", 0.05)
    run = make_run("a", job="7")
    slurm.answer("squeue", "7|RUNNING|None")

    def restart() -> None:
        time.sleep(0.3)
        folder = write_log(run, "7_0", "one\n")
        time.sleep(0.3)
        with open(folder / "rank_00000.log", "a") as log:
            log.write("two\n")
        time.sleep(0.3)
        write_log(run, "7_1", "three\n")
        time.sleep(0.3)
        slurm.answer("squeue")

    thread = threading.Thread(target=restart)
    thread.start()
    code, out, _ = weft("logs", "a", "-f")
    thread.join()
    assert (code, out) == (0, "one\ntwo\nthree\n")


# Stop


def test_a_run_at_work_gets_a_stop_file(slurm: FakeSlurm, weft: Weft) -> None:
    run = make_run("a", START, job="7")
    slurm.answer("squeue", "7|RUNNING|None")
    code, out, _ = weft("stop", "a")
    assert code == 0
    assert "a (job 7) saves after the step it is in and ends with exit code 75" in out
    assert (run / "STOP").exists()
    assert slurm.calls_of("scancel") == []


def test_a_run_without_a_scheduler_is_stopped_too_and_waited_for(
    slurm: FakeSlurm, weft: Weft, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(stop, "LOOK_EVERY_S", 0.02)
    run = make_run("a", START)
    lock = RunLock(run)
    lock.acquire(1)
    thread = threading.Timer(0.3, lock.release)
    thread.start()
    started = time.monotonic()
    assert weft("stop", "a", "--wait")[0] == 0
    assert time.monotonic() - started > 0.25
    assert (run / "STOP").exists()


def test_a_job_that_waits_is_taken_out_of_the_queue(slurm: FakeSlurm, weft: Weft) -> None:
    run = make_run("a", job="20", task=3)
    slurm.answer("squeue", "20_3|PENDING|Priority")
    assert weft("stop", "a")[0] == 0
    assert slurm.calls_of("scancel") == ["scancel 20_3"]
    assert not (run / "STOP").exists()


def test_stopping_what_does_not_run_is_one_line_each(slurm: FakeSlurm, weft: Weft) -> None:
    run = make_run("a", *ended("finished", 0), job="7")
    make_run("b")
    code, _, err = weft("stop", "a", "b")
    assert code == 2
    assert [line.split(" is not running")[0] for line in err.splitlines()] == [
        "weft: error: a", "weft: error: b",
    ]  # fmt: skip
    assert not (run / "STOP").exists()


# Requeue


def test_a_running_job_is_requeued_by_the_scheduler(slurm: FakeSlurm, weft: Weft) -> None:
    make_run("a", START, job="20", task=1)
    slurm.answer("squeue", "20_1|RUNNING|None")
    assert weft("requeue", "a")[0] == 0
    assert slurm.calls_of("scontrol") == ["scontrol requeue 20_1"]
    assert slurm.calls_of("sbatch") == []


def test_an_ended_job_is_submitted_with_its_stored_script(slurm: FakeSlurm, weft: Weft) -> None:
    run = make_run("a", *ended("error", 1), job="20", task=1)
    slurm.answer("sbatch", "33")
    assert weft("requeue", "a")[0] == 0
    assert slurm.calls_of("sbatch") == ["sbatch --parsable --array=1"]
    assert slurm.script.read_text() == "#!/bin/bash\n"
    job = json.loads((run / "slurm" / "job.json").read_text())
    assert (job["job_id"], job["array_task_id"]) == ("33", 1)
    assert Path(job["script"]).read_text() == "#!/bin/bash\n"


def test_requeues_that_cannot_be(slurm: FakeSlurm, weft: Weft) -> None:
    make_run("a")
    code, _, err = weft("requeue", "a")
    assert (code, "was never submitted" in err) == (2, True)
    make_run("b", job="7")
    slurm.answer("squeue", "7|PENDING|BeginTime")
    code, _, err = weft("requeue", "b")
    assert (code, "waits in the queue already (BeginTime)" in err) == (2, True)
    slurm.answer("squeue", "7|RUNNING|None")
    slurm.answer("scontrol", error="Requested operation is presently disabled for job 7\n", code=1)
    code, _, err = weft("requeue", "b")
    assert (code, "presently disabled" in err) == (2, True)
    slurm.answer("squeue")
    slurm.answer("sbatch", error="sbatch: error: closed\n", code=1)
    code, _, err = weft("requeue", "b")
    assert (code, "sbatch refused the job: closed" in err) == (2, True)
    Path("runs/b/slurm/7.sbatch").unlink()
    code, _, err = weft("requeue", "b")
    assert (code, "the script of job 7 is gone" in err) == (2, True)


def test_the_judgement_is_cheap(slurm: FakeSlurm) -> None:
    run = make_run("a", *ended("time_limit", 76))
    program = (
        "import atexit, sys\n"
        "atexit.register(lambda: print(*sorted({'torch', 'pydantic', 'rich', 'jinja2'} & set(sys.modules)), file=sys.stderr))\n"
        f"sys.argv = ['weft', 'requeue', {str(run)!r}, '--after', '76']\n"
        "from weft.launch.cli import main\n"
        "main()\n"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.stdout == "requeue 76\n"
    assert done.stderr.splitlines()[-1] == ""
