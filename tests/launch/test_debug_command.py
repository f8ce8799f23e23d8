"""`weft debug RUN`: tables, files and debuggers; what may be asked of a run and what of a recipe."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import click
import pytest
from click.testing import CliRunner, Result
from tiny_run import poison, write_recipe
from weft.launch.debug import command
from weft.models.errors import ConfigError, LaunchError
from weft.trainer.configuration.load import load_config
from weft.trainer.train import train


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("debug")
    config = load_config(str(write_recipe(folder, train__steps=4)), [], folder).config
    assert train(config) == 0
    return config.run_dir


def debug(*arguments: object, stdin: str | None = None) -> Result:
    words = [str(argument) for argument in arguments]
    return CliRunner().invoke(command, words, input=stdin, standalone_mode=False)


def test_the_tables_say_what_the_step_was(run: Path) -> None:
    done = debug(run, "--step", 3)
    assert done.exit_code == 0, done.output
    out = done.stdout
    assert f"step 3 of {run}: from checkpoint 2, 1 rank, samples 16 to 23 in 2 micro-batches" in out
    (loss,) = (line for line in out.splitlines() if line.split()[:1] == ["loss"])
    assert loss.split()[1] == loss.split()[2]
    assert loss.split()[3] == "equal"
    assert "every module's output and gradient is finite" in out
    for words in ("model.blocks.0.mlp", "model/head.weight", "update / weight", "Highest losses"):
        assert words in out
    assert "replaying step 3" in done.stderr


def test_options_come_in_any_order(run: Path) -> None:
    done = debug("--step", 3, "--depth", 0, "--no-samples", run, "run.threads=1")
    assert done.exit_code == 0, done.output
    assert "deeper modules" in done.output
    assert "model.blocks" not in done.output.replace("model/blocks", "")
    assert "Highest losses" not in done.output


def test_a_filter_shows_all_depths_of_what_it_names(run: Path) -> None:
    out = debug(run, "--step", 3, "--module", "blocks.0.mlp").stdout
    assert "model.blocks.0.mlp.up_proj" in out
    assert "model/blocks.0.mlp.up_proj.weight" in out
    assert "attention" not in out


def test_a_share_is_not_compared(run: Path) -> None:
    out = debug(run, "--step", 3, "--ranks", 2, "--rank", 1, "train.micro_batch_tokens=null").stdout
    assert "rank 1 of 2, samples 20 to 23 in 1 micro-batch," in out
    assert "not compared with the run: only a share was replayed" in out


def test_json_and_the_file_hold_the_same(run: Path, tmp_path: Path) -> None:
    copy = Path(shutil.copytree(run, tmp_path / "run"))
    done = debug(copy, "--step", 3, "--json", "--out")
    printed = json.loads(done.stdout)
    assert printed["step"] == 3
    assert len(printed["samples"]) == 8
    assert json.loads((copy / "debug" / "step_00000003.json").read_text()) == printed
    debug(copy, "--step", 3, "--rank", 0, "--out")
    assert (copy / "debug" / "step_00000003_rank_00000.json").exists()
    shutil.rmtree(copy / "debug")
    (copy / "debug").write_text("in the way")
    assert isinstance(debug(copy, "--step", 3, "--out").exception, LaunchError)


def test_the_reference_is_compared_module_by_module(run: Path) -> None:
    out = debug(run, "--step", 3, "--reference").stdout
    assert "first output that differs by more than 1e-05: none" in out
    refused = debug(run, "--step", 3, "--reference", "--stream").exception
    assert isinstance(refused, click.UsageError)


def test_streaming_tells_what_it_held(run: Path) -> None:
    assert "streamed: at most 0.0" in debug(run, "--step", 3, "--stream").stdout


@pytest.mark.parametrize(
    ("target", "option", "message"),
    [
        ("olmo2/debug", ["--step", "3"], "--step has no meaning here: olmo2/debug is a recipe"),
        ("olmo2/debug", ["--pdb"], "--pdb has no meaning here"),
        ("RUN", ["--builtin-data"], "is a run"),
        ("RUN", ["--keep", "x"], "--keep has no meaning here"),
    ],
)
def test_an_option_of_the_other_kind_is_refused(
    run: Path, target: str, option: list[str], message: str
) -> None:
    done = debug(target.replace("RUN", str(run)), *option)
    assert isinstance(done.exception, click.UsageError)
    assert message in str(done.exception)


def test_what_is_neither_a_run_nor_a_recipe() -> None:
    done = debug("olmo2/debgu")
    assert isinstance(done.exception, ConfigError)
    assert "did you mean olmo2/debug" in str(done.exception)


def test_the_named_commands_are_still_there() -> None:
    assert "Compare an undisturbed run" in debug("seam", "--help").output
    assert "--reference" in debug("replay", "--help").output
    assert "seam" in debug("--help").output


def weft(*arguments: object, stdin: str) -> str:
    done = subprocess.run(
        [sys.executable, "-m", "weft", "debug", *map(str, arguments)],
        input=stdin,
        capture_output=True,
        text=True,
        check=False,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_a_debugger_opens_at_the_module(run: Path) -> None:
    out = weft(
        *(run, "--step", 3, "--break", "model.blocks.0.mlp", "--no-samples"),
        stdin="p type(module).__name__, tuple(output.shape)\nc\nc\n",
    )
    assert "(Pdb) ('MLP', (128, 16))" in out
    assert "every module's output and gradient is finite" in out


def test_a_debugger_opens_where_a_value_goes_wrong(run: Path, tmp_path: Path) -> None:
    copy = Path(shutil.copytree(run, tmp_path / "run"))
    poison(copy, 2, "model/blocks.0.mlp_norm.weight")
    out = weft(
        *(copy, "--step", 3, "--pdb", "--no-samples"),
        stdin="p module is not None, int(output.isnan().sum())\nc\n",
    )
    assert "(Pdb) (True, 128)" in out
    assert "FIRST NOT FINITE: forward of model.blocks.0.mlp_norm; not finite in it" in out


def test_the_commands_of_the_page_run(run: Path, tmp_path: Path) -> None:
    page = (Path(__file__).parents[2] / "docs" / "debug.md").read_text()
    found = re.findall(r"^weft debug (runs/\S+) (.*)$", page, re.M)
    assert {name for name, _ in found} == {"runs/debug", "runs/broken"}
    for _, options in found:
        # The run of this file is shorter: steps 15 and 11 of the page are its steps 4 and 3.
        words = (
            options.replace("15", "4").replace("11", "3").replace("blocks.1", "blocks.0").split()
        )
        done = debug(run, *words, stdin="c\nc\n") if "--break" not in words else None
        assert done is None or done.exit_code == 0
