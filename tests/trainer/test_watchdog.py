"""A phase that lasts too long ends the process with the stacks of every rank; one that goes on does not."""

from __future__ import annotations

import subprocess
import sys
import time
from pathlib import Path

import pytest
from weft.trainer.configuration.run import WatchdogConfig
from weft.trainer.watchdog import Watchdog

HANGS = """
import sys, time
sys.path[:0] = {path!r}
from pathlib import Path
from weft.trainer.configuration.run import WatchdogConfig
from weft.trainer.watchdog import Watchdog
from weft.trainer import watchdog
watchdog.GRACE_S = {grace}

def stuck_in_a_loader():
    {body}

limits = WatchdogConfig(step_s={limit}, init_s=600)
told = []
with Watchdog(limits, Path({logs!r}), attempt=3, rank={rank}, world_size=2, on_hang=lambda r: print("told:", r, flush=True), poll_s=0.05) as dog:
    dog.enter("step")
    stuck_in_a_loader()
"""


def start(
    logs: Path, rank: int, limit: float, body: str = "time.sleep(60)", grace: float = 10.0
) -> subprocess.Popen[str]:
    script = HANGS.format(
        path=[p for p in sys.path if p],
        logs=str(logs),
        rank=rank,
        limit=limit,
        body=body,
        grace=grace,
    )
    return subprocess.Popen(
        [sys.executable, "-c", script], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )


def test_every_rank_says_where_it_stands_and_the_last_line_says_why(tmp_path: Path) -> None:
    # Rank 1 is within its own limit: it follows the other.
    processes = [start(tmp_path, 0, 0.3), start(tmp_path, 1, 500)]
    outputs = [p.communicate(timeout=60) for p in processes]
    assert [p.returncode for p in processes] == [6, 6], outputs
    first, second = ((tmp_path / f"hang_003_rank_{rank:05d}.txt").read_text() for rank in range(2))
    assert first.startswith("rank 0 of 2: no progress in phase step for ")
    assert "(run.watchdog.step_s=0.3)" in first
    assert second.startswith("rank 1 of 2: another rank hangs\n")
    assert all("in stuck_in_a_loader" in text for text in (first, second))
    out, err = outputs[0]
    assert out.startswith("told: hang: no progress in phase step")
    assert "nothing was heard" not in out
    assert f"{tmp_path}/hang_003_rank_*.txt" in err


def test_ranks_that_say_nothing_are_named(tmp_path: Path) -> None:
    process = start(tmp_path, 0, 0.3, grace=0.5)
    out, _ = process.communicate(timeout=60)
    assert process.returncode == 6
    assert "nothing was heard of rank 1; " in out


def test_code_that_never_lets_go_of_the_interpreter_is_dumped_too(tmp_path: Path) -> None:
    # A regular expression that backtracks for minutes holds the interpreter's lock all the while.
    body = "import re; time.sleep(0.2); re.match(r'(a+)+$', 'a' * 60 + 'b')"
    process = start(tmp_path, 0, 0.3, body, grace=0.5)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 1
    assert "in stuck_in_a_loader" in err


@pytest.mark.parametrize("phase", ["init", "compile", "step", "save", "evaluation"])
def test_a_phase_that_goes_on_is_left_alone(tmp_path: Path, phase: str) -> None:
    limits = WatchdogConfig(**{f"{phase}_s": 0.4})
    with Watchdog(limits, tmp_path, attempt=1, poll_s=0.02) as dog:
        for _ in range(12):
            dog.enter(phase)
            time.sleep(0.08)
        # Another phase has a limit of its own.
        dog.enter("step" if phase != "step" else "save")
        time.sleep(0.6)
    assert list(tmp_path.iterdir()) == []


def test_null_is_never(tmp_path: Path) -> None:
    with Watchdog(WatchdogConfig(init_s=None), tmp_path, attempt=1, poll_s=0.02):
        time.sleep(0.3)
    assert list(tmp_path.iterdir()) == []


def test_a_sign_of_life_is_shown_again_and_again(tmp_path: Path) -> None:
    beats: list[float] = []
    with Watchdog(
        WatchdogConfig(), tmp_path, attempt=1, poll_s=0.02, beat=lambda: beats.append(0.0)
    ):
        time.sleep(0.6)
    assert len(beats) >= 3
