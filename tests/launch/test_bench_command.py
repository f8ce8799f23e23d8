"""`weft bench train` and `restarts` measure everything they report; how fast anything is here is not the tests' business."""

from __future__ import annotations

import importlib.util
import json
import math
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner
from tiny_run import write_recipe
from weft.launch.bench import _measure, command
from weft.trainer.benchmarks import loading

STEPS = 4
NUMBERS = {
    "step": {"trainer_step_s", "bare_step_s", "ratio", "data_wait_share", "tokens_per_s"},
    "save": {"bytes", "sync_s", "async_stall_s", "ratio", "sync_bytes_per_s"},
    "data": {"bytes", "prepare_bytes_per_s", "load_tokens_per_s"},
    "start": {"first_step_s", "resumed_first_step_s", "peak_bytes"},
}
PEER = {
    "prepare_ratio",
    "load_ratio",
    "datasets_prepare_bytes_per_s",
    "datasets_load_tokens_per_s",
    "datasets_iter_tokens_per_s",
}


def test_it_measures_everything_it_reports(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # Seconds of loading for each side; the default's four are for a figure one can rely on.
    monkeypatch.setattr(loading, "SECONDS", 0.2)
    write_recipe(tmp_path)
    sources = [f"data.sources.0.path={tmp_path / 'tales'}", f"data.cache_dir={tmp_path / 'cache'}"]
    path = tmp_path / "bench.json"
    arguments = ["olmo2/debug", *sources, "run.device=cpu", "--steps", str(STEPS)]
    result = CliRunner().invoke(
        command, ["train", *arguments, "--json", str(path)], standalone_mode=False
    )
    assert result.exception is None, result.output
    numbers = json.loads(path.read_text())
    assert (numbers["recipe"], numbers["machine"]["device"]) == ("olmo2/debug", "cpu")
    for part, names in NUMBERS.items():
        has_peer = part == "data" and importlib.util.find_spec("datasets") is not None
        assert not (names | (PEER if has_peer else set())) - numbers[part].keys()
        for name, value in numbers[part].items():
            assert math.isfinite(value), name
            assert value > 0 or (name == "data_wait_share" and value >= 0), name
    check_ratios(numbers)
    check_table(result.stdout.splitlines(), numbers)
    # olmo2/debug by hand: embedding and head, two blocks of grouped-query attention and SwiGLU, the norms.
    attention = 64 * 64 + 2 * 64 * 32 + 64 * 64 + (64 + 32)
    parameters = 2 * 260 * 64 + 2 * (attention + 3 * 64 * 192 + 2 * 64) + 64
    # A save is the weights and two moments, in fp32.
    assert numbers["save"]["bytes"] == 3 * 4 * parameters


def check_ratios(numbers: dict[str, Any]) -> None:
    """Each ratio is of the numbers beside it."""
    step, save, data = numbers["step"], numbers["save"], numbers["data"]
    assert step["ratio"] == pytest.approx(step["trainer_step_s"] / step["bare_step_s"])
    assert step["tokens_per_s"] == pytest.approx(2048 / step["trainer_step_s"])
    assert step["data_wait_share"] <= 1
    # Four turns, the first two steps of each left out.
    assert step["steps_measured"] == 4 * (STEPS - 2)
    assert save["ratio"] == pytest.approx(save["async_stall_s"] / save["sync_s"])
    assert save["sync_bytes_per_s"] == pytest.approx(save["bytes"] / save["sync_s"])
    if "load_ratio" in data:
        assert data["load_ratio"] == pytest.approx(
            data["load_tokens_per_s"] / data["datasets_load_tokens_per_s"]
        )
        assert data["prepare_ratio"] == pytest.approx(
            data["prepare_bytes_per_s"] / data["datasets_prepare_bytes_per_s"]
        )


def check_table(lines: list[str], numbers: dict[str, Any]) -> None:
    """What is printed is what is in the file."""
    for label, part in (("trainer step / bare", "step"), ("stall of a background save", "save")):
        (line,) = [line for line in lines if label in line]
        assert f"{numbers[part]['ratio']:.3f}" in line
    (line,) = [line for line in lines if "resume to first step done" in line]
    assert f"{numbers['start']['resumed_first_step_s']:.1f} s" in line


def test_a_folder_that_is_not_there_is_named_before_minutes_of_measuring(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def too_late(*arguments: object) -> None:
        pytest.fail("it measured first")

    monkeypatch.setattr(f"{_measure.__module__}._measure", too_late)
    path = tmp_path / "nowhere" / "bench.json"
    result = CliRunner().invoke(command, ["train", "olmo2/debug", "--json", str(path)])
    assert result.exit_code == 2
    assert f"there is no folder {path.parent}" in " ".join(result.output.split())


def test_fewer_steps_than_a_turn_needs_are_refused() -> None:
    result = CliRunner().invoke(command, ["train", "olmo2/debug", "--steps", "3"])
    assert result.exit_code == 2
    assert "--steps" in result.output


def test_restarts_are_measured_on_real_ranks(tmp_path: Path) -> None:
    recipe = write_recipe(tmp_path, train__steps=100_000)
    path = tmp_path / "restarts.json"
    result = CliRunner().invoke(
        command,
        ["restarts", str(recipe), "--ranks", "2", "--json", str(path)],
        standalone_mode=False,
    )
    assert result.exception is None, result.output
    numbers = json.loads(path.read_text())
    assert (numbers["recipe"], numbers["ranks"]) == (str(recipe), 2)
    seconds = {name: value for name, value in numbers.items() if name.endswith("_s")}
    assert len(seconds) == 8
    assert all(0 < value < 300 for value in seconds.values()), seconds
    assert seconds["save_s"] < seconds["signal_to_exit_s"]
    assert "% of a step" in result.stdout


def test_a_run_that_cannot_be_measured_says_why(tmp_path: Path) -> None:
    recipe = write_recipe(tmp_path, train__steps=2, schedule__warmup_steps=0)
    result = CliRunner().invoke(
        command, ["restarts", str(recipe), "--ranks", "1"], standalone_mode=False
    )
    assert "the run came to no step 12; its output ends:" in str(result.exception)
