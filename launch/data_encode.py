"""`weft data encode`: what a trained image tokenizer makes of a source, in shards that a generator trains on."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from .image_options import image_options, images_from

if TYPE_CHECKING:
    from ..trainer.data.images.encoded_format import EncodePlan
    from ..trainer.data.images.encoding import EncodingTokenizer

__all__ = ["command"]

EXAMPLES = """\b
Examples:
  weft data encode runs/vq16 imagenet/train --out data/codes --views ten-crop
  weft data encode runs/nested data/imagenet --out data/latents --scores data/scores
  sbatch --array 0-15 --wrap 'weft data encode runs/vq16 data/imagenet --out data/codes'
"""


@click.command("encode", epilog=EXAMPLES)
@click.argument("run", metavar="RUN")
@click.argument("source")
@click.option(
    "--out", required=True, type=click.Path(path_type=Path), help="Folder of the encoded images."
)
@click.option("--step", type=int, help="Step of the run's checkpoint; the newest by default.")
@click.option(
    "--views",
    default="flip",
    show_default=True,
    type=click.Choice(["center", "flip", "ten-crop"]),
    help="Squares of each picture: the middle; it and its mirror image; also the corners.",
)
@click.option(
    "--crop-scale",
    default=1.1,
    show_default=True,
    type=click.FloatRange(min=1),
    help="Of ten-crop: pictures are this much larger than the square.",
)
@click.option("--scores", help="Folder of scores: each image at the ratio they say.")
@click.option(
    "--ratios",
    default="auto",
    show_default=True,
    type=click.Choice(["auto", "scored", "all"]),
    help="Which ratios of a nested tokenizer are stored; auto is scored where there are scores.",
)
@click.option(
    "--dtype",
    default="float32",
    show_default=True,
    type=click.Choice(["float16", "float32"]),
    help="How latents are stored.",
)
@click.option(
    "--shard-images",
    default=1024,
    show_default=True,
    type=click.IntRange(min=1),
    help="Images of a shard, the unit of work.",
)
@click.option(
    "--batch-images",
    default=32,
    show_default=True,
    type=click.IntRange(min=1),
    help="Images the tokenizer takes at a time.",
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
    run: str,
    source: str,
    out: Path,
    step: int | None,
    part: str | None,
    held_out: int,
    **given: Any,
) -> None:
    """Encode the images of SOURCE with the tokenizer of RUN.

    Run the same command again after an interruption, or in several processes at once: finished shards are kept, and the
    last one to finish writes the manifest.
    """
    from ..trainer.data.images.encoding import EncodeOptions, finish_encoding, plan_encoding
    from ..trainer.data.images.parts import part_of
    from ..trainer.data.images.preparing import prepared_images
    from ..trainer.data.shards import read_manifest
    from ..trainer.tokenizer import open_tokenizer
    from .data import name_of
    from .options import run_folder

    mine, run_of = part_of(part), run_folder(run)
    folder = prepared_images(source, name_of(source), held_out, images_from(given))
    options = EncodeOptions(**given)
    tokenizer = open_tokenizer(run_of, step)
    plan = plan_encoding(tokenizer, folder, options)
    _encode(tokenizer, plan, folder, out, options.scores, mine)
    made = finish_encoding(out, (read_manifest(folder).images or {})["classes"])
    click.echo("\n".join(_report(out, plan, made)))


def _encode(
    tokenizer: EncodingTokenizer,
    plan: EncodePlan,
    folder: Path,
    out: Path,
    scores: str | None,
    part: tuple[int, int],
) -> None:
    import time

    from rich.console import Console
    from rich.progress import Progress

    from ..trainer.data.images.encoding import encode_shards

    console = Console(stderr=True, highlight=False)
    started = time.monotonic()
    total = sum(
        stop - start for start, stop in map(plan.range_of, range(part[0], plan.shards, part[1]))
    )
    with Progress(console=console, transient=True, disable=not console.is_terminal) as bar:
        task = bar.add_task("encoding", total=total)
        done = encode_shards(
            tokenizer,
            plan,
            folder,
            out,
            scores=scores,
            part=part,
            advance=lambda shard, images: bar.advance(task, images),
        )
    seconds = max(time.monotonic() - started, 1e-3)
    if done:
        rate = done * len(plan.views) / seconds
        console.print(f"encoded {done:,} images in {seconds:.1f} s ({rate:.1f} views/s)")


def _report(out: Path, plan: EncodePlan, made: dict[str, Any] | None) -> list[str]:
    from ..trainer.data.images.encoded_format import read_record

    views, fingerprint = len(plan.views), plan.tokenizer["fingerprint"]
    lines = []
    if made is None:
        done = sum(read_record(out, plan, shard) is not None for shard in range(plan.shards))
        lines.append(
            f"{out}: {done} of {plan.shards} shards are there; the other parts write the rest, or run this again without --part"
        )
        return [*lines, f"tokenizer {fingerprint}"]
    lines.append(f"{out}: {plan.images:,} images, {views} views each, {plan.shards} shards")
    for name, shape in made["shapes"].items():
        lines.append(f"{name}: {' x '.join(map(str, shape))}, {plan.dtype}")
    if len(plan.ratios) > 1 and plan.scores:
        counts = zip(plan.ratios, made["ratio_counts"], strict=True)
        lines.append("ratios " + ", ".join(f"{ratio}: {count:,}" for ratio, count in counts))
    lines.append(f"held out {made['held_out']} images")
    lines.append(f"tokenizer {fingerprint}")
    kind = "codes" if plan.kind == "codes" else "latents"
    length = made["shapes"]["codes"][0] if plan.kind == "codes" else 1
    lines.append(
        f"next: a recipe with data.images.kind={kind}, data.sequence_length={length} and data.sources: "
        f"[{{name: encoded, path: {out}}}]"
    )
    return lines
