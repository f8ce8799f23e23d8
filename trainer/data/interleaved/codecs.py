"""Images to what a model is trained on, and back: one small interface, several codecs.

Dimensions: N images of H x W pixels with C channels; latents (N, C, h, w); codes (N, h * w) in raster order.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from ....models.errors import ConfigError, DataError
from .config import ImageConfig

__all__ = ["GrayCodes", "ImageCodec", "PixelCodec", "open_codec"]


class ImageCodec(Protocol):
    """Encodes pictures of one size.

    Attributes:
        kind: `latents` or `codes`.
        size: pixels a side.
        channels: of the pictures, 1 or 3.
        shape: of what an image becomes: (C, h, w) latents, or (h, w) codes.
    """

    kind: str
    size: int
    channels: int
    shape: tuple[int, ...]

    @property
    def identity(self) -> dict[str, Any]:
        """JSON-able; equal exactly where the same picture becomes the same."""

    def encode(self, pixels: NDArray[np.uint8]) -> NDArray[Any]:
        """(N, size, size, channels) pictures to (N, C, h, w) float32 latents or (N, h * w) int64 codes."""

    def decode(self, values: NDArray[Any]) -> NDArray[np.uint8]:
        """Back to (N, size, size, channels) pictures; of latents as `encode` gives them, not as they are scaled for a model."""


class PixelCodec:
    """Latents that are the pixels, from -1 to 1: for tests and small runs, and for diffusion on pixels."""

    kind = "latents"

    def __init__(self, size: int, channels: int) -> None:
        self.size, self.channels = size, channels
        self.shape: tuple[int, ...] = (channels, size, size)

    @property
    def identity(self) -> dict[str, Any]:
        return {"codec": "pixels", "size": self.size, "channels": self.channels}

    def encode(self, pixels: NDArray[np.uint8]) -> NDArray[Any]:
        return (pixels.astype(np.float32) / 127.5 - 1).transpose(0, 3, 1, 2)

    def decode(self, values: NDArray[Any]) -> NDArray[np.uint8]:
        return _to_bytes(np.asarray(values, np.float32)).transpose(0, 2, 3, 1)


class GrayCodes:
    """Codes that are the pixels' brightness in equal steps: the discrete setting without a trained codec."""

    kind, channels = "codes", 1

    def __init__(self, size: int, codes: int) -> None:
        self.size, self._codes = size, codes
        self.shape: tuple[int, ...] = (size, size)

    @property
    def identity(self) -> dict[str, Any]:
        return {"codec": "gray-codes", "size": self.size, "codes": self._codes}

    def encode(self, pixels: NDArray[np.uint8]) -> NDArray[Any]:
        levels = np.rint(pixels.astype(np.float64) * (self._codes - 1) / 255)
        return levels.astype(np.int64).reshape(len(pixels), -1)

    def decode(self, values: NDArray[Any]) -> NDArray[np.uint8]:
        levels = np.clip(values, 0, self._codes - 1) * (255 / (self._codes - 1))
        return np.rint(levels).astype(np.uint8).reshape(-1, self.size, self.size, 1)


def _to_bytes(values: NDArray[np.float32]) -> NDArray[np.uint8]:
    return np.rint((values.clip(-1, 1) + 1) * 127.5).astype(np.uint8)


def open_codec(config: ImageConfig) -> ImageCodec | None:
    """The codec that a configuration names; None where the data bring latents or codes.

    Raises:
        ConfigError: it needs a size, or has another number of codes.
        DataError: a folder that holds no such codec.
        LaunchError: the diffusers package is missing.
    """
    if config.codec is None:
        return None
    name, _, folder = config.codec.partition(":")
    if name in ("vae", "vq"):
        from .diffusers_codecs import open_vae, open_vq

        where = Path(folder).expanduser()
        if not (where / "config.json").is_file():
            raise DataError(
                f"data.interleaved.image.codec: {where} has no config.json; name a local folder that diffusers saved "
                "(download the model there first)"
            )
        return open_vae(where, config) if name == "vae" else open_vq(where, config)
    if name == "tokenizer":
        return _open_tokenizer(folder, config)
    if config.size is None:
        raise ConfigError(
            f"data.interleaved.image.size: codec {name} has no size of its own; set it, such as "
            "data.interleaved.image.size=32 (--image-size 32)"
        )
    if name == "pixels":
        return PixelCodec(config.size, config.channels)
    return GrayCodes(config.size, config.codes)


def _open_tokenizer(folder: str, config: ImageConfig) -> ImageCodec:
    """A run's own tokenizer, at its coarsest ratio."""
    from ...tokenizer import TokenizerCodec, open_tokenizer

    codec = TokenizerCodec(tokenizer := open_tokenizer(Path(folder).expanduser()))
    if codec.kind != config.kind:
        raise ConfigError(
            f"data.interleaved.image.kind: {config.kind}, but the tokenizer {folder} makes {codec.kind}; set it to {codec.kind}"
        )
    if tokenizer.codes is not None and tokenizer.codes != config.codes:
        raise ConfigError(
            f"data.interleaved.image.codes: {config.codes}, but the codebook of {folder} has {tokenizer.codes}; set it to {tokenizer.codes}"
        )
    if config.size not in (None, codec.size):
        raise ConfigError(
            f"data.interleaved.image.size: {config.size}, but the tokenizer {folder} takes pictures of {codec.size}; leave it null"
        )
    return codec
