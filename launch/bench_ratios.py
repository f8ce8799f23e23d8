"""`weft bench ratios`: a diffusion transformer on images of several ratios, packed against padded and against one call a ratio."""

from __future__ import annotations

import json
import platform
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from ..models.errors import ConfigError
from .options import load_recipe, print_table

if TYPE_CHECKING:
    from ..trainer.configuration.schema import TrainingConfig

__all__ = ["ratios_command"]


@click.command(
    "ratios",
    epilog="\b\nExample:\n  weft bench ratios dit/cat-ref-s-2 model.n_layers=4 --images 2,4,2",
)
@click.argument("recipe", default="dit/cat-ref-s-2")
@click.argument("overrides", nargs=-1, metavar="[KEY=VALUE]...")
@click.option(
    "--images",
    default="4,8,4",
    show_default=True,
    help="Images at each ratio of the model, in its order.",
)
@click.option(
    "--turns", type=click.IntRange(min=1), default=3, show_default=True, help="Turns of each side."
)
@click.option(
    "--json", "json_path", type=click.Path(dir_okay=False), help="Also write the numbers here."
)
def ratios_command(
    recipe: str, overrides: tuple[str, ...], images: str, turns: int, json_path: str | None
) -> None:
    """Measure a step of RECIPE's diffusion transformer on a batch whose images differ in their number of tokens."""
    if json_path and not Path(json_path).absolute().parent.is_dir():
        raise click.BadParameter(
            f"there is no folder {Path(json_path).parent} for {json_path}", param_hint="--json"
        )
    config = load_recipe(recipe, list(overrides)).config
    model: Any = config.model
    if model.family != "dit":
        raise ConfigError(f"{recipe} is of family {model.family}; give a recipe of family dit")
    counts = _parse_counts(images, len(model.ratios))
    results = _measure(config, recipe, counts, turns)
    if json_path:
        Path(json_path).write_text(json.dumps(results, indent=1) + "\n")
    _print(results)


def _parse_counts(images: str, ratios: int) -> list[int]:
    parts = images.split(",")
    if len(parts) != ratios or not all(part.isdecimal() and int(part) for part in parts):
        raise click.BadParameter(
            f"{images!r} is not {ratios} numbers of images, one a ratio, such as {','.join(['4'] * ratios)}",
            param_hint="--images",
        )
    return [int(part) for part in parts]


def _measure(config: TrainingConfig, recipe: str, counts: list[int], turns: int) -> dict[str, Any]:
    import torch

    from ..trainer.benchmarks.mixed_ratios import compare_layouts

    is_cuda = config.run.device != "cpu" and torch.cuda.is_available()
    device = torch.device("cuda" if is_cuda else "cpu")
    model: Any = config.model
    return {
        "date": time.strftime("%Y-%m-%d"),
        "recipe": recipe,
        "device": torch.cuda.get_device_name() if is_cuda else "cpu",
        "torch": torch.__version__,
        "python": platform.python_version(),
        "threads": torch.get_num_threads(),
        "parameters": sum(model.count_parameters().values()),
        "image_tokens": [model.image_tokens(item.ratio) for item in model.ratios],
        "image_counts": counts,
        **compare_layouts(config, device, counts, turns),
    }


def _print(results: dict[str, Any]) -> None:
    pairs = zip(results["image_counts"], results["image_tokens"], strict=True)
    mix = " and ".join(f"{count} x {tokens}" for count, tokens in pairs)
    rows = [
        ["packed", f"{results['packed_s'] * 1e3:,.0f}", "1.00", f"{results['tokens']:,}"],
        [
            "padded to the longest",
            f"{results['padded_s'] * 1e3:,.0f}",
            f"{results['padded_ratio']:.2f}",
            f"{results['padded_tokens']:,}",
        ],
        [
            "one call a ratio",
            f"{results['separate_s'] * 1e3:,.0f}",
            f"{results['separate_ratio']:.2f}",
            f"{results['tokens']:,}",
        ],
    ]
    print_table(
        f"{results['recipe']}, {results['parameters']:,} parameters; images x tokens: {mix}; on {results['device']}, "
        f"torch {results['torch']}, {results['threads']} threads, {results['date']}",
        ["forward and backward", "ms", "times packed", "tokens"],
        rows,
        right=(1, 2, 3),
    )
    click.echo(
        f"predictions differ by at most {results['difference']:.1e} of the largest; "
        f"{results['images_per_s']:.1f} images/s packed"
    )
