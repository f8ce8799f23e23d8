"""`weft generate`: samples from a run."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import click

from ..models.errors import DataError
from .options import overrides_argument, run_argument, run_folder

if TYPE_CHECKING:
    from ..trainer.generation import Completion

__all__ = ["command"]

EXAMPLES = """\b
Examples:
  weft generate runs/quickstart --prompt 'import os'
  weft generate runs/quickstart --prompt 'def ' --num-samples 3 --temperature 1 --seed 7
  weft generate runs/quickstart --prompt-file start.py --stop $'\\n\\n' --json
  echo 'class A' | weft generate runs/quickstart --prompt-file -
"""


@click.command(epilog=EXAMPLES)
@run_argument
@overrides_argument
@click.option(
    "--prompt", "prompts", multiple=True, metavar="TEXT", help="Text to continue; may be repeated."
)
@click.option(
    "--prompt-file",
    "prompt_files",
    multiple=True,
    metavar="FILE",
    help="A file whose whole text is one prompt (- is standard input); may be repeated.",
)
@click.option(
    "--max-new-tokens",
    type=click.IntRange(min=1),
    default=200,
    show_default=True,
    help="Most ids generated for a prompt.",
)
@click.option(
    "--temperature",
    type=click.FloatRange(min=0),
    default=0.8,
    show_default=True,
    help="0 takes the likeliest id each time.",
)
@click.option(
    "--top-p",
    type=click.FloatRange(0, 1, min_open=True),
    default=0.95,
    show_default=True,
    help="Keep the fewest likeliest ids whose probabilities add up to this.",
)
@click.option(
    "--top-k",
    type=click.IntRange(min=1),
    help="Keep this many of the likeliest ids; all by default.",
)
@click.option(
    "--stop", multiple=True, metavar="TEXT", help="End before this text; may be repeated."
)
@click.option(
    "--seed", type=int, default=0, show_default=True, help="Same seed and prompt, same sample."
)
@click.option(
    "--num-samples",
    type=click.IntRange(min=1),
    default=1,
    show_default=True,
    help="Samples of each prompt.",
)
@click.option(
    "--step", type=click.IntRange(min=0), help="Checkpoint to load; the newest by default."
)
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object a sample.")
def command(
    run: str,
    overrides: tuple[str, ...],
    prompts: tuple[str, ...],
    prompt_files: tuple[str, ...],
    max_new_tokens: int,
    temperature: float,
    top_p: float,
    top_k: int | None,
    stop: tuple[str, ...],
    seed: int,
    num_samples: int,
    step: int | None,
    as_json: bool,
) -> None:
    """Continue texts with the newest weights of RUN. Without a prompt, documents are made up from nothing."""
    folder = run_folder(run)
    texts = [*prompts, *map(_read_prompt, prompt_files)] or [""]
    texts = [text for text in texts for _ in range(num_samples)]
    from ..trainer.data.vocabulary import open_vocabulary
    from ..trainer.generation import generate
    from ..trainer.trained import open_trained

    with open_trained(folder, step, overrides) as trained:
        completions = generate(
            trained.engine.network_for_generation(next(iter(trained.engine.networks))),
            open_vocabulary(trained.config.data.vocabulary),
            texts,
            max_new_tokens=max_new_tokens,
            temperature=temperature,
            top_p=top_p,
            top_k=top_k,
            stop=stop,
            seed=seed,
        )
        is_main = trained.topology.is_main
    if is_main:
        _print_completions(texts, completions, as_json=as_json)


def _read_prompt(name: str) -> str:
    try:
        return sys.stdin.read() if name == "-" else Path(name).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"--prompt-file {name} cannot be read as text: {error}") from error


def _print_completions(texts: list[str], completions: list[Completion], *, as_json: bool) -> None:
    for number, (text, completion) in enumerate(zip(texts, completions, strict=True), 1):
        if as_json:
            fields = {
                "prompt": text,
                "text": completion.text,
                "finish_reason": completion.finish_reason,
                "token_ids": completion.token_ids,
            }
            click.echo(json.dumps(fields, ensure_ascii=False))
            continue
        if len(texts) > 1:
            click.secho(f"--- {number} of {len(texts)} ({completion.finish_reason})", dim=True)
        click.echo(f"{click.style(text, bold=True)}{completion.text}")
