"""Every command in README.md and docs/ is one that Weft has: verbs, options, recipes and keys; every link leads somewhere."""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator
from pathlib import Path

import click
import pytest
from weft.launch import cli
from weft.launch.options import RECIPES, split_arguments
from weft.models.errors import CheckpointError, TrainingError
from weft.trainer.configuration.load import load_config
from weft.trainer.configuration.recipes import list_recipes

ROOT = Path(__file__).parents[2]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
# Pages that show what a mistake gets.
MISTAKES = ("train.stps", "optimizer.lr=-1")


def commands_of(page: Path) -> Iterator[list[str]]:
    """Words after `weft` of each command in the page's code blocks."""
    for block in re.findall(r"^```(?:console|bash|sh)?\n(.*?)^```", page.read_text(), re.M | re.S):
        joined = block.replace("\\\n", " ")
        for line in joined.splitlines():
            words = line.removeprefix("$ ")
            if re.match(r"(torchrun|srun|weft|[A-Z_]+=\S+) ?", words) and "weft" in words.split():
                words = re.sub(r"\$'([^']*)'", r"'\1'", words).split("  #")[0].split(" | ")[0]
                found = shlex.split(words, comments=True)
                yield found[found.index("weft") + 1 :]


def parse(words: list[str]) -> tuple[str, click.Context]:
    """The verb and the context of its innermost command, with nothing run."""
    context = click.Context(cli.cli, info_name="weft")
    name, command, rest = cli.cli.resolve_command(context, list(words))
    assert command is not None
    while isinstance(command, click.Group) and rest and not rest[0].startswith("-"):
        name, command, rest = command.resolve_command(click.Context(command), rest)
        assert command is not None
    return words[0], command.make_context(name, [w for w in rest if w != "--help"])


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_commands_exist_with_these_options(page: Path) -> None:
    known = set(list_recipes(RECIPES))
    for words in commands_of(page):
        if not words or words[0].startswith("-") or any(m in " ".join(words) for m in MISTAKES):
            continue
        verb, context = parse(words)
        recipes, overrides = split_arguments(context.params.get("arguments", ()))
        if verb == "train" and recipes and recipes[0] in known:
            load_config(recipes[0], overrides, RECIPES)


def test_the_readme_has_commands() -> None:
    verbs = {words[0] for words in commands_of(ROOT / "README.md")}
    assert verbs >= {"train", "eval", "generate", "checkpoint", "debug", "plan", "data", "convert"}


def test_a_wrong_option_would_be_found() -> None:
    with pytest.raises(click.UsageError):
        parse(["train", "--reusme", "x"])


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_somewhere(page: Path) -> None:
    for target in re.findall(r"\]\(([^)#]+)(?:#[^)]*)?\)", page.read_text()):
        if "://" not in target:
            assert (page.parent / target).exists(), f"{page.name}: {target}"


def test_exit_codes_of_the_page_are_those_of_the_code() -> None:
    from weft.trainer.exit_codes import ExitCode

    page = (ROOT / "docs" / "resume.md").read_text()
    rows = dict(re.findall(r"^\| (\d+) \| ([^|]+) \|", page, re.M))
    assert set(rows) >= {str(int(code)) for code in ExitCode}
    assert "mend" in rows[str(CheckpointError.exit_code)]
    assert "policy" in rows[str(TrainingError.exit_code)]
    assert "stopped on request" in rows[str(int(ExitCode.STOPPED))]


def test_the_python_of_the_kernels_page_runs(capsys: pytest.CaptureFixture[str]) -> None:
    (code,) = re.findall(r"```python\n(.*?)```", (ROOT / "docs" / "kernels.md").read_text(), re.S)
    exec(compile(code, "docs/kernels.md", "exec"), {})
    assert capsys.readouterr().out == "True\n"


def test_the_kernels_page_names_every_public_op() -> None:
    import weft.kernels

    page = (ROOT / "docs" / "kernels.md").read_text()
    helpers = {"HASH_PRIMES", "IGNORED", "Patches", "RotaryTable", "Routing", "attention_problem"}
    helpers |= {"following_windows", "packed_windows", "patch_block_mask", "rotary_frequencies"}
    helpers |= {"rotary_table", "routed_linear_unsorted", "segment_attention_problem"}
    missing = [name for name in set(weft.kernels.__all__) - helpers if name not in page]
    assert not missing
