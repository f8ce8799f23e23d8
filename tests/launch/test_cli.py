"""The `weft` command: answers without heavy imports, one-line errors, exit codes, quiet pipes."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import click
import pytest
import weft
from weft.launch import cli
from weft.models.errors import ConfigError, TrainingError

HEAVY = ("torch", "pydantic", "yaml", "numpy", "rich", "triton", "matplotlib")


def weft_command(*arguments: str, cwd: Path | None = None) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "weft", *arguments], capture_output=True, text=True, cwd=cwd
    )


def imported_by(*arguments: str) -> set[str]:
    """Top-level packages that are loaded by the time `weft ARGUMENTS` has ended."""
    program = (
        "import atexit, json, sys\n"
        "atexit.register(lambda: print(json.dumps(sorted(sys.modules)), file=sys.stderr))\n"
        f"sys.argv = ['weft', *{list(arguments)!r}]\n"
        "from weft.launch.cli import main\n"
        "main()\n"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    return {name.partition(".")[0] for name in json.loads(done.stderr.splitlines()[-1])}


@pytest.mark.parametrize("arguments", [["--help"], ["--version"], ["train", "--help"], ["tran"]])
def test_answers_without_heavy_imports(arguments: list[str]) -> None:
    assert imported_by(*arguments).isdisjoint(HEAVY)


@pytest.mark.parametrize(
    "arguments",
    [
        ["train", "olmo2/debug", "train.stps=1"],
        ["train", "olmo2/debug", "--print-config"],
        ["train", "--help-keys"],
        ["train", "olmo2/dbug"],
    ],
)
def test_configuration_is_checked_without_torch(arguments: list[str]) -> None:
    loaded = imported_by(*arguments)
    assert "click" in loaded
    assert loaded.isdisjoint({"torch", "numpy", "triton"})


def test_help_lists_every_verb_with_one_line() -> None:
    done = weft_command("--help")
    assert done.returncode == 0
    lines = [line.split() for line in done.stdout.splitlines()]
    for verb, (_, text) in cli.VERBS.items():
        assert [verb, *text.split()] in lines, f"{verb} is missing, or its help is wrapped"
    assert weft_command().stdout == done.stdout


@pytest.mark.parametrize("verb", cli.VERBS)
def test_every_verb_exists_and_shows_an_example(verb: str) -> None:
    context = click.Context(cli.cli, info_name="weft")
    command = cli.cli.get_command(context, verb)
    assert command is not None
    text = command.get_help(click.Context(command, info_name=verb, parent=context))
    assert f"weft {verb}" in text.partition("\n")[2], "the help has no example"


def test_version() -> None:
    assert weft_command("--version").stdout == f"weft {weft.__version__}\n"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["tran"], "there is no command 'tran'; did you mean 'train'?"),
        (["zzz"], "there is no command 'zzz'; weft --help lists them"),
        (["--versio"], "No such option"),
        (["train", "--reume", "x"], "--resume"),
        (["train"], "name a RECIPE, such as olmo2/quickstart, or a run: --resume RUN"),
    ],
)
def test_usage_errors_are_one_line_and_exit_2(arguments: list[str], message: str) -> None:
    done = weft_command(*arguments)
    assert done.returncode == 2
    assert done.stdout == ""
    assert len(done.stderr.splitlines()) == 1
    assert done.stderr.startswith("weft: error: ")
    assert message in done.stderr


def run_main(monkeypatch: pytest.MonkeyPatch, raised: BaseException | int) -> int | str | None:
    """`main`'s exit code where the command raises or returns this."""

    def invoke() -> int:
        if isinstance(raised, int):
            return raised
        raise raised

    monkeypatch.setattr(cli, "_invoke", invoke)
    with pytest.raises(SystemExit) as caught:
        cli.main()
    return caught.value.code


@pytest.mark.parametrize(
    ("raised", "code", "said"),
    [
        (0, 0, ""),
        (7, 7, ""),
        (ConfigError("one\ntwo"), 2, "weft: error: one\nweft: error: two\n"),
        (TrainingError("stopped"), 3, "weft: error: stopped\n"),
        (KeyboardInterrupt(), 130, "weft: error: interrupted\n"),
        (click.Abort(), 130, "weft: error: interrupted\n"),
    ],
)
def test_exit_codes(
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    raised: BaseException | int,
    code: int,
    said: str,
) -> None:
    assert run_main(monkeypatch, raised) == code
    assert capsys.readouterr().err == said


@pytest.mark.parametrize(
    "bug", [ZeroDivisionError("a bug"), BrokenPipeError("someone else's pipe")]
)
def test_bugs_keep_their_traceback(monkeypatch: pytest.MonkeyPatch, bug: Exception) -> None:
    monkeypatch.setattr(cli, "_invoke", lambda: (_ for _ in ()).throw(bug))
    with pytest.raises(type(bug)):
        cli.main()


def test_a_reader_that_goes_away_is_no_error() -> None:
    writer = subprocess.Popen(
        [sys.executable, "-m", "weft", "train", "--help-keys"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )
    assert writer.stdout is not None
    assert writer.stderr is not None
    writer.stdout.close()
    assert writer.wait() == 141
    assert writer.stderr.read() == b""
    writer.stderr.close()
