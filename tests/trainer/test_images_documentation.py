"""The commands and the Python of docs/images.md work as they stand there, and its keys exist."""

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
from weft.launch.cli import cli
from weft.trainer.data.config import DataConfig

TEXT = (Path(__file__).parents[2] / "docs" / "images.md").read_text()


def test_the_page_shows_what_its_commands_print(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    commands = re.findall(r"^```\nweft (.*)\n```$", TEXT, re.M)
    assert len(commands) == 3
    shown = set(TEXT.splitlines())
    for command in commands:
        done = CliRunner().invoke(cli, shlex.split(command))
        assert done.exit_code == 0, done.output
        if "inspect" not in command:
            # Progress goes to stderr, which the runner mixes in.
            lines = [line for line in done.stdout.splitlines() if "prepared" not in line]
            assert set(lines) <= shown
    assert Image.open("photos.png").size == (530, 530)
    encoded = CliRunner().invoke(cli, ["data", "encode", "runs/none", "data/photos", "--out", "x"])
    assert "runs/none is not a run" in str(encoded.exception)
    assert not Path("x").exists()


def test_the_python_of_the_page_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WEFT_CACHE", str(tmp_path))
    code = re.search(r"```python\n(.*?)```", TEXT, re.S)
    assert code is not None
    done = subprocess.run([sys.executable, "-c", code[1]], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout == "torch.Size([16, 3, 32, 32]) 3 16\n"


def test_recipes_of_the_page_are_valid() -> None:
    recipes = re.findall(r"```yaml\n(.*?)```", TEXT, re.S)
    assert len(recipes) == 3
    for recipe in recipes:
        data = yaml.safe_load(recipe)["data"]
        config = DataConfig.model_validate({"sequence_length": 1, **data})
        assert config.images is not None


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["score", "builtin:digits", "--out", "x", "--tokens", "1", "--shares", "1,0,0"], "contradict each other"),
        (["score", "builtin:digits", "--out", "x", "--scorer", "llm"], "--scorer llm needs --model FOLDER"),
        (["score", "builtin:digits", "--out", "x", "--shares", "a,b"], "is no list of numbers"),
        (["score", "builtin:digits", "--out", "x", "--tokens", "3"], "T=3 cannot be had with a share of 0.05"),
        (["prepare", "nowhere", "--images", "--out", "x"], "nowhere does not exist"),
        (["score", "builtin:digits", "--out", "x", "--part", "3"], "--part 3 is not K/N"),
    ],
)  # fmt: skip
def test_commands_that_cannot_work_say_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, words: list[str], message: str
) -> None:
    monkeypatch.chdir(tmp_path)
    done = CliRunner().invoke(cli, ["data", *words])
    assert message in str(done.exception)
    assert not Path("x").exists()
