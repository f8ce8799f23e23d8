"""Options of `weft data` that are of images with classes: data.images on the command line."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import click

from ..models.errors import ConfigError

if TYPE_CHECKING:
    from ..trainer.data.images.config import ImagesConfig

__all__ = ["image_options", "images_from", "numbers_of"]

OPTIONS = (
    click.option("--image-key", default="image", help="Column of the image in Parquet."),
    click.option("--label-key", default="label", help="Column of the class in Parquet."),
    click.option("--caption-key", default="caption", help="Column of the caption in Parquet."),
    click.option(
        "--max-bad-share",
        type=click.FloatRange(0, 1),
        default=0.001,
        show_default=True,
        help="Refuse more unreadable images than this.",
    ),
)


def image_options(command: Callable[..., Any]) -> Callable[..., Any]:
    """Add the options."""
    for option in reversed(OPTIONS):
        command = option(command)
    return command


def images_from(given: dict[str, Any]) -> ImagesConfig:
    """The settings that the options name; they are taken out of `given`."""
    from ..trainer.data.images.config import ImagesConfig

    names = ("image_key", "label_key", "caption_key", "max_bad_share")
    return ImagesConfig(**{name: given.pop(name) for name in names})


def numbers_of(text: str, option: str) -> tuple[float, ...]:
    """Numbers with commas between them.

    Raises:
        ConfigError: something else.
    """
    try:
        return tuple(float(part) for part in text.split(","))
    except ValueError as error:
        raise ConfigError(
            f"{option} {text} is no list of numbers with commas, such as 8,16,32"
        ) from error
