"""`weft convert`: Hugging Face folders and DeepSpeed checkpoints to runs, and runs to those."""

from __future__ import annotations

import re
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import click

from ..models.errors import ConfigError
from .options import load_recipe_or_run, load_run, overrides_argument, run_argument, run_folder

__all__ = ["command"]

UNITS = {
    "": 1,
    "KB": 10**3,
    "MB": 10**6,
    "GB": 10**9,
    "TB": 10**12,
    "KIB": 2**10,
    "MIB": 2**20,
    "GIB": 2**30,
}


@click.group(epilog="Example: weft convert import ./OLMo-2-1124-7B runs/olmo2-7b")
def command() -> None:
    """To and from Hugging Face (Olmo2, Llama, Blt; safetensors only) and DeepSpeed checkpoints."""


@command.command(
    "import",
    epilog="Example: weft convert import ./OLMo-2-1124-7B runs/olmo2-7b data.sequence_length=2048",
)
@click.argument("folder", metavar="HF_DIR", type=click.Path(path_type=Path))
@click.argument("run", metavar="RUN", type=click.Path(path_type=Path))
@overrides_argument
@click.option(
    "--tokenizer",
    type=click.Path(path_type=Path),
    help="Folder with tokenizer.json, if not HF_DIR.",
)
@click.option("--overwrite", is_flag=True, help="Replace an earlier import.")
def import_(
    folder: Path, run: Path, overrides: tuple[str, ...], tokenizer: Path | None, overwrite: bool
) -> None:
    """Make the run folder RUN of HF_DIR: a complete config.yaml and the weights as step 0.

    Tensors may have Hugging Face's or OLMo-core's names. KEY=VALUE goes over the run's configuration.
    """
    from ..trainer.convert import import_folder

    with _progress("reading") as progress:
        made = import_folder(
            folder, run, overrides, tokenizer=tokenizer, overwrite=overwrite, progress=progress
        )
    data = made.config.data
    click.echo(f"{run}: {made.parameters:,} parameters in checkpoints/step_00000000")
    click.echo(f"vocabulary {data.vocabulary}, samples of {data.sequence_length} positions")
    click.echo(f"next: weft eval {run}")
    click.echo(f"      weft generate {run} --prompt TEXT")
    click.echo(f"      weft train {run}/config.yaml checkpoint.start_from={run} run.dir=NEW_RUN")


@command.command(
    "export",
    epilog="Example: weft convert export runs/olmo2-7b ./olmo2-7b-hf --dtype bf16 --max-shard-size 2GB",
)
@run_argument
@click.argument("folder", metavar="HF_DIR", type=click.Path(path_type=Path))
@click.option(
    "--step", type=click.IntRange(min=0), help="Checkpoint to export; the newest if left out."
)
@click.option(
    "--dtype", type=click.Choice(["fp32", "bf16", "fp16"]), default="fp32", show_default=True
)
@click.option("--max-shard-size", default="5GB", show_default=True, help="Most bytes of one file.")
@click.option(
    "--max-positions",
    type=click.IntRange(min=1),
    help="max_position_embeddings; data.sequence_length if left out.",
)
@click.option(
    "--tokenizer",
    type=click.Path(path_type=Path),
    help="Folder with tokenizer.json, if not the run's.",
)
@click.option("--overwrite", is_flag=True, help="Replace an earlier export.")
def export(
    run: str,
    folder: Path,
    step: int | None,
    dtype: str,
    max_shard_size: str,
    max_positions: int | None,
    tokenizer: Path | None,
    overwrite: bool,
) -> None:
    """Write a checkpoint of RUN to HF_DIR as transformers reads it: safetensors, config.json, tokenizer."""
    largest = parse_size(max_shard_size)
    config = load_run(run).config
    from ..trainer.convert import export_run

    with _progress("writing") as progress:
        made = export_run(
            config,
            run_folder(run),
            folder,
            step=step,
            dtype=dtype,
            max_shard_bytes=largest,
            max_positions=max_positions,
            tokenizer=tokenizer,
            overwrite=overwrite,
            progress=progress,
        )
    folders = sorted({str(Path(file).parent) for file in made.files})
    files = made.files[0] if len(made.files) == 1 else f"{len(made.files)} files and an index"
    if len(folders) > 1:
        files = f"a folder each for {' and '.join(folders)}"
    click.echo(
        f"{folder}: {made.parameters:,} parameters of {made.checkpoint} as {dtype}, in {files}"
    )
    for part in folders:
        click.echo(f'next: AutoModelForCausalLM.from_pretrained("{folder / part}")')


