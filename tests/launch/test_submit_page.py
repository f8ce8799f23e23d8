"""docs/submit.md does what it says: its commands run, its profile loads, its tables are complete."""

from __future__ import annotations

import re
import sys
from pathlib import Path

import pytest
from fake_slurm import FakeSlurm
from test_documentation import commands_of
from weft.launch import cli
from weft.launch.slurm.cluster import ClusterConfig, load_cluster
from weft.trainer.exit_codes import ExitCode

PAGE = Path(__file__).parents[2] / "docs" / "submit.md"
COMMANDS = [words for words in commands_of(PAGE) if words[:1] == ["submit"]]


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working folder with the page's profile and a run, and a scheduler."""
    FakeSlurm(tmp_path / "bin", monkeypatch)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path / "config"))
    monkeypatch.delenv("WEFT_CLUSTER", raising=False)
    return tmp_path


def write_the_page_s_profile(folder: Path) -> None:
    (text,) = re.findall(r"```yaml\n(.*?)```", PAGE.read_text(), re.S)
    path = folder / "config" / "weft" / "clusters" / "default.yaml"
    path.parent.mkdir(parents=True)
    path.write_text(text)


def weft(monkeypatch: pytest.MonkeyPatch, *arguments: str) -> int:
    monkeypatch.setattr(sys, "argv", ["weft", *arguments])
    return cli._run()


@pytest.mark.parametrize("words", COMMANDS, ids=" ".join)
def test_every_submission_of_the_page_is_accepted(
    here: Path, monkeypatch: pytest.MonkeyPatch, words: list[str]
) -> None:
    if words[1].startswith("runs/"):
        assert weft(monkeypatch, "submit", "olmo2/1b", "--gpus-per-node", "8") == 0
    words = ["submit", "olmo2/1b", *words[2:]] if words[1] == "RECIPE" else words
    assert weft(monkeypatch, *words) == 0


def test_the_profile_of_the_page_says_what_the_page_shows(here: Path) -> None:
    write_the_page_s_profile(here)
    shown = load_cluster(None, {"nodes": 4}).describe()
    assert re.search(r"^partition: h100 +# .*default.yaml:1$", shown, re.M)
    assert re.search(r"^nodes: 4 +# --nodes$", shown, re.M)
    config = load_cluster(None, {}).config
    assert (config.time, config.mem, config.setup) == ("24:00:00", "0", ("ulimit -l unlimited",))


def test_every_key_of_a_profile_is_on_the_page() -> None:
    table = PAGE.read_text().partition("| key | |")[2].partition("\n\n")[0]
    assert set(ClusterConfig.model_fields) - set(re.findall(r"\w+", table)) == set()


def test_every_exit_code_is_on_the_page() -> None:
    rows = re.findall(r"^\| (\d+) \|", PAGE.read_text(), re.M)
    assert {int(code) for code in rows} == {int(code) for code in ExitCode}
