"""`weft debug seam` says that a resume is exact where it is, and that the seam shows where one number differs."""

from __future__ import annotations

import json
import resource
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from tiny_run import write_recipe
from weft.launch import seam
from weft.launch.seam import run_seam
from weft.trainer.checkpoint.reading import verify_checkpoint
from weft.trainer.configuration.load import load_config
from weft.trainer.train import train

STEPS = 3


def children_s() -> float:
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def text_source(folder: Path) -> Path:
    """Code to train on; the built-in corpus would take longer to prepare than the runs take."""
    (folder / "texts").mkdir()
    for number in range(6):
        lines = (f"def f{i}(x):\n    return x * {i * number} + {number}\n" for i in range(200))
        (folder / "texts" / f"{number}.txt").write_text("\n".join(lines))
    return folder / "texts"


def test_real_runs_are_killed_and_resumed_and_the_seam_is_exact(tmp_path: Path) -> None:
    before = children_s()
    done = subprocess.run(
        [
            *(sys.executable, "-m", "weft", "debug", "seam", "olmo2/debug"),
            *(f"data.sources.0.path={text_source(tmp_path)}", f"data.cache_dir={tmp_path}/cache"),
            *("--steps", str(STEPS), "--ranks", "2", "--keep", str(tmp_path / "runs")),
        ],
        capture_output=True,
        text=True,
        check=False,
        timeout=400,
    )
    assert done.returncode == 0, f"{done.stdout}\n{done.stderr}"
    assert "the seam is exact (" in done.stdout
    assert "DIFFERS" not in done.stdout
    # Under a minute where each of the two ranks has a core; a busy machine's wall time would say nothing.
    assert children_s() - before < 2 * 60
    # It did compare three runs, and the last attempts were on as many ranks as it says.
    for name, ranks in {"whole": 2, "killed": 2, "moved": 1}.items():
        records = seam._records(tmp_path / "runs" / name)
        assert sorted(records) == list(range(1, 2 * STEPS + 1))
        assert {"loss", "grad_norm", "data_digest"} <= records[1].keys()
        last = tmp_path / "runs" / name / "checkpoints" / f"step_{2 * STEPS:08d}"
        assert verify_checkpoint(last) == []
        assert json.loads((last / "manifest.json").read_text())["world_size"] == ranks


