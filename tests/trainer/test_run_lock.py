"""Two jobs on one run folder: the second is refused while the first lives, and goes on when it is dead."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import pytest
from tiny_run import write_recipe
from weft.models.errors import LaunchError
from weft.trainer.configuration.load import load_run_config
from weft.trainer.run_lock import RunLock, read_lock
from weft.trainer.train import train

HOLDER = """
import sys, time
sys.path[:0] = {path!r}
from pathlib import Path
from weft.trainer.run_lock import RunLock
RunLock(Path({run!r})).acquire(1)
print("held", flush=True)
time.sleep(600)
"""


def hold(run: Path) -> subprocess.Popen[str]:
    script = HOLDER.format(path=[p for p in sys.path if p], run=str(run))
    process = subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    assert process.stdout.readline() == "held\n"
    return process


def test_a_living_holder_is_named_and_a_dead_one_is_not_waited_for(tmp_path: Path) -> None:
    process = hold(tmp_path)
    try:
        with pytest.raises(
            LaunchError, match=rf"is being run by process {process.pid} on .*weft stop"
        ):
            RunLock(tmp_path).acquire(2)
    finally:
        process.send_signal(signal.SIGKILL)
    # Not yet asked how it ended, so a zombie: dead all the same.
    begin = time.monotonic()
    while read_lock(tmp_path).is_alive and time.monotonic() < begin + 10:
        time.sleep(0.01)
    lock = RunLock(tmp_path)
    lock.acquire(2)
    assert time.monotonic() - begin < 5
    assert lock.previous_alive is not None
    assert read_lock(tmp_path).token == lock.token
    process.wait()
    lock.release()
    assert list(tmp_path.iterdir()) == []


def from_elsewhere(run: Path, **values: Any) -> None:
    """The lock as a process of another host left it."""
    lock = RunLock(run)
    lock.acquire(1)
    content = json.loads((run / "lock").read_text())
    (run / "lock").write_text(json.dumps({**content, "token": "other", "host": "node7", **values}))


def test_a_silent_holder_on_another_host_is_watched_before_its_lock_is_taken(
    tmp_path: Path,
) -> None:
    from_elsewhere(tmp_path)
    begin = time.monotonic()
    RunLock(tmp_path).acquire(2, watch_s=0.5)
    assert time.monotonic() - begin >= 0.5


def test_a_holder_on_another_host_that_shows_signs_of_life_keeps_it(tmp_path: Path) -> None:
    from_elsewhere(tmp_path)
    over = threading.Event()

    def beat() -> None:
        while not over.wait(0.05):
            os.utime(tmp_path / "lock")

    thread = threading.Thread(target=beat)
    thread.start()
    try:
        with pytest.raises(LaunchError, match=r"on node7"):
            RunLock(tmp_path).acquire(2, watch_s=2.0)
    finally:
        over.set()
        thread.join()


def test_a_requeued_job_takes_its_own_lock_over_at_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from_elsewhere(tmp_path, job_id="41", restart=0)
    monkeypatch.setenv("SLURM_JOB_ID", "41")
    monkeypatch.setenv("SLURM_RESTART_COUNT", "1")
    begin = time.monotonic()
    RunLock(tmp_path).acquire(2)
    assert time.monotonic() - begin < 1


def test_of_many_only_one_takes_a_dead_holders_lock(tmp_path: Path) -> None:
    from_elsewhere(tmp_path)
    found: list[str] = []

    def take() -> None:
        try:
            RunLock(tmp_path).acquire(2, watch_s=0.3)
            found.append("held")
        except LaunchError:
            found.append("refused")

    threads = [threading.Thread(target=take) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(found) == ["held"] + ["refused"] * 7


def test_a_holder_whose_lock_was_taken_is_told(tmp_path: Path) -> None:
    lock = RunLock(tmp_path)
    lock.acquire(1)
    before = read_lock(tmp_path).last_beat
    time.sleep(0.02)
    assert lock.beat()
    assert read_lock(tmp_path).last_beat > before
    (tmp_path / "lock").write_text(json.dumps({"token": "another"}))
    assert not lock.beat()
    lock.release()
    assert (tmp_path / "lock").exists(), "another job's lock is not ours to remove"


def test_a_torn_lock_holds_nobody_up(tmp_path: Path) -> None:
    (tmp_path / "lock").write_text('{"token": "x", "ho')
    RunLock(tmp_path).acquire(1, watch_s=0.3)


def test_a_second_job_on_a_run_is_refused_and_spoils_nothing(tmp_path: Path) -> None:
    recipe = write_recipe(tmp_path, train__steps=100_000)
    process = subprocess.Popen([sys.executable, "-m", "weft", "train", str(recipe)])
    run = tmp_path / "run"
    try:
        deadline = time.monotonic() + 60
        while not (run / "metrics.jsonl").exists() and time.monotonic() < deadline:
            time.sleep(0.01)
        with pytest.raises(LaunchError, match=rf"is being run by process {process.pid} on"):
            train(load_run_config(run, []).config, resume=True)
        assert process.poll() is None
        process.send_signal(signal.SIGTERM)
        assert process.wait(timeout=30) == 75
    finally:
        process.kill()
    assert not (run / "lock").exists()
