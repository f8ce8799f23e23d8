"""What `weft generate` does with runs on text, images and speech: samples as text on the terminal, images as one PNG."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from ..models.errors import ConfigError, DataError

if TYPE_CHECKING:
    from ..trainer.interleaved_generation import InterleavedCompletion, InterleavedGenerator, Part
    from ..trainer.trained import TrainedRun

__all__ = ["Request", "make_samples"]


@dataclass(frozen=True)
class Request:
    """What is wanted, as it was typed.

    Args:
        texts: prompts; with pictures, what follows each of them.
        pictures: files that prompts begin with.
        make: `text`, `image`, `speech` or `any`.
        copies: samples of each prompt.
    """

    texts: Sequence[str]
    pictures: Sequence[Path]
    make: Any
    copies: int
    max_new_tokens: int
    temperature: float
    top_p: float
    top_k: int | None
    guidance: float
    image_steps: int
    eta: float
    seed: int


def make_samples(
    run: Path,
    step: int | None,
    overrides: Sequence[str],
    request: Request,
    out: Path | None,
    *,
    as_json: bool,
) -> None:
    """Make the samples and show them."""
    from ..trainer.interleaved_generation import ImageSampling, open_generator
    from ..trainer.sampling import Sampling
    from ..trainer.trained import open_trained

    with open_trained(run, step, overrides, for_generation=True) as trained:
        generator = open_generator(trained)
        prompts = _prompts(request, generator)
        made = generator(
            prompts,
            make=request.make,
            max_new_tokens=request.max_new_tokens,
            sampling=Sampling(request.temperature, request.top_p, request.top_k),
            images=ImageSampling(request.image_steps, request.guidance, request.eta),
            seed=request.seed,
        )
    if not trained.topology.is_main:
        return
    grid = _write_images(trained, made, out)
    if as_json:
        for prompt, one in zip(prompts, made, strict=True):
            click.echo(json.dumps(_as_json(prompt, one, grid), ensure_ascii=False))
    else:
        _print(prompts, made)
        if grid is not None:
            click.echo(f"images in {grid}", err=True)


def _prompts(request: Request, generator: InterleavedGenerator) -> list[list[Part]]:
    from ..trainer.data.interleaved.images import decode_image, fit_image

    texts: list[str] = list(request.texts)
    if not request.pictures:
        prompts: list[list[Part]] = [[text] if text else [] for text in texts or [""]]
    else:
        codec = generator.codec
        if codec is None:
            raise ConfigError(
                "this run's images came without a codec, so pictures cannot be read; set data.interleaved.image.codec"
            )
        prompts = []
        for path in request.pictures:
            try:
                raw = path.read_bytes()
            except OSError as error:
                raise DataError(f"--from-image {path} cannot be read: {error.strerror}") from error
            pixels = fit_image(decode_image(raw, str(path)), codec.size, codec.channels)
            prompts += [[pixels, text] if text else [pixels] for text in texts or [""]]
    return [prompt for prompt in prompts for _ in range(request.copies)]


def _write_images(
    trained: TrainedRun, made: Sequence[InterleavedCompletion], out: Path | None
) -> Path | None:
    import numpy as np

    from ..trainer.data.interleaved.images import write_image_grid

    images = [image for one in made for image in one.images]
    if not images:
        return None
    path = out or trained.run_dir / "samples" / f"step_{trained.step:08d}.png"
    try:
        write_image_grid(np.stack(images), path)
    except OSError as error:
        raise ConfigError(
            f"{path} cannot be written: {error.strerror}; give --out another path"
        ) from error
    return path


def _shown(parts: Sequence[Any], first_image: int) -> tuple[str, int]:
    """Pieces as one line of text, pictures numbered in the order of the grid."""
    words = []
    for part in parts:
        if isinstance(part, str):
            words.append(part)
        elif isinstance(part, list):
            words.append(f"<speech {len(part)}>")
        else:
            first_image += 1
            words.append(f"<image {first_image}>")
    return "".join(words), first_image


def _print(prompts: Sequence[Sequence[Part]], made: Sequence[InterleavedCompletion]) -> None:
    image = 0
    for number, (prompt, one) in enumerate(zip(prompts, made, strict=True), 1):
        if len(prompts) > 1:
            click.secho(f"--- {number} of {len(prompts)} ({one.finish_reason})", dim=True)
        given = "".join(part if isinstance(part, str) else "<picture>" for part in prompt)
        shown, image = _shown(one.parts, image)
        click.echo(f"{click.style(given, bold=True)}{shown}")


def _as_json(
    prompt: Sequence[Part], one: InterleavedCompletion, grid: Path | None
) -> dict[str, Any]:
    given = [part if isinstance(part, str) else "<picture>" for part in prompt]
    parts: list[Any] = []
    for part in one.parts:
        if isinstance(part, str):
            parts.append({"text": part})
        elif isinstance(part, list):
            parts.append({"speech_codes": part})
        else:
            parts.append({"image": list(part.shape)})
    fields = {"prompt": given, "parts": parts, "finish_reason": one.finish_reason}
    return fields if grid is None else {**fields, "images": str(grid)}
