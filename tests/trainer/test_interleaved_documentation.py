"""The commands and the Python of docs/interleaved.md work as they stand there, and its keys exist."""

from __future__ import annotations

import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from click.testing import CliRunner
from PIL import Image
from test_interleaved_data import write_pairs
from weft.launch.cli import cli
from weft.trainer.data.config import DataConfig
from weft.trainer.data.interleaved.config import ImageConfig, InterleavedConfig

TEXT = (Path(__file__).parents[2] / "docs" / "interleaved.md").read_text()


@pytest.fixture(scope="module")
def outputs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """What each command of the page prints."""
    commands = re.findall(r"^```\nweft (.*)\n```$", TEXT, re.M)
    assert len(commands) == 3
    folder, found = tmp_path_factory.mktemp("page"), {}
    write_pairs(folder / "pairs")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        for command in commands:
            done = CliRunner().invoke(cli, shlex.split(command))
            assert done.exit_code == 0, done.output
            found[command] = done.output
        assert Image.open("digits.png").size == (530, 530)
    return found


def test_the_page_shows_what_its_commands_print(outputs: dict[str, str]) -> None:
    digits, inspected, pairs = outputs.values()
    shown = {line.rstrip() for line in TEXT.splitlines()}
    lines = [
        line.rstrip()
        for line in digits.splitlines()
        if line.startswith(("data/", "holds", "1,797"))
    ]
    assert len(lines) == 3
    assert set(lines) <= shown
    packing = [
        line.rstrip() for line in inspected.splitlines() if "positions" in line and "%" in line
    ]
    assert set(packing) <= shown
    assert "│ <image 4x4> zero" in inspected
    assert "64 images in digits.png" in inspected
    assert "30 images as latents of 3 x 16 x 16, 8 x 8 positions each" in pairs


def test_the_python_of_the_page_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WEFT_CACHE", str(tmp_path))
    code = re.search(r"```python\n(.*?)```", TEXT, re.S)
    assert code is not None
    done = subprocess.run([sys.executable, "-c", code[1]], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    size, rows, columns, images = re.findall(r"\d+", done.stdout)
    assert (size, rows, columns) == ("272", "8", "8")
    assert int(images) > 8


def test_recipe_and_keys_of_the_page_exist() -> None:
    recipe = re.search(r"```yaml\n(.*?)```", TEXT, re.S)
    assert recipe is not None
    config = DataConfig.model_validate(yaml.safe_load(recipe[1])["data"])
    assert config.packs_documents
    named = set(re.findall(r"`(?:data\.interleaved\.)?image\.([a-z_]+)", TEXT))
    assert named >= {"codec", "codes", "dtype", "patch_size", "clip"}
    assert named <= set(ImageConfig.model_fields)
    for key in ("image_first", "caption_dropout", "score_boi", "boi_id"):
        assert f"`{key}" in TEXT
        assert key in InterleavedConfig.model_fields


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (
            ["prepare", "plain.txt", "--out", "x", "--codec", "pixels"],
            "--codec is of documents with images or speech",
        ),
        (
            ["prepare", "builtin:shapes", "--out", "x"],
            "codec pixels has no size of its own; set it",
        ),
        (
            ["prepare", "builtin:shapes", "--out", "x", "--codec", "png"],
            "is none of pixels, gray-codes",
        ),
        (
            ["prepare", "builtin:shapes", "--out", "x", "--modalities", "image"],
            "must begin with text",
        ),
        (
            ["inspect", "words", "--sequence-length", "8", "--images", "x.png"],
            "there are no images in this data",
        ),
    ],
)
def test_commands_that_cannot_work_say_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, words: list[str], message: str
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("plain.txt").write_text("some words " * 20)
    if words[0] == "inspect":
        made = CliRunner().invoke(cli, ["data", "prepare", "plain.txt", "--out", "words"])
        assert made.exit_code == 0, made.output
    done = CliRunner().invoke(cli, ["data", *words])
    assert message in str(done.exception)
    assert not Path("x").exists()
