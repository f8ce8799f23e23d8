"""`weft debug soak`: a run gets over its faults, and the soak tells of one that it did not get over."""

from __future__ import annotations

import json
import random
import subprocess
import sys
from collections import Counter
from pathlib import Path

from tiny_run import write_recipe
from weft.launch.faults import FAULTS, Pace
from weft.launch.local import LocalRanks
from weft.launch.soak import _Soak

SABOTAGE = """
import json, random, sys
from pathlib import Path
from weft.launch import soak
from weft.launch.faults import Fault, KILLED, _in_a_step, _in_a_save

def change_a_record(run, chance):
    path = run / "metrics.jsonl"
    lines = path.read_text().splitlines(keepends=True)
    record = json.loads(lines[0])
    record["loss"] += 1e-7
    path.write_text(json.dumps(record) + "\\n" + "".join(lines[1:]))

soak.FAULTS = (
    Fault("a record is changed", (_in_a_step,), after=change_a_record),
    Fault("an end of another kind", (_in_a_step,), codes=frozenset({75})),
)
sys.exit(soak.run_soak(sys.argv[1], [], faults=2, ranks=1, other_ranks=None, seed=0, steps=40, fork=True, keep=None))
"""


def run(*command: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, *command], capture_output=True, text=True, check=False, timeout=400
    )


def test_a_run_gets_over_its_faults(tmp_path: Path) -> None:
    keep = tmp_path / "runs"
    recipe = str(write_recipe(tmp_path))
    options = ("--faults", "9", "--steps", "100", "--keep", str(keep))
    done = run("-m", "weft", "debug", "soak", recipe, *options)
    assert done.returncode == 0, f"{done.stdout}\n{done.stderr}"
    assert "9 of 9" in done.stdout
    assert "the faults left no trace" in done.stdout
    events = (keep / "disturbed" / "attempts.jsonl").read_text()
    assert events.count('"event": "start"') > 5
    # Nothing happened to the run it is compared with.
    assert (keep / "whole" / "attempts.jsonl").read_text().count('"event": "start"') == 1


def test_on_changing_numbers_of_ranks(tmp_path: Path) -> None:
    options = ("--faults", "4", "--steps", "50", "--other-ranks", "1", "--seed", "3")
    done = run(
        *("-m", "weft", "debug", "soak", str(write_recipe(tmp_path)), *options),
        *("--keep", str(tmp_path / "runs")),
    )
    assert done.returncode == 0, f"{done.stdout}\n{done.stderr}"
    events = (tmp_path / "runs" / "disturbed" / "attempts.jsonl").read_text().splitlines()
    worlds = {e["world_size"] for e in map(json.loads, events) if e["event"] == "start"}
    assert worlds == {1, 2}


def test_what_a_fault_left_is_told(tmp_path: Path) -> None:
    done = run("-c", SABOTAGE, str(write_recipe(tmp_path)))
    assert done.returncode == 3, f"{done.stdout}\n{done.stderr}"
    assert "an end of another kind: exit codes [-9]" in done.stdout
    assert "first at step 1: " in done.stdout
    assert "THE FAULTS SHOW" in done.stdout


def test_every_kind_of_fault_comes_before_one_comes_again(tmp_path: Path) -> None:
    soak = _Soak(
        arguments=[],
        run=tmp_path,
        logs=tmp_path,
        steps=100,
        faults=100,
        worlds=[2],
        chance=random.Random(1),
        start=LocalRanks,
        pace=Pace(1.0, 0.01, 0.01),
    )
    for step in (4, 8, 12):
        folder = tmp_path / "checkpoints" / f"step_{step:08d}"
        folder.mkdir(parents=True)
        (folder / "manifest.json").touch()
    drawn = Counter(soak._draw(2).name for _ in range(2 * len(FAULTS)))
    assert drawn == Counter({fault.name: 2 for fault in FAULTS})


def test_damage_waits_for_a_checkpoint_to_fall_back_to(tmp_path: Path) -> None:
    soak = _Soak([], tmp_path, tmp_path, 9, 9, [1], random.Random(0), LocalRanks, Pace(1, 1, 1))
    names = {f.name for f in FAULTS if soak._is_possible(f, 1)}
    assert names.isdisjoint(f.name for f in FAULTS if f.damages or f.needs_ranks)
    assert "kill -9 of all ranks in a step" in names


def test_options_that_mean_nothing_are_refused(tmp_path: Path) -> None:
    done = run("-m", "weft", "debug", "soak", str(write_recipe(tmp_path)), "--faults", "0")
    assert done.returncode == 2
    assert "--faults" in done.stderr
    assert "Traceback" not in done.stderr
