"""`weft data patches`: how long patches are, which threshold gives which length, and where the borders fall."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from .options import RECIPES, load_recipe_or_run, overrides_argument
from .patch_options import patch_options, patching_from

if TYPE_CHECKING:
    from ..models.blt.patching_config import PatchingConfig
    from ..trainer.data.config import DataConfig

__all__ = ["command"]

EXAMPLES = """\b
Examples:
  weft data patches builtin:python-stdlib --entropy-model runs/entropy --patch-size 4.5
  weft data patches texts/ --entropy-model runs/entropy --scheme rise --rise 0.2 --plot patches.png
  weft data patches texts/ --scheme space --json
"""


@click.command("patches", epilog=EXAMPLES)
@click.argument("what", metavar="SOURCE|RECIPE|RUN")
@overrides_argument
@click.option(
    "--entropy-model",
    type=click.Path(path_type=Path),
    help="Run folder of a trained entropy model.",
)
@patch_options
@click.option("--sequence-length", type=click.IntRange(min=2), help="Positions of one row.")
@click.option("--sample", type=click.IntRange(min=1), help="Bytes to look at.")
@click.option(
    "--text",
    "text_bytes",
    default=600,
    show_default=True,
    type=click.IntRange(min=0),
    help="Bytes of text to show with its borders.",
)
@click.option("--plot", type=click.Path(path_type=Path), help="Draw lengths and curve into a PNG.")
@click.option("--json", "as_json", is_flag=True, help="Everything as one JSON object.")
def command(
    what: str,
    overrides: tuple[str, ...],
    entropy_model: Path | None,
    sequence_length: int | None,
    sample: int | None,
    text_bytes: int,
    plot: Path | None,
    as_json: bool,
    **given: Any,
) -> None:
    """Show what patches a rule makes of SOURCE: the distribution of their lengths, the mean length for each threshold,
    and text with the borders marked.

    SOURCE is what `weft data prepare` takes, or a prepared dataset; a RECIPE or RUN brings its data and its rule.
    """
    import torch
    from rich.console import Console

    from ..trainer.data.dataset import open_data
    from ..trainer.patch_report import make_report, plot_report, render_report
    from ..trainer.patching import open_patch_maker, sample_batches

    data_config, base, seed = _data_of(what, overrides, sequence_length)
    patching, compute = patching_from(given, entropy_model, base)
    device = "cuda" if torch.cuda.is_available() and patching.needs_entropy else "cpu"
    maker = open_patch_maker(patching, device, compute)
    data = open_data(data_config)
    report = make_report(
        maker, sample_batches(data, seed, device, sample), data.vocabulary, text_bytes
    )
    if plot:
        plot_report(report, plot)
    if as_json:
        click.echo(json.dumps(report.as_dict()))
        return
    console = Console(highlight=False)
    if not console.is_terminal:
        console = Console(highlight=False, width=140)
    for item in render_report(report, is_terminal=console.is_terminal):
        console.print(item)
    if plot:
        console.print(f"drawn in {plot}", markup=False)


def _data_of(
    what: str, overrides: tuple[str, ...], length: int | None
) -> tuple[DataConfig, PatchingConfig | None, int]:
    """Data, the rule that comes with it, and the seed of its order."""
    from ..trainer.configuration.recipes import list_recipes
    from ..trainer.data.config import DataConfig, SourceConfig
    from ..trainer.patching import patching_of
    from .data import name_of

    path = Path(what)
    is_recipe = what.removesuffix(".yaml") in list_recipes(RECIPES) or path.suffix in (
        ".yaml",
        ".yml",
    )
    if is_recipe or (path / "config.yaml").is_file():
        if length is not None:
            overrides = (*overrides, f"data.sequence_length={length}")
        config = load_recipe_or_run(what, overrides).config
        return config.data, patching_of(config), config.run.seed
    source = SourceConfig(name=name_of(what), path=what)
    return DataConfig(sources=(source,), sequence_length=length or 4096), None, 0
