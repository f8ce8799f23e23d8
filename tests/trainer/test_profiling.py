"""`train.profile`: the steps that were asked for, in a trace that can be read, and nothing otherwise."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from pydantic import ValidationError
from test_resume import run_new
from weft.trainer.configuration.run import TrainConfig
from weft.trainer.distributed import Topology
from weft.trainer.profiling import StepProfiler


def run_steps(folder: Path, wanted: str | None, steps: range, rank: int = 0) -> list[Path]:
    """A loop with a matrix product a step; the files it left."""
    profiler = StepProfiler(TrainConfig(profile=wanted), folder, Topology(rank=rank))
    for step in steps:
        profiler.begin(step)
        torch.ones(step, 3) @ torch.ones(3, 5)
        profiler.end(step)
    profiler.close()
    profiler.close()
    return sorted(p for p in folder.rglob("*") if p.is_file())


def products(path: Path) -> list[int]:
    """Rows of each matrix product in a trace."""
    events = json.loads(path.read_text())["traceEvents"]
    found = [e for e in events if e.get("name") == "aten::mm"]
    return [e["args"]["Input Dims"][0][0] for e in sorted(found, key=lambda e: e["ts"])]


def test_the_steps_asked_for_are_in_the_trace(tmp_path: Path) -> None:
    (path,) = run_steps(tmp_path, "3:4", range(1, 8), rank=2)
    assert path == tmp_path / "profile" / "rank_00002" / "steps_00000003_00000004.json"
    assert products(path) == [3, 4]


@pytest.mark.parametrize(
    ("steps", "seen"), [(range(5, 9), [5, 6]), (range(1, 5), [3, 4])], ids=["resumed", "ended"]
)
def test_a_run_that_is_there_for_part_of_them_leaves_that(
    tmp_path: Path, steps: range, seen: list[int]
) -> None:
    (path,) = run_steps(tmp_path, "3:6", steps)
    assert path.name == f"steps_{seen[0]:08d}_{seen[-1]:08d}.json"
    assert products(path) == seen


@pytest.mark.parametrize("wanted", [None, "20:30"])
def test_otherwise_nothing_is_written(tmp_path: Path, wanted: str | None) -> None:
    assert run_steps(tmp_path, wanted, range(1, 5)) == []


def test_a_folder_that_cannot_be_written_costs_the_trace_only(tmp_path: Path) -> None:
    (tmp_path / "profile").write_text("in the way")
    assert run_steps(tmp_path, "2:2", range(1, 4)) == [tmp_path / "profile"]


@pytest.mark.parametrize("wanted", ["3", "4:3", "0:2", "a:b", "1:2:3"])
def test_what_is_no_range_is_refused(wanted: str) -> None:
    with pytest.raises(ValidationError, match="first:last"):
        TrainConfig(profile=wanted)


def test_a_run_profiles_its_steps(tmp_path: Path) -> None:
    run = run_new(tmp_path, "train.profile=3:4", "train.steps=6", "schedule.horizon_steps=9")
    (path,) = (run / "profile").rglob("*.json")
    assert path.name == "steps_00000003_00000004.json"
    assert products(path)
