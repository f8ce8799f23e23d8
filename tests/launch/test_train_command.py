"""`weft train`: what it accepts, what it refuses, and that nothing is left behind by a refusal."""

from __future__ import annotations

import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import yaml
from click.testing import CliRunner, Result
from tiny_run import write_recipe
from weft.launch.options import RECIPES
from weft.launch.train import command
from weft.models.errors import ConfigError, WeftError
from weft.trainer.configuration.recipes import list_recipes
from weft.trainer.exit_codes import ExitCode

Train = Callable[..., Result]


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    """What would have been trained."""
    recorded: list[dict[str, Any]] = []

    def train(config: Any, run_dir: Path, *, resume: bool) -> int:
        recorded.append({"config": config, "run_dir": run_dir, "resume": resume})
        return 0

    module = ModuleType("weft.trainer.train")
    module.train = train  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "weft.trainer.train", module)
    return recorded


@pytest.fixture
def train(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, calls: list[dict[str, Any]]) -> Train:
    monkeypatch.chdir(tmp_path)
    return lambda *arguments: CliRunner().invoke(command, arguments, standalone_mode=False)


def test_a_recipe_with_overrides_in_any_order(train: Train, calls: list[dict[str, Any]]) -> None:
    result = train("train.steps=7", "olmo2/debug", "run.dir=here")
    assert result.return_value == 0
    (call,) = calls
    assert call["config"].train.steps == 7
    assert call["run_dir"] == Path("here")
    assert call["resume"] is False


def test_a_run_goes_on_from_its_own_configuration(
    train: Train, calls: list[dict[str, Any]], tmp_path: Path
) -> None:
    printed = train("olmo2/debug", "train.steps=7", "--print-config").output
    (tmp_path / "runs" / "first").mkdir(parents=True)
    (tmp_path / "runs" / "first" / "config.yaml").write_text(printed)
    for argument in ("runs/first", "first"):
        train("--resume", argument, "train.steps=9")
        call = calls.pop()
        assert call["config"].train.steps == 9
        assert call["run_dir"] == Path("runs/first")
        assert call["resume"] is True


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["olmo2/debug", "other"], "one RECIPE is expected"),
        (["--resume", "runs/first", "olmo2/debug"], "'olmo2/debug' has no place here"),
        (["--resume", "runs/frst"], "runs here: runs/first"),
        (["runs/first"], "is a run folder, not a recipe"),
        (["--resume", "runs"], "no config.yaml in runs; runs here: runs/first"),
        (
            ["olmo2/debug", "train.steps=0"],
            "train.steps: should be greater than 0, found 0 [override]",
        ),
        (["olmo2/debgu"], "did you mean olmo2/debug"),
        (["absent.yaml"], "there is no recipe 'absent.yaml'"),
    ],
)
def test_refusals(train: Train, tmp_path: Path, arguments: list[str], message: str) -> None:
    (tmp_path / "runs" / "first").mkdir(parents=True)
    (tmp_path / "runs" / "first" / "config.yaml").write_text("{}\n")
    before = sorted(tmp_path.rglob("*"))
    result = train(*arguments)
    assert result.exception is not None
    text = getattr(result.exception, "message", None) or str(result.exception)
    assert message in text
    assert getattr(result.exception, "exit_code", None) == 2
    assert sorted(tmp_path.rglob("*")) == before


def test_all_bad_keys_are_named_at_once(train: Train, calls: list[dict[str, Any]]) -> None:
    result = train("olmo2/debug", "train.stps=1", "modl.x=2", "optimizer.lr=-1")
    assert isinstance(result.exception, ConfigError)
    assert len(str(result.exception).splitlines()) == 3
    assert calls == []


def test_print_config_is_a_recipe_with_origins(
    train: Train, calls: list[dict[str, Any]], tmp_path: Path
) -> None:
    output = train("olmo2/debug", "train.steps=7", "--print-config").output
    assert yaml.safe_load(output)["train"]["steps"] == 7
    lines = {line.split(":")[0].strip(): line for line in output.splitlines()}
    assert lines["steps"].endswith("# override")
    assert "# olmo2/debug.yaml:" in lines["d_model"]
    assert lines["weight_decay"].endswith("# default")
    assert calls == []
    (tmp_path / "again.yaml").write_text(output)
    again = train("again.yaml", "--print-config").output
    assert yaml.safe_load(again) == yaml.safe_load(output)


def test_help_keys(train: Train) -> None:
    output = train("--help-keys", "schedule").output
    assert "schedule.kind: cosine | linear | wsd | constant (default cosine)" in output
    assert "train.steps:" not in output
    assert "train.steps: integer > 0" in train("--help-keys").output
    result = train("--help-keys", "shedule")
    assert isinstance(result.exception, WeftError)
    assert "did you mean schedule?" in str(result.exception)


@pytest.mark.parametrize("recipe", list_recipes(RECIPES))
def test_every_recipe_is_sound(train: Train, recipe: str) -> None:
    result = train(recipe, "--print-config")
    assert result.exception is None, result.exception


PAGE = Path(__file__).parents[2] / "docs" / "configuration.md"


def test_the_recipe_on_the_page_loads(train: Train, tmp_path: Path) -> None:
    (block,) = re.findall(r"```yaml\n(.*?)```", PAGE.read_text(), re.DOTALL)
    (tmp_path / "page.yaml").write_text(block)
    result = train("page.yaml", "--print-config")
    assert result.exception is None, result.exception
    assert "notes" in result.output


def test_the_errors_on_the_page_are_what_is_said(train: Train) -> None:
    (arguments, shown) = re.findall(
        r"\$ weft train (.*)\n((?:weft: error: .*\n)+)", PAGE.read_text()
    )[0]
    result = train(*arguments.split())
    said = "".join(f"weft: error: {line}\n" for line in str(result.exception).splitlines())
    assert said == shown


def test_signals_to_the_last_do_not_change_how_a_stopped_run_ends(tmp_path: Path) -> None:
    recipe = write_recipe(tmp_path, train__steps=100_000)
    process = subprocess.Popen(
        [sys.executable, "-m", "weft", "train", str(recipe)], stdout=subprocess.DEVNULL
    )
    metrics = tmp_path / "run" / "metrics.jsonl"
    deadline = time.monotonic() + 100
    try:
        while not (metrics.is_file() and metrics.stat().st_size):
            assert time.monotonic() < deadline
            time.sleep(0.01)
        # A scheduler that ends a job may signal it again and again.
        while process.poll() is None:
            assert time.monotonic() < deadline
            process.send_signal(signal.SIGTERM)
            time.sleep(0.005)
    finally:
        process.kill()
    assert process.returncode == ExitCode.STOPPED
