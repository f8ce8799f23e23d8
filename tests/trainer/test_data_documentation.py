"""The commands and the Python of docs/data.md work as they stand there."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

PAGE = Path(__file__).parents[2] / "docs" / "data.md"


def test_commands_and_python_of_the_page_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WEFT_CACHE", str(tmp_path / "cache"))
    text = PAGE.read_text()
    commands = re.findall(r"^```\n(weft data .*)\n```$", text, re.M)
    assert len(commands) == 3
    # The recipe comes last: it is another area's file, and the dataset has to be prepared before it is shown.
    for command in [*commands[1:], commands[0]]:
        words = command.split()[1:]
        done = subprocess.run(
            [sys.executable, "-m", "weft", *words], cwd=tmp_path, capture_output=True, text=True
        )
        assert done.returncode == 0, done.stderr
    code = re.search(r"```python\n(.*?)```", text, re.S)
    assert code is not None
    done = subprocess.run(
        [sys.executable, "-c", code[1]], cwd=tmp_path, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[0] == "0 torch.Size([8192])"


def test_settings_named_on_the_page_exist() -> None:
    from weft.trainer.data.config import DataConfig, HeldOutConfig, RepeatFilterConfig

    known = {f"data.{name}" for name in DataConfig.model_fields}
    known |= {f"data.held_out.{name}" for name in HeldOutConfig.model_fields}
    known |= {f"data.repeat_filter.{name}" for name in RepeatFilterConfig.model_fields}
    named = set(re.findall(r"`(data\.[a-z_.]+)", PAGE.read_text()))
    assert named
    assert named <= known
