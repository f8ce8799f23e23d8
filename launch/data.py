"""`weft data`: prepare datasets ahead of a run, and look at what training will see."""

from __future__ import annotations

import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from ..models.errors import DataError
from .data_encode import command as encode
from .data_patches import command as patches
from .data_score import command as score
from .image_options import image_options, images_from
from .interleaved_options import interleaved_from, interleaved_options
from .options import load_recipe_or_run, overrides_argument
from .patch_options import patch_options, patching_from

if TYPE_CHECKING:
    from ..trainer.data.config import DataConfig
    from ..trainer.data.patches import PatchJob
    from ..trainer.data.shards import Manifest

__all__ = ["command", "name_of"]

PREPARE_EXAMPLES = """\b
Examples:
  weft data prepare ~/texts --out data/texts
  weft data prepare 'web/*.jsonl.zst' --out data/web --vocabulary hf:tokenizers/dolma2
  weft data prepare builtin:python-stdlib --out data/stdlib --held-out 20
  weft data prepare ~/texts --out data/texts --patches-from runs/entropy --patch-size 4.5
  weft data prepare pairs.jsonl --out data/pairs --format interleaved --codec vae:models/vae --image-size 256
  weft data prepare builtin:digits-captions --out data/digits --image-size 8 --image-channels 1
  weft data prepare imagenet/train --images --out data/imagenet
"""

INSPECT_EXAMPLES = """\b
Examples:
  weft data inspect olmo2/quickstart
  weft data inspect olmo2/quickstart data.sequence_length=1024 --samples 1
  weft data inspect data/texts --sequence-length 512 --verify
  weft data inspect data/digits --sequence-length 128 --images digits.png
"""


@click.group()
def command() -> None:
    """Prepare datasets, look at what training will see.

    Recipes prepare their sources by themselves on first use; prepare by hand what is large or
    shared.

    Example: weft data inspect olmo2/quickstart
    """


@command.command(epilog=PREPARE_EXAMPLES)
@click.argument("source")
@click.option(
    "--out",
    required=True,
    type=click.Path(path_type=Path),
    help="Folder of the dataset; must be new.",
)
@click.option(
    "--vocabulary",
    default="bytes",
    show_default=True,
    help="bytes, or hf:PATH with tokenizer.json.",
)
@click.option(
    "--format",
    "kind",
    default="auto",
    show_default=True,
    type=click.Choice(["auto", "text", "jsonl", "parquet", "tokens", "interleaved", "webdataset"]),
    help="How to read SOURCE; auto goes by the file names.",
)
@click.option(
    "--text-key", default="text", show_default=True, help="Field of the text in JSONL and Parquet."
)
@click.option(
    "--extension", "extensions", multiple=True, help="Only files with this ending; may be repeated."
)
@click.option(
    "--token-dtype",
    default="uint32",
    show_default=True,
    type=click.Choice(["uint16", "uint32"]),
    help="Type of headerless token files.",
)
@click.option(
    "--workers",
    type=click.IntRange(min=1),
    help="Processes; the result is the same for any number.",
)
@click.option(
    "--held-out",
    default=20,
    show_default=True,
    type=click.IntRange(0, 4096),
    help="Documents kept for evaluation.",
)
@click.option(
    "--held-out-min-bytes", default=0, type=click.IntRange(min=0), help="Hold out none shorter."
)
@click.option("--held-out-max-bytes", type=click.IntRange(min=1), help="Hold out none longer.")
@click.option(
    "--drop-repetitive",
    is_flag=True,
    help="Leave out documents with 32 repeats of an n-gram in a row.",
)
@click.option(
    "--patches-from",
    type=click.Path(path_type=Path),
    help="Store patch starts too: run of an entropy model (with --threshold or --patch-size), or one with patches.",
)
@click.option(
    "--images",
    "is_images",
    is_flag=True,
    help="SOURCE is images with classes: folders, tars, Parquet, builtin:digits and others.",
)
@patch_options
@interleaved_options
@image_options
@click.option(
    "--sequence-length",
    default=4096,
    show_default=True,
    type=click.IntRange(min=2),
    help="Of the runs that will read the patches: data.sequence_length.",
)
def prepare(
    source: str,
    out: Path,
    vocabulary: str,
    kind: str,
    text_key: str,
    extensions: tuple[str, ...],
    token_dtype: str,
    workers: int | None,
    held_out: int,
    held_out_min_bytes: int,
    held_out_max_bytes: int | None,
    drop_repetitive: bool,
    patches_from: Path | None,
    sequence_length: int,
    is_images: bool,
    **given: Any,
) -> None:
    """Prepare SOURCE into memory-mapped shards.

    SOURCE is a file, a folder, a glob, or builtin:NAME: text or code, JSONL (.gz, .zst), Parquet,
    token files, documents of text, images and speech (JSONL with --format interleaved, WebDataset tar), or with --images
    images with classes. Run the same command again after an interruption: finished shards are kept.
    """
    from ..trainer.data.config import HeldOutConfig, RepeatFilterConfig, SourceConfig
    from ..trainer.data.prepare import plan_preparation, prepare_source
    from ..trainer.data.sources import INTERLEAVED_KINDS, list_inputs

    config = SourceConfig(
        name=name_of(source),
        path=source,
        format=kind,  # type: ignore[arg-type]
        text_key=text_key,
        extensions=extensions,
        token_dtype=token_dtype,  # type: ignore[arg-type]
    )
    rules = HeldOutConfig(
        documents=held_out, min_bytes=held_out_min_bytes, max_bytes=held_out_max_bytes
    )
    images = images_from(given)
    if is_images:
        preparation = plan_preparation(
            config, "", held_out=rules, repeats=RepeatFilterConfig(), images=images
        )
        _report(prepare_source(preparation, out, workers=workers), out)
        return
    listing = list_inputs(config)
    interleaved = interleaved_from(given, needed=listing.kind in INTERLEAVED_KINDS)
    preparation = plan_preparation(
        config,
        vocabulary,
        held_out=rules,
        repeats=RepeatFilterConfig(),
        drop_repetitive=drop_repetitive,
        patches=_patch_job(patches_from, given, vocabulary, sequence_length),
        interleaved=interleaved,
    )
    if preparation.listing.kind == "prepared":
        raise DataError(
            f"{source} is a prepared dataset already; name it in a recipe's data.sources path"
        )
    _report(prepare_source(preparation, out, workers=workers), out)


