"""The commands of docs/blt.md work in their order as they stand there, and the refusals are those shown."""

from __future__ import annotations

import json
import re
import shlex
from pathlib import Path

import pytest
from click.testing import CliRunner
from weft.launch.cli import cli

PAGE = Path(__file__).parents[2] / "docs" / "blt.md"


def weft(words: list[str]) -> tuple[int, str]:
    result = CliRunner().invoke(cli, words)
    return result.exit_code, result.output + str(result.exception or "")


def test_the_page_from_top_to_bottom(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WEFT_CACHE", str(tmp_path / "cache"))
    monkeypatch.chdir(tmp_path)
    (tmp_path / "docs").symlink_to(PAGE.parent)
    text = PAGE.read_text()
    recipe = re.search(r"```yaml\n# (my-blt\.yaml)\n(.*?)```", text, re.S)
    assert recipe is not None
    (tmp_path / recipe[1]).write_text(recipe[2])
    commands = [
        shlex.split(line)[1:] for line in re.findall(r"^(weft (?:train|data) .*)$", text, re.M)
    ]
    assert len(commands) == 5
    for words in commands:
        code, output = weft(words)
        assert code == 0, output
    losses = [
        [json.loads(line)["loss"] for line in (tmp_path / "runs" / run / "metrics.jsonl").read_text().splitlines() if '"loss"' in line]
        for run in ("blt", "blt-stored")
    ]  # fmt: skip
    assert losses[0] == losses[1]
    assert (tmp_path / "patches.png").is_file()

    again = ["train", "my-blt.yaml", "run.dir=runs/other"]
    _, output = weft([*again, "model.patching.threshold=1.0"])
    assert (
        "more than 20 % off the 4.5 wanted; set model.patching.threshold=null to have it found"
        in output
    )
    stored = ["model.patching.patch_size=null", "data.sources=[{name: docs, path: data/docs}]"]
    _, output = weft([*again, "model.patching.threshold=2.5", *stored])
    assert re.search(
        r"stored patches are another patcher's \(threshold [\d.]+, not 2\.5\); prepare", output
    )
    _, output = weft([*again, "model.patching.entropy_model=runs/none"])
    assert "model.patching.entropy_model: runs/none is not a run folder" in output
    assert not (tmp_path / "runs" / "other").exists()
