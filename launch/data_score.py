"""`weft data score`: how complex the images of a source are, and at which ratio each is to be trained."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from ..models.errors import ConfigError
from .image_options import image_options, images_from, numbers_of

if TYPE_CHECKING:
    from ..trainer.data.images.scorers import Scorer
    from ..trainer.data.images.scoring import ScoreOptions

__all__ = ["command"]

EXAMPLES = """\b
Examples:
  weft data score data/photos --out data/scores --tokens 0.9
  weft data score imagenet/train --out data/scores --scorer llm --model models/llm --captions captions.jsonl
  weft data score data/photos --out data/scores --scorer residual --block 16 --shares 0.1,0.5,0.4
"""
LLM_THRESHOLDS = (3.0, 6.0)


@click.command("score", epilog=EXAMPLES)
@click.argument("source")
@click.option("--out", required=True, type=click.Path(path_type=Path), help="Folder of the scores.")
@click.option(
    "--scorer",
    "name",
    default="proxy",
    show_default=True,
    type=click.Choice(["proxy", "residual", "llm"]),
    help="proxy: bits a pixel as JPEG; residual: what blocks' means leave; llm: a language model reads captions.",
)
@click.option("--model", type=click.Path(path_type=Path), help="Of llm: a local folder.")
@click.option(
    "--captions",
    type=click.Path(path_type=Path),
    help="Of llm: JSON lines of id and caption, before those of the data.",
)
@click.option(
    "--size",
    default=256,
    show_default=True,
    type=click.IntRange(min=8),
    help="Pixels of the shorter side at which pictures are scored.",
)
@click.option(
    "--block",
    default=16,
    show_default=True,
    type=click.IntRange(min=2),
    help="Of residual: pixels a side of a block.",
)
@click.option("--ratios", default="8,16,32", show_default=True, help="Finest first.")
@click.option(
    "--tokens",
    type=click.FloatRange(min=0, min_open=True),
    help="T: wanted tokens of a mean image, where one at the middle ratio has 1.",
)
@click.option(
    "--finest-share",
    default=0.05,
    show_default=True,
    type=click.FloatRange(0, 1),
    help="With --tokens: share of the finest ratio.",
)
@click.option("--shares", help="Wanted share of each ratio, instead of --tokens.")
@click.option(
    "--thresholds", help="Scores up to which an image is coarsest, and next: 3,6 is llm's default."
)
@click.option(
    "--calibration",
    default=10_000,
    show_default=True,
    type=click.IntRange(min=1),
    help="Images that thresholds are taken of.",
)
@click.option(
    "--threads", default=1, show_default=True, type=click.IntRange(min=1), help="That decode."
)
@click.option(
    "--part", help="K/N: every N-th shard from the K-th; by rank or array task otherwise."
)
@click.option(
    "--held-out",
    default=20,
    show_default=True,
    type=click.IntRange(0, 4096),
    help="Of a raw SOURCE: images kept for evaluation.",
)
@image_options
def command(
    source: str, out: Path, threads: int, part: str | None, held_out: int, **given: Any
) -> None:
    """Score the images of SOURCE and assign compression ratios.

    Thresholds are quantiles of a calibration sample that give the wanted shares; they are stored and used for all images. Run
    the same command again after an interruption: scores are kept.
    """
    from rich.console import Console
    from rich.progress import Progress

    from ..trainer.data.images.parts import part_of
    from ..trainer.data.images.preparing import prepared_images
    from ..trainer.data.images.scoring import finish_scores, score_shards
    from ..trainer.data.shards import read_manifest
    from .data import name_of

    mine = part_of(part)
    images = images_from(given)
    options = _options(given)
    scorer = _scorer(given)
    folder = prepared_images(source, name_of(source), held_out, images)
    total = read_manifest(folder).documents // mine[1]
    console = Console(stderr=True)
    with Progress(console=console, transient=True, disable=not console.is_terminal) as bar:
        task = bar.add_task("scoring", total=total)
        score_shards(
            scorer,
            folder,
            out,
            part=mine,
            threads=1 if given["name"] == "llm" else threads,
            advance=lambda images: bar.advance(task, images),
        )
    click.echo("\n".join(_report(out, finish_scores(scorer, folder, out, options))))


def _options(given: dict[str, Any]) -> ScoreOptions:
    from ..trainer.data.images.scoring import ScoreOptions
    from ..trainer.data.images.sidecar import shares_for

    asked = [name for name in ("tokens", "shares", "thresholds") if given[name] is not None]
    if len(asked) > 1:
        raise ConfigError(f"--{asked[0]} and --{asked[1]} contradict each other; give one of them")
    ratios = tuple(int(ratio) for ratio in numbers_of(given["ratios"], "--ratios"))
    shares = numbers_of(given["shares"], "--shares") if given["shares"] else None
    borders = numbers_of(given["thresholds"], "--thresholds") if given["thresholds"] else None
    if not asked and given["name"] == "llm":
        borders = LLM_THRESHOLDS
    elif shares is None and borders is None:
        shares = shares_for(ratios, given["tokens"] or 1.0, given["finest_share"])
    return ScoreOptions(ratios, shares, borders, given["calibration"])


def _scorer(given: dict[str, Any]) -> Scorer:
    from ..trainer.data.images.scorers import open_proxy

    if given["name"] != "llm":
        return open_proxy(given["name"], given["size"], given["block"])
    from ..trainer.data.images.llm_scorer import LanguageModelScorer, read_captions

    if given["model"] is None:
        raise ConfigError("--scorer llm needs --model FOLDER, a local causal language model")
    captions = read_captions(given["captions"]) if given["captions"] else None
    return LanguageModelScorer(given["model"], captions)


def _report(out: Path, made: dict[str, Any] | None) -> list[str]:
    if made is None:
        return ["this part is scored; the others write the rest, or run this again without --part"]
    shares = zip(made["ratios"], made["shares"], strict=True)
    borders = ", ".join(f"{border:.4g}" for border in made["thresholds"])
    return [
        f"{out}: {made['images']:,} images scored by {made['scorer']['name']}, {made['score_missing']} without a score",
        f"thresholds {borders} of {made['calibration']['images']:,} images",
        f"shares {', '.join(f'{ratio}: {share:.1%}' for ratio, share in shares)}; T = {made['mean_tokens']:.3f}",
        f"next: a recipe with data.images.ratios: {{values: {made['ratios']}, scores: {out}}}",
    ]