@command.command(
    "import-deepspeed",
    epilog="Example: weft convert import-deepspeed ./checkpoints runs/mine --model olmo2/1b data.sequence_length=2048",
)
@click.argument("folder", metavar="DEEPSPEED_DIR", type=click.Path(path_type=Path))
@click.argument("run", metavar="RUN", type=click.Path(path_type=Path))
@overrides_argument
@click.option(
    "--model",
    required=True,
    metavar="RECIPE|RUN|HF_DIR",
    help="What it was saved with: a recipe, a run folder, or a folder with config.json.",
)
@click.option("--tag", help="Which checkpoint; the one that `latest` names if left out.")
@click.option("--prefix", default="", help="What all parameters' names begin with there.")
@click.option("--weights-only", is_flag=True, help="Leave the optimizer's moments.")
@click.option("--overwrite", is_flag=True, help="Replace an earlier import.")
def import_deepspeed_(
    folder: Path,
    run: Path,
    overrides: tuple[str, ...],
    model: str,
    tag: str | None,
    prefix: str,
    weights_only: bool,
    overwrite: bool,
) -> None:
    """Make the run folder RUN of a DeepSpeed checkpoint, with its moments.

    DEEPSPEED_DIR is what save_checkpoint wrote under ZeRO 1, 2 or 3, or what ds_to_universal made of it.
    Weights and moments become the checkpoint of step 0. KEY=VALUE goes over the run's configuration.
    """
    tokenizer = None
    if (Path(model) / "config.json").is_file():
        from ..trainer.convert import config_of_folder

        config, tokenizer = config_of_folder(Path(model), run, overrides)
    else:
        config = load_recipe_or_run(model, overrides).config
    from ..trainer.convert_deepspeed import import_deepspeed

    with _progress("reading") as progress:
        made = import_deepspeed(
            folder,
            run,
            config,
            tag=tag,
            prefix=prefix,
            weights_only=weights_only,
            tokenizer=tokenizer,
            overwrite=overwrite,
            progress=progress,
        )
    moments = "no moments" if made.updates is None else f"moments after {made.updates} updates"
    click.echo(
        f"{run}: {made.parameters:,} parameters and {moments} in checkpoints/step_00000000, from {made.layout}"
    )
    parts = "" if made.updates is None else " checkpoint.start_from_parts=weights_and_optimizer"
    click.echo(f"next: weft eval {run}")
    click.echo(
        f"      weft train {run}/config.yaml checkpoint.start_from={run}{parts} run.dir=NEW_RUN"
    )


@command.command(
    "export-deepspeed",
    epilog="Example: weft convert export-deepspeed runs/mine ./universal --names hf",
)
@run_argument
@click.argument("folder", metavar="DEEPSPEED_DIR", type=click.Path(path_type=Path))
@click.option(
    "--step", type=click.IntRange(min=0), help="Checkpoint to export; the newest if left out."
)
@click.option(
    "--names",
    type=click.Choice(["weft", "hf"]),
    default="weft",
    show_default=True,
    help="Whose parameter names: this model's, or Olmo2ForCausalLM's and LlamaForCausalLM's.",
)
@click.option(
    "--step-counter",
    type=click.Choice(["tensor", "int"]),
    default="tensor",
    show_default=True,
    help="tensor for torch's AdamW; int for DeepSpeed's FusedAdam and DeepSpeedCPUAdam.",
)
@click.option("--overwrite", is_flag=True, help="Replace an earlier export.")
def export_deepspeed_(
    run: str, folder: Path, step: int | None, names: str, step_counter: str, overwrite: bool
) -> None:
    """Write a checkpoint of RUN as DeepSpeed's universal layout.

    It holds weights and moments, for load_universal of any ZeRO stage and number of ranks.
    """
    config = load_run(run).config
    from ..trainer.deepspeed_universal import export_deepspeed

    with _progress("writing") as progress:
        made = export_deepspeed(
            config,
            run_folder(run),
            folder,
            step=step,
            names=names,
            step_counter=step_counter,
            overwrite=overwrite,
            progress=progress,
        )
    moments = "moments of zero" if made.updates is None else f"moments after {made.updates} updates"
    click.echo(
        f"{folder}/{made.tag}: {made.parameters:,} parameters of {made.checkpoint} and {moments}"
    )
    click.echo('next: in the JSON "checkpoint": {"load_universal": true}, then')
    click.echo(f'      engine.load_checkpoint("{folder}")')


@contextmanager
def _progress(what: str) -> Iterator[Callable[[int], object]]:
    """A counter of bytes and their speed on a terminal, nothing elsewhere."""
    from rich.console import Console
    from rich.progress import FileSizeColumn, Progress, TextColumn, TransferSpeedColumn

    columns = (TextColumn("{task.description}"), FileSizeColumn(), TransferSpeedColumn())
    console = Console(stderr=True)
    with Progress(
        *columns, console=console, transient=True, disable=not sys.stderr.isatty()
    ) as bar:
        task = bar.add_task(what, total=None)
        yield lambda count: bar.advance(task, count)


def parse_size(text: str) -> int:
    """Bytes of `5GB`, `500 MB`, `2GiB` or a plain number.

    Raises:
        ConfigError: something else.
    """
    found = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([a-zA-Z]*)\s*", text)
    unit = UNITS.get(found.group(2).upper()) if found else None
    if found is None or unit is None or float(found.group(1)) * unit < 1:
        raise ConfigError(
            f"--max-shard-size {text!r} is not a size; write 5GB, 500MB or a number of bytes"
        )
    return int(float(found.group(1)) * unit)
