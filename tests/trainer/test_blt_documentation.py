"""The commands of docs/blt.md work in their order as they stand there, and the refusals are those shown."""

from __future__ import annotations

import json
import re
import shlex
from pathlib import Path
from typing import Any

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
        shlex.split(line)[1:]
        for line in re.findall(r"^(weft (?:train|data|generate) .*)$", text, re.M)
    ]
    assert len(commands) == 7
    outputs = []
    for words in commands:
        code, output = weft(words)
        assert code == 0, output
        outputs.append(output)
    losses = [
        [json.loads(line)["loss"] for line in (tmp_path / "runs" / run / "metrics.jsonl").read_text().splitlines() if '"loss"' in line]
        for run in ("blt", "blt-stored")
    ]  # fmt: skip
    assert losses[0] == losses[1]
    assert (tmp_path / "patches.png").is_file()

    check_generation(outputs[-2:])

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


def check_generation(outputs: list[str]) -> None:
    """The page's two commands: borders and the count of steps, and a run with stored patches gives what its twin does."""
    marked, as_json = outputs
    assert marked.startswith("# Submit")
    assert "|" in marked
    assert re.search(r"\d+ latent steps for 40 bytes: \d\.\d{3} a byte", marked)
    (sample,) = samples_of(as_json)
    assert len(sample["token_ids"]) == 20
    assert sample["latent_steps_per_byte"] == sample["latent_steps"] / 20
    words = ["--temperature", "0.3", "--seed", "3", "--max-new-tokens", "20", "--json"]
    code, output = weft(["generate", "runs/blt", "--prompt", "# Submit to a cluster", *words])
    assert code == 0
    assert samples_of(output) == [sample]


def samples_of(output: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in output.splitlines() if line.startswith("{")]