@pytest.fixture(scope="module")
def kept(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with an undisturbed run and two that are equal to it."""
    folder = tmp_path_factory.mktemp("seam")
    recipe = write_recipe(folder, run__dir=str(folder / "whole"), train__steps=2 * STEPS)
    assert train(load_config(str(recipe), [], folder).config) == 0
    for name in ("killed", "moved"):
        shutil.copytree(folder / "whole", folder / name)
    return folder


Change = Callable[[Path], None]


def edit_records(run: Path, change: Callable[[list[dict[str, Any]]], None]) -> None:
    path = run / "metrics.jsonl"
    records = [json.loads(line) for line in path.read_text().splitlines()]
    change(records)
    path.write_text("".join(json.dumps(record) + "\n" for record in records))


def add_to(key: str, amount: float) -> Change:
    def change(run: Path) -> None:
        edit_records(run, lambda records: records[4].update({key: records[4][key] + amount}))

    change.__name__ = f"{key} {amount:+g}"
    return change


def lose_a_record(run: Path) -> None:
    edit_records(run, lambda records: records.pop(3))


def repeat_a_record(run: Path) -> None:
    edit_records(run, lambda records: records.insert(4, records[3]))


def lose_a_number(run: Path) -> None:
    edit_records(run, lambda records: records[4].update(loss="NaN"))


def change_manifest(run: Path, change: Callable[[dict[str, Any]], None]) -> None:
    path = run / "checkpoints" / f"step_{2 * STEPS:08d}" / "manifest.json"
    manifest = json.loads(path.read_text())
    change(manifest)
    path.write_text(json.dumps(manifest))


def change_a_tensor(run: Path) -> None:
    """One bit of one weight, with the checksum a save would have given it."""

    def change(manifest: dict[str, Any]) -> None:
        chunks = manifest["tensors"]["parameters/model/norm.weight"]["chunks"]
        chunks[0]["sha256"] = f"0{chunks[0]['sha256'][1:]}"[::-1]

    change_manifest(run, change)


def lose_a_tensor(run: Path) -> None:
    change_manifest(run, lambda m: m["tensors"].pop("optimizer/exp_avg/model/norm.weight"))


def change_a_generator(run: Path) -> None:
    change_manifest(run, lambda m: m["ranks"][0].update(torch="0" * 64))


# What was changed in one of the runs -> the line of the report that has to say so.
ON_THE_SAME_RANKS = {
    add_to("loss", 1e-9): "loss",
    add_to("grad_norm", 1e-9): "grad_norm",
    add_to("z_loss", 1e-9): "z_loss",
    add_to("lr", 1e-12): "lr",
    add_to("first_sample", 1): "first_sample",
    add_to("last_sample", 1): "last_sample",
    add_to("target_tokens", 1): "target_tokens",
    add_to("data_digest", 1): "data_digest",
    add_to("skipped", 1): "skipped",
    lose_a_number: "loss",
    lose_a_record: "steps in metrics.jsonl",
    repeat_a_record: "steps in metrics.jsonl",
    change_a_tensor: "tensors of the last checkpoint",
    lose_a_tensor: "tensors of the last checkpoint",
    change_a_generator: "random generators",
}


def copy_of(kept: Path, name: str, folder: Path) -> Path:
    return Path(shutil.copytree(kept / name, folder / name))


def bad(verdicts: list[seam.Verdict]) -> list[str]:
    return [v.what for v in verdicts if not v.is_good]


@pytest.mark.parametrize("change", ON_THE_SAME_RANKS, ids=lambda c: c.__name__)
@pytest.mark.parametrize("which", ["whole", "killed"])
def test_one_difference_to_the_bit_is_found(
    kept: Path, tmp_path: Path, change: Change, which: str
) -> None:
    runs = {name: kept / name for name in ("whole", "killed")}
    assert bad(seam.compare_exactly(runs["whole"], runs["killed"], 2 * STEPS)) == []
    runs[which] = copy_of(kept, which, tmp_path)
    change(runs[which])
    found = bad(seam.compare_exactly(runs["whole"], runs["killed"], 2 * STEPS))
    assert ON_THE_SAME_RANKS[change] in found


@pytest.mark.parametrize(
    ("change", "what"),
    [
        (add_to("loss", 1e-2), "2 -> 1 ranks: loss"),
        (add_to("grad_norm", 1e-1), "2 -> 1 ranks: grad_norm"),
        (lose_a_number, "2 -> 1 ranks: loss"),
        (add_to("data_digest", 1), "2 -> 1 ranks: samples and their content"),
        (add_to("first_sample", -1), "2 -> 1 ranks: samples and their content"),
        (lose_a_record, "steps in metrics.jsonl"),
        (repeat_a_record, "steps in metrics.jsonl"),
    ],
    ids=lambda value: getattr(value, "__name__", None),
)
def test_one_difference_on_other_ranks_is_found(
    kept: Path, tmp_path: Path, change: Change, what: str
) -> None:
    whole, moved = kept / "whole", copy_of(kept, "moved", tmp_path)
    assert bad(seam.compare_closely(whole, moved, 2 * STEPS, 2, 1)) == []
    change(moved)
    assert what in bad(seam.compare_closely(whole, moved, 2 * STEPS, 2, 1))


@pytest.mark.parametrize("fault", [None, add_to("loss", 1e-9)], ids=["sound", "faulty"])
def test_the_verdict_is_the_exit_code(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    fault: Change | None,
) -> None:
    """The whole command over runs made in this process; in one case the resumed run is changed on its way."""
    recipe = write_recipe(tmp_path, run__dir=None)

    def train_here(arguments: list[str], ranks: int, folder: Path, name: str, detail: str) -> None:
        place = folder / ("whole" if name == "undisturbed run" else Path(arguments[1]).name)
        if not place.exists():
            train(load_config(str(recipe), arguments[1:], tmp_path).config)
        if name == "resumed" and fault is not None:
            fault(place)

    def kill_here(arguments: list[str], ranks: int, folder: Path, steps: int) -> None:
        shutil.copytree(folder / "whole", folder / "killed")

    monkeypatch.setattr(seam, "_train", train_here)
    monkeypatch.setattr(seam, "_train_and_kill", kill_here)
    code = run_seam(str(recipe), [], STEPS, 1, 1, str(tmp_path / "runs"))
    said = capsys.readouterr().out
    if fault is None:
        assert code == 0
        assert "the seam is exact" in said
        assert "DIFFERS" not in said
    else:
        assert code == 3
        assert "THE SEAM SHOWS" in said
        (line,) = [line for line in said.splitlines() if "DIFFERS" in line]
        assert line.split()[1] == "loss"
        assert "first at step 5" in line