def _patch_job(
    run: Path | None, given: dict[str, Any], vocabulary: str, length: int
) -> PatchJob | None:
    """Patches to store: those of a run, or of a rule that needs no entropy model."""
    asked = [name for name, value in given.items() if value is not None]
    if run is None and not asked:
        return None
    if vocabulary != "bytes":
        raise DataError(f"patches are of bytes, not of --vocabulary {vocabulary}; leave it out")
    if run is None and given["scheme"] not in ("stride", "space"):
        raise DataError(
            f"--{asked[0].replace('_', '-')} needs an entropy model; name its run with --patches-from"
        )
    import torch

    from ..trainer.patching import patch_job

    patching, compute = patching_from(given, run)
    device = "cuda" if torch.cuda.is_available() and patching.needs_entropy else "cpu"
    return patch_job(patching, length, device, compute)


def name_of(path: str) -> str:
    """A source's name from its path: what configuration allows of its last part."""
    last = Path(path.removeprefix("builtin:")).expanduser().resolve().name
    return re.sub(r"[^\w.-]+", "-", last).strip("-") or "data"


def _report(manifest: Manifest, out: Path) -> None:
    if manifest.images is not None:
        click.echo("\n".join(_image_lines(manifest, manifest.images, out)))
        return
    dropped = ", ".join(f"{number} {reason}" for reason, number in sorted(manifest.dropped.items()))
    lines = [
        f"{out}: {manifest.documents:,} documents, {manifest.tokens:,} ids, {manifest.bytes:,} "
        "bytes, "
        f"{len(manifest.shards)} shards",
        f"held out {len(manifest.held_out)} documents, left out {dropped or 'none'}",
        *_patch_lines(manifest),
        *_interleaved_lines(manifest),
        f"fingerprint {manifest.fingerprint}",
        f"next: weft data inspect {out}, or a recipe with data.sources: "
        f"[{{name: {name_of(str(out))}, path: {out}}}]",
    ]
    click.echo("\n".join(lines))


def _image_lines(manifest: Manifest, images: dict[str, Any], out: Path) -> list[str]:
    counts = images["class_counts"]
    spread = f", {min(counts):,} to {max(counts):,} images each" if counts else ""
    height, width, name = images["smallest"]
    bad = images["quarantined"]
    return [
        f"{out}: {manifest.documents:,} images, {manifest.bytes:,} bytes, {len(manifest.shards)} shards",
        f"{len(counts)} classes{spread}; the smallest image is {name}, {width} x {height} pixels",
        f"held out {len(manifest.held_out)} images, quarantined {bad}"
        + (f" (see {out / 'quarantine.jsonl'})" if bad else ""),
        f"fingerprint {manifest.fingerprint}",
        f"next: weft data inspect {out}, or a recipe with data.images and data.sources: "
        f"[{{name: {name_of(str(out))}, path: {out}}}]",
    ]


