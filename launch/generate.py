"""`weft generate`: samples from a run."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from ..models.errors import ConfigError, DataError
from .options import overrides_argument, run_argument, run_folder

if TYPE_CHECKING:
    from ..trainer.data.vocabulary import Vocabulary
    from ..trainer.generated_text import TextStream
    from ..trainer.generation import Completion, GenerationState

__all__ = ["command"]

EXAMPLES = """\b
Examples:
  weft generate runs/quickstart --prompt 'import os'
  weft generate runs/quickstart --prompt 'def ' --num-samples 3 --temperature 1 --seed 7
  weft generate runs/quickstart --prompt-file start.py --stop $'\\n\\n' --json
  echo 'class A' | weft generate runs/quickstart --prompt-file -
  weft generate runs/blt --prompt 'import os' --show-patches
  weft generate runs/digits --prompt three --prompt seven --image --guidance 1.5
  weft generate runs/digits --from-image three.png
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
@click.option(
    "--show-patches", is_flag=True, help="Mark the patches of prompt and text with | (BLT)."
)
@click.option(
    "--stream/--no-stream",
    default=None,
    help="Print one sample while it is made; by default on a terminal.",
)
@click.option("--image", is_flag=True, help="Make an image after each prompt.")
@click.option("--speech", is_flag=True, help="Make speech codes after each prompt.")
@click.option(
    "--interleaved",
    is_flag=True,
    help="Let the model open images and speech by itself; the default without a picture.",
)
@click.option(
    "--from-image",
    "from_images",
    multiple=True,
    metavar="FILE",
    help="Begin with this picture and write what follows; may be repeated.",
)
@click.option(
    "--guidance",
    type=click.FloatRange(min=0),
    default=1.0,
    show_default=True,
    help="Classifier-free guidance of images; 1 is none.",
)
@click.option(
    "--image-steps",
    type=click.IntRange(min=1),
    default=50,
    show_default=True,
    help="Noise levels a continuous image passes.",
)
@click.option(
    "--eta",
    type=click.FloatRange(min=0),
    default=0.0,
    show_default=True,
    help="Noise on the way: 0 is DDIM, 1 DDPM.",
)
@click.option(
    "--out",
    type=click.Path(path_type=Path),
    metavar="PNG",
    help="Where the grid of images goes; RUN/samples/step_N.png by default.",
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
    show_patches: bool,
    stream: bool | None,
    image: bool,
    speech: bool,
    interleaved: bool,
    from_images: tuple[str, ...],
    guidance: float,
    image_steps: int,
    eta: float,
    out: Path | None,
    as_json: bool,
) -> None:
    """Continue texts with the newest weights of RUN. Without a prompt, documents are made up from nothing.

    Runs on interleaved data also make images and speech, and read pictures.
    """
    folder = run_folder(run)
    is_interleaved = _is_interleaved(folder, overrides)
    if is_interleaved or image or speech or interleaved or from_images:
        from .generate_interleaved import Request, make_samples

        if not is_interleaved:
            raise ConfigError(
                f"{folder} was trained on plain text; --image, --speech, --interleaved and --from-image need data.interleaved"
            )

        prompts_of_text = [*prompts, *map(_read_prompt, prompt_files)]
        if image or speech:
            # Codes are drawn from all there are: cutting the tail of an image's codes makes it flat.
            temperature = 1.0 if _is_default("temperature") else temperature
            top_p = 1.0 if _is_default("top_p") else top_p
        request = Request(
            texts=prompts_of_text,
            pictures=[Path(name) for name in from_images],
            make=_one_of(image=image, speech=speech, any=interleaved)
            or ("text" if from_images else "any"),
            copies=num_samples,
            max_new_tokens=max_new_tokens,
            temperature=temperature,
            top_p=top_p,
            top_k=top_k,
            guidance=guidance,
            image_steps=image_steps,
            eta=eta,
            seed=seed,
        )
        make_samples(folder, step, overrides, request, out, as_json=as_json)
        return
    texts = [*prompts, *map(_read_prompt, prompt_files)] or [""]
    texts = [text for text in texts for _ in range(num_samples)]
    streams = _streams(stream, len(texts), as_json)
    from ..trainer.data.vocabulary import open_vocabulary
    from ..trainer.generated_text import TextStream
    from ..trainer.generation import generate
    from ..trainer.trained import open_trained

    with open_trained(folder, step, overrides, for_generation=True) as trained:
        vocabulary = open_vocabulary(trained.config.data.vocabulary)
        is_main = trained.topology.is_main
        writer = None
        if streams and is_main:
            writer = TextStream(_write, vocabulary, stop, with_borders=show_patches)
        completions = generate(
            trained.network_for_generation(),
            vocabulary,
            texts,
            max_new_tokens=max_new_tokens,
            temperature=temperature,
            top_p=top_p,
            top_k=top_k,
            stop=stop,
            seed=seed,
            on_token=_watcher(writer, texts[0], show_patches=show_patches),
        )
    if not is_main:
        return
    if writer is not None:
        writer.finish(completions[0])
        click.echo()
    elif as_json:
        _print_json(texts, completions, vocabulary, show_patches=show_patches)
    else:
        _print_completions(texts, completions, vocabulary, show_patches=show_patches)
    if not as_json:
        _print_latent_steps(completions)


