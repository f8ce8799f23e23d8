"""`weft train`: start a run from a recipe, or go on with one.

The configuration is checked whole before anything heavy is imported, so a typo is answered at once.
"""

from __future__ import annotations

import shutil
import signal
from typing import TYPE_CHECKING

import click

from .options import load_recipe, load_run, split_arguments

if TYPE_CHECKING:
    from ..trainer.configuration.load import Loaded

__all__ = ["command"]

EXAMPLES = """\b
Examples:
  weft train olmo2/quickstart train.steps=50
  weft train my_recipe.yaml run.dir=runs/first optimizer.lr=1e-3
  weft train --resume runs/first train.steps=200
  weft train olmo2/1b --print-config
  weft train --help-keys schedule
  torchrun --nproc-per-node 2 -m weft train olmo2/quickstart
"""


@click.command(epilog=EXAMPLES)
@click.argument("arguments", metavar="[RECIPE] [KEY=VALUE]...", nargs=-1)
@click.option("--resume", metavar="RUN", help="Go on with this run from its newest checkpoint.")
@click.option(
    "--print-config",
    is_flag=True,
    help="Print the complete configuration, each value's origin beside it.",
)
@click.option(
    "--help-keys",
    metavar="[PREFIX]",
    is_flag=False,
    flag_value="",
    help="List the configuration's keys (below PREFIX) with types, defaults and meanings.",
)
def command(
    arguments: tuple[str, ...], resume: str | None, print_config: bool, help_keys: str | None
) -> int:
    """Train a recipe, or go on with a run.

    RECIPE is a name under weft's recipes (olmo2/1b) or a path to a YAML file. KEY=VALUE pairs
    override it; values are YAML, and items of lists go by number (data.sources.0.weight=2).
    A resumed run may change its engine, its devices and its number of ranks.
    """
    recipes, overrides = split_arguments(arguments)
    if help_keys is not None:
        _print_keys(help_keys)
        return 0
    loaded = _load(recipes, resume, overrides)
    if print_config:
        from ..trainer.configuration.dump import dump_config

        click.echo(dump_config(loaded.config, loaded.origins), nl=False)
        return 0
    from ..trainer.policies import StopRequest
    from ..trainer.train import train

    code = train(loaded.config, loaded.config.run_dir, resume=resume is not None)
    if code:
        # Schedulers signal more than once; all is saved, and this process should end with its own code.
        for number in StopRequest.SIGNALS:
            signal.signal(number, signal.SIG_IGN)
    return code


def _load(recipes: list[str], resume: str | None, overrides: list[str]) -> Loaded:
    if len(recipes) > 1:
        raise click.UsageError(
            f"one RECIPE is expected, found {' and '.join(map(repr, recipes))}; overrides are KEY=VALUE without spaces"
        )
    if resume is not None:
        if recipes:
            raise click.UsageError(
                f"--resume takes its configuration from the run, so {recipes[0]!r} has no place here; "
                "leave it out, or give KEY=VALUE"
            )
        return load_run(resume, overrides)
    if not recipes:
        raise click.UsageError("name a RECIPE, such as olmo2/quickstart, or a run: --resume RUN")
    return load_recipe(recipes[0], overrides)


def _print_keys(prefix: str) -> None:
    from ..trainer.configuration.reference import keys_under

    width = shutil.get_terminal_size((100, 24)).columns
    for key in keys_under(prefix):
        default = key.default_text
        note = "" if default == "required" else f" (default {default})"
        click.echo(f"{key.name}: {key.type_text}{' (required)' if default == 'required' else note}")
        click.echo(click.wrap_text(key.description, width, "    ", "    "))
