"""What several commands share: recipes with overrides, run folders, tables."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from difflib import get_close_matches
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from ..models.errors import ConfigError

if TYPE_CHECKING:
    from ..trainer.configuration.load import Loaded

__all__ = [
    "RECIPES",
    "load_recipe",
    "load_recipe_or_run",
    "load_run",
    "looks_like_run",
    "max_restarts_of",
    "overrides_argument",
    "plain_config",
    "print_table",
    "recipe_argument",
    "run_argument",
    "run_folder",
    "split_arguments",
]

RECIPES = Path(__file__).parent / "recipes"
MAX_RESTARTS = 10
"""Failures that are restarted where the configuration does not say; the default of run.max_restarts."""
_MOST_LISTED = 5


def recipe_argument(function: Callable[..., Any]) -> Callable[..., Any]:
    """Adds the argument `recipe`: a name under launch/recipes or a path to a YAML file."""
    return click.argument("recipe", metavar="RECIPE")(function)


def run_argument(function: Callable[..., Any]) -> Callable[..., Any]:
    """Adds the argument `run`: a run folder; give it to `run_folder` or `load_run`."""
    return click.argument("run", metavar="RUN")(function)


def overrides_argument(function: Callable[..., Any]) -> Callable[..., Any]:
    """Adds the argument `overrides`: a tuple of `key=value`; put it below the other arguments."""
    return click.argument("overrides", metavar="[KEY=VALUE]...", nargs=-1)(function)


def split_arguments(arguments: Sequence[str]) -> tuple[list[str], list[str]]:
    """Arguments in any order, as (those that are not overrides, overrides)."""
    overrides = [argument for argument in arguments if _is_override(argument)]
    return [argument for argument in arguments if not _is_override(argument)], overrides


def _is_override(argument: str) -> bool:
    # A path may hold `=` as well, but then something other than a dotted word stands before it.
    key, equals, _ = argument.partition("=")
    return bool(equals) and "/" not in key and not Path(argument).exists()


def load_recipe(recipe: str, overrides: Sequence[str] = ()) -> Loaded:
    """The checked configuration of a recipe argument.

    Raises:
        ConfigError: every error found, one a line.
    """
    from ..trainer.configuration.load import load_config

    return load_config(recipe, list(overrides), RECIPES)


def looks_like_run(argument: str) -> bool:
    return (Path(argument) / "config.yaml").is_file()


def run_folder(run: str) -> Path:
    """The run folder a RUN argument means: a path, or a name under runs/.

    Raises:
        ConfigError: there is no such run; the nearest are listed.
    """
    for folder in (Path(run), Path("runs") / run):
        if looks_like_run(str(folder)):
            return folder
    found = "there is no folder" if not Path(run).exists() else "no config.yaml in"
    raise ConfigError(f"{run} is not a run: {found} {run}; {_nearby_runs(Path(run))}")


def _nearby_runs(run: Path) -> str:
    parents = dict.fromkeys([run, run.parent, Path("runs")])
    runs = sorted({str(p.parent) for parent in parents for p in parent.glob("*/config.yaml")})
    if not runs:
        return "give the folder a run was started in (the run.dir of its recipe)"
    near = get_close_matches(str(run), runs, n=_MOST_LISTED, cutoff=0.5) or runs[:_MOST_LISTED]
    return f"runs here: {', '.join(near)}"


def load_run(run: str, overrides: Sequence[str] = ()) -> Loaded:
    """The checked configuration of a run folder argument.

    Raises:
        ConfigError: no such run, or an override that cannot work.
    """
    folder = run_folder(run)
    from ..trainer.configuration.load import load_run_config

    return load_run_config(folder, list(overrides))


def plain_config(run: Path) -> dict[str, Any]:
    """A run's config.yaml as plain data, unchecked and fast; empty where it cannot be read."""
    import yaml

    # The same text a hundred times faster, where PyYAML was built with libyaml.
    loader = getattr(yaml, "CSafeLoader", yaml.SafeLoader)
    try:
        data = yaml.load((run / "config.yaml").read_bytes(), Loader=loader)
    except (OSError, yaml.YAMLError):
        return {}
    return data if isinstance(data, dict) else {}


def max_restarts_of(run: Path) -> int:
    """A run's run.max_restarts, without checking the rest of its configuration."""
    value = (plain_config(run).get("run") or {}).get("max_restarts", MAX_RESTARTS)
    return value if isinstance(value, int) else MAX_RESTARTS


def load_recipe_or_run(argument: str, overrides: Sequence[str] = ()) -> Loaded:
    """The checked configuration of an argument that may be either; a run folder wins."""
    is_run = looks_like_run(argument)
    return load_run(argument, overrides) if is_run else load_recipe(argument, overrides)


def print_table(
    title: str,
    columns: Sequence[str],
    rows: Sequence[Sequence[Any]],
    *,
    right: Sequence[int] = (),
    stderr: bool = False,
) -> None:
    """A plain table on standard output, or error; `right` lists the columns to align right."""
    from rich import box
    from rich.console import Console
    from rich.table import Table

    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    for i, name in enumerate(columns):
        table.add_column(name, justify="right" if i in right else "left", overflow="fold")
    for row in rows:
        table.add_row(*(str(value) for value in row))
    # Not markup: a message may hold brackets of its own.
    console = Console(stderr=stderr, markup=False)
    # Piped output has no width of its own; 80 columns would cut paths and numbers.
    if not console.is_terminal:
        console = Console(width=160, stderr=stderr, markup=False)
    # Not the table's own title, which wraps at the width of a narrow table.
    if title:
        console.print(title, style="bold", markup=False, highlight=False)
    console.print(table)
