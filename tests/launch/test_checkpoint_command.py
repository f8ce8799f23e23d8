"""`weft checkpoint`: what it lists, that it finds every kind of damage, and that it writes nothing."""

from __future__ import annotations

import json
import os
import re
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from click.testing import CliRunner, Result
from tiny_run import write_recipe
from weft.launch.checkpoint import command
from weft.models.errors import CheckpointError, ConfigError
from weft.trainer.configuration.load import load_config
from weft.trainer.train import train

STEPS = [2, 4, 6]


@pytest.fixture(scope="module")
def sound(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run with three checkpoints."""
    folder = tmp_path_factory.mktemp("run")
    recipe = write_recipe(folder, train__steps=6, checkpoint__keep=3)
    assert train(load_config(str(recipe), [], folder).config) == 0
    return folder / "run"


@pytest.fixture
def run(sound: Path, tmp_path: Path) -> Path:
    """A copy to damage."""
    shutil.copytree(sound, tmp_path / "run")
    return tmp_path / "run"


def snapshot(folder: Path) -> list[tuple[str, int, int]]:
    paths = (p for p in folder.rglob("*"))
    return sorted((str(p), p.stat().st_mtime_ns, p.stat().st_size) for p in paths)


def weft_checkpoint(run: Path, *arguments: str) -> Result:
    """What it answers; it must leave every file as it was."""
    before = snapshot(run)
    verb, *options = arguments
    result = CliRunner().invoke(command, [verb, str(run), *options], standalone_mode=False)
    assert snapshot(run) == before
    return result


def folder_of(run: Path, step: int) -> Path:
    return run / "checkpoints" / f"step_{step:08d}"


def data_file(run: Path, step: int) -> Path:
    (file,) = folder_of(run, step).glob("*.safetensors")
    return file


def flip(path: Path, place: int) -> None:
    raw = bytearray(path.read_bytes())
    raw[place] ^= 1
    path.write_bytes(raw)


def truncate(run: Path, step: int) -> None:
    os.truncate(data_file(run, step), data_file(run, step).stat().st_size - 1)


def lengthen(run: Path, step: int) -> None:
    with open(data_file(run, step), "ab") as file:
        file.write(b"\0")


def flip_in_data(run: Path, step: int) -> None:
    flip(data_file(run, step), -7)


def flip_in_header(run: Path, step: int) -> None:
    flip(data_file(run, step), 20)


def flip_in_header_length(run: Path, step: int) -> None:
    flip(data_file(run, step), 0)


def remove_shard(run: Path, step: int) -> None:
    data_file(run, step).unlink()


def remove_manifest(run: Path, step: int) -> None:
    (folder_of(run, step) / "manifest.json").unlink()


def cut_manifest(run: Path, step: int) -> None:
    path = folder_of(run, step) / "manifest.json"
    path.write_text(path.read_text()[:-30])


def change_manifest(run: Path, step: int) -> None:
    """One digit of the loop's state: it would resume at other data without a word."""
    path = folder_of(run, step) / "manifest.json"
    text = path.read_text()
    changed = re.sub(r'("samples": )\d', r"\g<1>9", text, count=1)
    assert changed != text
    assert json.loads(changed)
    path.write_text(changed)


DAMAGES: dict[Callable[[Path, int], None], str] = {
    truncate: "rank_00000_00.safetensors has ",
    lengthen: "rank_00000_00.safetensors has ",
    flip_in_data: "does not match its checksum",
    flip_in_header: "does not match its checksum",
    flip_in_header_length: "does not match its checksum",
    remove_shard: "rank_00000_00.safetensors is missing",
    remove_manifest: "its manifest cannot be read (No such file or directory)",
    cut_manifest: "manifest.json is damaged",
    change_manifest: "manifest.json does not match its own checksum",
}


def test_list_shows_each_checkpoint(sound: Path) -> None:
    result = weft_checkpoint(sound, "list")
    assert result.exception is None
    rows = [line.split() for line in result.output.splitlines()]
    rows = [row for row in rows if row and row[0].isdigit()]
    assert [int(row[0]) for row in rows] == STEPS
    assert [row[-1] for row in rows] == ["complete", "complete", "latest"]
    assert ["final" in row for row in rows] == [False, False, True]
    megabytes = f"{data_file(sound, 2).stat().st_size / 1e6:,.1f}"
    assert all(megabytes in row for row in rows)


@pytest.mark.parametrize("damage", DAMAGES, ids=lambda d: d.__name__)
def test_list_names_what_it_can_see_without_reading_data(
    run: Path, damage: Callable[[Path, int], None]
) -> None:
    damage(run, 4)
    lines = weft_checkpoint(run, "list").output.splitlines()
    (row,) = [line for line in lines if line.split()[:1] == ["4"]]
    is_visible = not damage.__name__.startswith("flip")
    assert ("complete" not in row.replace("not a complete", "")) == is_visible


def test_list_says_what_is_wrong_in_the_row_however_long_the_path_of_the_run(
    sound: Path, tmp_path: Path
) -> None:
    """The folder stands in the title; in the row it would break the sentence at a place of its own."""
    run = tmp_path / ("long" * 30) / "run"
    shutil.copytree(sound, run)
    remove_manifest(run, 4)
    cut_manifest(run, 6)
    lines = weft_checkpoint(run, "list").output.splitlines()
    states = {line.split()[0]: line[58:].strip() for line in lines if line.split()}
    assert states["2"] == "complete"
    assert states["4"] == (
        "not a complete checkpoint: its manifest cannot be read (No such file or directory)"
    )
    assert states["6"].startswith("manifest.json is damaged: ")


def test_verify_says_so_of_each_sound_checkpoint(sound: Path) -> None:
    result = weft_checkpoint(sound, "verify")
    assert result.exception is None
    assert result.return_value == 0
    assert result.output.splitlines() == [
        f"{folder_of(sound, step)}: every byte sound" for step in STEPS
    ]


@pytest.mark.parametrize("damage", DAMAGES, ids=lambda d: d.__name__)
def test_verify_names_the_damage_and_offers_the_newest_sound_one(
    run: Path, damage: Callable[[Path, int], None]
) -> None:
    damage(run, 6)
    result = weft_checkpoint(run, "verify")
    assert isinstance(result.exception, CheckpointError)
    assert result.exception.exit_code == 2
    assert str(result.exception) == (
        f"1 of 3 checkpoints of {run} damaged, step_00000006 the newest of them; "
        "the newest sound one is step_00000004"
    )
    said = [line for line in result.output.splitlines() if "every byte sound" not in line]
    assert said
    assert all(line.startswith(f"{folder_of(run, 6)}: ") for line in said)
    assert DAMAGES[damage] in said[0]
    assert said[0].count(str(run)) == 1


def test_every_single_byte_of_a_file_is_looked_at(run: Path) -> None:
    """A byte in each stretch of the file, header and data alike."""
    path = data_file(run, 2)
    size = path.stat().st_size
    for place in range(3, size, size // 23):
        flip(path, place)
        result = weft_checkpoint(run, "verify", "--step", "2")
        assert isinstance(result.exception, CheckpointError), f"byte {place} of {size}"
        flip(path, place)
    assert weft_checkpoint(run, "verify").exception is None


def test_a_checkpoint_from_before_headers_were_summed_is_still_sound(run: Path) -> None:
    path = folder_of(run, 6) / "manifest.json"
    data = json.loads(path.read_text())
    del data["headers"], data["sha256"]
    path.write_text(json.dumps(data))
    assert weft_checkpoint(run, "verify").exception is None


def test_damage_in_the_middle_leaves_the_newest_one_on_offer(run: Path) -> None:
    flip_in_data(run, 2)
    remove_shard(run, 4)
    result = weft_checkpoint(run, "verify")
    assert "2 of 3 checkpoints" in str(result.exception)
    assert "step_00000004 the newest of them" in str(result.exception)
    assert "the newest sound one is step_00000006" in str(result.exception)


def test_no_sound_one_left(run: Path) -> None:
    for step in STEPS:
        flip_in_data(run, step)
    result = weft_checkpoint(run, "verify")
    assert "3 of 3 checkpoints" in str(result.exception)
    assert "no sound one is left" in str(result.exception)


def test_one_step_alone(run: Path) -> None:
    flip_in_data(run, 6)
    result = weft_checkpoint(run, "verify", "--step", "4")
    assert result.exception is None
    assert result.output == f"{folder_of(run, 4)}: every byte sound\n"
    result = weft_checkpoint(run, "verify", "--step", "6")
    assert "1 of 1 checkpoints" in str(result.exception)
    # The others were not asked about, but they are there to go on from.
    assert "the newest sound one is step_00000004" in str(result.exception)
    result = weft_checkpoint(run, "verify", "--step", "5")
    assert f"{run} has no checkpoint of step 5; see weft checkpoint list {run}" in str(
        result.exception
    )


@pytest.mark.parametrize("verb", ["list", "verify"])
def test_a_run_without_checkpoints_and_no_run_at_all(run: Path, verb: str) -> None:
    shutil.rmtree(run / "checkpoints")
    result = weft_checkpoint(run, verb)
    assert isinstance(result.exception, CheckpointError)
    assert f"{run} has no checkpoint" in str(result.exception)
    (run / "config.yaml").unlink()
    result = weft_checkpoint(run, verb)
    assert isinstance(result.exception, ConfigError)
    assert "no config.yaml" in str(result.exception)
