"""The history of attempts: what is read from it, whether a job goes back into the queue, how much time was useful."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from tiny_run import trace, write_recipe
from weft.trainer.attempts import AttemptLog, attempts_so_far, goodput, judge, read_attempts
from weft.trainer.configuration.load import load_config, load_run_config
from weft.trainer.run_lock import RunLock
from weft.trainer.train import train


def write(run: Path, *events: dict[str, Any]) -> None:
    with open(run / "attempts.jsonl", "a") as file:
        file.writelines(json.dumps(event) + "\n" for event in events)


def attempt(
    number: int,
    *,
    start: float = 0.0,
    opened: int | None = 0,
    saved: int | None = None,
    end: tuple[str, int] | None = None,
    seconds: tuple[float, float] = (0.0, 0.0),
    length: float = 100.0,
    **more: Any,
) -> list[dict[str, Any]]:
    """Events of an attempt that began at `start` and lasted `length` seconds."""
    events: list[dict[str, Any]] = [{"event": "start", "attempt": number, "time": start, **more}]
    if opened is not None:
        events.append({"event": "opened", "step": opened, "train_seconds": seconds[0]})
    if saved is not None:
        events.append(
            {"event": "saved", "step": saved, "seconds": 1.5, "train_seconds": seconds[1]}
        )
    if end is not None:
        events.append({"event": "end", "outcome": end[0], "exit_code": end[1], "reason": "why"})
    times = [start + length * i / max(1, len(events) - 1) for i in range(len(events))]
    return [{**e, "attempt": number, "time": t} for e, t in zip(events, times, strict=True)]


DIED = None


@pytest.mark.parametrize(
    ("history", "code", "requeue", "final", "said"),
    [
        ([(0, 8, ("finished", 0))], 0, False, 0, "finished"),
        ([(0, 8, ("time_limit", 76))], 76, True, 76, "why"),
        ([(0, 8, ("preempted", 77))], 77, False, 77, "the scheduler requeues"),
        ([(0, 8, ("stopped", 75))], 75, False, 75, "why"),
        ([(0, 8, ("policy", 3))], 3, False, 3, "why"),
        ([(0, 8, ("error", 2))], 2, False, 2, "why"),
        ([(0, 8, ("error", 1))], 1, True, 1, "failure 1 of run.max_restarts=3"),
        ([(0, 8, ("hang", 6))], 6, True, 6, "failure 1"),
        ([(0, 8, DIED)], 137, True, 137, "killed by signal 9 after step 8"),
        # One start that came to nothing may be a bad node; two are a crash loop, from one step or from none.
        ([(8, None, DIED)], 137, True, 137, "failure 1"),
        ([(8, None, DIED), (8, None, DIED)], 137, False, 5, "2 starts in a row from step 8"),
        ([(None, None, ("error", 1)), (None, None, DIED)], 1, False, 5, "crash loop"),
        ([(0, 8, DIED), (8, 16, DIED), (16, 20, DIED)], 1, True, 1, "failure 3 of"),
        ([(0, 8, DIED), (8, 16, DIED), (16, 20, DIED), (20, 24, DIED)], 1, False, 5, "4 failures"),
        # Neither time limits nor preemptions are failures.
        ([(s, s + 1, ("time_limit", 76)) for s in range(20)], 76, True, 76, "why"),
        ([(0, 1, ("preempted", 77)), (1, 1, ("time_limit", 76))], 76, True, 76, "why"),
        # Time that is too short for one checkpoint would be spent again and again.
        ([(4, 4, ("time_limit", 76)), (4, 4, ("time_limit", 76))], 76, False, 5, "crash loop"),
        ([], 1, True, 1, "before the run was opened"),
    ],
)
def test_verdicts(
    tmp_path: Path, history: list[Any], code: int, requeue: bool, final: int, said: str
) -> None:
    for number, (opened, saved, end) in enumerate(history, 1):
        write(
            tmp_path,
            *attempt(number, start=1000.0 * number, opened=opened, saved=saved, end=end),
        )
    verdict = judge(tmp_path, code, max_restarts=3)
    assert (verdict.requeue, verdict.exit_code) == (requeue, final)
    assert said in verdict.reason


def test_what_the_failing_rank_says_counts_more_than_what_rank_0_saw(tmp_path: Path) -> None:
    events = attempt(1, saved=4)
    events.append({"event": "failed", "rank": 3, "exit_code": 2, "reason": "no disk"})
    events.append({"event": "end", "outcome": "rank_lost", "exit_code": 4, "reason": "gone"})
    write(tmp_path, *({**e, "attempt": 1, "time": 5.0} for e in events))
    verdict = judge(tmp_path, 4, max_restarts=3)
    assert (verdict.requeue, verdict.exit_code, verdict.reason) == (False, 2, "rank 3: no disk")


def test_torn_lines_and_other_words_are_passed_over(tmp_path: Path) -> None:
    write(tmp_path, *attempt(1, saved=4))
    with open(tmp_path / "attempts.jsonl", "a") as file:
        file.write('{"event": "sav\n[1, 2]\n')
    write(tmp_path, *attempt(2, start=500.0, opened=4, saved=9, end=("finished", 0)))
    first, second = read_attempts(tmp_path)
    assert (first.outcome, first.last_saved_step) == ("died", 4)
    assert (second.outcome, second.first_step, second.last_saved_step) == ("finished", 4, 9)
    assert attempts_so_far(tmp_path) == 2


def test_half_a_line_does_not_swallow_the_next_start(tmp_path: Path) -> None:
    write(tmp_path, *attempt(1, saved=4))
    with open(tmp_path / "attempts.jsonl", "a") as file:
        file.write('{"event": "end", "outc')
    AttemptLog(tmp_path, 2).write("start", pid=1)
    AttemptLog(tmp_path, 2).write("opened", step=4, train_seconds=1.0)
    assert [(a.number, a.first_step) for a in read_attempts(tmp_path)] == [(1, 0), (2, 4)]


def test_goodput_counts_what_later_attempts_did_not_repeat(tmp_path: Path) -> None:
    # 90 of 100 seconds trained and saved, 40 more trained in 60 and lost with the process, then 50 of 100 kept.
    write(tmp_path, *attempt(1, length=100, saved=9, seconds=(0, 90), world_size=2))
    write(
        tmp_path,
        *attempt(2, start=200, opened=None, length=0, previous_alive=160.0, world_size=2),
    )
    events = attempt(3, start=300, opened=9, saved=14, seconds=(90, 140), end=("finished", 0))
    write(tmp_path, *({**e, "world_size": 1} for e in events))
    first, second, _ = read_attempts(tmp_path)
    assert (first.end, second.seconds) == (160.0, 0.0)
    assert goodput(tmp_path) == pytest.approx((90 * 2 + 50) / (160 * 2 + 100))


def test_nothing_to_say_of_a_run_that_was_never_started(tmp_path: Path) -> None:
    assert read_attempts(tmp_path) == []
    assert goodput(tmp_path) is None


def test_a_run_writes_its_history(tmp_path: Path) -> None:
    recipe = write_recipe(tmp_path, train__steps=6, schedule__horizon_steps=9)
    config = load_config(str(recipe), [], tmp_path).config
    run = config.run_dir
    run.mkdir()
    (run / "STOP").touch()
    assert train(config) == 75
    assert train(load_run_config(run, []).config, resume=True) == 0
    first, second = read_attempts(run)
    assert (first.outcome, first.exit_code, first.last_step) == ("stopped", 75, 0)
    assert first.reason == "stopped by STOP file"
    assert (second.outcome, second.first_step, second.last_step) == ("finished", 0, 6)
    assert (second.last_saved_step, second.world_size, second.pid) == (6, 1, os.getpid())
    assert 0 < second.seconds_to_first_step < 3600
    assert 0 < second.save_seconds < 60
    assert 0 < goodput(run) <= 1
    assert not (run / "lock").exists()
    assert len(trace(run)) == 6


def test_the_reader_imports_no_torch() -> None:
    code = (
        "import sys, weft.trainer.attempts, weft.trainer.run_lock; sys.exit('torch' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_the_attempt_that_runs_has_no_outcome_yet(tmp_path: Path) -> None:
    lock = RunLock(tmp_path)
    lock.acquire(1)
    AttemptLog(tmp_path, 1).write("start", pid=os.getpid())
    (running,) = read_attempts(tmp_path)
    assert (running.outcome, running.end) == (None, None)
    lock.release()
    (died,) = read_attempts(tmp_path)
    assert died.outcome == "died"
    assert died.end <= time.time()
