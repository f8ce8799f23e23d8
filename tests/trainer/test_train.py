"""A run whose surroundings fail it: a folder that cannot be written, a rank that dies, a rank that hangs."""

from __future__ import annotations

import json
import re
import signal
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from click.testing import CliRunner
from tiny_run import EXACT, trace, write_recipe
from weft.launch import cli, evaluate
from weft.launch.local import LocalRanks
from weft.trainer import run_folder
from weft.trainer.attempts import judge, read_attempts
from weft.trainer.checkpoint.reading import find_checkpoint, list_checkpoints
from weft.trainer.configuration.load import load_config, load_run_config
from weft.trainer.exit_codes import ExitCode
from weft.trainer.train import train


def snapshot(folder: Path) -> list[tuple[str, int]]:
    return sorted((str(p), p.stat().st_mtime_ns) for p in folder.rglob("*"))


def mount(*arguments: str) -> bool:
    return subprocess.run(["mount", *arguments], capture_output=True, check=False).returncode == 0


@pytest.fixture(scope="module")
def read_only(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A folder on a read-only file system, with a run of four steps and its recipe in it."""
    folder = tmp_path_factory.mktemp("disk")
    recipe = write_recipe(folder, train__steps=4, schedule__horizon_steps=8)
    assert train(load_config(str(recipe), [], folder).config) == 0
    # Permissions stop nobody who is root; a file system does.
    if not mount("--bind", str(folder), str(folder)):
        pytest.skip("mounting is not permitted here")
    try:
        if not mount("-o", "remount,bind,ro", str(folder)):
            pytest.skip("mounting is not permitted here")
        yield folder
    finally:
        subprocess.run(["umount", "-l", str(folder)], check=True)


def run_weft(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str], *arguments: str
) -> tuple[object, list[str]]:
    """Exit code and lines on standard error of `weft ARGUMENTS`, in this process."""
    monkeypatch.setattr("sys.argv", ["weft", *arguments])
    with pytest.raises(SystemExit) as caught:
        cli.main()
    return caught.value.code, capfd.readouterr().err.splitlines()


@pytest.mark.parametrize("is_new", [True, False], ids=["new", "resumed"])
def test_a_read_only_run_folder_is_one_line_and_exit_code_2(
    read_only: Path,
    is_new: bool,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    run = read_only / ("new" if is_new else "run")
    before = snapshot(read_only)
    new = ("train", str(read_only / "tiny.yaml"), f"run.dir={run}")
    arguments = new if is_new else ("train", "--resume", str(run), "train.steps=8")
    code, lines = run_weft(monkeypatch, capfd, *arguments)
    assert code == 2
    assert lines == [
        f"weft: error: run folder {run} cannot be written: Read-only file system; set run.dir elsewhere"
    ]
    assert snapshot(read_only) == before


def test_a_disk_that_fails_when_the_folder_is_made(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    recipe = write_recipe(tmp_path)

    def fails(path: Path, text: str) -> None:
        raise OSError(5, "Input/output error", str(path))

    monkeypatch.setattr(run_folder, "write_text", fails)
    code, lines = run_weft(monkeypatch, capfd, "train", str(recipe))
    assert code == 2
    assert len(lines) == 1
    assert "cannot be written: Input/output error; set run.dir elsewhere" in lines[0]


def test_a_read_only_run_can_be_evaluated(
    read_only: Path, caplog: pytest.LogCaptureFixture
) -> None:
    run = read_only / "run"
    result = CliRunner().invoke(evaluate.command, [str(run), "--json"], standalone_mode=False)
    assert result.exception is None, result.exception
    report = json.loads(result.stdout)
    assert report["step"] == 4
    assert report["total"]["loss"] > 0
    path = run / "eval" / "step_00000004.json"
    assert f"{path} was not written: Read-only file system" in caplog.text
    assert "written to" not in CliRunner().invoke(evaluate.command, [str(run)]).stdout
    assert not path.exists()


TIMEOUT_S = 15
LAST = 4000


def losses(run: Path) -> list[dict[str, float]]:
    path = run / "metrics.jsonl"
    lines = path.read_text().splitlines() if path.is_file() else []
    return [r for r in map(json.loads, lines[:-1]) if "loss" in r]


# A dead rank's connections break; a stopped one's stay open, and either the exchange's time limit or the watchdog ends that wait.
@pytest.mark.parametrize(
    ("number", "limit_s", "outcome"),
    [
        (signal.SIGKILL, 900, "rank_lost"),
        (signal.SIGSTOP, 900, "rank_lost"),
        (signal.SIGSTOP, 3, "hang"),
    ],
    ids=["killed", "stopped", "hung"],
)
def test_a_lost_rank_ends_the_others_and_the_run_resumes(
    tmp_path: Path, number: signal.Signals, limit_s: int, outcome: str
) -> None:
    # What the watchdog shows is the exchange of a step: no save is near when the rank is stopped.
    every, seen = (40, 60) if outcome == "hang" else (2, 5)
    limits = {
        "checkpoint__every": every,
        "parallel__timeout_s": TIMEOUT_S if outcome == "rank_lost" else 120,
        "checkpoint__timeout_s": 1800,
        "run__watchdog": {"step_s": limit_s, "save_s": limit_s},
    }
    recipe = write_recipe(tmp_path / "two", train__steps=LAST, **limits)
    run = tmp_path / "two" / "run"
    group = LocalRanks(["train", str(recipe)], 2, tmp_path / "logs" / "two")
    try:
        deadline = time.monotonic() + 120
        while group.is_running() and len(losses(run)) < seen and time.monotonic() < deadline:
            time.sleep(0.01)
        assert group.is_running(), group.tail()
        group.processes[1].send_signal(number)
        # The limit of the exchange, or of the watchdog and its wait for the other's stacks, and the way out.
        code = group.processes[0].wait(timeout=45)
    finally:
        group.kill()
    said = group.logs[0].read_text()
    assert "Traceback" not in said
    (attempt,) = read_attempts(run)
    assert (attempt.outcome, attempt.exit_code) == (outcome, code)
    if outcome == "rank_lost":
        assert code == ExitCode.MACHINE
        assert re.search(
            r"weft: error: another rank is gone \(.*\) after step \d+; .* --resume", said
        )
    else:
        assert code == ExitCode.HANG
        assert re.search("no progress in phase (step|save)", attempt.reason)
        assert "nothing was heard of rank 1" in attempt.reason
        stacks = (run / "logs" / "hang_001_rank_00000.txt").read_text()
        assert re.search("in (sum_integers|all_reduce|join)", stacks)
    assert judge(run, code, max_restarts=10).requeue
    path = find_checkpoint(run)
    assert path is not None, [info.problem for info in list_checkpoints(run)]
    # It goes on, here on one rank, as a run of one rank that nothing happened to.
    steps = int(path.name.removeprefix("step_")) + 4
    settings = ["schedule.horizon_steps=4000", f"train.steps={steps}"]
    assert train(load_run_config(run, settings).config, run, resume=True) == 0
    recipe = write_recipe(tmp_path / "one", train__steps=steps, schedule__horizon_steps=LAST)
    assert train(load_config(str(recipe), [], recipe.parent).config) == 0
    for ours, theirs in zip(trace(run), trace(tmp_path / "one" / "run"), strict=True):
        for name, a, b in zip(EXACT, ours, theirs, strict=False):
            is_sum = name in ("loss", "z_loss", "grad_norm", "bits_per_byte")
            assert a == (pytest.approx(b, rel=1e-3) if is_sum else b), name
