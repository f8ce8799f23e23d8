"""What several commands share: recipes with overrides, run folders, tables."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..models.errors import ConfigError

if TYPE_CHECKING:
    from ..trainer.configuration.load import Loaded

__all__ = ["RECIPES", "load_recipe", "load_run", "looks_like_run", "print_table"]

RECIPES = Path(__file__).parent / "recipes"


def load_recipe(recipe: str, overrides: Sequence[str]) -> Loaded:
    """The checked configuration of a recipe argument."""
    from ..trainer.configuration.load import load_config

    return load_config(recipe, list(overrides), RECIPES)


def looks_like_run(argument: str) -> bool:
    return (Path(argument) / "config.yaml").is_file()


def load_run(run: str, overrides: Sequence[str] = ()) -> Loaded:
    """The checked configuration of a run folder argument.

    Raises:
        ConfigError: no such run; the runs nearby are listed.
    """
    from ..trainer.configuration.load import load_run_config

    folder = Path(run)
    if not looks_like_run(run):
        parents = {folder.parent, Path("runs")}
        nearby = sorted(str(p.parent) for parent in parents if parent.is_dir() for p in parent.glob("*/config.yaml"))
        hint = f"runs here: {', '.join(nearby[:5])}" if nearby else "give the folder a run was started in"
        raise ConfigError(f"{run} is not a run folder (no config.yaml); {hint}")
    return load_run_config(folder, list(overrides))


def print_table(title: str, columns: Sequence[str], rows: Sequence[Sequence[Any]], *, right: Sequence[int] = ()) -> None:
    """A plain table on standard output; `right` lists the columns to align right."""
    from rich import box
    from rich.console import Console
    from rich.table import Table

    table = Table(title=title, title_justify="left", title_style="bold", box=box.SIMPLE_HEAD, pad_edge=False)
    for i, name in enumerate(columns):
        table.add_column(name, justify="right" if i in right else "left", overflow="fold")
    for row in rows:
        table.add_row(*(str(value) for value in row))
    console = Console()
    # Piped output has no width of its own; 80 columns would cut paths and numbers.
    if not console.is_terminal:
        console = Console(width=160)
    console.print(table)