def _one_of(**chosen: bool) -> str:
    """The name of the one flag that is set, or nothing."""
    names = [name for name, is_set in chosen.items() if is_set]
    if len(names) > 1:
        raise click.UsageError("--image, --speech and --interleaved exclude each other; give one")
    return names[0] if names else ""


def _is_default(option: str) -> bool:
    """Whether an option was not typed."""
    source = click.get_current_context().get_parameter_source(option)
    return source is click.core.ParameterSource.DEFAULT


def _is_interleaved(folder: Path, overrides: tuple[str, ...]) -> bool:
    from ..trainer.configuration.load import load_run_config

    config = load_run_config(folder, ["parallel={}", *overrides]).config
    return config.data.interleaved is not None


def _streams(wanted: bool | None, samples: int, as_json: bool) -> bool:
    can = samples == 1 and not as_json
    if wanted and not can:
        raise click.UsageError(
            "--stream prints one sample as text; leave out --json, or give one prompt and one sample"
        )
    return can and (sys.stdout.isatty() if wanted is None else wanted)


def _write(text: str) -> None:
    click.echo(text, nl=False)
    sys.stdout.flush()


def _watcher(
    writer: TextStream | None, prompt: str, *, show_patches: bool
) -> Callable[[GenerationState], None]:
    """What looks at each step: refuses to show patches where there are none, and writes."""

    def watch(state: GenerationState) -> None:
        if state.step == 0 and show_patches and state.cache.patch_starts(0) is None:
            raise ConfigError("--show-patches: this model has no patches; leave it out")
        if writer is not None:
            if state.step == 0 and not show_patches:
                _write(click.style(prompt, bold=True))
            writer(state)

    return watch


def _read_prompt(name: str) -> str:
    try:
        return sys.stdin.read() if name == "-" else Path(name).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"--prompt-file {name} cannot be read as text: {error}") from error


def _print_json(
    texts: list[str], completions: list[Completion], vocabulary: Vocabulary, *, show_patches: bool
) -> None:
    from ..trainer.generated_text import completion_with_borders

    for text, completion in zip(texts, completions, strict=True):
        fields: dict[str, Any] = {
            "prompt": text,
            "text": completion.text,
            "finish_reason": completion.finish_reason,
            "token_ids": completion.token_ids,
        }
        if completion.latent_steps is not None:
            fields["latent_steps"] = completion.latent_steps
            fields["latent_steps_per_byte"] = completion.latent_steps / max(1, len(completion.token_ids))  # fmt: skip
        if show_patches:
            fields["patches"] = completion_with_borders(completion, vocabulary)
            fields["patch_starts"] = completion.patch_starts
        click.echo(json.dumps(fields, ensure_ascii=False))


def _print_completions(
    texts: list[str], completions: list[Completion], vocabulary: Vocabulary, *, show_patches: bool
) -> None:
    from ..trainer.generated_text import completion_with_borders

    for number, (text, completion) in enumerate(zip(texts, completions, strict=True), 1):
        if len(texts) > 1:
            click.secho(f"--- {number} of {len(texts)} ({completion.finish_reason})", dim=True)
        if show_patches:
            click.echo(completion_with_borders(completion, vocabulary))
        else:
            click.echo(f"{click.style(text, bold=True)}{completion.text}")


def _print_latent_steps(completions: list[Completion]) -> None:
    """One line on standard error, so that standard output is the text alone."""
    known = [(one.latent_steps, len(one.token_ids)) for one in completions if one.latent_steps is not None]  # fmt: skip
    if not known:
        return
    steps, count = (sum(column) for column in zip(*known, strict=True))
    click.secho(
        f"{steps:,} latent steps for {count:,} bytes: {steps / max(1, count):.3f} a byte",
        dim=True,
        err=True,
    )