def _patch_lines(manifest: Manifest) -> list[str]:
    if manifest.patches is None:
        return []
    known = {name: value for name, value in manifest.patches.items() if value is not None}
    told = ", ".join(f"{name.replace('_', ' ')} {str(v)[:20]}" for name, v in known.items())
    return [f"patches: {told}"]


def _interleaved_lines(manifest: Manifest) -> list[str]:
    found = manifest.interleaved
    if found is None:
        return []
    lines = [f"holds {', '.join(found['modalities'])}"]
    image = found.get("image")
    if image is not None:
        shape, grid = (" x ".join(map(str, image[key])) for key in ("shape", "grid"))
        count = sum(shard.images for shard in manifest.shards)
        line = f"{count:,} images as {image['kind']} of {shape}, {grid} positions each"
        if image["statistics"]:
            line += (
                f"; mean {image['statistics']['mean']:.4f}, std {image['statistics']['std']:.4f}"
            )
        lines.append(line)
    return lines


@command.command(epilog=INSPECT_EXAMPLES)
@click.argument("what", metavar="RECIPE|RUN|DIR")
@overrides_argument
@click.option(
    "--samples", default=3, show_default=True, type=click.IntRange(min=0), help="Samples to print."
)
@click.option("--seed", type=int, help="Seed of the order; a recipe's own by default.")
@click.option("--vocabulary", help="For a DIR whose vocabulary is not bytes: hf:PATH.")
@click.option(
    "--sequence-length",
    default=4096,
    show_default=True,
    type=click.IntRange(min=2),
    help="For a DIR.",
)
@click.option("--verify", is_flag=True, help="Check every byte against the checksums first.")
@click.option(
    "--images",
    type=click.Path(path_type=Path, dir_okay=False),
    help="Write the first images of the order as a grid into this PNG.",
)
def inspect(
    what: str,
    overrides: tuple[str, ...],
    samples: int,
    seed: int | None,
    vocabulary: str | None,
    sequence_length: int,
    verify: bool,
    images: Path | None,
) -> None:
    """Show sources, document lengths, packing and decoded samples of a recipe, a run, or a prepared
    dataset.
    """
    from rich.console import Console

    from ..trainer.data.dataset import open_data
    from ..trainer.data.images.encoded_format import is_encoded, verify_encoded
    from ..trainer.data.inspect import render_dataset
    from ..trainer.data.shards import verify_prepared

    if (Path(what) / "manifest.json").is_file():
        config, own_seed = _config_of_folder(Path(what), vocabulary, sequence_length, overrides), 0
    else:
        loaded = load_recipe_or_run(what, overrides).config
        config, own_seed = loaded.data, loaded.run.seed
    data = open_data(config)
    if verify:
        for source in data.sources:
            if is_encoded(source.folder):
                verify_encoded(source.folder)
            else:
                verify_prepared(source.folder)
    console = Console(highlight=False)
    # Piped output has no width of its own; 80 columns would cut tables.
    if not console.is_terminal:
        console = Console(highlight=False, width=140)
    for item in render_dataset(data, seed=own_seed if seed is None else seed, samples=samples):
        console.print(item)
    if images is not None:
        from ..trainer.data.images import inspect as of_images
        from ..trainer.data.interleaved.inspect import write_images

        write = write_images if config.images is None else of_images.write_images
        count = write(data, images, own_seed if seed is None else seed)
        click.echo(f"{count} images in {images}")


def _config_of_folder(
    folder: Path, vocabulary: str | None, sequence_length: int, overrides: tuple[str, ...]
) -> DataConfig:
    from ..trainer.data.config import DataConfig, SourceConfig
    from ..trainer.data.images.inspect import config_of_folder
    from ..trainer.data.shards import read_manifest

    if overrides:
        raise DataError(f"{overrides[0]}: settings go with a recipe or a run, not with a folder")
    images = config_of_folder(folder, name_of(str(folder)))
    if images is not None:
        return images
    manifest = read_manifest(folder)
    kind = manifest.vocabulary["kind"]
    if vocabulary is None and kind != "bytes":
        raise DataError(
            f"{folder} was prepared with a tokenizer; name it with --vocabulary hf:PATH"
        )
    source = SourceConfig(name=name_of(str(folder)), path=str(folder), format="prepared")
    return DataConfig(
        sources=(source,),
        vocabulary=vocabulary or "bytes",
        sequence_length=sequence_length,
        interleaved=manifest.interleaved["settings"] if manifest.interleaved else None,
    )


command.add_command(patches)
command.add_command(encode)
command.add_command(score)
