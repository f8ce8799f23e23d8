"""Options of `weft data prepare` that say what images and speech become: data.interleaved on the command line."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import click

from ..models.errors import ConfigError

if TYPE_CHECKING:
    from ..trainer.data.interleaved.config import InterleavedConfig

__all__ = ["interleaved_from", "interleaved_options"]

OPTIONS = (
    click.option("--modalities", help="What documents may hold, text first: text,image,speech."),
    click.option(
        "--codec",
        help="Of images: pixels, gray-codes, vae:FOLDER, vq:FOLDER, or none where the data bring latents or codes.",
    ),
    click.option(
        "--image-kind",
        type=click.Choice(["latents", "codes"]),
        help="With --codec none: which of them.",
    ),
    click.option("--image-size", type=click.IntRange(min=1), help="Pixels a side."),
    click.option(
        "--image-channels", type=click.Choice(["1", "3"]), help="Of --codec pixels: 1 is greyscale."
    ),
    click.option(
        "--image-codes", type=click.IntRange(min=2), help="How many image codes there are."
    ),
    click.option(
        "--image-patch-size",
        type=click.IntRange(min=1),
        help="A position is a square of so many latents a side.",
    ),
    click.option(
        "--latent-dtype", type=click.Choice(["float16", "float32"]), help="How latents are stored."
    ),
    click.option(
        "--speech-codes", type=click.IntRange(min=2), help="How many speech codes there are."
    ),
)
CODEC_KINDS = {"gray-codes": "codes", "vq": "codes"}


def interleaved_options(command: Callable[..., Any]) -> Callable[..., Any]:
    """Add the options, all None where they are not given."""
    for option in reversed(OPTIONS):
        command = option(command)
    return command


def interleaved_from(given: dict[str, Any], *, needed: bool) -> InterleavedConfig | None:
    """The settings that the options name; they are taken out of `given`.

    Args:
        needed: the source holds documents of several modalities; otherwise no option may be given.

    Raises:
        ConfigError: an option without need, or settings that do not go together.
    """
    from pydantic import ValidationError

    from ..trainer.data.interleaved.config import InterleavedConfig

    names = [option_name(option) for option in OPTIONS]
    values = {name: given.pop(name) for name in names}
    asked = [name for name, value in values.items() if value is not None]
    if not needed:
        if asked:
            raise ConfigError(
                f"--{asked[0].replace('_', '-')} is of documents with images or speech; name the format with --format interleaved "
                "or webdataset"
            )
        return None
    codec = values["codec"]
    image: dict[str, Any] = {
        "kind": values["image_kind"] or CODEC_KINDS.get(str(codec).partition(":")[0]),
        "size": values["image_size"],
        "channels": int(values["image_channels"]) if values["image_channels"] else None,
        "codes": values["image_codes"],
        "patch_size": values["image_patch_size"],
        "dtype": values["latent_dtype"],
    }
    image = {key: value for key, value in image.items() if value is not None}
    if codec is not None:
        image["codec"] = None if codec == "none" else codec
    settings: dict[str, Any] = {"image": image}
    if values["modalities"]:
        settings["modalities"] = values["modalities"].split(",")
    if values["speech_codes"]:
        settings["speech"] = {"codes": values["speech_codes"]}
        settings.setdefault("modalities", ["text", "image", "speech"])
    try:
        return InterleavedConfig.model_validate(settings)
    except ValidationError as error:
        first = error.errors()[0]
        key = ".".join(str(part) for part in first["loc"])
        raise ConfigError(f"{key}: {first['msg'].removeprefix('Value error, ')}") from error


def option_name(option: Callable[..., Any]) -> str:
    """The parameter that an option fills."""

    @option
    def probe() -> None: ...

    return str(probe.__click_params__[0].name)  # type: ignore[attr-defined]
